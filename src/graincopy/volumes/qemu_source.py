"""S of the qemu driver: its name, its size, and which disk it is (stage 3)."""

from __future__ import annotations

import os
import stat

from graincopy.core.ids import VolumeId
from graincopy.volumes import ioctl, qemu_rest
from graincopy.volumes.qemu_running import Found

PREFIX = "qemu:"


def identity(path: str, kind: str, found: Found | None) -> tuple[int, str]:
    """Size and incarnation of S: another file, format or backing file shows another disk. Raises HeaderUnfit, OSError.

    ``found`` says which running QEMU has it.
    """
    here = _incarnation(path)
    if kind == "raw":
        return file_size(path), here
    if found is not None:
        return found.disk.size, f"{here}:qcow2:{found.disk.backing or ''}"
    header = qemu_rest.header_of(path)
    return header.size, f"{here}:{header.identity}"


def parts(volume: VolumeId) -> tuple[str, str]:
    """Format and path of S."""
    kind, _, path = volume.removeprefix(PREFIX).partition(":")
    return kind, path


def file_size(path: str) -> int:
    """Bytes of a file or block device. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        return ioctl.device_size(fd) if stat.S_ISBLK(found.st_mode) else found.st_size
    finally:
        os.close(fd)


def _incarnation(path: str) -> str:
    """Inode and, where the file system has one, its generation; of a device its number."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if stat.S_ISBLK(found.st_mode):
            return f"device {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        try:
            return f"{found.st_ino}.{ioctl.generation(fd)}"
        except OSError:
            return str(found.st_ino)
    finally:
        os.close(fd)
