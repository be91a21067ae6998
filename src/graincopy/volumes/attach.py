"""T attached: its file system mounted where nobody sees it, and its files readable (stage 7).

Nothing is left when the process ends in whatever way: the loop device clears itself with its last user, and the mount
is in no namespace (docs/decisions/0001-detached-mounts.md).
"""

from __future__ import annotations

import errno
import os
import stat

from graincopy.core.errors import AttachFailed, SourceChanged
from graincopy.volumes import fiemap, loop, superblock
from graincopy.volumes.image import FdImage
from graincopy.volumes.mounts import mount_detached, open_beneath

# Same UUIDs as S, and no log replay: T stays as it is to the last byte.
OPTIONS: dict[str, tuple[str, ...]] = {"ext4": ("noload",), "xfs": ("norecovery", "nouuid")}
_REPLAY: dict[str, tuple[str, ...]] = {"ext4": (), "xfs": ("nouuid",)}


class AttachedFileSystem:
    """The file system of one T. Files that were opened stay readable after ``close``: the kernel counts its users."""

    def __init__(self, mount_fd: int, fs_offset: int) -> None:
        self.fs_offset = fs_offset  # bytes into T
        self._mount_fd = mount_fd

    def open_file(self, inner_path: str, path: str | None = None) -> FdImage:
        """The regular file at ``inner_path`` (relative to the file system's root), placed in bytes of T.

        No symbolic link is followed: a guest or tenant may have written them. ``path`` is how errors call the file.
        Raises SourceChanged when T has no such regular file, AttachFailed when it cannot be opened.
        """
        name = inner_path if path is None else path
        try:
            fd = open_beneath(self._mount_fd, inner_path.lstrip("/"), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise _not_opened(name, error) from error
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise SourceChanged(path=name, reason="in the target it is no regular file")
        size, offset = found.st_size, self.fs_offset
        return FdImage(fd, size, lambda: fiemap.read_placement(fd, size).shift(offset))

    def open_folder(self, inner_path: str, path: str | None = None) -> int:
        """Descriptor of the folder at ``inner_path``, as :meth:`open_file` finds files. Raises as that does."""
        name = inner_path if path is None else path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            return open_beneath(self._mount_fd, inner_path.strip("/") or ".", flags)
        except OSError as error:
            raise _not_opened(name, error) from error

    def close(self) -> None:
        """Let the mount go; may be repeated."""
        fd, self._mount_fd = self._mount_fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> AttachedFileSystem:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _not_opened(path: str, error: OSError) -> SourceChanged | AttachFailed:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return SourceChanged(path=path, reason="the target does not have it")
    if error.errno in (errno.ELOOP, errno.EXDEV, errno.EISDIR, errno.ENXIO):
        return SourceChanged(path=path, reason="in the target it is no regular file, or its path leads over a link")
    return AttachFailed(volume=path, reason=error.strerror)


def attach(device_or_file: str, fs_type: str, fs_offset: int = 0, fs_size: int = 0) -> AttachedFileSystem:
    """Mount, read-only and unseen, the ``fs_type`` that begins ``fs_offset`` bytes into T and has ``fs_size`` bytes.

    ``fs_size`` 0: to the end of T. T is looked at through a read-only loop device in any case, so nothing can write to
    it. It must have been frozen cleanly (superblock.py tells how that is seen). Raises AttachFailed.
    """
    _known(device_or_file, fs_type)
    try:
        trouble = unclean(device_or_file, fs_type, fs_offset)
        if trouble is not None:
            raise AttachFailed(volume=device_or_file, reason=trouble)
        with loop.attach_read_only(device_or_file, fs_offset, fs_size) as device:
            return AttachedFileSystem(mount_detached(fs_type, device.path, OPTIONS[fs_type]), fs_offset)
    except OSError as error:
        raise AttachFailed(volume=device_or_file, reason=error.strerror or str(error)) from error


def unclean(device_or_file: str, fs_type: str, fs_offset: int = 0) -> str | None:
    """Why the file system on T cannot be attached as it is; None when it can. Raises OSError and AttachFailed."""
    _known(device_or_file, fs_type)
    fd = os.open(device_or_file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return superblock.unclean(fd, fs_type, fs_offset)
    finally:
        os.close(fd)


def replay(throw_away: str, fs_type: str, fs_offset: int = 0, fs_size: int = 0) -> None:
    """Replay the log of the file system in ``throw_away``, a clone of a T that was not frozen cleanly.

    Never for T itself, and never for S: this writes. Raises AttachFailed.
    """
    _known(throw_away, fs_type)
    try:
        with loop.attach_writable(throw_away, fs_offset, fs_size) as device:
            os.close(mount_detached(fs_type, device.path, _REPLAY[fs_type], read_only=False))
    except OSError as error:
        raise AttachFailed(volume=throw_away, reason=error.strerror or str(error)) from error


def _known(volume: str, fs_type: str) -> None:
    if fs_type not in OPTIONS:
        raise AttachFailed(volume=volume, reason=f"{fs_type} file systems are not attached, only ext4 and XFS")
