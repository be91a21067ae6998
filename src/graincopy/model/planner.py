"""The planner: described values in (claims, volumes, lineages), a printable plan out. It decides; it never does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from graincopy.core.ids import PointId, VolumeId
from graincopy.model.audit import AuditAmount
from graincopy.model.instant import instant_of
from graincopy.model.lineage import Compare, First, Incremental, Lineage
from graincopy.model.plan import (
    BackupDisk,
    BackupPlan,
    ExpirePlan,
    ExpirePoint,
    PlannedRestore,
    PlannedVolume,
    RestorePlan,
    counted,
)
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.retention import RetentionPolicy, Verdict, decide
from graincopy.model.volume import Claim, SourceVolume, VolumeCapabilities
from graincopy.model.workload import Workload, WorkloadFile


class FreezeForecast(msgspec.Struct, frozen=True, kw_only=True):
    """What will be frozen, in this order (innermost first), and for how long."""

    mounts: tuple[str, ...] = ()
    predicted_ms: float | None = None


class RestorePlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where one disk of a restore point goes, as found now."""

    path: str
    size_before: int | None = None  # bytes; None: it does not exist
    change_map: bool = False  # the driver can tell what changed since the newest point's checkpoint
    reason: str = "the driver keeps no change map"  # why not
    snapshots: bool = False  # an undo target can be made


_IN_PLACE = (
    "hold writers off",
    "take the undo snapshot of each file, or keep the overwritten grains in the repository",
    "put the restore record: from here on the restore can be finished or undone from any host",
    "write the grains that differ, audit, flush",
    "close the restore record",
)
_TO_DIRECTORY = ("make each file, sparse", "write its grains, flush")

USUAL_AUDIT = AuditAmount()


class _Place(msgspec.Struct, frozen=True):
    """A file of the workload, where it lies, and what its next point builds on."""

    file: WorkloadFile
    claim: Claim
    volume: SourceVolume
    lineage: Lineage
    capabilities: VolumeCapabilities

    @property
    def keeps_checkpoint(self) -> bool:
        """Whether a target of it can be kept to compute the next changes from."""
        return self.capabilities.checkpoints if self.claim.tracked is None else self.claim.tracked


def plan_backup(
    workload: Workload,
    claims: Sequence[Claim],
    volumes: Mapping[VolumeId, SourceVolume],
    lineages: Sequence[Lineage],
    capabilities: Mapping[str, VolumeCapabilities],
    freeze: FreezeForecast | None = None,
    audit: AuditAmount = USUAL_AUDIT,
    keep_checkpoint: bool = True,
) -> BackupPlan:
    """The plan of a backup of ``workload``.

    ``claims`` and ``lineages`` go with the workload's files in order; ``capabilities`` are by driver name.
    Without ``freeze`` the file systems of the claims are listed as they come, and the window is not predicted.
    """
    places = [
        _Place(file, claim, volumes[claim.volume], lineage, capabilities[claim.driver])
        for file, claim, lineage in zip(workload.files, claims, lineages, strict=True)
    ]
    planned = _volumes(places)
    freeze = freeze or _unpredicted(places)
    kept = keep_checkpoint and any(place.keeps_checkpoint for place in places)
    return BackupPlan(
        workload=workload.id,
        workload_name=workload.name,
        disks=tuple(_backup_disk(place) for place in places),
        volumes=planned,
        freeze_mounts=freeze.mounts,
        predicted_ms=freeze.predicted_ms,
        instant=_instant(places, freeze, workload.paused),
        keep_checkpoint=kept,
        steps=_backup_steps(places, planned, freeze, audit, kept),
        notes=workload.notes,
    )


def plan_restore(
    point: RestorePoint, places: Mapping[str, RestorePlace], to: str | None = None, compare: bool = False
) -> RestorePlan:
    """The plan of a restore of the disks of ``point`` that ``places`` names (disk name → place)."""
    disks = tuple(
        _restore_disk(disk, places[disk.name], to is None, compare) for disk in point.disks if disk.name in places
    )
    return RestorePlan(
        point=point.id,
        workload=point.workload,
        workload_name=point.workload_name,
        time=point.time,
        to=to,
        disks=disks,
        steps=_IN_PLACE if to is None else _TO_DIRECTORY,
        notes=tuple(f"{name}: parts of it are missing in this restore point" for name in sorted(point.missing)),
    )


def plan_expire(
    points: Sequence[RestorePoint], policy: RetentionPolicy, now: float, pinned: Mapping[PointId, str]
) -> ExpirePlan:
    """The plan of an expire at wall-clock ``now`` under ``policy``."""
    verdicts = decide(points, policy, now, pinned)
    return ExpirePlan(policy=policy, points=tuple(_expire_point(verdict) for verdict in verdicts))


def change_map_text(lineage: Lineage) -> str:
    """What a report says about where the change map of a disk comes from, before it was asked."""
    match lineage:
        case Incremental():
            return "incremental"
        case Compare(reason=reason):
            return f"compared: {reason}"
        case First(reason=reason):
            return reason


def _expire_point(verdict: Verdict) -> ExpirePoint:
    return ExpirePoint(
        id=verdict.point.id,
        workload=verdict.point.workload,
        workload_name=verdict.point.workload_name,
        time=verdict.point.time,
        keep=verdict.keep,
        reasons=verdict.reasons,
    )


def _backup_disk(place: _Place) -> BackupDisk:
    base = None if isinstance(place.lineage, First) else place.lineage.point.id
    return BackupDisk(
        name=place.file.name,
        path=place.file.path,
        volume=place.volume.id,
        driver=place.claim.driver,
        representation=place.file.representation,
        format=place.file.format,
        base=base,
        change_map=change_map_text(place.lineage),
        why=place.claim.why,
    )


def _unpredicted(places: Sequence[_Place]) -> FreezeForecast:
    """The file systems inside the volumes of drivers that are to be frozen from outside."""
    mounts = {
        place.claim.mount: None
        for place in places
        if place.capabilities.freeze == "outside" and not place.claim.identity and place.claim.mount is not None
    }
    return FreezeForecast(mounts=tuple(mounts))


def _instant(places: Sequence[_Place], freeze: FreezeForecast, paused: bool) -> str:
    """What the restore point is going to say."""
    running = [place for place in places if place.capabilities.snapshots and not place.claim.still]
    together = {place.claim.driver for place in running if place.capabilities.group_instant}
    return instant_of([place.claim for place in running], freeze.mounts, paused=paused, together=together)


def _volumes(places: Sequence[_Place]) -> tuple[PlannedVolume, ...]:
    """Each volume once, in the order of the disks."""
    found: dict[VolumeId, PlannedVolume] = {}
    for place in places:
        volume = PlannedVolume(
            id=place.volume.id,
            driver=place.volume.driver,
            size=place.volume.size,
            snapshot=place.capabilities.snapshots,
            extents=place.volume.extents,
        )
        found.setdefault(volume.id, volume)
    return tuple(found.values())


def _backup_steps(
    places: Sequence[_Place],
    volumes: tuple[PlannedVolume, ...],
    freeze: FreezeForecast,
    audit: AuditAmount,
    keep_checkpoint: bool,
) -> tuple[str, ...]:
    thin = sum(volume.snapshot for volume in volumes)
    steps = []
    if thin < len(volumes):
        steps.append("hold writers off")
    if thin:
        steps.append(f"provision {counted(thin, 'thin target')}")
        mounts = counted(len(freeze.mounts), "file system")
        steps.append(f"freeze {mounts}, snapshot, thaw" if freeze.mounts else "snapshot")
    steps += [f"{place.file.name}: {_reading(place.lineage, audit)}" for place in places]
    steps.append("publish the restore point")
    if thin:
        steps.append("keep the checkpoints, delete every other target" if keep_checkpoint else "delete the targets")
    return tuple(steps)


def _reading(lineage: Lineage, audit: AuditAmount) -> str:
    match lineage:
        case Incremental():
            return f"read the dirty grains and audit {audit} of the clean ones"
        case Compare():
            return "read every allocated grain and compare"
        case First():
            return "read every allocated grain"


def _restore_disk(record: DiskRecord, place: RestorePlace, in_place: bool, compare: bool) -> PlannedRestore:
    undo = "none"
    if in_place:
        undo = "snapshot" if place.snapshots else "overwritten grains kept in the repository"
    return PlannedRestore(
        disk=record.id,
        name=record.name,
        path=place.path,
        size=record.size,
        size_before=place.size_before,
        representation=record.representation,
        format=record.format,
        difference=_difference(place, in_place, compare),
        undo=undo,
    )


def _difference(place: RestorePlace, in_place: bool, compare: bool) -> str:
    if not in_place or place.size_before is None:
        return "everything"
    if compare:
        return "compared: asked for"
    return "change map" if place.change_map else f"compared: {place.reason}"
