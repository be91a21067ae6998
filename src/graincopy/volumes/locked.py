"""The locked driver (stages 3-7): no snapshot at all; the file itself is T, and writers are held off while it is read.

For stopped workloads on storage that cannot snapshot. A read lease (F_SETLEASE, fcntl(2)) keeps writers out; the
kernel breaks it after 45 s (/proc/sys/fs/lease-break-time), so what was read counts only when the lease and the times
of the file are as they were *after* the last read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

from graincopy.core.errors import GraincopyError, SnapshotFailed, TargetLost
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes import ioctl, leases, live
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.fiemap import best_placement
from graincopy.volumes.image import FdImage
from graincopy.volumes.leases import ReadLease
from graincopy.volumes.topology import Broken, HostFiles, trace

_PREFIX = "locked:"


class LockedDriver(VolumeDriver):
    """Any regular file. Leases live in this object and die with the process; there is nothing on storage to find."""

    name: ClassVar[str] = "locked"

    def __init__(self, host: HostFiles | None = None) -> None:
        self._host = host or HostFiles()
        self._held: dict[str, ReadLease] = {}

    def capabilities(self) -> VolumeCapabilities:
        return VolumeCapabilities(snapshots=False)

    def resolve(self, path: str) -> Claim | Refusal:
        stack = trace(path, self._host)
        regular = stack.regular_file
        if not regular:
            reason = stack.reason if isinstance(stack, Broken) else f"{path} is a block device, which takes no lease"
            remedy = stack.remedy if isinstance(stack, Broken) else "name the disk image file itself"
            missing = isinstance(stack, Broken) and stack.missing
            return Refusal(path=path, driver=self.name, reason=reason, remedy=remedy, missing=missing)
        real = os.path.realpath(path)
        if not os.access(real, os.R_OK):
            remedy = "run graincopy as the owner of the file or as root"
            return Refusal(path=path, driver=self.name, reason=f"{path} cannot be read", remedy=remedy)
        why = "writers are held off while the file is read; nothing else would work here"
        size = os.stat(real).st_size
        return Claim(path=real, driver=self.name, volume=VolumeId(_PREFIX + real), why=why, size=size)

    def describe(self, volume: VolumeId) -> SourceVolume:
        try:
            fd = leases.open_existing(_path(volume))
        except (OSError, GraincopyError) as error:
            raise SnapshotFailed(volume=volume, reason=str(error)) from error
        try:
            found = os.fstat(fd)
            return SourceVolume(
                id=volume,
                driver=self.name,
                size=found.st_size,
                incarnation=_incarnation(fd),
                allocated=found.st_blocks * 512,
            )
        finally:
            os.close(fd)

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        """Takes the leases: from here to ``delete`` nobody writes. Raises SourceInUse when somebody does."""
        made: list[Target] = []
        fresh: list[str] = []
        try:
            for volume in volumes:
                place = f"{volume}@{tag.run}"
                if place not in self._held:
                    self._held[place] = self._hold(volume)
                    fresh.append(place)
                made.append(self._target(place, volume, tag))
        except BaseException:
            for place in fresh:
                self._let_go(place)
            raise
        return PreparedGroup(tuple(made))

    def _hold(self, volume: VolumeId) -> ReadLease:
        try:
            return ReadLease(leases.open_regular(_path(volume)), _path(volume))
        except FileNotFoundError as error:
            raise SnapshotFailed(volume=volume, reason="it is gone") from error

    def _target(self, place: str, volume: VolumeId, tag: TargetTag) -> Target:
        lease = self._held[place]
        return Target(
            id=place,
            driver=self.name,
            volume=volume,
            size=lease.start.st_size,
            incarnation=_incarnation(lease.fd),
            tag=tag,
        )

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        """Nobody has written since ``prepare``: any moment is the instant. Raises SourceWritten otherwise."""
        for target in group.targets:
            self._lease(target).check()
        return group.targets

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        lease = self._lease(target)
        lease.check()
        fd = os.dup(lease.fd)  # the very inode that the lease is on, whatever has its path by now
        with FdImage(fd, target.size, lambda: _identity(fd, target.size), lease.check) as image:
            yield image

    def _lease(self, target: Target) -> ReadLease:
        lease = self._held.get(target.id)
        if lease is None:
            raise TargetLost(target=target.id, reason="its lease ended with the process that took it")
        return lease

    def delete(self, target: Target) -> Deleted | Absent:
        return Deleted() if self._let_go(target.id) else Absent()

    def _let_go(self, place: str) -> bool:
        lease = self._held.pop(place, None)
        if lease is not None:
            lease.close()
        return lease is not None

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """None, ever: nothing is made on storage."""
        return ()

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        return live.open_sink(claim.path)


def _path(volume: VolumeId) -> str:
    return volume.removeprefix(_PREFIX)


def _incarnation(fd: int) -> str:
    """Inode and, where the file system has one, its generation."""
    found = os.fstat(fd)
    try:
        return f"{found.st_ino}.{ioctl.generation(fd)}"
    except OSError:
        return str(found.st_ino)


def _identity(fd: int, size: int) -> Placement:
    """Every range lies where it is; states as far as the file system tells them."""
    found = best_placement(fd, size)
    return Placement(size, found.starts, found.stops, found.starts, found.states)
