"""What a disk file needs back besides its bytes: owner, mode, extended attributes, nodatacow (stages 2 and R)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial

from graincopy.model.workload import FileMetadata
from graincopy.volumes import ioctl, leases


def read_metadata(path: str) -> FileMetadata:
    """What the regular file needs back besides its bytes.

    Raises PathUnfit, PathUnreadable, FileNotFoundError.
    """
    fd = leases.open_regular(path)
    try:
        return metadata_of(fd)
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
    if os.fstat(fd).st_size:
        raise OSError(errno.EINVAL, "it can only be set on an empty file")
    flags = ioctl.inode_flags(fd) & ~ioctl.FS_NOCOW_FL
    ioctl.set_inode_flags(fd, flags | ioctl.FS_NOCOW_FL if wanted else flags)


def _attempt(what: str, change: Callable[[], object]) -> list[str]:
    try:
        change()
    except OSError as error:
        return [f"{what} could not be set: {error.strerror}"]
    return []
