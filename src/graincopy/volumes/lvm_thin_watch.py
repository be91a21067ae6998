"""A thin pool watched while a run holds targets in it (stages 4-8): a full pool stops everybody who writes to it.

T shares all blocks with S, and every block that a guest overwrites afterwards is a new one. So a run ends, and its T
goes, before the pool is full: of data, or of metadata, which is the worse one.
"""

from __future__ import annotations

from threading import Lock

import msgspec

from graincopy.core.clock import Clock
from graincopy.core.errors import SnapshotFailed, TargetNoSpace
from graincopy.core.placement import Placement
from graincopy.volumes.base import FileImage
from graincopy.volumes.lvm_thin_report import LogicalVolume, PoolStatus
from graincopy.volumes.lvm_thin_tools import Lvm, ToolFailed

_EVERY = 2.0  # seconds


class PoolLimits(msgspec.Struct, frozen=True):
    """Shares of a pool that may be in use while targets lie in it."""

    data: float = 0.95
    metadata: float = 0.90


def too_full(status: PoolStatus, limits: PoolLimits) -> str | None:
    """Which part of the pool is too full, in words."""
    parts = (("data", status.data_used, limits.data), ("metadata", status.metadata_used, limits.metadata))
    for what, used, limit in parts:
        if used >= limit:
            return f"{used:.0%} of its {what} space in use, {limit:.0%} allowed"
    return None


def check_pool(lvm: Lvm, vg: str, pool: str, limits: PoolLimits) -> PoolStatus:
    """Its status. Raises TargetNoSpace when it is too full, SnapshotFailed when it is not in order."""
    try:
        status = lvm.pool_status(vg, pool)
    except ToolFailed as error:
        raise SnapshotFailed(volume=f"thin pool {vg}/{pool}", reason=str(error)) from error
    full = too_full(status, limits)
    if full is not None:
        raise TargetNoSpace(volume=f"thin pool {vg}/{pool} ({full})")
    if status.trouble:
        raise SnapshotFailed(volume=f"thin pool {vg}/{pool}", reason=status.trouble)
    return status


def room(lvm: Lvm, pool: LogicalVolume, limits: PoolLimits) -> int:
    """Bytes that may still be allocated in ``pool``. Raises TargetNoSpace, SnapshotFailed."""
    return int(pool.size * (limits.data - check_pool(lvm, pool.vg, pool.name, limits).data_used))


class PoolWatch:
    """Looks at one pool, at most every two seconds, whoever asks."""

    def __init__(self, lvm: Lvm, vg: str, pool: str, limits: PoolLimits, clock: Clock) -> None:
        self._lvm, self._vg, self._pool, self._limits, self._clock = lvm, vg, pool, limits, clock
        self._next = clock.monotonic()
        self._lock = Lock()

    def look(self) -> None:
        """Raise TargetNoSpace or SnapshotFailed when it is time to give up."""
        with self._lock:
            if self._clock.monotonic() < self._next:
                return
            self._next = self._clock.monotonic() + _EVERY
        check_pool(self._lvm, self._vg, self._pool, self._limits)


class WatchedImage:
    """A FileImage (volumes/base) whose every read looks at the pool that T lies in."""

    def __init__(self, image: FileImage, watch: PoolWatch) -> None:
        self._image, self._watch = image, watch
        self.size = image.size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """As the image itself; raises TargetNoSpace when the pool fills up."""
        self._watch.look()
        self._image.readinto(offset, buffer)

    def placement(self) -> Placement:
        """As the image itself."""
        return self._image.placement()

    def verify(self) -> None:
        """As the image itself."""
        self._image.verify()

    def close(self) -> None:
        """As the image itself."""
        self._image.close()
