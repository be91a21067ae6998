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
import fcntl
import itertools
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
from graincopy.model.snapshot import Absent, Created, Deleted, Existing

TEMPORARY = ".tmp"
FILE_MODE, FOLDER_MODE = 0o600, 0o700
IOV_MAX = 1024  # buffers that one writev(2) takes, <limits.h>
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_GONE = {errno.ENOENT, errno.ENOTDIR}
_NO_NAMELESS_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}


class DirectoryMedium(Medium):
    """The directory ``path`` as a medium. Raises RepositoryMissing when it is not there.

    ``nameless`` off makes it write through ``.tmp/`` even where O_TMPFILE works.
    """

    def __init__(self, path: str, *, nameless: bool = True) -> None:
        self.url = path
        self._root = os.path.join(os.getcwd(), path).rstrip("/") or "/"
        self._nameless = nameless
        self._durable = {self._root}  # folders that survive a power cut; add() of a set is atomic
        self._serial = itertools.count()
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
            _make_folders(path)
            with contextlib.suppress(PermissionError):  # not ours: then it was not made by us either
                _fsync_folder(os.path.dirname(path.rstrip("/")) or ".")
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
            with self._temporary(folder) as (fd, link_from):
                write_all(fd, parts)
                os.fsync(fd)
                created = self._link(fd, link_from, path)
            _fsync_folder(folder)
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
                _fsync_folder(os.path.dirname(path))
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
        _fsync_folder(above)  # also when it was there: whoever made it may not have come to its own fsync
        self._durable.add(folder)

    @contextlib.contextmanager
    def _temporary(self, folder: str) -> Iterator[tuple[int, str]]:
        """A new file open for writing, and the path to link it from; without a link it is gone afterwards."""
        fd = self._open_nameless(folder)
        if fd is not None:
            try:
                yield fd, f"/proc/self/fd/{fd}"
            finally:
                os.close(fd)
            return
        if next(self._serial) == 0:
            self._sweep()
        fd, path = self._open_named()
        try:
            yield fd, path
        finally:
            os.unlink(path)  # while it is locked: afterwards a sweeper may take it for left behind
            os.close(fd)

    def _open_nameless(self, folder: str) -> int | None:
        if not self._nameless:
            return None
        try:
            return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE)
        except OSError as error:
            if error.errno not in _NO_NAMELESS_FILES or not os.path.isdir(folder):
                raise
            self._nameless = False
            return None

    def _open_named(self) -> tuple[int, str]:
        """A locked file under ``.tmp/``: one that is not locked was left by a writer that died."""
        home = os.path.join(self._root, TEMPORARY)
        with contextlib.suppress(FileExistsError):
            os.mkdir(home, FOLDER_MODE)
        while True:  # O_EXCL passes over what others, on other hosts too, are using
            path = os.path.join(home, f"{os.getpid()}-{next(self._serial)}")
            with contextlib.suppress(FileExistsError):
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE)
                if _lock(fd, where_unsupported=True) and _is_still(fd, path):
                    return fd, path
                os.close(fd)  # swept by somebody before it was locked

    def _sweep(self) -> None:
        """Remove what killed writers left under ``.tmp/``."""
        home = os.path.join(self._root, TEMPORARY)
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(home):
                path = os.path.join(home, name)
                with contextlib.suppress(OSError):  # gone, or not ours to judge
                    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                    try:
                        if _lock(fd, where_unsupported=False) and _is_still(fd, path):
                            os.unlink(path)
                    finally:
                        os.close(fd)

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


def write_all(fd: int, parts: Sequence[Buffer]) -> None:
    """Write every byte of ``parts`` at the file position, however short the kernel writes."""
    views = [view for view in (memoryview(part).cast("B") for part in parts) if view.nbytes]
    index = 0
    while index < len(views):
        written = os.writev(fd, views[index : index + IOV_MAX])
        while written:
            step = min(written, views[index].nbytes)
            views[index] = views[index][step:]
            written -= step
            if not views[index].nbytes:
                index += 1


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


def _make_folders(path: str) -> None:
    """``mkdir -p`` that survives a power cut."""
    if os.path.isdir(path):
        return
    path = path.rstrip("/")
    above = os.path.dirname(path) or "."
    _make_folders(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, FOLDER_MODE)
    _fsync_folder(above)


def _fsync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(fd: int, where_unsupported: bool) -> bool:
    """Hold the file until it is closed; False when somebody else does. Some file systems have no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return where_unsupported
    return True


def _is_still(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


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
