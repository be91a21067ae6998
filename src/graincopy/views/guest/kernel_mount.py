"""A guest's file system mounted by the kernel where nobody sees it: read-only, without replaying its log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from graincopy.core.errors import GuestUnreadable
from graincopy.views.guest.block import seen_by_kernel
from graincopy.views.guest.partitions import Partition
from graincopy.views.source import ViewDisk
from graincopy.volumes import loop
from graincopy.volumes.mounts import mount_detached

_OPTIONS: dict[str, tuple[str, ...]] = {
    "ext4": ("noload",),
    "xfs": ("norecovery", "nouuid"),
    "btrfs": ("rescue=nologreplay",),
}
_BTRFS_IOC_FORGET_DEV = 1 << 30 | 4096 << 16 | 0x94 << 8 | 5  # linux/btrfs.h: struct btrfs_ioctl_vol_args


@contextmanager
def mounted(disk: ViewDisk, partition: Partition) -> Iterator[int]:
    """Descriptor of the mount; it ends with the block, or with this process. Raises GuestUnreadable."""
    where = f"{disk.name}@{partition.number}" if partition.number else disk.name
    if os.geteuid() != 0:
        raise GuestUnreadable(where=where, reason=f"{partition.fs_type} is read by the kernel, which takes root")
    with ExitStack() as held:
        try:
            path = held.enter_context(seen_by_kernel(disk))
            size = partition.size // 512 * 512
            device = held.enter_context(loop.attach_read_only(path, partition.start, size))
            if partition.fs_type == "btrfs":
                held.callback(_forget, device.path)
            fd = mount_detached(partition.fs_type, device.path, _OPTIONS[partition.fs_type])
        except OSError as failure:
            reason = f"the kernel does not mount it: {failure.strerror or failure}"
            raise GuestUnreadable(where=where, reason=reason) from failure
        held.callback(os.close, fd)
        yield fd


def _forget(device: str) -> None:
    """Btrfs remembers every device that it has seen; one of the same UUID could be taken for this one later."""
    with contextlib.suppress(OSError):
        control = os.open("/dev/btrfs-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            described = bytearray(
                struct.pack("=q4088s", 0, os.fsencode(device))
            )  # longer than what ioctl takes as bytes
            fcntl.ioctl(control, _BTRFS_IOC_FORGET_DEV, described)
        finally:
            os.close(control)
