"""How a path lies on storage, as a frozen value, and what can be snapshotted of it (stage 3). Decisions only.

``topology.trace`` makes the value; the two questions are :meth:`Stack.lun` and :meth:`Stack.in_place`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from graincopy.volumes.loop import LoopBacking
from graincopy.volumes.mounts import Mount

INNER = ("ext4", "xfs")  # file systems that can be attached from T


class Broken(msgspec.Struct, frozen=True):
    """Where the way to a volume ends, and what would let it go on.

    ``regular_file``: the path is an ordinary file all the same, so that a driver without snapshots can take it.
    ``missing``: there is nothing at the path.
    """

    reason: str
    remedy: str = ""
    regular_file: bool = False
    missing: bool = False


class Device(msgspec.Struct, frozen=True):
    """One block device. ``start`` is where it begins in the one below it: in the disk, or in the backing file."""

    number: str  # "major:minor"
    name: str  # kernel name
    kind: str  # "partition", "loop" or "disk"
    size: int  # bytes
    start: int = 0  # bytes
    backing: LoopBacking | None = None


class Facts(msgspec.Struct, frozen=True):
    """What a mounted file system says about itself. ``trouble``: why T of it could not be attached, or empty."""

    reflinks: bool = False
    trouble: str = ""


class Floor(msgspec.Struct, frozen=True):
    """One file and the file system that it lies on; ``devices`` lead down to a disk or a loop device."""

    path: str
    inner_path: str  # the file, relative to the root of its file system
    mount: Mount
    facts: Facts
    devices: tuple[Device, ...]
    end: Broken | None = None  # why the way down is not known further


class Lun(msgspec.Struct, frozen=True):
    """An answer: the path lies on a file system (or is a device) inside the image file ``volume``."""

    volume: str  # real path of the image file
    home: Floor  # where the image file lies
    offset: int  # bytes into the image
    size: int  # bytes of the file system or device; 0: to the image's end
    inner_path: str | None = None  # None: the path is the device itself
    fs_type: str | None = None
    mount: str | None = None


class Stack(msgspec.Struct, frozen=True):
    """The way of one real path down to storage, as it was when it was traced.

    ``devices`` is empty for a file. ``floors[0]`` holds the path itself (or the image below the device), each next one
    the image file below the one before.
    """

    path: str
    size: int  # bytes
    devices: tuple[Device, ...]
    floors: tuple[Floor, ...]
    deep: Broken | None = None  # the way ended before a disk was reached

    @property
    def regular_file(self) -> bool:
        """It is a file, not a device."""
        return not self.devices

    def lun(self) -> Lun | Broken:
        """The LUN image under the path's own file system (or device), when T of it can be made and attached."""
        if self.devices:
            return self._device_lun()
        top = self.floors[0]
        if top.end is not None:
            return top.end
        if top.devices[-1].kind != "loop":
            return Broken(
                f"{top.mount.point} lies on the disk {top.devices[-1].name}, not on a LUN image", regular_file=True
            )
        if top.mount.fs_type not in INNER:
            return Broken(
                f"the file system at {top.mount.point} is {top.mount.fs_type}, which cannot be attached from a target",
                "use ext4 or XFS inside the LUN",
                True,
            )
        if top.facts.trouble:
            return Broken(f"{top.mount.point}: {top.facts.trouble}", "keep all of the file system on the LUN", True)
        below = self._image(top.devices, 1)
        if isinstance(below, Broken):
            return below
        offset, size = span(top.devices)
        return Lun(below.path, below, offset, size, top.inner_path, top.mount.fs_type, top.mount.point)

    def _device_lun(self) -> Lun | Broken:
        if self.devices[-1].kind != "loop":
            return Broken(
                f"{self.devices[-1].name} is a disk that no driver can snapshot", "name the disk image files on it"
            )
        below = self._image(self.devices, 0)
        if isinstance(below, Broken):
            return below
        offset, size = span(self.devices)
        return Lun(below.path, below, offset, size)

    def _image(self, devices: Sequence[Device], floor: int) -> Floor | Broken:
        """The floor that holds the image below ``devices``, if the image can be cloned there."""
        backing = devices[-1].backing
        if backing is None or floor >= len(self.floors):
            return self.deep or Broken(f"nothing is bound to {devices[-1].name}", regular_file=self.regular_file)
        below = self.floors[floor]
        if below.facts.reflinks:
            return below
        refused = _no_reflink(below)
        return Broken(f"its LUN image {below.path}: {refused.reason}", refused.remedy, self.regular_file)

    def in_place(self) -> Floor | Broken:
        """The path's own floor, when the file can be cloned beside itself."""
        if self.devices:
            return Broken(f"{self.path} is a block device", "name the disk image files themselves")
        return self.floors[0] if self.floors[0].facts.reflinks else _no_reflink(self.floors[0])


def _no_reflink(floor: Floor) -> Broken:
    fs_type = floor.mount.fs_type
    if fs_type == "xfs":
        reason, remedy = "this XFS was made without reflink", "make it anew with mkfs.xfs -m reflink=1"
    else:
        reason, remedy = f"{fs_type} at {floor.mount.point} cannot clone files", "move the file to XFS or Btrfs"
    return Broken(reason, remedy, regular_file=True)


def span(devices: Sequence[Device]) -> tuple[int, int]:
    """Where the topmost of ``devices`` lies in the backing file of the loop device that ends them: offset, size.

    Bytes; size 0 means to the end.
    """
    offset = sum(device.start for device in devices)
    bottom = devices[-1]
    limited = len(devices) > 1 or (bottom.backing is not None and bottom.backing.size_limit)
    return offset, devices[0].size if limited else 0
