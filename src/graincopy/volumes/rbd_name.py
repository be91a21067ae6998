"""Which image a name or a path means (stage 3): ``rbd:POOL[/NAMESPACE]/IMAGE``, a mapped device, a file of rbd-fuse.

sysfs of the kernel client: Documentation/ABI/testing/sysfs-bus-rbd.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

import msgspec

from graincopy.core.errors import SnapshotFailed
from graincopy.core.ids import VolumeId
from graincopy.volumes.stack import INNER, Broken, Device, Stack
from graincopy.volumes.topology import HostFiles

PREFIX = "rbd:"


class ImageName(msgspec.Struct, frozen=True):
    """Where an image is: ``place`` is its pool, with the namespace where it has one."""

    pool: str
    image: str
    namespace: str = ""

    @property
    def place(self) -> str:
        """``POOL`` or ``POOL/NAMESPACE``."""
        return f"{self.pool}/{self.namespace}" if self.namespace else self.pool

    @property
    def volume(self) -> VolumeId:
        """The name of S."""
        return VolumeId(f"{PREFIX}{self.place}/{self.image}")

    def __str__(self) -> str:
        return f"{self.place}/{self.image}"


def parse(text: str) -> ImageName | None:
    """``rbd:POOL[/NAMESPACE]/IMAGE``; None when it is nothing of the kind. A snapshot cannot be named."""
    if not text.startswith(PREFIX) or "@" in text or "\0" in text:
        return None
    parts = text.removeprefix(PREFIX).split("/")
    if not all(parts) or not 2 <= len(parts) <= 3:
        return None
    return ImageName(parts[0], parts[-1], parts[1] if len(parts) == 3 else "")


def parse_place(text: str) -> tuple[str, str]:
    """``POOL[/NAMESPACE]`` → the two; the namespace may be empty."""
    pool, _, namespace = text.removeprefix(PREFIX).partition("/")
    return pool, namespace


def name_of(volume: VolumeId) -> ImageName:
    """The image that is S. Raises SnapshotFailed when it is none."""
    name = parse(volume)
    if name is None:
        raise SnapshotFailed(volume=volume, reason="it is not the name of an image")
    return name


class Located(msgspec.Struct, frozen=True):
    """An answer: ``path`` is (or lies on a file system on) a device that shows ``image``.

    ``offset`` and ``size`` as in a Lun; ``fsid`` is the cluster's where the kernel tells it.
    """

    image: ImageName
    offset: int
    size: int
    inner_path: str | None = None
    fs_type: str | None = None
    mount: str | None = None
    fsid: str = ""


def locate(stack: Stack, host: HostFiles, fuse: Mapping[str, str]) -> Located | Broken:
    """The image under ``stack``, or why there is none. ``fuse``: folders of rbd-fuse → their pools. Reads sysfs."""
    devices = stack.devices or stack.floors[0].devices
    if not stack.devices and stack.floors[0].end is not None:
        return stack.floors[0].end
    if not devices:
        return Broken(f"{stack.path} lies on no block device", regular_file=stack.regular_file)
    found = _image_under(devices[-1], host, fuse)
    if isinstance(found, Broken):
        return found
    image, fsid = found
    offset = sum(device.start for device in devices)
    whole = len(devices) == 1 and (devices[0].backing is None or not devices[0].backing.size_limit)
    size = 0 if whole else devices[0].size
    if stack.devices:
        if offset or size:
            return Broken(f"{stack.path} shows only a part of {image}", f"name the image itself: {image.volume}")
        return Located(image, 0, 0, fsid=fsid)
    return _file_system(stack, image, fsid, offset, size)


def _file_system(stack: Stack, image: ImageName, fsid: str, offset: int, size: int) -> Located | Broken:
    top = stack.floors[0]
    if top.mount.fs_type not in INNER:
        what = f"the file system at {top.mount.point} is {top.mount.fs_type}, which cannot be attached from a target"
        return Broken(what, "use ext4 or XFS on the image", True)
    if top.facts.trouble:
        return Broken(f"{top.mount.point}: {top.facts.trouble}", "keep all of the file system on the image", True)
    return Located(image, offset, size, top.inner_path, top.mount.fs_type, top.mount.point, fsid)


def _image_under(bottom: Device, host: HostFiles, fuse: Mapping[str, str]) -> tuple[ImageName, str] | Broken:
    """The image that the lowest device shows, and its cluster where that is known."""
    if bottom.kind == "loop" and bottom.backing is not None:
        folder, name = os.path.split(bottom.backing.path)
        pool, namespace = parse_place(fuse.get(folder, ""))
        return (ImageName(pool, name, namespace), "") if pool else Broken(f"{bottom.name} shows no image of Ceph")
    if not bottom.name.startswith("rbd"):
        return Broken(f"{bottom.name} is no device of Ceph")
    about = f"{host.sys}/bus/rbd/devices/{bottom.name.removeprefix('rbd')}"
    try:
        if _attribute(about, "current_snap") != "-":
            return Broken(f"{bottom.name} shows a snapshot", "name the image itself")
        image = ImageName(_attribute(about, "pool"), _attribute(about, "name"), _attribute(about, "pool_ns"))
        return image, _attribute(about, "cluster_fsid")
    except OSError as error:
        return Broken(f"the kernel does not tell which image {bottom.name} shows: {error.strerror}")


def _attribute(folder: str, name: str) -> str:
    """Without the newline that the kernel puts after it; empty where this kernel has none such."""
    try:
        with open(f"{folder}/{name}", "rb") as file:
            return os.fsdecode(file.read().removesuffix(b"\n"))
    except OSError as error:
        if error.errno == errno.ENOENT and name in ("pool_ns", "cluster_fsid"):
            return ""
        raise
