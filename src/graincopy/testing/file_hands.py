"""What a lab does to a real file: writes of three kinds, fallocate(2), clones of ranges."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct

from graincopy.volumes import ioctl

KEEP_SIZE, PUNCH_HOLE = ioctl.FALLOC_FL_KEEP_SIZE, ioctl.FALLOC_FL_PUNCH_HOLE
COLLAPSE, ZERO, INSERT = ioctl.FALLOC_FL_COLLAPSE_RANGE, ioctl.FALLOC_FL_ZERO_RANGE, ioctl.FALLOC_FL_INSERT_RANGE
BLOCK = 4096  # bytes


def try_power(power: str, path: str) -> None:
    """Use ``power`` on the file at ``path``, which has at least eight blocks. Raises OSError where it does not work."""
    size = 4 * BLOCK
    if power == "direct":
        write_direct(path, 0, bytes(BLOCK))
    elif power == "compress":
        os.setxattr(path, "btrfs.compression", b"zstd")
        os.removexattr(path, "btrfs.compression")
    elif power.startswith("reflink"):
        clone_range(path, path, 0, size, BLOCK)
    else:
        modes = {"punch": PUNCH_HOLE | KEEP_SIZE, "zero_range": ZERO | KEEP_SIZE, "preallocate": 0}
        mode = {**modes, "collapse": COLLAPSE, "insert": INSERT}[power]
        fallocate(path, mode, BLOCK, BLOCK)


def write_buffered(path: str, offset: int, data: bytes) -> None:
    """Through the page cache. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)
    finally:
        os.close(fd)


def write_mapped(path: str, offset: int, data: bytes) -> None:
    """Through a shared mapping that is let go without msync: the pages stay dirty in the cache."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[offset : offset + len(data)] = data


def write_direct(path: str, offset: int, data: bytes) -> None:
    """Past the page cache: whole blocks of ``BLOCK`` bytes, in one call. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, len(data)) as aligned:
            aligned[:] = data
            if os.pwritev(fd, [aligned], offset) != len(data):
                raise OSError("short direct write")
    finally:
        os.close(fd)


def fallocate(path: str, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl.fallocate(fd, mode, offset, length)
    finally:
        os.close(fd)


def clone_range(source: str, target: str, source_offset: int, target_offset: int, length: int) -> None:
    """FICLONERANGE. Raises OSError."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = os.open(target, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(
                target_fd, ioctl.FICLONERANGE, struct.pack("=qQQQ", source_fd, source_offset, length, target_offset)
            )
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)
