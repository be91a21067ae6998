"""A directory as a medium: every object is a file, made durable before ``put`` returns.

Order of effects in ``put``, which is what makes an object whole, exclusive and durable (linkat(2), open(2)
O_TMPFILE, fsync(2)):

1. each missing folder of the name is made from the top down, and the folder *above* it fsynced;
2. the bytes go into a file without a name (O_TMPFILE) in the object's folder. Where the file system has no such
   files, into a unique name under ``.tmp/``, which is no object name: listings never show it;
3. fsync of the file;
4. link(2) to the object's name. It fails when the name exists, so of two writers one wins; nothing is ever
   renamed over anything;
5. fsync of the object's folder. Also by the loser of step 4, and by whoever deletes what is already gone: the
   winner may have died just before its own fsync, and "it exists" has to be as durable as "it was created".

Folders are never removed: a folder that others may take away cannot be remembered as durable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence

from graincopy.core.errors import (
    GraincopyError,
    MediumFailed,
    MediumFull,
    MediumReadOnly,
    ObjectDamaged,
    ObjectMissing,
    RepositoryExists,
    RepositoryMissing,
)
from graincopy.media.base import Buffer, Medium, MediumCapabilities, ObjectEntry, check_name
from graincopy.media.memory import check_range
from graincopy.media.temporary import FOLDER_MODE, TemporaryFiles, fsync_folder, make_folders, write_object
from graincopy.model.snapshot import Absent, Created, Deleted, Existing

TEMPORARY = ".tmp"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_GONE = {errno.ENOENT, errno.ENOTDIR}


class DirectoryMedium(Medium):
    """The directory ``path`` as a medium. Raises RepositoryMissing when it is not there.

    ``nameless`` off makes it write through ``.tmp/`` even where O_TMPFILE works.
    """

    def __init__(self, path: str, *, nameless: bool = True) -> None:
        self.url = path
        self._root = os.path.join(os.getcwd(), path).rstrip("/") or "/"
        self._files = TemporaryFiles(os.path.join(self._root, TEMPORARY), nameless)
        self._durable = {self._root}  # folders that survive a power cut; add() of a set is atomic
        try:
            self._identity = os.stat(os.path.join(self._root, "."))
        except OSError as error:
            if error.errno in _GONE:
                raise RepositoryMissing(url=path, reason="there is no such directory") from error
            raise MediumFailed(url=path, reason=_reason(error)) from error

    @classmethod
    def create(cls, path: str) -> DirectoryMedium:
        """Make ``path`` and the folders above it, durably. An empty directory is as good as none.

        Raises RepositoryExists when something is in it, MediumReadOnly, MediumFull or MediumFailed.
        """
        with _translated(path):
            make_folders(path)
            with contextlib.suppress(PermissionError):  # not ours: then it was not made by us either
                fsync_folder(os.path.dirname(path.rstrip("/")) or ".")
            if set(os.listdir(path)) - {"lost+found"}:
                raise RepositoryExists(url=path)
        return cls(path)

    def capabilities(self) -> MediumCapabilities:
        return MediumCapabilities(exclusive_create=True)

    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        path = self._path(name)
        folder = os.path.dirname(path)
        with _translated(self.url):
            self._make_durable(folder)
            with self._files.new(folder) as (fd, link_from):
                write_object(fd, parts)
                os.fsync(fd)
                created = self._link(fd, link_from, path)
            fsync_folder(folder)
        return Created() if created else Existing()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        check_range(offset, length)
        path = self._path(name)
        with self._reading(name):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise ObjectMissing(name=name)
                stop = max(offset, found.st_size) if length is None else offset + length
                if stop > found.st_size:
                    raise ObjectDamaged(name=name, reason=f"it has {found.st_size} bytes, {stop} were expected")
                return _read_exactly(fd, name, offset, stop - offset)
            finally:
                os.close(fd)

    def size(self, name: str) -> int | None:
        path = self._path(name)
        try:
            with self._reading(name):
                found = os.lstat(path)
        except ObjectMissing:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def list(self, prefix: str) -> Iterator[ObjectEntry]:
        if prefix:
            check_name(prefix)
        with _translated(self.url):
            self._check_root()
        return self._walk(prefix)

    def delete(self, name: str) -> Deleted | Absent:
        path = self._path(name)
        answer: Deleted | Absent = Deleted()
        with _translated(self.url):
            try:
                os.unlink(path)
            except OSError as error:
                if error.errno not in _GONE | {errno.EISDIR}:
                    raise
                self._check_root()
                answer = Absent()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                fsync_folder(os.path.dirname(path))
        return answer

    # --- writing ----------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return os.path.join(self._root, check_name(name))

    def _make_durable(self, folder: str) -> None:
        """``folder`` exists, and a power cut will not take it away. The root itself is never made here."""
        if folder in self._durable:
            return
        above = os.path.dirname(folder)
        self._make_durable(above)
        self._check_root()
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, FOLDER_MODE)
        fsync_folder(above)  # also when it was there: whoever made it may not have come to its own fsync
        self._durable.add(folder)

    def _link(self, fd: int, link_from: str, path: str) -> bool:
        """Give the file its name; False when the name was taken."""
        try:
            # src_dir_fd does not matter for an absolute path, but makes CPython call linkat(AT_SYMLINK_FOLLOW),
            # without which /proc/self/fd/N would be linked itself
            os.link(link_from, path, src_dir_fd=fd, follow_symlinks=True)
        except FileExistsError:
            winner = os.lstat(path)
            if not stat.S_ISREG(winner.st_mode):
                raise MediumFailed(url=self.url, reason=f"{path} is in the way and no file") from None
            # over NFS the answer to a link that succeeded may be lost and the repetition say "exists"
            return os.path.samestat(winner, os.fstat(fd))
        return True

    # --- reading ----------------------------------------------------------------------------------

    def _walk(self, folder: str) -> Iterator[ObjectEntry]:
        try:
            with self._reading(folder), os.scandir(os.path.join(self._root, folder)) as found:
                entries = [(entry.name, entry) for entry in found]
        except ObjectMissing:
            return
        for leaf, entry in entries:
            name = f"{folder}/{leaf}" if folder else leaf
            if not _legal(leaf):
                continue
            try:
                with self._reading(name):
                    is_folder = entry.is_dir(follow_symlinks=False)
                    found_stat = None if is_folder else entry.stat(follow_symlinks=False)
            except ObjectMissing:
                continue  # deleted since
            if found_stat is None:
                yield from self._walk(name)
            elif stat.S_ISREG(found_stat.st_mode):
                yield ObjectEntry(name=name, size=found_stat.st_size)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Errors of reading. What is not there is missing only if the root is still the one that was opened."""
        try:
            yield
        except OSError as error:
            if error.errno not in _GONE | {errno.ELOOP}:
                raise MediumFailed(url=self.url, reason=_reason(error)) from error
            with _translated(self.url):
                self._check_root()
            raise ObjectMissing(name=name) from error

    def _check_root(self) -> None:
        """An unmounted medium must neither read as an empty one nor be filled with what belongs on it."""
        if not os.path.samestat(self._identity, os.stat(self._root)):
            raise MediumFailed(url=self.url, reason="another directory is there now; was it unmounted?")


def _read_exactly(fd: int, name: str, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    pieces = [data]
    got = len(data)
    while got < length:
        data = os.pread(fd, length - got, offset + got)
        if not data:
            raise ObjectDamaged(name=name, reason=f"it ends at {offset + got} while being read")
        pieces.append(data)
        got += len(data)
    return b"".join(pieces)


def _legal(leaf: str) -> bool:
    try:
        check_name(leaf)
    except ValueError:
        return False
    return True


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Errors of writing."""
    try:
        yield
    except GraincopyError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise MediumFull(url=url) from error
        if error.errno in _FORBIDDEN:
            raise MediumReadOnly(url=url, reason=_reason(error)) from error
        raise MediumFailed(url=url, reason=_reason(error)) from error
