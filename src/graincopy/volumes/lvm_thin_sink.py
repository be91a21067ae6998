"""The live file on a thin volume (stage R): its room is the pool's, whatever its file system or its size says.

U shares every block with S, so each block that a restore writes to is a new one in the pool; and a pool that is full
stops everybody in it.
"""

from __future__ import annotations

from collections.abc import Callable

from graincopy.core.placement import Placement
from graincopy.model.workload import FileMetadata
from graincopy.volumes.base import FileSink


class PoolSink:
    """A FileSink (volumes/base) that minds its pool: ``room`` is the bytes left, ``look`` raises when it fills up."""

    def __init__(self, sink: FileSink, room: Callable[[], int], look: Callable[[], None]) -> None:
        self._sink, self._room, self._look = sink, room, look
        self.path, self.existed = sink.path, sink.existed

    @property
    def size(self) -> int:
        return self._sink.size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._sink.readinto(offset, buffer)

    def placement(self) -> Placement:
        return self._sink.placement()

    def write(self, offset: int, data: memoryview) -> None:
        """Raises TargetNoSpace, too, before the pool is full: the restore can be finished, or undone, later."""
        self._look()
        self._sink.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """As :meth:`write`: a block device writes zeros."""
        self._look()
        self._sink.zero(offset, length)

    def resize(self, size: int) -> None:
        self._sink.resize(size)

    def sync(self) -> None:
        self._sink.sync()

    def metadata(self) -> FileMetadata:
        return self._sink.metadata()

    def apply(self, metadata: FileMetadata) -> tuple[str, ...]:
        return self._sink.apply(metadata)

    def free_bytes(self) -> int | None:
        """What is left in the pool, or in the file system where that is less."""
        free, room = self._sink.free_bytes(), self._room()
        return room if free is None else min(free, room)

    def remove(self) -> None:
        self._sink.remove()

    def close(self) -> None:
        self._sink.close()
