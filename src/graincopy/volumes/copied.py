"""The copied driver (stages 3-7): T is a whole copy in memory, made inside the freeze window. For small files only.

For what a running machine keeps beside its disks, firmware variables and TPM state: its QEMU has it open for writing,
so no lease can be had, and it lies where nothing can be snapshotted. A copy counts only when the times of the file are
the same before and after it; while its machine is paused, the first attempt does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

from msgspec.structs import replace

from graincopy.core.errors import GraincopyError, SnapshotFailed, TargetLost
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement
from graincopy.core.units import MIB
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes import leases, live
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.image import FdImage
from graincopy.volumes.topology import Broken, HostFiles, trace

LARGEST = 64 * MIB  # bytes; copied in some ten milliseconds, and held in memory
_ATTEMPTS = 20
_PREFIX = "copied:"


class CopiedDriver(VolumeDriver):
    """Regular files of at most :data:`LARGEST` bytes. Copies live in this object and die with the process."""

    name: ClassVar[str] = "copied"

    def __init__(self, host: HostFiles | None = None) -> None:
        self._host = host or HostFiles()
        self._copies: dict[str, tuple[Target, int]] = {}  # by id: T, and the descriptor of its content

    def capabilities(self) -> VolumeCapabilities:
        return VolumeCapabilities(copies=True)

    def resolve(self, path: str) -> Claim | Refusal:
        stack = trace(path, self._host)
        if not stack.regular_file:
            broken = stack if isinstance(stack, Broken) else None
            reason = broken.reason if broken else f"{path} is a block device"
            return Refusal(path=path, driver=self.name, reason=reason, missing=broken is not None and broken.missing)
        real = os.path.realpath(path)
        size = os.stat(real).st_size
        if size > LARGEST:
            return Refusal(path=path, driver=self.name, reason=f"it has {size} bytes, too many to be held in memory")
        why = "it is small, and is copied while its machine stands still"
        return Claim(path=real, driver=self.name, volume=VolumeId(_PREFIX + real), why=why, size=size)

    def describe(self, volume: VolumeId) -> SourceVolume:
        try:
            found = os.stat(_path(volume))
        except OSError as error:
            raise SnapshotFailed(volume=volume, reason=error.strerror) from error
        return SourceVolume(
            id=volume,
            driver=self.name,
            size=found.st_size,
            incarnation=str(found.st_ino),
            allocated=found.st_blocks * 512,
        )

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        sources = [self.describe(volume) for volume in volumes]
        return PreparedGroup(
            tuple(
                Target(
                    id=f"{source.id}@{tag.run}",
                    driver=self.name,
                    volume=source.id,
                    size=source.size,
                    incarnation=source.incarnation,
                    tag=tag,
                )
                for source in sources
            )
        )

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        return tuple(self._take(target) for target in group.targets)

    def _take(self, target: Target) -> Target:
        if target.id not in self._copies:
            copy = _copy(target.volume)
            self._copies[target.id] = replace(target, size=os.fstat(copy).st_size), copy
        return self._copies[target.id][0]

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        if target.id not in self._copies:
            raise TargetLost(target=target.id, reason="it was in the memory of the process that made it")
        fd = os.dup(self._copies[target.id][1])
        with FdImage(fd, target.size, lambda: Placement.identity(target.size)) as image:
            yield image

    def delete(self, target: Target) -> Deleted | Absent:
        found = self._copies.pop(target.id, None)
        if found is None:
            return Absent()
        os.close(found[1])
        return Deleted()

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """Those of this object: nothing is made on storage."""
        return tuple(target for target, _ in self._copies.values())

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        return live.open_sink(claim.path)


def _path(volume: VolumeId) -> str:
    return volume.removeprefix(_PREFIX)


def _copy(volume: VolumeId) -> int:
    """A descriptor of the file's content, in memory. Raises SnapshotFailed."""
    try:
        source = leases.open_existing(_path(volume))
    except (OSError, GraincopyError) as error:
        raise SnapshotFailed(volume=volume, reason=str(error)) from error
    try:
        for _ in range(_ATTEMPTS):
            before = os.fstat(source)
            if before.st_size > LARGEST:
                raise SnapshotFailed(volume=volume, reason=f"it has grown to {before.st_size} bytes")
            content = os.pread(source, before.st_size + 1, 0)
            if len(content) == before.st_size and not leases.changed(before, os.fstat(source)):
                return _held(content)
    finally:
        os.close(source)
    raise SnapshotFailed(volume=volume, reason="somebody writes to it all the time")


def _held(content: bytes) -> int:
    copy = os.memfd_create("graincopy", os.MFD_CLOEXEC)
    with open(copy, "wb", closefd=False) as file:
        file.write(content)
    return copy
