"""The backup, stage by stage: snapshot coarse, copy fine, never merge. Read this page and you know the method.

Crash points, in order (kill -9 at any of them leaves a state that the next command mends):
``opened``, the five of the instant, then ``copied`` once for each disk, ``indexed``, ``published``, ``promoted``,
``superseded``, ``cleaned``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from graincopy.core.errors import FreezeBroken, PointUnknown
from graincopy.core.ids import PointId
from graincopy.model.audit import AuditAmount, Turns, take_turns
from graincopy.model.lineage import First, Incremental, Lineage
from graincopy.model.plan import BackupPlan
from graincopy.model.planner import plan_backup
from graincopy.model.restore_point import DiskRecord, RestorePoint, RunRecord
from graincopy.model.snapshot import Role, Target, TargetTag
from graincopy.model.workload import Consistency, Workload
from graincopy.repository.store import Session
from graincopy.volumes.instant import Instant, Revision
from graincopy.workflow.checkpoints import delete_target, keep_checkpoints, may_checkpoint, tag_disks
from graincopy.workflow.context import Context
from graincopy.workflow.copying import ChangeMaps, DiskCopy, copy_disk
from graincopy.workflow.heart import Heart
from graincopy.workflow.survey import Place, Survey, refuse_busy, refuse_open_restores, survey
from graincopy.workflow.trees import as_targets_show, relist, with_learnt
from graincopy.workloads.base import Quiesced, WorkloadSource

SMALL = 1 << 20  # bytes; such a file of a directory is read whole sooner than a clone of it is kept


class BackupWish(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for."""

    audit: str | None = None  # None: as configured
    keep_checkpoint: bool = True
    allow_partial: bool = False


class BackupOutcome(msgspec.Struct, frozen=True):
    """A published restore point and what was left behind to make the next one cheap."""

    point: RestorePoint
    metadata_bytes: int  # what the repository grew by besides the chunks, the point itself included
    targets_left: tuple[Target, ...]
    warnings: tuple[str, ...] = ()


def plan(context: Context, workload: Workload) -> BackupPlan:
    """What :func:`backup` would do now. No effect."""
    found = survey(context, workload)
    workload = found.workload
    claims = [place.claim for place in found.places]
    volumes = {place.volume.id: place.volume for place in found.places}
    return plan_backup(
        workload,
        claims,
        volumes,
        [found.base_of(context, place) for place in found.places],
        {name: driver.capabilities() for name, driver in context.drivers.items()},
        context.forecast(claims, tuple(volumes.values())),
    )


def backup(context: Context, source: WorkloadSource, workload: Workload, wish: BackupWish) -> BackupOutcome:
    """Back up ``workload`` and publish one restore point. On any error nothing is published and no T stays.

    Raises WorkloadBusy while another run works on the same workload.
    """
    found, run = _open(context, workload)  # 2, 3: files and volumes
    started = context.clock.monotonic()
    instant: Instant | None = None
    try:
        context.step("opened")
        refuse_busy(context, run)
        refuse_open_restores(context, found.workload)  # again: one may have come, and died, before our run was open
        instant, quiesced, found = _snapshot(context, source, found, run)  # 4, 5: targets, freeze, one instant
        taken = context.clock.now()
        with as_targets_show(context, found, instant) as found, context.repository.session(run) as session:
            disks = _copy_disks(context, found, instant, session, run, wish)  # 6, 7, 8: only dirty grains of Ef
            session.finish()
            context.step("indexed")
            point = msgspec.structs.replace(
                _restore_point(context, found, run, instant, disks, wish, quiesced.warnings, source.held_ms(quiesced)),
                time=taken,
                consistency=quiesced.consistency,
                duration_s=round(context.clock.monotonic() - started, 3),
                metadata_bytes=session.metadata_bytes,
            )
            size = context.repository.publish(point)  # 9: the point is there, whole, or not at all
    except BaseException:
        _abandon(context, instant, run)
        raise
    context.step("published")
    left, warnings = keep_checkpoints(context, found, instant, point)
    context.step("cleaned")
    return BackupOutcome(point, point.metadata_bytes + size, left, point.warnings + warnings)


def _open(context: Context, workload: Workload) -> tuple[Survey, RunRecord]:
    """Survey, and pin the bases found; once more when one of them was expired in between."""
    found = survey(context, workload)
    try:
        return found, context.repository.open_run("backup", workload.id, pins=_bases(context, found))
    except PointUnknown:
        found = survey(context, workload)
        return found, context.repository.open_run("backup", workload.id, pins=_bases(context, found))


def _snapshot(
    context: Context, source: WorkloadSource, found: Survey, run: RunRecord
) -> tuple[Instant, Quiesced, Survey]:
    """All S→T at one instant, the workload quiesced around it where it can be; and what it was found to be then."""
    reached: list[Quiesced] = []
    surveyed = found

    @contextmanager
    def quiesce() -> Iterator[None]:
        quiesced = source.quiesce(surveyed.workload, context.limits.freeze_deadline_s)
        reached.append(quiesced)
        held = False
        try:
            yield
        finally:
            held = source.thaw(quiesced)
        if not held:
            raise FreezeBroken(reason=f"{surveyed.workload.name} went on before the snapshot was taken")

    def revise() -> Revision:
        nonlocal found
        found, revision = relist(context, surveyed)
        return revision

    claims = [place.claim for place in surveyed.places]
    instant = context.instant(claims, tag_of(context, surveyed, run), quiesce, revise)
    learnt = with_learnt(reached[0].workload, found.workload)
    return instant, reached[0], msgspec.structs.replace(found, workload=learnt)


def tag_of(context: Context, found: Survey, run: RunRecord) -> TargetTag:
    """The tag of every target that this run makes."""
    return TargetTag(
        run=run.id,
        role=Role.TARGET,
        owner=context.owner,
        repository=context.repository.id,
        disks=tag_disks(found.workload.id, (place.file for place in found.places)),
        created=context.clock.now(),
    )


def _copy_disks(
    context: Context, found: Survey, instant: Instant, session: Session, run: RunRecord, wish: BackupWish
) -> tuple[DiskCopy, ...]:
    heart = Heart(context.repository, run, context.clock, context.progress)
    change_maps = ChangeMaps()
    amount = wish.audit or context.limits.audit
    lineages = [found.base_of(context, place, target_of(instant, place).incarnation) for place in found.places]
    turns = audit_turns(found, lineages, amount)
    copies = []
    for place, lineage in zip(found.places, lineages, strict=True):
        copies.append(
            copy_disk(
                context,
                session,
                place,
                target_of(instant, place),
                lineage,
                audit=amount if not place.file.tree or place.file.disk in turns.disks else "",
                audit_every=turns.every if place.file.tree else 1,
                allow_partial=wish.allow_partial,
                progress=heart,
                change_maps=change_maps,
            )
        )
        context.step("copied")
    return tuple(copies)


def audit_turns(found: Survey, lineages: Sequence[Lineage], amount: str) -> Turns:
    """Which files of the workload's directories are audited now, of those that are not read as a whole anyway."""
    waited = {
        place.file.disk: lineage.disk_record.audit.waited
        for place, lineage in zip(found.places, lineages, strict=True)
        if place.file.tree and isinstance(lineage, Incremental)
    }
    return take_turns(waited, AuditAmount.parse(amount))


def target_of(instant: Instant, place: Place) -> Target:
    """The T of the volume that holds the file at ``place``."""
    return instant.targets[place.claim.driver, place.claim.volume]


def _restore_point(
    context: Context,
    found: Survey,
    run: RunRecord,
    instant: Instant,
    copies: Sequence[DiskCopy],
    wish: BackupWish,
    warnings: tuple[str, ...],
    held_ms: float | None,
) -> RestorePoint:
    missing = {copy.record.name: list(copy.missing) for copy in copies if copy.missing}
    keeps = wish.keep_checkpoint and not missing
    window = instant.freeze
    stood = [time for time in (instant.held_ms, held_ms) if time is not None]
    return RestorePoint(
        id=run.id,
        repository=context.repository.id,
        workload=found.workload.id,
        workload_name=found.workload.name,
        kind=found.workload.kind,
        sequence=context.repository.sequence(),
        time=context.clock.now(),
        hostname=context.owner.hostname,
        base=_base_id(context, found),
        consistency=Consistency.CRASH,
        instant=context.instant_of([place.claim for place in found.places], found.workload.paused),
        disks=tuple(
            _with_checkpoint(context, place, copy.record, target_of(instant, place), keeps)
            for place, copy in zip(found.places, copies, strict=True)
        ),
        definitions=found.workload.definitions,
        freeze_ms=round(max(stood), 1) if stood else None,
        notes=found.workload.notes,
        warnings=warnings
        + tuple(warning for copy in copies for warning in copy.warnings)
        + (window.warnings if window else ()),
        incomplete=bool(missing),
        missing=missing,
    )


def _with_checkpoint(context: Context, place: Place, record: DiskRecord, target: Target, keeps: bool) -> DiskRecord:
    """The point names its checkpoint before T is promoted: a crash in between is mended by promoting later."""
    small = bool(place.file.tree) and place.claim.identity and record.size < SMALL
    if not keeps or small or not may_checkpoint(context, place.claim):
        return record
    return msgspec.structs.replace(record, checkpoint=target.id)


def _base_id(context: Context, found: Survey) -> PointId | None:
    """The restore point that the disks were computed from or compared with; None when there was none."""
    return next(iter(_bases(context, found)), None)


def _bases(context: Context, found: Survey) -> tuple[PointId, ...]:
    """Restore points whose maps this run builds on: they must not be collected under it."""
    lineages = (found.base_of(context, place) for place in found.places)
    return tuple({lineage.point.id: None for lineage in lineages if not isinstance(lineage, First)})


def _abandon(context: Context, instant: Instant | None, run: RunRecord) -> None:
    """Undo what the run left outside; what cannot be undone is tagged and left to the reaper."""
    try:
        for target in instant.targets.values() if instant else ():
            delete_target(context, target)
    finally:
        context.repository.close_run(run)
