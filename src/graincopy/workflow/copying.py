"""Stages 6 to 8 for one disk: change map → audit → copy the dirty grains → new grain map."""

from __future__ import annotations

import msgspec

from graincopy.core.errors import ObjectDamaged, ObjectMissing, SourceChanged
from graincopy.core.extent import Extents
from graincopy.core.placement import Placement
from graincopy.core.units import ceil_div
from graincopy.model.change_map import Changed, ChangeMap, DirtyGrains, dirty_file, to_grains, whole_file
from graincopy.model.lineage import Compare, First, Incremental, Lineage
from graincopy.model.restore_point import AuditResult, DiskRecord, MapRoot
from graincopy.model.snapshot import Target
from graincopy.repository.entries import CHUNK, ZERO, Entries
from graincopy.repository.store import Session
from graincopy.transfer.pipeline import Copied, copy_grains, differ
from graincopy.transfer.progress import Meter, ProgressSink
from graincopy.volumes.base import FileImage, VolumeDriver
from graincopy.workflow.audit import audit_clean, distrust
from graincopy.workflow.context import Context
from graincopy.workflow.survey import Place


class Work(msgspec.Struct, frozen=True):
    """What has to be done for one disk, and what it is done against."""

    grains: DirtyGrains
    base: DiskRecord | None
    change_map: str
    trusted: bool  # the grains that are not in ``grains`` are taken as clean without looking

    @property
    def base_root(self) -> MapRoot:
        """The map that the new one starts from."""
        return self.base.root if self.base else MapRoot()


class DiskCopy(msgspec.Struct, frozen=True):
    """One disk, copied: its record, and what a person should hear about it."""

    record: DiskRecord
    warnings: tuple[str, ...]
    missing: tuple[tuple[int, int], ...]


class ChangeMaps:
    """What the drivers say changed, asked once for each pair of targets: a thousand files may lie on one volume.

    Targets never change, so neither does the answer.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], ChangeMap] = {}

    def between(self, driver: VolumeDriver, base: Target, now: Target) -> ChangeMap:
        """``driver.changed(base, now)``."""
        key = (driver.name, base.id, now.id)
        if key not in self._known:
            self._known[key] = driver.changed(base, now)
        return self._known[key]


def copy_disk(
    context: Context,
    session: Session,
    place: Place,
    target: Target,
    lineage: Lineage,
    *,
    audit: str,
    audit_every: int = 1,
    allow_partial: bool,
    progress: ProgressSink,
    change_maps: ChangeMaps | None = None,
) -> DiskCopy:
    """Copy what is dirty of the disk at ``place`` from ``target``; an empty ``audit``: it is not this disk's turn.

    It has one in ``audit_every`` runs. Raises ReadIncomplete, SourceWritten, TargetLost.
    """
    driver = context.driver(place.claim)
    warnings: tuple[str, ...] = ()
    if session.lost and not isinstance(lineage, First) and not _is_whole(context, session, lineage.disk_record):
        lineage = First("the repository has lost parts of the base")
    with driver.open(target, place.claim) as image:
        now = image.placement()
        work = plan_work(context, driver, place, target, lineage, now, change_maps or ChangeMaps())
        audited = _not_audited(work)
        if work.trusted and work.base is not None and audit:
            audited = audit_clean(context, image, place.file.path, now, work.grains, work.base, audit, audit_every)
        if audited.mismatches:
            warnings = (distrust(place.file.name, audited.mismatches, audited.grains),)
            work = compare_all(context, now, work.base, "compared: the audit found grains wrongly called unchanged")
        copied = _copy(context, session, place, image, work, allow_partial, progress)
        if copied.unreadable:
            warnings += (f"{place.file.name}: {copied.unreadable.total} bytes could not be read and are zeros here",)
        image.verify()
        changes = changed_entries(context, work, copied.entries)
        root = session.update_map(work.base_root, ceil_div(image.size, context.repository.grain_size), changes)
        record = _record(context, place, target, image, now, work, audited, copied, changes, root)
    return DiskCopy(record, warnings, tuple(copied.unreadable))


def _not_audited(work: Work) -> AuditResult:
    """Nothing was looked at; a disk that is not read as a whole either waits for its turn."""
    before = work.base.audit if work.base else AuditResult()
    return AuditResult(cursor=before.cursor, waited=before.waited + 1 if work.trusted else 0)


def _is_whole(context: Context, session: Session, base: DiskRecord) -> bool:
    """Whether all that ``base`` refers to is in packs that are there: what is not has to be stored anew."""
    grains = Extents.whole(ceil_div(base.size, context.repository.grain_size))
    try:
        for entries in context.repository.map.walk(base.root, grains):
            if not session.known(entries.ids[entries.kinds == CHUNK]).all():
                return False
    except (ObjectMissing, ObjectDamaged):
        return False
    return True


def plan_work(
    context: Context,
    driver: VolumeDriver,
    place: Place,
    target: Target,
    lineage: Lineage,
    now: Placement,
    change_maps: ChangeMaps,
) -> Work:
    """The central computation for one disk, or why everything is read."""
    if isinstance(lineage, First):
        return Work(to_grains(whole_file(now), now, context.repository.grain_size), None, lineage.reason, False)
    if isinstance(lineage, Compare):
        return compare_all(context, now, lineage.disk_record, f"compared: {lineage.reason}")
    return _incremental(context, driver, place, target, lineage, now, change_maps)


def _incremental(
    context: Context,
    driver: VolumeDriver,
    place: Place,
    target: Target,
    lineage: Incremental,
    now: Placement,
    change_maps: ChangeMaps,
) -> Work:
    base = lineage.disk_record
    volume = change_maps.between(driver, lineage.checkpoint, target)
    if not isinstance(volume, Changed):
        return compare_all(context, now, base, f"compared: {volume.reason}")
    try:
        placement = driver.placement_at(lineage.checkpoint, place.claim, now, volume.extents)
    except SourceChanged:
        return compare_all(context, now, base, "compared: the checkpoint does not hold this file")
    dirty = dirty_file(placement, now, volume.extents)
    grains = to_grains(dirty, now, context.repository.grain_size, base.size)
    return Work(grains, base, volume.source, True)


def compare_all(context: Context, now: Placement, base: DiskRecord | None, why: str) -> Work:
    """Read everything that is allocated; what has the base's id is found clean then."""
    return Work(to_grains(whole_file(now), now, context.repository.grain_size), base, why, False)


def _copy(
    context: Context,
    session: Session,
    place: Place,
    image: FileImage,
    work: Work,
    allow_partial: bool,
    progress: ProgressSink,
) -> Copied:
    grain_size = context.repository.grain_size
    return copy_grains(
        image,
        place.file.path,
        work.grains.read,
        context.repository,
        session,
        workers=context.limits.workers,
        meter=Meter(place.file.name, work.grains.read.total * grain_size, progress),
        allow_partial=allow_partial,
    )


def changed_entries(context: Context, work: Work, read: Entries) -> Entries:
    """What the new grain map says otherwise than the base's: the grains read that differ, and those now zero."""
    grain_map = context.repository.map
    differs = differ(grain_map.lookup(work.base_root, read.grains), read)
    emptied = Entries.join(list(grain_map.walk(work.base_root, work.grains.zero)))
    zeros = Entries.zeros(emptied.grains[emptied.kinds != ZERO])
    return Entries.join([read.pick(differs), zeros]).settled()


def _record(
    context: Context,
    place: Place,
    target: Target,
    image: FileImage,
    now: Placement,
    work: Work,
    audited: AuditResult,
    copied: Copied,
    changes: Entries,
    root: MapRoot,
) -> DiskRecord:
    grain_size = context.repository.grain_size
    dirty = work.grains.read | work.grains.zero if work.trusted else Extents.from_points(changes.grains)
    return DiskRecord(
        id=place.file.disk,
        name=place.file.name,
        path=place.file.path,
        size=image.size,
        root=root,
        representation=place.file.representation,
        format=place.file.format,
        metadata=place.file.metadata,
        volume=place.claim.volume,
        driver=place.claim.driver,
        incarnation=target.incarnation,
        inner_path=place.claim.inner_path,
        fs_offset=place.claim.fs_offset,
        change_map=work.change_map,
        checkpoint=None,
        audit=audited,
        allocated=now.allocated().total,
        dirty_bytes=dirty.to_bytes(grain_size).clip(0, image.size).total,
        read_bytes=copied.read_bytes,
        audit_bytes=audited.grains * grain_size,
        stored_bytes=copied.stored_bytes,
        tree_disk=place.file.tree_disk,
    )
