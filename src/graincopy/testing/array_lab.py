"""Labs over the array of our own: disks that are files on LUNs, or LUNs themselves, for the volume laws.

What a real array does for raw LUNs at the instant (it holds I/O of all members) is done here by the data plane's gate:
the lab's own writes pass it.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from graincopy.core.clock import Clock
from graincopy.core.errors import VolumeUnsupported
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.testing.array import Array
from graincopy.testing.array_plane import LoopPlane
from graincopy.testing.file_lab import FileLab
from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import NotTried
from graincopy.volumes import ioctl
from graincopy.volumes.base import VolumeDriver


def used_of(array: Array, target: Target) -> int:
    """Bytes that T alone takes, by the data plane, once everything written to the LUNs has reached the images."""
    for vdisk in array.vdisks.values():
        array.plane.flush(vdisk.number)
    return array.plane.used(array.vdisks[target.id.partition("/")[2]].number)


class ArrayFilesLab(FileLab):
    """Disks are files in ``directories``, which lie on LUNs of ``array``."""

    def __init__(
        self, array: Array, directories: Sequence[str], make_driver: Callable[[], VolumeDriver], clock: Clock, name: str
    ) -> None:
        self._array = array
        super().__init__(directories, make_driver, clock, name=name)

    def footprint(self) -> frozenset[str]:
        return self._array.footprint() | super().footprint()

    def allocated(self, target: Target) -> int:
        return used_of(self._array, target)


class ArrayLunLab(VolumeLab):
    """Every disk is a LUN, used as a device."""

    name = "flashcopy-luns"
    unit = 512
    fixed_size = True
    powers = frozenset({"buffered", "direct", "two_volumes", "one_instant", "hold"})

    def __init__(self, array: Array, plane: LoopPlane, host: str, make_driver: Callable[[], VolumeDriver]) -> None:
        super().__init__()
        self._array, self._plane, self._host, self._make_driver = array, plane, host, make_driver
        self._serial = itertools.count()
        self._disks: dict[str, str] = {}  # path → vdisk

    def driver(self) -> VolumeDriver:
        return self._make_driver()

    def footprint(self) -> frozenset[str]:
        ours = {f"vdisk {name}" for name in self._disks.values()}
        ours |= {f"host {self._host} sees {name}" for name in self._disks.values()}
        return self._array.footprint() - ours | frozenset(os.listdir(self._plane.by_id))

    def allocated(self, target: Target) -> int:
        return used_of(self._array, target)

    def why_not(self, power: str) -> str:
        return "a LUN is named by its WWN, and has a fixed size" if "volume" in power else super().why_not(power)

    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        if size % self.unit:
            raise NotTried("a LUN has whole sectors")
        name = f"lun{next(self._serial)}"
        self._array.make(name, size, self._host)
        path = self._plane.device(self._array.vdisks[name].number)
        self._disks[path] = name
        claim = self.driver().resolve(path)
        if not isinstance(claim, Claim):
            raise VolumeUnsupported(path=path, reason=claim.reason)
        return claim

    def read(self, claim: Claim) -> bytes:
        fd = os.open(claim.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, ioctl.device_size(fd), 0)
        finally:
            os.close(fd)

    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        direct = how == "direct"
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        fd = os.open(claim.path, flags)
        try:
            with self._plane.gate, mmap.mmap(-1, len(data)) as aligned:
                aligned[:] = data
                os.pwritev(fd, [aligned], offset)
                if not direct and len(data) < 4096:
                    os.fsync(fd)  # an ordered writer waits for the medium
        finally:
            os.close(fd)

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        fd = os.open(claim.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            yield
        finally:
            os.close(fd)

    def reset(self) -> None:
        super().reset()
        while self._disks:
            with contextlib.suppress(KeyError):
                self._array.drop(self._disks.popitem()[1])
