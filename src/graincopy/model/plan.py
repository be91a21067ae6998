"""Plans: what an operation is going to do, decided before it has any effect (``--dry-run`` prints one and stops).

Frozen and made of plain values, so that a plan can be shown to people (:meth:`lines`), given out as JSON, or handed to
the host that has the volume. Paths are kept as they are; only :meth:`lines` makes them printable.
"""

from __future__ import annotations

import msgspec

from graincopy.core.errors import printable
from graincopy.core.ids import DiskId, PointId, VolumeId, WorkloadId
from graincopy.core.units import format_duration, format_size
from graincopy.model.retention import RetentionPolicy
from graincopy.model.workload import Representation


class BackupDisk(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a backup to come."""

    name: str
    path: str
    volume: VolumeId
    driver: str
    representation: Representation
    format: str
    base: PointId | None
    change_map: str  # "incremental", "compared: <reason>", or "first backup"
    why: str  # the driver's clause on how the file sits on the volume


class PlannedVolume(msgspec.Struct, frozen=True, kw_only=True):
    """One S that gets a T."""

    id: VolumeId
    driver: str
    size: int  # bytes
    snapshot: bool  # False: S is read itself while writers are held off
    extents: int


class BackupPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A backup to come."""

    workload: WorkloadId
    workload_name: str
    disks: tuple[BackupDisk, ...]
    volumes: tuple[PlannedVolume, ...]
    freeze_mounts: tuple[str, ...]  # in the order in which they are frozen
    predicted_ms: float | None  # of the freeze window; None: not predicted, or nothing is frozen
    instant: str  # "one" or "per file"
    keep_checkpoint: bool
    steps: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """For people, one fact a line."""
        disks = [
            f"  {disk.name}: {disk.path} on {disk.volume} ({disk.why}); {disk.representation} view; {disk.change_map}"
            for disk in self.disks
        ]
        volumes = [
            f"  {volume.id}: {format_size(volume.size)}, {volume.extents} extents, "
            + ("snapshot" if volume.snapshot else "read in place, writers held off")
            for volume in self.volumes
        ]
        head = f"Backup of {self.workload_name}: {counted(len(self.disks), 'disk')}, instant: {self.instant}"
        return _shown(
            [
                head,
                *disks,
                "Volumes:",
                *volumes,
                _window(self),
                *_numbered(self.steps),
                *_noted(self.notes),
            ]
        )


class PlannedRestore(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a restore to come."""

    disk: DiskId
    name: str
    path: str  # what is written
    size: int  # bytes that it will have
    size_before: int | None  # bytes that it has; None: it does not exist
    representation: Representation
    format: str
    difference: str  # where the differing grains are known from: "change map", "compared: <reason>", "everything"
    undo: str  # "snapshot", "overwritten grains kept in the repository", or "none"


class RestorePlan(msgspec.Struct, frozen=True, kw_only=True):
    """A restore to come."""

    point: PointId
    workload: WorkloadId
    workload_name: str
    time: float  # wall clock of the restore point
    to: str | None  # directory; None: in place
    disks: tuple[PlannedRestore, ...]
    steps: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """For people, one fact a line."""
        where = "in place" if self.to is None else f"to {self.to}"
        disks = [
            f"  {disk.name}: {disk.path}, {_resized(disk)}; {disk.difference}; undo: {disk.undo}" for disk in self.disks
        ]
        head = f"Restore of {self.workload_name} {where} from {self.point}: {counted(len(self.disks), 'disk')}"
        return _shown([head, *disks, *_numbered(self.steps), *_noted(self.notes)])


class ExpirePoint(msgspec.Struct, frozen=True, kw_only=True):
    """What an expire does with one restore point, with every reason."""

    id: PointId
    workload: WorkloadId
    workload_name: str
    time: float  # wall clock
    keep: bool
    reasons: tuple[str, ...]


class ExpirePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Which restore points an expire removes. ``points`` are grouped by workload, newest first."""

    policy: RetentionPolicy
    points: tuple[ExpirePoint, ...]

    @property
    def removed(self) -> tuple[PointId, ...]:
        """Restore points that go, oldest first of each workload: a crash half way leaves the newest."""
        return tuple(point.id for point in reversed(self.points) if not point.keep)

    def lines(self) -> tuple[str, ...]:
        """For people, one restore point a line."""
        points = [
            f"  {'keep' if point.keep else 'remove'} {point.id} {point.workload_name}: {', '.join(point.reasons)}"
            for point in self.points
        ]
        return _shown([f"Expire removes {len(self.removed)} of {counted(len(points), 'restore point')}", *points])


def _shown(lines: list[str]) -> tuple[str, ...]:
    return tuple(printable(line) for line in lines)


def counted(number: int, noun: str) -> str:
    """``1 disk``, ``3 disks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _numbered(steps: tuple[str, ...]) -> list[str]:
    return [f"{number}. {step}" for number, step in enumerate(steps, 1)]


def _noted(notes: tuple[str, ...]) -> list[str]:
    return [f"Note: {note}" for note in notes]


def _window(plan: BackupPlan) -> str:
    if not plan.freeze_mounts:
        return "Freeze window: nothing is frozen"
    took = "not predicted" if plan.predicted_ms is None else f"about {format_duration(plan.predicted_ms / 1000)}"
    return f"Freeze window: {', '.join(plan.freeze_mounts)} ({took})"


def _resized(disk: PlannedRestore) -> str:
    if disk.size_before is None:
        return f"made anew, {format_size(disk.size)}"
    if disk.size_before == disk.size:
        return format_size(disk.size)
    return f"{format_size(disk.size_before)} becomes {format_size(disk.size)}"
