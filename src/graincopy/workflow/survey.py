"""Stages 2, 3 and the base: what would be backed up, from where, and what it can be compared with. No effect."""

from __future__ import annotations

from dataclasses import dataclass

from graincopy.core.errors import RestoreOpen, WorkloadBusy
from graincopy.core.ids import VolumeId
from graincopy.model.lineage import Lineage, choose_base
from graincopy.model.restore_point import RestorePoint, RunRecord
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim, SourceVolume
from graincopy.model.workload import Workload, WorkloadFile
from graincopy.volumes.base import VolumeDriver
from graincopy.workflow.context import Context

_EXCLUSIVE = ("backup", "restore", "undo")  # kinds of run of which a workload has one at a time


@dataclass(frozen=True, slots=True)
class Place:
    """One file of the workload and where it lies."""

    file: WorkloadFile
    claim: Claim
    volume: SourceVolume


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything known before anything is touched."""

    workload: Workload
    places: tuple[Place, ...]
    points: tuple[RestorePoint, ...]  # newest first
    targets: tuple[Target, ...]  # of ours, on these volumes

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
            changes=context.driver(place.claim).capabilities().change_map,
        )


def survey(context: Context, workload: Workload) -> Survey:
    """Find the volumes of ``workload``, its restore points and the checkpoints on these volumes.

    Raises VolumeUnsupported, and RestoreOpen when an in-place restore of one of its disks was not ended.
    """
    _refuse_open_restores(context, workload)
    claims = [context.claim(file.path) for file in workload.files]
    volumes: dict[str, SourceVolume] = {}
    for claim in claims:
        if claim.volume not in volumes:
            volumes[claim.volume] = context.driver(claim).describe(claim.volume)
    places = tuple(
        Place(file, claim, volumes[claim.volume]) for file, claim in zip(workload.files, claims, strict=True)
    )
    drivers = {claim.driver: context.driver(claim) for claim in claims}
    targets = tuple(target for driver in drivers.values() for target in driver.list_targets(_on(driver, claims)))
    return Survey(workload, places, context.repository.points(), targets)


def _on(driver: VolumeDriver, claims: list[Claim]) -> tuple[VolumeId, ...]:
    return tuple({claim.volume: None for claim in claims if claim.driver == driver.name})


def _refuse_open_restores(context: Context, workload: Workload) -> None:
    disks = {file.disk: file for file in workload.files}
    paths = {file.path for file in workload.files}
    for restore in context.repository.restores():
        if restore.state not in ("open", "undoing"):
            continue
        for disk in restore.record.disks:
            if disk.disk in disks or disk.path in paths:
                raise RestoreOpen(restore=restore.record.id, path=disk.path, point=restore.record.point)


def refuse_busy(context: Context, run: RunRecord) -> None:
    """Raise WorkloadBusy when another run works on the workload of ``run``, which must be open already.

    Each puts its record first and looks then: of two, at least one sees the other, and whoever sees one yields. A run
    whose owner is known to be dead does not count.
    """
    for other in context.repository.open_runs():
        rival = other.id != run.id and other.workload == run.workload and other.kind in _EXCLUSIVE
        if rival and context.alive(other.owner) is not False:
            raise WorkloadBusy(workload=run.workload, run=other.id, owner=f"{other.kind} by {other.owner}")
