"""The kernel's numbers and structures that the volumes layer speaks, one thin wrapper each (below stage 3).

Numbers are built as ``asm-generic/ioctl.h`` builds them (x86, ARM, RISC-V, s390); the header that defines each is
named beside it. Wrappers raise OSError as the kernel gives it; callers translate.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

import msgspec

_WRITE, _READ = 1, 2


def _number(direction: int, kind: int, number: int, size: int) -> int:
    """``_IOC()`` of asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | kind << 8 | number


# linux/fs.h
FICLONE = _number(_WRITE, 0x94, 9, 4)
FICLONERANGE = _number(_WRITE, 0x94, 13, 32)  # struct file_clone_range: s64 fd, u64 start, length, target start
FIFREEZE = _number(_READ | _WRITE, ord("X"), 119, 4)
FITHAW = _number(_READ | _WRITE, ord("X"), 120, 4)
FS_IOC_GETFLAGS = _number(_READ, ord("f"), 1, struct.calcsize("l"))
FS_IOC_SETFLAGS = _number(_WRITE, ord("f"), 2, struct.calcsize("l"))
FS_IOC_GETVERSION = _number(_READ, ord("v"), 1, struct.calcsize("l"))
FS_IOC_GETFSUUID = _number(_READ, 0x15, 0, 17)  # struct fsuuid2; since Linux 6.9
BLKGETSIZE64 = _number(_READ, 0x12, 114, struct.calcsize("N"))
FS_NOCOW_FL = 0x00800000

# linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_COLLAPSE_RANGE = 0x08
FALLOC_FL_ZERO_RANGE = 0x10
FALLOC_FL_INSERT_RANGE = 0x20

# linux/fiemap.h: struct fiemap is u64 start, u64 length, u32 flags, u32 mapped, u32 count, u32 reserved
FS_IOC_FIEMAP = _number(_READ | _WRITE, ord("f"), 11, 32)
FIEMAP_HEADER = struct.Struct("=QQLLLL")
FIEMAP_FLAG_SYNC = 0x1
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_UNKNOWN = 0x2
FIEMAP_EXTENT_DELALLOC = 0x4
FIEMAP_EXTENT_ENCODED = 0x8
FIEMAP_EXTENT_DATA_ENCRYPTED = 0x80
FIEMAP_EXTENT_NOT_ALIGNED = 0x100
FIEMAP_EXTENT_DATA_INLINE = 0x200
FIEMAP_EXTENT_DATA_TAIL = 0x400
FIEMAP_EXTENT_UNWRITTEN = 0x800
FIEMAP_EXTENT_SHARED = 0x2000

# linux/loop.h: struct loop_info64, and struct loop_config = u32 fd, u32 block size, loop_info64, u64[8]
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LOOP_INFO64 = struct.Struct("=QQQQQLLLL64s64s32sQQ")
LOOP_CONFIG = struct.Struct(f"=LL{LOOP_INFO64.size}s64s")

# xfsprogs libxfs/xfs_fs.h: struct xfs_fsop_geom_v4, 112 bytes; the version that every kernel answers
XFS_IOC_FSGEOMETRY_V4 = _number(_READ, ord("X"), 124, 112)
XFS_GEOMETRY = struct.Struct("=8L4Q16sLLlLLLLL")
XFS_FSOP_GEOM_FLAGS_REFLINK = 1 << 20

# linux/btrfs.h: struct btrfs_ioctl_fs_info_args, 1024 bytes: u64 max id, u64 devices, u8[16] fsid …
BTRFS_IOC_FS_INFO = _number(_READ, 0x94, 31, 1024)

# asm/unistd.h: the same on every architecture that uses the common table
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT, SYS_OPENAT2 = 430, 431, 432, 437

_NOT_MINE = (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class XfsGeometry(msgspec.Struct, frozen=True):
    """What a mounted XFS says about itself."""

    uuid: bytes
    reflinks: bool
    realtime: bool  # file data may lie on another device
    external_log: bool


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which the os module lacks; the modes are FALLOC_FL_*."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def clone(source_fd: int, target_fd: int) -> None:
    """Make ``target_fd`` share all of ``source_fd``'s extents (FICLONE)."""
    fcntl.ioctl(target_fd, FICLONE, source_fd)


def clone_range(source_fd: int, target_fd: int, start: int, length: int) -> None:
    """As :func:`clone` for ``length`` bytes (0: to the end) from ``start``, block-aligned, at the same place."""
    fcntl.ioctl(target_fd, FICLONERANGE, struct.pack("=qQQQ", source_fd, start, length, start))


def freeze(directory_fd: int) -> None:
    """Stop writers of the file system. EBUSY: somebody froze it before."""
    fcntl.ioctl(directory_fd, FIFREEZE, 0)


def thaw(directory_fd: int) -> None:
    """Let writers go on. EINVAL: it was not frozen."""
    fcntl.ioctl(directory_fd, FITHAW, 0)


def inode_flags(fd: int) -> int:
    """FS_*_FL flags of a file; the kernel fills 32 bits."""
    return _long(fd, FS_IOC_GETFLAGS)


def set_inode_flags(fd: int, flags: int) -> None:
    """Set all FS_*_FL flags of a file."""
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flags))


def generation(fd: int) -> int:
    """Inode generation: another number when an inode number is used again."""
    return _long(fd, FS_IOC_GETVERSION)


def _long(fd: int, request: int) -> int:
    buffer = bytearray(struct.calcsize("l"))
    fcntl.ioctl(fd, request, buffer)
    return int(struct.unpack_from("=L", buffer)[0])


def device_size(fd: int) -> int:
    """Bytes of a block device."""
    buffer = bytearray(struct.calcsize("N"))
    fcntl.ioctl(fd, BLKGETSIZE64, buffer)
    return int(struct.unpack("N", buffer)[0])


def xfs_geometry(fd: int) -> XfsGeometry | None:
    """Geometry of the XFS that ``fd`` (file or directory) lies on, or None when it is no XFS."""
    answer = _ask(fd, XFS_IOC_FSGEOMETRY_V4, XFS_GEOMETRY.size)
    if answer is None:
        return None
    fields = XFS_GEOMETRY.unpack(answer)
    return XfsGeometry(
        uuid=fields[12],
        reflinks=bool(fields[16] & XFS_FSOP_GEOM_FLAGS_REFLINK),
        realtime=fields[9] > 0,
        external_log=fields[11] == 0,
    )


def btrfs_id(fd: int) -> tuple[bytes, int] | None:
    """fsid and number of devices of the Btrfs that ``fd`` lies on, or None when it is no Btrfs."""
    answer = _ask(fd, BTRFS_IOC_FS_INFO, 1024)
    if answer is None:
        return None
    _, devices, fsid = struct.unpack_from("=QQ16s", answer)
    return fsid, devices


def fs_uuid(fd: int) -> str | None:
    """UUID (hex) of the file system that ``fd`` lies on, where it tells one."""
    xfs = xfs_geometry(fd)
    if xfs is not None:
        return xfs.uuid.hex()
    btrfs = btrfs_id(fd)
    if btrfs is not None:
        return btrfs[0].hex()
    answer = _ask(fd, FS_IOC_GETFSUUID, 17)
    return bytes(answer[1 : 1 + answer[0]]).hex() if answer else None


def _ask(fd: int, request: int, size: int) -> bytearray | None:
    """Answer of an ioctl that only some file systems know; None from the others."""
    buffer = bytearray(size)
    try:
        fcntl.ioctl(fd, request, buffer)
    except OSError as error:
        if error.errno in _NOT_MINE:
            return None
        raise
    return buffer
