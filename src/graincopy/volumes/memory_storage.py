"""Storage in memory for the reference driver: volumes that can be copied on write, with files inside them.

A :class:`Copy` is what an array calls a thin FlashCopy target with background copy off: at first nothing but a
reference to its source; a grain moves into it when the source is about to overwrite that grain.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from typing import NamedTuple

import msgspec
import numpy as np

from graincopy.core.extent import Array
from graincopy.core.placement import Placement, State
from graincopy.core.units import ceil_div
from graincopy.model.snapshot import Target
from graincopy.model.workload import FileMetadata

GRAIN = 4096  # bytes: unit of change tracking and of file allocation


class Block(NamedTuple):
    """One grain of a file: the volume's grain ``number``, and whether it was written."""

    number: int
    state: State


class MemoryFile(msgspec.Struct, frozen=True):
    """A file inside a volume; None is a hole, and so is what lies beyond ``blocks``."""

    size: int = 0
    blocks: tuple[Block | None, ...] = ()

    @classmethod
    def identity(cls, size: int) -> MemoryFile:
        """The file that is the volume."""
        return cls(size, tuple(Block(number, State.WRITTEN) for number in range(ceil_div(size, GRAIN))))

    def placement(self) -> Placement:
        segments = [
            (at * GRAIN, (at + 1) * GRAIN, block.number * GRAIN, block.state)
            for at, block in enumerate(self.blocks)
            if block is not None
        ]
        return Placement.of(self.size, *segments)

    def resized(self, size: int) -> MemoryFile:
        """Cut or extended; a cut inside a block leaves that block's bytes to the caller."""
        return MemoryFile(size, self.blocks[: ceil_div(size, GRAIN)])

    def with_blocks(self, at: int, blocks: tuple[Block | None, ...]) -> MemoryFile:
        """``blocks`` in place of those from number ``at`` on."""
        padded = self.blocks + (None,) * (at + len(blocks) - len(self.blocks))
        return MemoryFile(self.size, padded[:at] + blocks + padded[at + len(blocks) :])


class MemoryVolume:
    """S: bytes, the generation of each grain, and the files inside. Writes are atomic with respect to snapshots."""

    def __init__(self, size: int, incarnation: str, lock: threading.RLock) -> None:
        self.data = bytearray()
        self.generation: Array = np.empty(0, np.int64)
        self.incarnation = incarnation
        self.files: dict[str, MemoryFile] = {}
        self.copies: list[Copy] = []
        self._writes = 0
        self._lock = lock
        self.resize(size)

    def write(self, offset: int, data: bytes) -> None:
        """Overwrite bytes inside the volume."""
        if offset + len(data) > len(self.data):
            raise ValueError("a volume does not grow by writing")
        if data:
            with self._lock:
                self._touch(offset // GRAIN, ceil_div(offset + len(data), GRAIN))
                self.data[offset : offset + len(data)] = data

    def resize(self, size: int) -> None:
        """Cut or extend with zeros. Grains that come (back) into being have a generation of their own."""
        if size == len(self.data):
            return
        with self._lock:
            grains, had = ceil_div(size, GRAIN), len(self.generation)
            self._touch(min(size, len(self.data)) // GRAIN, had)
            self.generation = np.append(self.generation[:grains], np.full(max(0, grains - had), self._writes, np.int64))
            self.data[size:] = b""
            self.data.extend(bytes(size - len(self.data)))

    def _touch(self, first: int, stop: int) -> None:
        for copy in self.copies:
            copy.keep(first, stop)
        self._writes += 1
        self.generation[first:stop] = self._writes

    # --- files inside -----------------------------------------------------------------------------

    def write_file(self, path: str, offset: int, data: bytes) -> None:
        """As write(2): grows the file, in place where a block is the file's own, else into a free block."""
        with self._lock:
            file = self.files.setdefault(path, MemoryFile())
            if not data:
                return
            first, stop = offset // GRAIN, ceil_div(offset + len(data), GRAIN)
            blocks = (file.blocks + (None,) * stop)[first:stop]
            old = b"".join(map(self.read_block, blocks))
            new = old[: offset - first * GRAIN] + data + old[offset + len(data) - first * GRAIN :]
            file = MemoryFile(max(file.size, offset + len(data)), file.blocks)
            for at in range(first, stop):
                number = self._own_block(file, at)
                self.write(number * GRAIN, new[(at - first) * GRAIN : (at - first + 1) * GRAIN])
                file = file.with_blocks(at, (Block(number, State.WRITTEN),))
                self.files[path] = file

    def resize_file(self, path: str, size: int) -> None:
        """As truncate(2): what comes back after a cut reads as zeros."""
        with self._lock:
            file = self.files.setdefault(path, MemoryFile())
            torn = size % GRAIN
            if size < file.size and torn:
                self.write_file(path, size, bytes(min(GRAIN - torn, file.size - size)))
            self.files[path] = self.files[path].resized(size)

    def read_block(self, block: Block | None) -> bytes:
        """One block of a file; short at the volume's end."""
        if block is None or block.state != State.WRITTEN:
            return bytes(GRAIN)
        return bytes(self.data[block.number * GRAIN : (block.number + 1) * GRAIN])

    def _own_block(self, file: MemoryFile, at: int) -> int:
        uses = self._uses()
        block = file.blocks[at] if at < len(file.blocks) else None
        if block is not None and uses[block.number] == 1:
            return block.number
        return self.free_block(uses)

    def free_block(self, uses: Counter[int] | None = None) -> int:
        """Number of the lowest block that no file uses. Raises OSError when there is none."""
        taken = self._uses() if uses is None else uses
        for number in range(len(self.data) // GRAIN):
            if number not in taken:
                return number
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def free_bytes(self) -> int:
        """Room for files."""
        return (len(self.data) // GRAIN - len(self._uses())) * GRAIN

    def _uses(self) -> Counter[int]:
        return Counter(block.number for file in self.files.values() for block in file.blocks if block)


class Copy(msgspec.Struct, eq=False):
    """T: empty until ``take``, then its source as it was at that instant."""

    target: Target
    source: MemoryVolume | None = None
    size: int = 0
    generation: Array = msgspec.field(default_factory=lambda: np.empty(0, np.int64))
    files: dict[str, MemoryFile] = msgspec.field(default_factory=dict)
    kept: dict[int, bytes] = msgspec.field(default_factory=dict)

    def take(self, source: MemoryVolume) -> None:
        self.source, self.size = source, len(source.data)
        self.generation, self.files = source.generation.copy(), dict(source.files)
        source.copies.append(self)

    def keep(self, first: int, stop: int) -> None:
        """Take over the grains ``[first, stop)`` before the source overwrites them."""
        assert self.source is not None
        for grain in range(first, min(stop, len(self.generation))):
            self.kept.setdefault(grain, bytes(self.source.data[grain * GRAIN : (grain + 1) * GRAIN]))

    def read_block(self, block: Block | None) -> bytes:
        """One grain as it was; short at the volume's end."""
        assert self.source is not None
        if block is None or block.state != State.WRITTEN:
            return bytes(GRAIN)
        kept = self.kept.get(block.number)
        return self.source.read_block(block) if kept is None else kept


class MemoryStorage:
    """Volumes by name and copies by id: what outlives every driver object over it."""

    def __init__(self) -> None:
        self.volumes: dict[str, MemoryVolume] = {}
        self.copies: dict[str, Copy] = {}
        self.metadata: dict[str, FileMetadata] = {}  # by path
        self.writers: set[str] = set()  # paths that somebody has open for writing
        self.lock = threading.RLock()
        self._created = 0

    def create(self, name: str, size: int) -> MemoryVolume:
        """A new volume of zeros, in place of one of that name."""
        self._created += 1
        self.volumes[name] = MemoryVolume(size, f"#{self._created}", self.lock)
        return self.volumes[name]

    def ensure(self, name: str, inner_path: str | None) -> None:
        """The volume exists, and the file in it; what was missing is empty."""
        volume = self.volumes.get(name) or self.create(name, 0)
        if inner_path is not None:
            volume.files.setdefault(inner_path, MemoryFile())
