"""An image as the file of T (stage 7), and as the live file on the way back (stage R): read and written by librbd."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from graincopy.core.errors import PathUnreadable, RestoreNoSpace, SourceInUse
from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State
from graincopy.model.workload import FileMetadata
from graincopy.volumes.image import fill_zeros
from graincopy.volumes.rbd_c import FEATURE_EXCLUSIVE_LOCK, CephError
from graincopy.volumes.rbd_cluster import SILENT, Cluster, Pool, unreachable
from graincopy.volumes.rbd_name import ImageName
from graincopy.volumes.rbd_open_image import Image

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PIECE = 1 << 30  # bytes; of one call that zeroes


def placement_of(image: Image, size: int) -> Placement:
    """The image lies on itself; what it never got, or gave back, is a hole. Raises CephError."""
    there, _ = image.diff(None, 0, size, whole_objects=True)
    return whole_placement(size, there.clip(0, size))


def whole_placement(size: int, there: Extents) -> Placement:
    """A volume of ``size`` bytes that is written in ``there``."""
    states = np.full(len(there), State.WRITTEN, np.uint8)
    return Placement(size, there.starts, there.stops, there.starts, states)


def read_padded(image: Image, size: int, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from ``offset``; beyond the end with zeros. Raises CephError."""
    wanted = max(0, min(len(buffer), size - offset))
    image.read(offset, buffer[:wanted])
    fill_zeros(buffer[wanted:])


class SnapImage:
    """A FileImage (volumes/base) over an image opened at a snapshot. ``check`` raises TargetLost when that is gone.

    A read of a snapshot that somebody deleted does not fail, it gives zeros: nothing read counts before ``verify``.
    """

    def __init__(self, image: Image, check: Callable[[], object]) -> None:
        self.size = image.size
        self._image, self._check = image, check

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros. Raises OSError."""
        read_padded(self._image, self.size, offset, buffer)

    def placement(self) -> Placement:
        """What the snapshot holds. Raises TargetLost, OSError."""
        found = placement_of(self._image, self.size)
        self._check()
        return found

    def verify(self) -> None:
        """Raises TargetLost when the snapshot is not there any more."""
        self._check()

    def close(self) -> None:
        """The driver's context closes the image."""


class LiveImage:
    """A FileSink (volumes/base) over the live image, which nobody else has open for writing."""

    def __init__(self, path: str, pool: Pool, name: ImageName, image: Image, existed: bool) -> None:
        self.path, self.existed = path, existed
        self._pool, self._name, self._image = pool, name, image
        self._locked = bool(image.features & FEATURE_EXCLUSIVE_LOCK)

    @property
    def size(self) -> int:
        """Bytes, now."""
        return self._image.size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros. Raises OSError, StorageUnreachable."""
        with self._asking():
            read_padded(self._image, self.size, offset, buffer)

    def placement(self) -> Placement:
        """What the image holds now. Raises OSError, StorageUnreachable."""
        with self._asking():
            return placement_of(self._image, self.size)

    def write(self, offset: int, data: memoryview) -> None:
        """All of ``data``; the image grows where that is needed. Raises RestoreNoSpace, OSError."""
        with self._asking(len(data)):
            if offset + len(data) > self.size:
                self._image.resize(offset + len(data))
            self._image.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Make the range, as far as it lies in the image, read as zeros; whole objects are given back."""
        stop = min(offset + length, self.size)
        with self._asking(length):
            for start, end in Extents.of((offset, stop)).split(_PIECE):
                self._image.write_zeros(start, end - start)

    def resize(self, size: int) -> None:
        """Cut or extend to ``size`` bytes."""
        with self._asking(size):
            self._image.resize(size)

    def sync(self) -> None:
        """Everything written is durable on return. Raises SourceInUse when somebody opened the image meanwhile."""
        with self._asking():
            self._image.flush()
            if not self._locked:
                refuse_others(self.path, self._image)

    def metadata(self) -> FileMetadata:
        """An image has none."""
        return FileMetadata()

    def apply(self, metadata: FileMetadata) -> tuple[str, ...]:
        """Nothing to be set."""
        return ()

    def free_bytes(self) -> int | None:
        """Room in the pool, if this user may know."""
        room, free = self._pool.cluster.room(self._name.pool)
        return free if room else None

    def remove(self) -> None:
        """Take the image away: the undo of a restore that created it."""
        self._image.close()
        self._pool.remove(self._name.image)

    def close(self) -> None:
        """Let the image go, and with it the lock; may be repeated."""
        self._image.close()

    @contextmanager
    def _asking(self, needed: int = 0) -> Iterator[None]:
        """What the cluster answers in the block, as errors; ``needed``: bytes that it would take."""
        try:
            yield
        except CephError as failure:
            if failure.errno in SILENT:
                raise unreachable(self._pool.cluster.conf, failure) from failure
            if failure.errno not in _NO_SPACE:
                raise
            raise RestoreNoSpace(path=self.path, needed=needed, free=self.free_bytes() or 0) from failure


def refuse_others(path: str, image: Image) -> None:
    """Raises SourceInUse while another client has the image open for writing."""
    others = image.others()
    if others:
        raise SourceInUse(path=path, reason=f"the image is open at {', '.join(others)}")


@contextmanager
def open_live(cluster: Cluster, path: str, name: ImageName) -> Iterator[LiveImage]:
    """The live image, locked for us alone; one that is missing is made, empty. Raises SourceInUse, PathUnreadable,
    StorageUnreachable.
    """
    with ExitStack() as held:
        try:
            pool = held.enter_context(cluster.pool(name.pool, name.namespace))
            image, existed = _open_or_create(pool, name)
            held.callback(image.close)
            refuse_others(path, image)
            if image.features & FEATURE_EXCLUSIVE_LOCK:
                image.lock()
        except CephError as failure:
            if failure.errno in (errno.EBUSY, errno.EROFS):
                raise SourceInUse(path=path, reason="another client holds its lock") from failure
            if failure.errno in SILENT:
                raise unreachable(cluster.conf, failure) from failure
            raise PathUnreadable(path=path, reason=failure.strerror) from failure
        yield LiveImage(path, pool, name, image, existed)


def _open_or_create(pool: Pool, name: ImageName) -> tuple[Image, bool]:
    try:
        return pool.open(name.image, writable=True), True
    except CephError as failure:
        if failure.errno != errno.ENOENT:
            raise
    pool.create(name.image, 0)
    return pool.open(name.image, writable=True), False
