"""From a path to the logical volume under it (stage 3): the path is its device, or a file on the file system on it.

Looks at /proc and /sys alone; what kind of volume it is, LVM is asked afterwards.
"""

from __future__ import annotations

import errno
import os
import stat

import msgspec

from graincopy.volumes.lvm_thin_report import uuid_of
from graincopy.volumes.mounts import Mount
from graincopy.volumes.stack import INNER, Broken, Device
from graincopy.volumes.topology import HostFiles


class OnVolume(msgspec.Struct, frozen=True):
    """A path and the logical volume that it lies on. ``path`` is the one that will still mean the same tomorrow."""

    path: str
    uuid: str
    size: int | None = None  # bytes of the file; None: the path is the volume
    inner_path: str | None = None
    mount: Mount | None = None


def locate(path: str, host: HostFiles) -> OnVolume | Broken:
    """How ``path`` lies on a logical volume, or why it does not. No effect; failures are answers."""
    try:
        real = host.real(path)
        found = host.stat(real)
        if stat.S_ISBLK(found.st_mode):
            return _device(real, f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}", host)
        if stat.S_ISREG(found.st_mode):
            return _file(real, found.st_size, host)
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        reason = f"{path} does not exist" if missing else f"{path} cannot be reached: {error.strerror}"
        return Broken(reason, "check the spelling" if missing else "run graincopy as root", missing=missing)
    what = "a directory" if stat.S_ISDIR(found.st_mode) else "neither a file nor a block device"
    return Broken(f"{path} is {what}", "name the disk itself")


def _device(real: str, number: str, host: HostFiles) -> OnVolume | Broken:
    volume = _volume_under(number, host, real)
    if isinstance(volume, Broken):
        return volume
    # /dev/dm-3 is another volume after the next boot; this name is not
    return OnVolume(f"{host.dev}/mapper/{_attribute(host, number, 'name')}", volume)


def _file(real: str, size: int, host: HostFiles) -> OnVolume | Broken:
    mount = host.mount_of(real)
    if mount is None:
        return Broken(f"{real} lies on a mount that is not seen from here", "run graincopy outside the container")
    volume = _volume_under(mount.device, host, mount.point)
    if isinstance(volume, Broken):
        return volume
    if mount.fs_type not in INNER:
        return Broken(
            f"the file system at {mount.point} is {mount.fs_type}, which cannot be attached from a target",
            "use ext4 or XFS on the logical volume",
        )
    node = Device(mount.device, os.path.basename(os.path.realpath(f"{host.sys}/dev/block/{mount.device}")), "disk", 0)
    trouble = host.facts(mount, os.path.dirname(real), (node,)).trouble
    if trouble:
        return Broken(f"{mount.point}: {trouble}", "keep all of the file system on the logical volume")
    return OnVolume(real, volume, size, mount.inside(real), mount)


def _volume_under(number: str, host: HostFiles, what: str) -> str | Broken:
    """UUID of the logical volume that the block device ``number`` is."""
    try:
        dm_uuid = _attribute(host, number, "uuid")
    except OSError:
        return Broken(f"{what} lies on no logical volume")
    uuid = uuid_of(dm_uuid)
    if uuid is not None:
        return uuid
    if "LVM-" in dm_uuid and not dm_uuid.startswith("LVM-"):
        return Broken(f"{what} lies on a part of a logical volume", "name the whole logical volume")
    return Broken(f"{what} lies on a device-mapper device that is no logical volume ({dm_uuid or 'it has no UUID'})")


def _attribute(host: HostFiles, number: str, name: str) -> str:
    with open(f"{host.sys}/dev/block/{number}/dm/{name}", "rb") as file:
        return os.fsdecode(file.read()).strip()
