"""The reference driver: volumes in memory. The smallest driver that has every power; read it first.

``/dev/memory/NAME`` is a volume, ``/memory/NAME/FILE`` a file inside one. It is the oracle of the volume laws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import numpy as np
from msgspec.structs import replace

from graincopy.core.errors import RestoreNoSpace, SnapshotFailed, SourceChanged, SourceInUse, TargetLost
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement
from graincopy.core.units import ceil_div
from graincopy.model.change_map import Changed, ChangeMap, Unknown
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.model.workload import FileMetadata
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.memory_storage import GRAIN, Block, Copy, MemoryFile, MemoryStorage, MemoryVolume

_DEVICES, _FILES = "/dev/memory/", "/memory/"


class MemoryDriver(VolumeDriver):
    """Volumes of one :class:`MemoryStorage`."""

    name: ClassVar[str] = "memory"

    def __init__(self, storage: MemoryStorage) -> None:
        self._storage = storage

    def capabilities(self) -> VolumeCapabilities:
        return VolumeCapabilities(group_instant=True, change_map=True, checkpoints=True, exact=True, grain=GRAIN)

    def resolve(self, path: str) -> Claim | Refusal:
        if path.startswith(_DEVICES):
            name, inner = path.removeprefix(_DEVICES), None
        else:
            name, _, inner = path.removeprefix(_FILES).partition("/")
        volume = self._storage.volumes.get(name)
        if volume is None or (inner is not None and inner not in volume.files):
            missing = path.startswith((_DEVICES, _FILES))
            return Refusal(path=path, driver=self.name, reason="it lies on no volume in memory", missing=missing)
        claim = Claim(path=path, driver=self.name, volume=VolumeId(f"memory:{name}"), why="it is a volume in memory")
        if inner is None:
            return claim
        return Claim(
            path=path, driver=self.name, volume=claim.volume, why=claim.why, inner_path=inner, fs_type="memory"
        )

    def describe(self, volume: VolumeId) -> SourceVolume:
        found = self._volume(volume)
        return SourceVolume(id=volume, driver=self.name, size=len(found.data), incarnation=found.incarnation)

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        return PreparedGroup(tuple(self._prepare(self.describe(volume), tag) for volume in volumes))

    def _prepare(self, source: SourceVolume, tag: TargetTag) -> Target:
        place = f"{source.id}@{tag.run}"
        empty = Target(
            id=place, driver=self.name, volume=source.id, size=source.size, incarnation=source.incarnation, tag=tag
        )
        return self._storage.copies.setdefault(place, Copy(empty)).target

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        with self._storage.lock:  # writers wait here: one instant for all members
            for target in group.targets:
                copy, source = self._copy(target), self._volume(target.volume)
                if copy.source is None:
                    copy.take(source)
                    copy.target = replace(copy.target, size=copy.size, incarnation=source.incarnation)
            return tuple(self._copy(target).target for target in group.targets)

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        copy = self._copy(target)
        if copy.source is None:
            raise TargetLost(target=target.id, reason="the snapshot was never taken")
        file = MemoryFile.identity(copy.size) if claim.inner_path is None else copy.files.get(claim.inner_path)
        if file is None:
            raise SourceChanged(path=claim.path, reason="it is not in the snapshot")
        yield MemoryImage(copy, file)

    def changed(self, base: Target, now: Target) -> ChangeMap:
        new = self._copy(now)
        old = self._storage.copies.get(base.id)
        if old is None:
            return Unknown("the checkpoint is gone")
        if old.source is not new.source:
            return Unknown("the volume was recreated")
        both = min(len(old.generation), len(new.generation))
        touched = Extents.from_points(np.flatnonzero(old.generation[:both] != new.generation[:both])).to_bytes(GRAIN)
        grown = Extents.of((min(old.size, new.size), new.size))
        return Changed((touched | grown).clip(0, new.size), "generations")

    def retag(self, target: Target, tag: TargetTag) -> Target:
        copy = self._copy(target)
        copy.target = replace(copy.target, tag=tag)
        return copy.target

    def delete(self, target: Target) -> Deleted | Absent:
        with self._storage.lock:
            copy = self._storage.copies.pop(target.id, None)
            if copy is None:
                return Absent()
            if copy.source is not None:
                copy.source.copies.remove(copy)
            return Deleted()

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        return tuple(copy.target for copy in self._storage.copies.values())

    @contextmanager
    def open_for_restore(self, claim: Claim) -> Iterator[FileSink]:
        if claim.path in self._storage.writers:
            raise SourceInUse(path=claim.path, reason="somebody writes to it")
        existed = not isinstance(self.resolve(claim.path), Refusal)
        self._storage.ensure(_name_of(claim.volume), claim.inner_path)
        self._storage.writers.add(claim.path)
        try:
            yield MemorySink(self._storage, claim, existed)
        finally:
            self._storage.writers.discard(claim.path)

    def _volume(self, volume: VolumeId) -> MemoryVolume:
        try:
            return self._storage.volumes[_name_of(volume)]
        except KeyError:
            raise SnapshotFailed(volume=volume, reason="it is gone") from None

    def _copy(self, target: Target) -> Copy:
        try:
            return self._storage.copies[target.id]
        except KeyError:
            raise TargetLost(target=target.id, reason="it was deleted") from None


class MemoryImage:
    """A file as a copy shows it."""

    def __init__(self, copy: Copy, file: MemoryFile) -> None:
        self.size = file.size
        self._copy, self._file = copy, file

    def readinto(self, offset: int, buffer: memoryview) -> None:
        _fill(offset, buffer, self._file, self._copy.read_block)

    def placement(self) -> Placement:
        return self._file.placement()

    def verify(self) -> None:
        """A copy cannot change."""

    def close(self) -> None:
        """Nothing is held."""


class MemorySink:
    """The live volume, or a live file inside one."""

    def __init__(self, storage: MemoryStorage, claim: Claim, existed: bool) -> None:
        self.path = claim.path
        self.existed = existed
        self._storage, self._inner = storage, claim.inner_path
        self._volume = storage.volumes[_name_of(claim.volume)]

    @property
    def size(self) -> int:
        return self._file().size

    def _file(self) -> MemoryFile:
        return MemoryFile.identity(len(self._volume.data)) if self._inner is None else self._volume.files[self._inner]

    def readinto(self, offset: int, buffer: memoryview) -> None:
        _fill(offset, buffer, self._file(), self._volume.read_block)

    def placement(self) -> Placement:
        return self._file().placement()

    def write(self, offset: int, data: memoryview) -> None:
        if self._inner is None:
            self._volume.resize(max(self.size, offset + len(data)))
            self._volume.write(offset, bytes(data))
            return
        try:
            self._volume.write_file(self._inner, offset, bytes(data))
        except OSError as error:
            raise RestoreNoSpace(path=self.path, needed=len(data), free=self.free_bytes()) from error

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, memoryview(bytes(length)))

    def resize(self, size: int) -> None:
        if self._inner is None:
            self._volume.resize(size)
        else:
            self._volume.resize_file(self._inner, size)

    def sync(self) -> None:
        """Memory is as durable as it gets."""

    def metadata(self) -> FileMetadata:
        return self._storage.metadata.get(self.path, FileMetadata())

    def apply(self, metadata: FileMetadata) -> tuple[str, ...]:
        self._storage.metadata[self.path] = metadata
        return ()

    def free_bytes(self) -> int | None:
        return None if self._inner is None else self._volume.free_bytes()

    def remove(self) -> None:
        if self._inner is None:
            self._storage.volumes = {n: v for n, v in self._storage.volumes.items() if v is not self._volume}
        else:
            self._volume.files.pop(self._inner, None)

    def close(self) -> None:
        """Nothing is held."""


def _name_of(volume: VolumeId) -> str:
    return volume.removeprefix("memory:")


def _fill(offset: int, buffer: memoryview, file: MemoryFile, read_block: Callable[[Block | None], bytes]) -> None:
    """``buffer`` from ``offset`` of ``file``; its last block may be short, and beyond it are zeros."""
    first, stop = offset // GRAIN, ceil_div(offset + len(buffer), GRAIN)
    blocks = (file.blocks + (None,) * stop)[first:stop]
    data = b"".join(read_block(block).ljust(GRAIN, b"\0") for block in blocks)
    buffer[:] = data[offset - first * GRAIN :][: len(buffer)]
