"""What a disk file needs back besides its bytes: owner, mode, extended attributes, nodatacow (stages 2 and R)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial

from graincopy.core.errors import PathUnfit
from graincopy.model.workload import FileMetadata
from graincopy.volumes import ioctl, leases


def read_metadata(path: str) -> FileMetadata:
    """What the regular file needs back besides its bytes; nothing for a block device.

    Raises PathUnfit, PathUnreadable, FileNotFoundError.
    """
    fd = leases.open_existing(path)
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFBLK):
            raise PathUnfit(path=path, what="neither a file nor a block device")
        return metadata_of(fd) if kind == stat.S_IFREG else FileMetadata()
    finally:
        os.close(fd)


def metadata_of(fd: int) -> FileMetadata:
    """:func:`read_metadata` of an open file. Raises OSError."""
    found = os.fstat(fd)
    return FileMetadata(
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        xattrs=_xattrs(fd),
        nodatacow=_nodatacow(fd),
    )


def _xattrs(fd: int) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(fd, name) for name in sorted(os.listxattr(fd))}
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return {}
        raise


def _nodatacow(fd: int) -> bool:
    try:
        return bool(ioctl.inode_flags(fd) & ioctl.FS_NOCOW_FL)
    except OSError:  # a file system without inode flags
        return False


def apply_metadata(fd: int, metadata: FileMetadata) -> tuple[str, ...]:
    """Give the file ``fd`` what ``metadata`` says; in words, what could not be given.

    Labels (security.*) often belong to the system's policy, owners to root: a restore does not fail on them. Whether a
    file is nodatacow can only be set while it is empty, so do this before the first write into a new file.
    """
    found = os.fstat(fd)
    failed: list[str] = []
    if _nodatacow(fd) != metadata.nodatacow:
        failed += _attempt("nodatacow", lambda: _set_nodatacow(fd, metadata.nodatacow))
    if (found.st_uid, found.st_gid) != (metadata.uid, metadata.gid):
        failed += _attempt(f"owner {metadata.uid}:{metadata.gid}", lambda: os.fchown(fd, metadata.uid, metadata.gid))
    present = _xattrs(fd)
    for name, value in metadata.xattrs.items():
        if present.get(name) != value:
            failed += _attempt(f"extended attribute {name}", partial(os.setxattr, fd, name, value))
    failed += _attempt(f"mode {metadata.mode:o}", lambda: os.fchmod(fd, metadata.mode))
    return tuple(failed)


def _set_nodatacow(fd: int, wanted: bool) -> None:
    found = os.fstat(fd)
    if found.st_blocks or _has_data(fd):
        raise OSError(errno.EINVAL, "it can only be set on an empty file")
    flags = ioctl.inode_flags(fd) & ~ioctl.FS_NOCOW_FL
    os.ftruncate(fd, 0)  # Btrfs wants its size to be 0, too
    try:
        ioctl.set_inode_flags(fd, flags | ioctl.FS_NOCOW_FL if wanted else flags)
    finally:
        os.ftruncate(fd, found.st_size)


def _has_data(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise
    return True


def _attempt(what: str, change: Callable[[], object]) -> list[str]:
    try:
        change()
    except OSError as error:
        return [f"{what} could not be set: {error.strerror}"]
    return []
