"""Restore points, runs and restore records as the repository keeps them (stages 9 and R)."""

from __future__ import annotations

import msgspec

from graincopy.core.ids import DiskId, PieceId, PointId, RepositoryId, VolumeId, WorkloadId
from graincopy.model.snapshot import Owner
from graincopy.model.workload import Consistency, FileMetadata, Representation


class MapRoot(msgspec.Struct, frozen=True, kw_only=True):
    """A grain map: root node (None: every grain is zero) and height (a leaf has height 0)."""

    node: PieceId | None = None
    height: int = 0


class AuditResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the audit of one disk saw."""

    grains: int = 0  # how many grains that the map calls clean were re-read
    mismatches: int = 0
    cursor: int = 0  # grain at which the next run's rolling half begins
    wrong_at_most: float | None = None  # share of clean grains, at 95 % confidence; None without an audit
    full_cover_runs: int | None = None  # after so many runs every allocated grain has been looked at
    waited: int = 0  # runs since the last one that looked at this disk


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a restore point. Always complete: there are no chains."""

    id: DiskId
    name: str
    path: str
    size: int  # bytes
    root: MapRoot
    representation: Representation
    format: str
    metadata: FileMetadata
    volume: VolumeId
    driver: str
    incarnation: str
    inner_path: str | None = None  # with fs_offset: which file of the volume it was; None: it is the volume
    fs_offset: int = 0
    change_map: str  # "extents" …, "first backup", or "compared: <reason>"
    checkpoint: str | None  # id of the target that was kept as checkpoint
    audit: AuditResult
    allocated: int = 0  # bytes
    dirty_bytes: int = 0
    read_bytes: int = 0
    audit_bytes: int = 0
    stored_bytes: int = 0
    tree_disk: DiskId | None = None  # as in WorkloadFile

    @property
    def tag_disk(self) -> DiskId:
        """What stands for this disk in the tags of targets."""
        return self.tree_disk or self.id


class RestorePoint(msgspec.Struct, frozen=True, kw_only=True):
    """Published last, complete, and never changed."""

    id: PointId
    repository: RepositoryId
    workload: WorkloadId
    workload_name: str
    kind: str
    sequence: int  # one more than any that its run could see: orders points when clocks disagree
    time: float  # wall clock of the snapshot
    hostname: str
    base: PointId | None
    consistency: Consistency
    instant: str  # "one" or "per file"
    disks: tuple[DiskRecord, ...]
    definitions: dict[str, bytes] = {}
    freeze_ms: float | None = None
    duration_s: float = 0.0
    metadata_bytes: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what was left out, and why
    incomplete: bool = False  # made with --allow-partial: never a base, never counts for retention
    missing: dict[str, list[tuple[int, int]]] = {}  # disk name → byte ranges that could not be read


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A run that is open in the repository: it holds the name that its restore point will have."""

    id: PointId
    kind: str  # "backup", "restore", "undo", "export", "expire", "view", "collect"
    workload: WorkloadId | None
    owner: Owner
    opened: float  # wall clock, a hint
    pins: tuple[PointId, ...] = ()  # restore points that must not go while the run is open


class RestoreDisk(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of an in-place restore."""

    disk: DiskId
    name: str
    path: str
    size: int  # bytes that the file will have
    size_before: int | None  # bytes that it had; None: it did not exist
    grains: bytes  # GrainBitmap of the grains that the restore writes
    metadata_before: FileMetadata | None
    undo_target: str | None  # id of the target that shows the file as it was
    undo_driver: str | None
    undo_root: MapRoot | None  # where S has no snapshots: the overwritten grains, in the repository


class RestoreRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Durable before the first byte is written: what is needed to finish or undo from any host."""

    id: PointId  # of the restore, not of the point
    point: PointId
    workload: WorkloadId
    owner: Owner
    opened: float
    expires: float  # wall clock, a hint
    disks: tuple[RestoreDisk, ...]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One trial restore: a machine of a restore point was started from a throw-away copy. Sizes and times of then."""

    id: PointId  # of the run that held it
    point: PointId
    machine: str  # name of the virtual machine
    time: float  # wall clock of its start
    duration_s: float  # until the sign of life, or until it was given up
    sign: str  # what was waited for: "agent" or "console:TEXT"
    alive: bool
    reason: str = ""  # why it counts as dead
    console: str = ""  # the last that the guest said on its serial port
    picture: bytes = b""  # PNG of its screen; empty without one
    hostname: str = ""
    version: str = ""  # of graincopy


class RestoreState(msgspec.Struct, frozen=True, kw_only=True):
    """A restore record and how far it came: "open", "done", "undoing" or "undone"."""

    record: RestoreRecord
    state: str
    resumed: bool = False  # more grains were written than the record names: what an undo brings back has to be compared


def order_key(point: RestorePoint) -> tuple[int, float, str]:
    """Sorts restore points oldest first, also when the clocks of their hosts disagree by hours."""
    return (point.sequence, point.time, point.id)
