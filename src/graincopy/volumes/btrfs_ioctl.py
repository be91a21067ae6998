"""What the btrfs driver asks of the kernel (stages 3-5): who a subvolume is, a snapshot of it, and its end.

Numbers and structures: linux/btrfs.h, linux/btrfs_tree.h. The calls go through libc, not through :mod:`fcntl`, which
holds the interpreter while an argument of more than 1 KiB is in the kernel: a snapshot waits for the disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

import msgspec

ROOT_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID: the root directory of every subvolume has it, and no other file

_MAGIC = 0x94
_ARGS = 4096  # bytes of struct btrfs_ioctl_vol_args and of btrfs_ioctl_vol_args_v2
_V1 = struct.Struct("=q4088s")  # fd, name
_V2 = struct.Struct("=qQQ32s4040s")  # fd, transid, flags, unused, name
_READ_ONLY = 1 << 1  # BTRFS_SUBVOL_RDONLY, as an argument
_SNAP_DESTROY = 1 << 30 | _ARGS << 16 | _MAGIC << 8 | 15
_SNAP_CREATE_V2 = 1 << 30 | _ARGS << 16 | _MAGIC << 8 | 23
_SUBVOL_SETFLAGS = 1 << 30 | 8 << 16 | _MAGIC << 8 | 26

# struct btrfs_ioctl_get_subvol_info_args: id, name, parent, dirid, generation, flags, uuid, parent uuid, received uuid,
# four transaction ids, four times, reserved
_INFO = struct.Struct("=Q256sQQQQ16s16s16s4Q64s64s")
_GET_SUBVOL_INFO = 2 << 30 | _INFO.size << 16 | _MAGIC << 8 | 60
_ROOT_READ_ONLY = 1 << 0  # BTRFS_ROOT_SUBVOL_RDONLY, as a flag of the root


class Subvolume(msgspec.Struct, frozen=True):
    """A subvolume as the kernel has it. UUIDs are hex; zeros where there is none."""

    number: int
    uuid: str
    parent_uuid: str  # of the subvolume that this one is a snapshot of
    read_only: bool
    made_at: int  # the transaction that made it


def subvolume_of(fd: int) -> Subvolume:
    """The subvolume that ``fd`` lies in. Raises OSError; ENOTTY where it is no Btrfs, or a kernel before 4.18."""
    buffer = bytearray(_INFO.size)
    fcntl.ioctl(fd, _GET_SUBVOL_INFO, buffer)
    number, _, _, _, _, flags, uuid, parent, _, _, made_at, *_ = _INFO.unpack(buffer)
    return Subvolume(number, uuid.hex(), parent.hex(), bool(flags & _ROOT_READ_ONLY), made_at)


def snapshot(source_fd: int, folder_fd: int, name: str) -> None:
    """Make the read-only snapshot ``name``, in the folder, of the subvolume whose root directory is ``source_fd``.

    Durable on return: the kernel commits it. Raises OSError; EEXIST when the name is taken.
    """
    _call(folder_fd, _SNAP_CREATE_V2, _V2.pack(source_fd, 0, _READ_ONLY, b"", _name(name, 4040)))


def destroy(folder_fd: int, name: str) -> None:
    """Take the subvolume ``name`` out of the folder; its space comes back later. Durable after fsync of the folder.

    Raises OSError; ENOENT when it is not there, EPERM where the user may not, ENOTEMPTY when it holds others.
    """
    _call(folder_fd, _SNAP_DESTROY, _V1.pack(0, _name(name, 4088)))


def make_writable(fd: int) -> None:
    """Let the read-only snapshot whose root directory is ``fd`` be written. Raises OSError."""
    fcntl.ioctl(fd, _SUBVOL_SETFLAGS, struct.pack("=Q", 0))


def sync_file_system(fd: int) -> None:
    """syncfs(2): what is dirty now is on disk on return. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd):
        _raise()


def _name(name: str, room: int) -> bytes:
    found = os.fsencode(name)
    if len(found) >= room:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
    return found


def _call(fd: int, request: int, argument: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(argument, len(argument))
    if libc.ioctl(fd, ctypes.c_ulong(request), buffer):
        _raise()


def _raise() -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))
