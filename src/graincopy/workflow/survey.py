"""Stages 2, 3 and the base: what would be backed up, from where, and what it can be compared with. No effect."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from graincopy.core.errors import PathMissing, RestoreOpen, SnapshotFailed, SubsystemFailed, WorkloadBusy
from graincopy.core.ids import DiskId, PointId, VolumeId
from graincopy.model.lineage import Lineage, choose_base, histories
from graincopy.model.restore_point import DiskRecord, RestorePoint, RunRecord
from graincopy.model.snapshot import Target
from graincopy.model.tree import tree_disk_of
from graincopy.model.volume import Claim, SourceVolume
from graincopy.model.workload import Workload, WorkloadFile
from graincopy.volumes.base import VolumeDriver
from graincopy.workflow.context import Context

Histories = Mapping[DiskId, Sequence[tuple[RestorePoint, DiskRecord]]]

_EXCLUSIVE = ("backup", "restore", "undo")  # kinds of run of which a workload has one at a time
_YIELDING = 10.0  # seconds within which a run that opened after ours has seen it and yielded


class Place(msgspec.Struct, frozen=True):
    """One file of the workload and where it lies."""

    file: WorkloadFile
    claim: Claim
    volume: SourceVolume
    missing: bool = False  # nothing is there; a restore makes it anew


class Survey(msgspec.Struct, frozen=True):
    """Everything known before anything is touched."""

    workload: Workload
    places: tuple[Place, ...]
    points: tuple[RestorePoint, ...]  # newest first
    targets: tuple[Target, ...]  # of ours, on these volumes
    histories: Histories

    def volumes(self) -> dict[str, tuple[VolumeId, ...]]:
        """Driver name → its source volumes, each once: Ev."""
        found: dict[str, dict[VolumeId, None]] = {}
        for place in self.places:
            found.setdefault(place.claim.driver, {})[place.claim.volume] = None
        return {driver: tuple(volumes) for driver, volumes in found.items()}

    def base_of(self, context: Context, place: Place, incarnation: str | None = None) -> Lineage:
        """What ``place`` can be compared with, S being of ``incarnation`` (as surveyed when None)."""
        volume = place.volume
        if incarnation is not None:
            volume = SourceVolume(id=volume.id, driver=volume.driver, size=volume.size, incarnation=incarnation)
        return choose_base(
            self.points,
            self.workload.id,
            place.file,
            volume,
            place.claim,
            self.targets,
            context.repository.id,
            changes=context.has_change_map(place.claim),
            history=self.histories.get(place.file.disk, ()),
        )


def survey(context: Context, workload: Workload) -> Survey:
    """Find the volumes of ``workload``, its restore points and the checkpoints on these volumes.

    Raises VolumeUnsupported, and RestoreOpen when an in-place restore of one of its disks was not ended.
    """
    refuse_open_restores(context, workload)
    places = places_of(context, workload.files)
    workload = msgspec.structs.replace(workload, files=tuple(place.file for place in places))
    claims = [place.claim for place in places]
    refuse_scattered(context, workload, claims)
    drivers = {claim.driver: context.driver(claim) for claim in claims}
    targets = tuple(target for driver in drivers.values() for target in driver.list_targets(_on(driver, claims)))
    points = context.repository.points()
    return Survey(workload, places, points, targets, histories(points, workload.id))


def places_of(context: Context, files: Sequence[WorkloadFile]) -> tuple[Place, ...]:
    """Where ``files`` lie. A file of a tree that is gone by now is left out; one that was named raises PathMissing.

    All files of a tree lie on one file system: where that lies inside a volume, one of them tells for the others.
    """
    samples: dict[str, Claim] = {}
    volumes: dict[str, SourceVolume] = {}
    places = []
    for file in files:
        sample = samples.get(file.tree)
        try:
            claim = context.claim(file) if sample is None else sibling(sample, file)
            if claim.volume not in volumes:
                volumes[claim.volume] = context.driver(claim).describe(claim.volume)
        except (PathMissing, SnapshotFailed):
            if file.tree and not os.path.lexists(file.path):
                continue
            raise
        if file.tree and claim.inner_path is not None:
            samples[file.tree] = claim
            file = msgspec.structs.replace(file, tree_disk=tree_disk_of(file.tree))
        places.append(Place(file, claim, volumes[claim.volume]))
    return tuple(places)


def sibling(sample: Claim, file: WorkloadFile) -> Claim:
    """The claim on ``file``, which lies in the same tree as the file inside a volume that ``sample`` claims."""
    inner = inner_folder(sample, file.tree) + file.path.removeprefix(file.tree.rstrip("/"))
    return msgspec.structs.replace(sample, path=file.path, inner_path=inner, size=None, tracked=None)


def inner_folder(sample: Claim, tree: str) -> str:
    """Path of ``tree`` inside the file system of the volume, known from the claim on one of its files."""
    assert sample.inner_path is not None
    return sample.inner_path.removesuffix(sample.path.removeprefix(tree.rstrip("/")))


def refuse_scattered(context: Context, workload: Workload, claims: Sequence[Claim]) -> None:
    """Raise SubsystemFailed when ``workload`` is worth nothing unless all its files show one instant, and they do not.

    "Per file" would be a restore point that looks good and is torn.
    """
    if workload.one_instant and context.instant_of(claims, workload.paused) != "one":
        drivers = ", ".join(sorted({claim.driver for claim in claims if context.snapshots(claim)}))
        reason = (
            f"its files would be copied one after the other ({drivers}) while it writes; put them on an image that can"
            " be cloned as a whole, or stop it first"
        )
        raise SubsystemFailed(subsystem=workload.name, reason=reason)


def _on(driver: VolumeDriver, claims: list[Claim]) -> tuple[VolumeId, ...]:
    return tuple({claim.volume: None for claim in claims if claim.driver == driver.name})


def refuse_open_restores(context: Context, workload: Workload) -> None:
    """Raise RestoreOpen when an in-place restore of a disk of ``workload`` was begun and not ended."""
    disks = {file.disk: file for file in workload.files}
    paths = {file.path for file in workload.files}
    for restore in context.repository.restores():
        if restore.state not in ("open", "undoing"):
            continue
        for disk in restore.record.disks:
            if disk.disk in disks or disk.path in paths:
                raise RestoreOpen(restore=restore.record.id, path=disk.path, point=restore.record.point)


def refuse_busy(context: Context, run: RunRecord) -> None:
    """Raise WorkloadBusy unless ``run``, which must be open already, is the one that may work on its workload.

    Each puts its record first and looks then, so that of two at least one sees the other. Who sees an earlier one
    yields at once. Who sees later ones only waits for them to see it and yield; one that stays had looked before and
    is at work, so then we yield. At most one goes on, whatever the clocks say; of those that begin at one moment and
    are not stopped, exactly one. A run whose owner is known to be dead does not count.
    """
    until = context.clock.monotonic() + _YIELDING
    waited: set[PointId] = set()
    while rivals := _rivals(context, run):
        first = min(rivals, key=_order)
        if _order(first) < _order(run) or context.clock.monotonic() >= until:
            raise WorkloadBusy(workload=run.workload, run=first.id, owner=f"{first.kind} by {first.owner}")
        waited |= {other.id for other in rivals}
        context.clock.sleep(_YIELDING / 100)
    for point in context.repository.points() if waited else ():
        if point.id in waited:  # it came to its end meanwhile, and what we surveyed is out of date
            raise WorkloadBusy(workload=run.workload, run=point.id, owner=f"backup on {point.hostname}, just done")


def _rivals(context: Context, run: RunRecord) -> list[RunRecord]:
    return [
        other
        for other in context.repository.open_runs()
        if other.id != run.id
        and other.workload == run.workload
        and other.kind in _EXCLUSIVE
        and context.alive(other.owner) is not False
    ]


def _order(run: RunRecord) -> tuple[float, str]:
    """The same for everybody who looks, since records never change; the time in it is a hint at who came first."""
    return run.opened, run.id
