"""Labs over the reference driver: disks that are volumes, or files inside volumes. The smallest labs; read first.

The file operations move blocks about as a file system does, so that a range can change without a volume byte being
written (insert, reflink, ``zero_range`` which keeps the block and marks it unwritten) and the other way round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from graincopy.core.placement import State
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.testing.lab import OPERATIONS, VolumeLab
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.memory import MemoryDriver
from graincopy.volumes.memory_storage import GRAIN, Block, MemoryFile, MemoryStorage, MemoryVolume

_COMMON = {"buffered", "truncate", "two_volumes", "one_instant", "recreate_volume", "rename_volume", "remove", "hold"}
ROOM = 16 << 20  # bytes of a volume that files lie in


class MemoryLab(VolumeLab):
    """Every disk is a volume of its own."""

    name = "memory"
    block = GRAIN
    patience = 0.0
    powers = frozenset(_COMMON | {"resize_volume"})

    def __init__(self, make_driver: Callable[[MemoryStorage], VolumeDriver] = MemoryDriver) -> None:
        super().__init__()
        self.storage = MemoryStorage()
        self._make_driver = make_driver
        self._serial = itertools.count()

    def driver(self) -> VolumeDriver:
        return self._make_driver(self.storage)

    def footprint(self) -> frozenset[str]:
        return frozenset(self.storage.copies)

    def allocated(self, target: Target) -> int:
        return len(self.storage.copies[target.id].kept) * GRAIN

    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        name = f"disk{next(self._serial)}"
        self.storage.create(name, size)
        return self._claim(f"/dev/memory/{name}")

    def read(self, claim: Claim) -> bytes:
        return bytes(self._volume(claim).data)

    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        volume = self._volume(claim)
        if offset + len(data) > len(volume.data):
            volume.resize(offset + len(data))
        volume.write(offset, data)

    def truncate(self, claim: Claim, size: int) -> None:
        self._volume(claim).resize(size)

    def remove(self, claim: Claim) -> None:
        del self.storage.volumes[self._name(claim)]

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        self.storage.writers.add(claim.path)
        yield
        self.storage.writers.discard(claim.path)

    def resize_volume(self, claim: Claim, size: int) -> None:
        self._volume(claim).resize(size)

    def recreate_volume(self, claim: Claim) -> None:
        old = self._volume(claim)
        self.storage.create(self._name(claim), len(old.data)).files = dict.fromkeys(old.files, MemoryFile())

    def rename_volume(self, claim: Claim) -> Claim:
        name = self._name(claim)
        self.storage.volumes[f"{name}-new"] = self.storage.volumes.pop(name)
        return self._claim(claim.path.replace(name, f"{name}-new"))

    def reset(self) -> None:
        super().reset()
        self.storage.volumes.clear()

    def _claim(self, path: str) -> Claim:
        claim = self.driver().resolve(path)
        assert isinstance(claim, Claim)
        return claim

    def _name(self, claim: Claim) -> str:
        return claim.volume.removeprefix("memory:")

    def _volume(self, claim: Claim) -> MemoryVolume:
        return self.storage.volumes[self._name(claim)]


class MemoryFilesLab(MemoryLab):
    """Disks are files inside two volumes, with everything that can happen to files."""

    name = "memory-files"
    powers = frozenset(_COMMON | set(OPERATIONS))

    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        name, file = f"volume{volume}", f"disk{next(self._serial)}.raw"
        if name not in self.storage.volumes:
            self.storage.create(name, ROOM)
        self.storage.volumes[name].files[file] = MemoryFile(size)
        return self._claim(f"/memory/{name}/{file}")

    def read(self, claim: Claim) -> bytes:
        volume, file = self._volume(claim), self._file(claim)
        blocks = file.blocks + (None,) * (-(-file.size // GRAIN))
        return b"".join(map(volume.read_block, blocks))[: file.size]

    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        self._volume(claim).write_file(self._path(claim), offset, data)

    def truncate(self, claim: Claim, size: int) -> None:
        self._volume(claim).resize_file(self._path(claim), size)

    def remove(self, claim: Claim) -> None:
        del self._volume(claim).files[self._path(claim)]

    def punch(self, claim: Claim, offset: int, length: int) -> None:
        self._clear(claim, offset, length, lambda block: None)

    def zero_range(self, claim: Claim, offset: int, length: int) -> None:
        self._clear(claim, offset, length, lambda block: block and Block(block.number, State.UNWRITTEN))

    def _clear(self, claim: Claim, offset: int, length: int, mark: Callable[[Block | None], Block | None]) -> None:
        """Zeros into the torn blocks at both ends; whole blocks are only marked."""
        stop = min(offset + length, self._file(claim).size)
        first, last = -(-offset // GRAIN), stop // GRAIN
        if first >= last:
            self.write(claim, offset, bytes(max(0, stop - offset)))
            return
        self.write(claim, offset, bytes(first * GRAIN - offset))
        self.write(claim, last * GRAIN, bytes(stop - last * GRAIN))
        self._put(claim, first, tuple(map(mark, self._blocks(claim, first, last))))

    def collapse(self, claim: Claim, offset: int, length: int) -> None:
        file = self._file(claim)
        blocks = self._blocks(claim, 0, offset // GRAIN) + file.blocks[(offset + length) // GRAIN :]
        self._replace(claim, MemoryFile(file.size - length, blocks))

    def insert(self, claim: Claim, offset: int, length: int) -> None:
        file, at = self._file(claim), offset // GRAIN
        blocks = self._blocks(claim, 0, at) + (None,) * (length // GRAIN) + file.blocks[at:]
        self._replace(claim, MemoryFile(file.size + length, blocks))

    def preallocate(self, claim: Claim, offset: int, length: int) -> None:
        volume = self._volume(claim)
        if offset + length > self._file(claim).size:
            self.truncate(claim, offset + length)
        for at in range(offset // GRAIN, -(-(offset + length) // GRAIN)):
            if self._blocks(claim, at, at + 1) == (None,):
                self._put(claim, at, (Block(volume.free_block(), State.UNWRITTEN),))

    def reflink_within(self, claim: Claim, source: int, target: int, length: int) -> None:
        self.reflink_from(claim, claim, source, target, length)

    def reflink_from(self, claim: Claim, donor: Claim, source: int, target: int, length: int) -> None:
        self._put(claim, target // GRAIN, self._blocks(donor, source // GRAIN, (source + length) // GRAIN))

    def rename_over(self, claim: Claim, data: bytes) -> None:
        volume = self._volume(claim)
        volume.write_file("new", 0, data)
        volume.files[self._path(claim)] = volume.files.pop("new")

    def _path(self, claim: Claim) -> str:
        assert claim.inner_path is not None
        return claim.inner_path

    def _file(self, claim: Claim) -> MemoryFile:
        return self._volume(claim).files[self._path(claim)]

    def _blocks(self, claim: Claim, first: int, stop: int) -> tuple[Block | None, ...]:
        return (self._file(claim).blocks + (None,) * stop)[first:stop]

    def _put(self, claim: Claim, at: int, blocks: tuple[Block | None, ...]) -> None:
        self._replace(claim, self._file(claim).with_blocks(at, blocks))

    def _replace(self, claim: Claim, file: MemoryFile) -> None:
        self._volume(claim).files[self._path(claim)] = file
