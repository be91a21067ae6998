"""Loop devices: T's bytes as a read-only block device that nobody has to clean up after (stage 7).

Device interface: linux/loop.h, Documentation/ABI/testing/sysfs-block-loop. AUTOCLEAR makes the kernel unbind the
device with its last user, so that SIGKILL leaves none behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from types import TracebackType

import msgspec

from graincopy.volumes import ioctl

_ATTEMPTS = 64
_DELETED = " (deleted)"


class LoopBacking(msgspec.Struct, frozen=True):
    """What a loop device shows: ``path`` from byte ``offset``, ``size_limit`` bytes of it (0: to the end)."""

    path: str
    offset: int = 0
    size_limit: int = 0
    deleted: bool = False


class LoopDevice:
    """A bound loop device, held open. ``close`` lets it go; the kernel unbinds it when nobody else uses it."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.path = f"/dev/{name}"
        self._fd = fd

    @property
    def fd(self) -> int:
        """Descriptor of the open device; -1 once it is closed."""
        return self._fd

    def close(self) -> None:
        """May be repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> LoopDevice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def attach_read_only(path: str, offset: int = 0, size_limit: int = 0) -> LoopDevice:
    """Bind ``path`` (file or block device) from byte ``offset``, ``size_limit`` bytes (0: to the end), read-only.

    No partition scan. Raises OSError; EBUSY when no free device could be had.
    """
    return _attach(path, os.O_RDONLY, ioctl.LO_FLAGS_READ_ONLY, offset, size_limit)


def attach_writable(path: str, offset: int = 0, size_limit: int = 0) -> LoopDevice:
    """As :func:`attach_read_only` but writable: for throw-away clones alone."""
    return _attach(path, os.O_RDWR, 0, offset, size_limit)


def _attach(path: str, mode: int, flags: int, offset: int, size_limit: int) -> LoopDevice:
    backing = os.open(path, mode | os.O_CLOEXEC)
    try:
        info = (0, 0, 0, offset, size_limit, 0, 0, 0, flags | ioctl.LO_FLAGS_AUTOCLEAR, b"", b"", b"", 0, 0)
        configuration = ioctl.LOOP_CONFIG.pack(backing, 0, ioctl.LOOP_INFO64.pack(*info), b"")
        return _bind(mode, configuration)
    finally:
        os.close(backing)


def _bind(mode: int, configuration: bytes) -> LoopDevice:
    """Take a free device; others may take it between the two calls."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            name = f"loop{fcntl.ioctl(control, ioctl.LOOP_CTL_GET_FREE)}"
            device = _open_node(name, mode)
            try:
                fcntl.ioctl(device, ioctl.LOOP_CONFIGURE, configuration)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return LoopDevice(name, device)
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device could be had")


def _open_node(name: str, mode: int) -> int:
    """The device's node, opened; made first where nobody (devtmpfs, udev) did."""
    path = f"/dev/{name}"
    try:
        return os.open(path, mode | os.O_CLOEXEC)
    except FileNotFoundError:
        major, minor = _read(f"/sys/block/{name}/dev").split(":")
        with contextlib.suppress(FileExistsError):
            os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(int(major), int(minor)))
        return os.open(path, mode | os.O_CLOEXEC)


def backing_of(device_name: str, sys_root: str = "/sys") -> LoopBacking | None:
    """What the loop device ``device_name`` ("loop0") shows, from sysfs; None when nothing is bound to it."""
    folder = f"{sys_root}/block/{device_name}/loop"
    try:
        path = _read(f"{folder}/backing_file")
        offset, limit = int(_read(f"{folder}/offset")), int(_read(f"{folder}/sizelimit"))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # ENODEV: it is being unbound at this moment
            raise
        return None
    deleted = path.endswith(_DELETED) and not os.path.lexists(path)
    return LoopBacking(path.removesuffix(_DELETED) if deleted else path, offset, limit, deleted)


def loops_of(device: int, inode: int, sys_root: str = "/sys") -> tuple[str, ...]:
    """Names of the bound loop devices whose backing file is (st_dev ``device``, st_ino ``inode``)."""
    return tuple(
        name
        for name in sorted(os.listdir(f"{sys_root}/block"))
        if name.startswith("loop") and _shows(name, sys_root, device, inode)
    )


def _shows(name: str, sys_root: str, device: int, inode: int) -> bool:
    backing = backing_of(name, sys_root)
    if backing is None:
        return False
    try:
        found = os.stat(backing.path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (device, inode)


def is_read_only(device_name: str, sys_root: str = "/sys") -> bool:
    """Whether the kernel refuses writes to this block device."""
    return _read(f"{sys_root}/block/{device_name}/ro") == "1"


def _read(path: str) -> str:
    """A sysfs attribute without the newline that the kernel puts after it (names may hold others)."""
    with open(path, "rb") as file:
        return os.fsdecode(file.read().removesuffix(b"\n"))
