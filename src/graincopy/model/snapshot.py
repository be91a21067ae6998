"""Targets and checkpoints: what graincopy makes on storage, and the tags that keep it from being orphaned."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from graincopy.core.ids import DiskId, PointId, RepositoryId, VolumeId, WorkloadId


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Who made something: the process, so exactly that it cannot be confused with a later one."""

    host: str  # machine id
    boot: str  # boot id
    pid: int
    started: int  # clock ticks after boot, /proc/PID/stat field 22
    hostname: str = ""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.hostname or self.host}"


class Role(StrEnum):
    """Why a target exists."""

    TARGET = "target"  # of a run in progress
    CHECKPOINT = "checkpoint"  # an instant that changes are computed from
    UNDO = "undo"  # the state before a restore
    VIEW = "view"  # held by a live view


class CheckpointDisk(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """One disk that a checkpoint serves."""

    workload: WorkloadId
    disk: DiskId


class TargetTag(msgspec.Struct, frozen=True, kw_only=True):
    """Written onto T before T holds anything."""

    run: PointId  # run id; for a backup also the id of the restore point it makes
    role: Role
    owner: Owner
    repository: RepositoryId
    disks: tuple[CheckpointDisk, ...]
    created: float  # wall clock, a hint
    expires: float | None = None  # wall clock, a hint


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """T: a snapshot of S on storage."""

    id: str  # unique within the driver and stable: enough to find T again
    driver: str
    volume: VolumeId
    size: int  # bytes; that of S at the instant
    incarnation: str  # of S at the instant
    tag: TargetTag
    allocated: int = 0  # bytes that T alone takes, as far as the driver can tell
    held_ms: float | None = None  # how long the snapshot itself held S's writers; None: it did not, or nobody knows


class Created(msgspec.Struct, frozen=True):
    """A verb's answer: it was not there and now is."""


class Existing(msgspec.Struct, frozen=True):
    """A verb's answer: it was there already; nothing was changed."""


class Deleted(msgspec.Struct, frozen=True):
    """A verb's answer: it was there and is gone."""


class Absent(msgspec.Struct, frozen=True):
    """A verb's answer: it was not there; nothing was changed."""
