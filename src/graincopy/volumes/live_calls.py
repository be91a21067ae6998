"""System calls of the live file: those that the os module lacks, or that a file system may not know (stage R)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat

from graincopy.volumes import ioctl

_NO_PUNCH = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV)
_SYNC_FILE_RANGE_WRITE = 2  # <linux/fs.h>


def set_direct(fd: int) -> bool:
    """Set O_DIRECT; False where the file system has no such thing (open(2): EINVAL)."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def start_writing_back(fd: int) -> None:
    """Keep the device busy from now on: else all of it is left to sync(). sync_file_range(2); may well do nothing."""
    ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


def punch(fd: int, offset: int, length: int) -> bool:
    """Make a hole; False where that is not possible. fallocate(2).

    A block device answers EINVAL where the range is not one of whole sectors.
    """
    try:
        ioctl.fallocate(fd, ioctl.FALLOC_FL_PUNCH_HOLE | ioctl.FALLOC_FL_KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno in _NO_PUNCH or (error.errno == errno.EINVAL and stat.S_ISBLK(os.fstat(fd).st_mode)):
            return False
        raise
    return True
