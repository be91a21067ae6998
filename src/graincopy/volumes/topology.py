"""How a path lies on storage: file → mount → partition → loop → backing file → its mount … (stage 3).

:func:`trace` reads mountinfo and sysfs and gives a frozen :class:`Stack`; what can be snapshotted is then decided from
that value alone (:meth:`Stack.lun`, :meth:`Stack.in_place`). sysfs: Documentation/ABI/{stable,testing}/sysfs-block*.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from graincopy.volumes import ioctl, loop, superblock
from graincopy.volumes.mounts import Mount, mount_id_of, read_mounts
from graincopy.volumes.stack import Broken, Device, Facts, Floor, Lun, Stack

__all__ = [
    "Broken",
    "Device",
    "Facts",
    "Floor",
    "HostFiles",
    "Lun",
    "Stack",
    "describe_device",
    "devices_of",
    "mounts_on",
    "reflinks",
    "trace",
]

SECTOR = 512  # sysfs counts in these, whatever the device's own block size
_DEEPEST = 8  # loop devices on loop devices on …


class HostFiles:
    """Where the host is looked at. Tests give recorded trees and override the questions to live objects."""

    def __init__(self, proc: str = "/proc", sys: str = "/sys", dev: str = "/dev") -> None:
        self.proc, self.sys, self.dev = proc, sys, dev

    def real(self, path: str) -> str:
        """``path`` without symbolic links. Raises OSError."""
        return os.path.realpath(path, strict=True)

    def stat(self, path: str) -> os.stat_result:
        """Of what the real ``path`` is. Raises OSError."""
        return os.stat(path, follow_symlinks=False)

    def mount_of(self, path: str) -> Mount | None:
        """The mount that holds the real ``path``. Raises OSError."""
        wanted = mount_id_of(path)
        return next((mount for mount in read_mounts(self.proc) if mount.mount_id == wanted), None)

    def facts(self, mount: Mount, directory: str, devices: Sequence[Device]) -> Facts:
        """What the file system that holds ``directory`` says about itself. Raises OSError."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            geometry = ioctl.xfs_geometry(fd)
            reflink = reflinks(fd)
        finally:
            os.close(fd)
        return Facts(reflink, _trouble(geometry) or self._journal(mount, devices))

    def _journal(self, mount: Mount, devices: Sequence[Device]) -> str:
        """Trouble that only the super block of ext4 tells; none where it may not be read."""
        if mount.fs_type != "ext4" or not devices:
            return ""
        try:
            fd = os.open(f"{self.dev}/{devices[0].name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            found = superblock.read_ext4(fd, 0)
        finally:
            os.close(fd)
        return "its ext4 journal lies on another device" if found is not None and found.external_journal else ""


def _trouble(geometry: ioctl.XfsGeometry | None) -> str:
    if geometry is None:
        return ""
    if geometry.external_log:
        return "its XFS log lies on another device"
    return "it has an XFS realtime device" if geometry.realtime else ""


def reflinks(directory_fd: int) -> bool:
    """Whether files of this file system can be cloned; asked of the file system, nothing is tried out or left."""
    geometry = ioctl.xfs_geometry(directory_fd)
    return geometry.reflinks if geometry is not None else ioctl.btrfs_id(directory_fd) is not None


def trace(path: str, host: HostFiles | None = None) -> Stack | Broken:
    """How ``path`` lies on storage. Symbolic links are followed first. No effect; failures are answers."""
    host = host or HostFiles()
    try:
        real = host.real(path)
        found = host.stat(real)
    except OSError as error:
        return _unreachable(path, error)
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFREG:
        floors, deep = _floors(real, host)
        return Stack(real, found.st_size, (), floors, deep) if floors else deep or Broken("unknown", "", True)
    if kind == stat.S_IFBLK:
        return _trace_device(real, f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}", host)
    return Broken(f"{path} is {_KINDS.get(kind, 'no file')}", "name the disk image files themselves")


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}


def _unreachable(path: str, error: OSError) -> Broken:
    if error.errno == errno.ELOOP:
        return Broken(f"{path} is a loop of symbolic links", "name the disk image file itself")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Broken(f"{path} does not exist", "check the spelling", missing=True)
    return Broken(f"{path} cannot be reached: {error.strerror}", "run graincopy as the owner of the file or as root")


def _trace_device(path: str, number: str, host: HostFiles) -> Stack | Broken:
    devices, end = describe_device(number, host)
    if end is not None:
        return Broken(end.reason, end.remedy)
    floors, deep = _below(devices[-1], host)
    return Stack(path, devices[0].size, devices, floors, deep)


def _floors(path: str, host: HostFiles, depth: int = 0) -> tuple[tuple[Floor, ...], Broken | None]:
    """The floor that holds the real ``path`` and all below it."""
    try:
        mount = host.mount_of(path)
        if mount is None:
            return (), Broken(
                f"{path} lies on a mount that is not seen from here", "run graincopy outside the container", True
            )
        devices, end = devices_of(mount, host)
        floor = Floor(path, mount.inside(path), mount, host.facts(mount, os.path.dirname(path), devices), devices, end)
    except OSError as error:
        found = _unreachable(path, error)
        return (), Broken(found.reason, found.remedy, regular_file=error.errno == errno.EACCES)
    if end is not None:
        return (floor,), end
    below, deep = _below(devices[-1], host, depth)
    return (floor, *below), deep


def _below(device: Device, host: HostFiles, depth: int = 0) -> tuple[tuple[Floor, ...], Broken | None]:
    """The floors under a loop device; none under a disk."""
    if device.backing is None:
        return (), None
    backing = device.backing
    if backing.deleted:
        return (), Broken(
            f"the backing file {backing.path} of {device.name} was deleted",
            "bind the device to a file that exists",
            True,
        )
    if depth >= _DEEPEST:
        return (), Broken(f"more than {_DEEPEST} loop devices lie on one another", "", True)
    try:
        mode = host.stat(backing.path).st_mode
    except OSError as error:
        return (), Broken(
            f"the backing file {backing.path} of {device.name} is not there: {error.strerror}",
            "run graincopy outside the container",
            True,
        )
    if not stat.S_ISREG(mode):
        return (), Broken(f"{device.name} lies on the device {backing.path}, not on an image file", "", True)
    return _floors(backing.path, host, depth + 1)


def devices_of(mount: Mount, host: HostFiles) -> tuple[tuple[Device, ...], Broken | None]:
    """Devices under a mounted file system, topmost first, and why they end early if they do."""
    if not mount.device.startswith("0:"):
        devices, end = describe_device(mount.device, host)
        return devices, Broken(end.reason, end.remedy, True) if end else None
    if mount.fs_type != "btrfs":
        why = f"{mount.point} is {mount.fs_type}, which lies on no block device of this host"
        return (), Broken(why, "move the file to XFS or Btrfs", True)
    return _btrfs_devices(mount, host)


def _btrfs_devices(mount: Mount, host: HostFiles) -> tuple[tuple[Device, ...], Broken | None]:
    """Btrfs shows an anonymous number; its devices are listed by name below /sys/fs/btrfs/UUID."""
    name = os.path.basename(os.path.realpath(mount.source))
    for uuid in sorted(_entries(f"{host.sys}/fs/btrfs")):
        names = _entries(f"{host.sys}/fs/btrfs/{uuid}/devices")
        if name not in names:
            continue
        if len(names) > 1:
            return (), Broken(f"the Btrfs at {mount.point} spans {len(names)} devices", "use one device", True)
        number = _attribute(f"{host.sys}/fs/btrfs/{uuid}/devices/{name}/dev")
        devices, end = describe_device(number, host)
        return devices, Broken(end.reason, end.remedy, True) if end else None
    return (), Broken(f"the device of the Btrfs at {mount.point} is not known", "", True)


def describe_device(number: str, host: HostFiles) -> tuple[tuple[Device, ...], Broken | None]:
    """Block device ``major:minor`` and what lies under it down to a disk or loop device, from sysfs alone."""
    folder = os.path.realpath(f"{host.sys}/dev/block/{number}")
    name = os.path.basename(folder).replace("!", "/")
    try:
        size = int(_attribute(f"{folder}/size")) * SECTOR
        if os.path.exists(f"{folder}/partition"):
            mine = Device(number, name, "partition", size, int(_attribute(f"{folder}/start")) * SECTOR)
            parent = os.path.dirname(folder)
            below, end = describe_device(_attribute(f"{parent}/dev"), host)
            return (mine, *below), end
    except FileNotFoundError:
        return (), Broken(f"block device {number} is not known to this kernel", "", True)
    trouble = _mapped(folder, name)
    if trouble is not None:
        return (Device(number, name, "disk", size),), trouble
    if not name.startswith("loop"):
        return (Device(number, name, "disk", size),), None
    backing = loop.backing_of(name, host.sys)
    if backing is None:
        return (), Broken(f"nothing is bound to {name}", "bind it with losetup, or name the image file")
    return (Device(number, name, "loop", size, backing.offset, backing),), None


def _mapped(folder: str, name: str) -> Broken | None:
    """Device-mapper and MD devices: what they lie on is not followed."""
    if os.path.exists(f"{folder}/dm"):
        uuid = _attribute(f"{folder}/dm/uuid")
        kind = {"LVM": "an LVM volume", "mpath": "a multipath device", "CRYPT": "an encrypted device"}
        what = kind.get(uuid.split("-")[0], "a device-mapper device")
        return Broken(f"{name} is {what}, which the reflink driver does not follow", "put the file on XFS or Btrfs")
    if os.path.exists(f"{folder}/md"):
        return Broken(
            f"{name} is an MD array, which the reflink driver does not follow", "put the file on XFS or Btrfs"
        )
    return None


def mounts_on(volume: str, host: HostFiles | None = None) -> tuple[Mount, ...]:
    """Every mount whose file system lies in the image file ``volume``: what has to be frozen for one instant of it."""
    host = host or HostFiles()
    found = host.stat(volume)
    loops = loop.loops_of(found.st_dev, found.st_ino, host.sys)
    return tuple(mount for mount in read_mounts(host.proc) if _lies_on(mount, loops, host))


def _lies_on(mount: Mount, loops: Sequence[str], host: HostFiles) -> bool:
    devices, _ = devices_of(mount, host)
    return bool(devices) and devices[-1].name in loops


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _attribute(path: str) -> str:
    with open(path, "rb") as file:
        return os.fsdecode(file.read()).strip()
