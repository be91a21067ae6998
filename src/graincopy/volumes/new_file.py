"""Stage R: restored disks as new files of a directory, nameless until they are whole, durable when they have a name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from graincopy.core.errors import OutputExists, OutputUnfit, RestoreNoSpace
from graincopy.core.units import MIB
from graincopy.volumes.base import FileSink
from graincopy.volumes.live import LiveFile, free_bytes
from graincopy.volumes.places import make_directory, sync_directory
from graincopy.volumes.qemu_sink import create_disk

_DIRECT_FROM = MIB  # bytes; below that the page cache costs less than waiting for the device
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)


class NewFiles:
    """The directory at ``path``; it and its parents are made when the first file is."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)

    def path_of(self, name: str) -> str:
        """Where the file will be."""
        return os.path.join(self._path, name)

    def below(self, path: str) -> NewFiles:
        """The folder at ``path`` in this one, which must be there when the first file is made."""
        return NewFiles(os.path.join(self._path, path))

    def refuse_existing(self, names: Sequence[str]) -> None:
        """Raises OutputExists for the first name that is taken, OutputUnfit when this is no directory."""
        if os.path.lexists(self._path) and not os.path.isdir(self._path):
            raise OutputUnfit(path=self._path, reason="it is no directory")
        for name in names:
            if os.path.lexists(self.path_of(name)):
                raise OutputExists(path=self.path_of(name))

    @contextmanager
    def new_file(self, name: str, size: int, preallocate: bool) -> Iterator[LiveFile]:
        """A file of ``size`` zero bytes that gets its name at the end of the block; never when the block fails."""
        with self._translated(name, size):
            make_directory(self._path)
            fd, part = self._open(name)
        try:
            with LiveFile(self.path_of(name), False, fd=fd, direct=size >= _DIRECT_FROM) as file:
                with self._translated(name, size):
                    os.ftruncate(fd, size)
                    if preallocate and size:
                        os.posix_fallocate(fd, 0, size)
                yield file
                file.sync()
                self._name(fd, part, name)
        finally:
            if part is not None:
                with suppress(FileNotFoundError):
                    os.unlink(part)

    @contextmanager
    def new_image(self, name: str, size: int, format: str) -> Iterator[FileSink]:
        """A disk image of ``format`` in which a guest would see ``size`` zero bytes, named at the end of the block.

        Raises OutputUnfit for a format that cannot be made here.
        """
        if format != "qcow2":
            raise OutputUnfit(path=self.path_of(name), reason=f"no image of the format {format} can be made here")
        with self._translated(name, size):
            make_directory(self._path)
        part = self.path_of(f".{name}.{os.getpid()}.part")
        try:
            with create_disk(part, size) as disk:
                yield disk
                disk.sync()
            with self._translated(name, size):
                self._name_part(part, name)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)

    def _name_part(self, part: str, name: str) -> None:
        fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # closing the image wrote to it once more
            self._name(fd, part, name)
        finally:
            os.close(fd)

    def _open(self, name: str) -> tuple[int, str | None]:
        """A file without a name; where the file system has none such, one under a name that says it is a part."""
        try:
            return os.open(self._path, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), None
        except OSError as failure:
            if failure.errno not in _NO_NAMELESS:
                raise
        part = self.path_of(f".{name}.{os.getpid()}.part")
        return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), part

    def _name(self, fd: int, part: str | None, name: str) -> None:
        """Link the whole, synced file to its name; a name that was taken meanwhile is not overwritten."""
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # src_dir_fd means nothing for an absolute path, but makes CPython call linkat(AT_SYMLINK_FOLLOW)
            os.link(part or f"/proc/self/fd/{fd}", self.path_of(name), src_dir_fd=folder, follow_symlinks=part is None)
        except FileExistsError as failure:
            raise OutputExists(path=self.path_of(name)) from failure
        finally:
            os.close(folder)
        sync_directory(self._path)

    @contextmanager
    def _translated(self, name: str, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            path = self.path_of(name)
            if failure.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RestoreNoSpace(path=path, needed=size, free=free_bytes(self._path)) from failure
            raise OutputUnfit(path=path, reason=failure.strerror) from failure
