"""Files of the directory medium until they get their name: without one where that is possible, else under ``.tmp/``."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Iterator, Sequence

from graincopy.media.base import Buffer

FILE_MODE, FOLDER_MODE = 0o600, 0o700
ALIGNMENT = 4096  # bytes; enough for O_DIRECT on every file system and device
DIRECT_FROM = 1 << 20  # bytes; below that the cache costs less than waiting for the device
IOV_MAX = 1024  # buffers that one writev(2) takes, <limits.h>
_NO_NAMELESS_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}


class TemporaryFiles:
    """New files; those with a name lie in the folder ``home``, which is made when it is needed first."""

    def __init__(self, home: str, nameless: bool = True) -> None:
        self._home, self._nameless = home, nameless
        self._serial = itertools.count()

    @contextlib.contextmanager
    def new(self, folder: str) -> Iterator[tuple[int, str]]:
        """A new file that will lie in ``folder``, open for writing, and the path to link it from.

        Without a link it is gone afterwards. Raises OSError.
        """
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
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._home, FOLDER_MODE)
        while True:  # O_EXCL passes over what others, on other hosts too, are using
            path = os.path.join(self._home, f"{os.getpid()}-{next(self._serial)}")
            with contextlib.suppress(FileExistsError):
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE)
                if _lock(fd, where_unsupported=True) and _is_still(fd, path):
                    return fd, path
                os.close(fd)  # swept by somebody before it was locked

    def _sweep(self) -> None:
        """Remove what killed writers left under ``.tmp/``."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._home):
                path = os.path.join(self._home, name)
                with contextlib.suppress(OSError):  # gone, or not ours to judge
                    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                    try:
                        if _lock(fd, where_unsupported=False) and _is_still(fd, path):
                            os.unlink(path)
                    finally:
                        os.close(fd)


def write_object(fd: int, parts: Sequence[Buffer]) -> None:
    """Write every byte of ``parts``; a large first one past the page cache, where it can be.

    A pack is written once and not read again soon: copying it into the cache costs as much as sealing it, and throws
    out what others have there. O_DIRECT asks for aligned memory, offset and length (open(2)), so whatever of the
    first part is not aligned, and all the rest, takes the ordinary way.
    """
    views = [memoryview(part).cast("B") for part in parts]
    if views and len(views[0]) >= DIRECT_FROM:
        done = _write_direct(fd, views[0][: len(views[0]) // ALIGNMENT * ALIGNMENT])
        views[0] = views[0][done:]
    write_all(fd, views)


def _write_direct(fd: int, content: memoryview) -> int:
    """How many bytes of ``content`` went past the page cache; 0 where the memory or the file system is not fit."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    done = 0
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        while done < len(content):
            done += os.write(fd, content[done:]) // ALIGNMENT * ALIGNMENT
            os.lseek(fd, done, os.SEEK_SET)  # a short write may end where the next cannot begin
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return done


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


def make_folders(path: str) -> None:
    """``mkdir -p`` that survives a power cut."""
    if os.path.isdir(path):
        return
    path = path.rstrip("/")
    above = os.path.dirname(path) or "."
    make_folders(above)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, FOLDER_MODE)
    fsync_folder(above)


def fsync_folder(path: str) -> None:
    """Make the entries of the directory ``path`` durable. Raises OSError."""
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
