"""Files out of a guest's file system into a directory of this host, or one file into a stream.

Names and links come from the guest and are hostile: every name is made below the descriptor of the directory that it
belongs to, exclusively, and no link is ever followed (openat2(2): RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS). Links are
recreated as they are, wherever they lead. Device nodes, setuid, setgid and file capabilities come only when asked for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from graincopy.core.errors import GuestUnreadable, OutputExists, OutputUnfit, RestoreNoSpace
from graincopy.views.guest import wire
from graincopy.views.guest.metadata import Allowed, Extracted, Metadata
from graincopy.volumes.mounts import open_beneath

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NODES = {"character": stat.S_IFCHR, "block": stat.S_IFBLK}
_NO_SUCH_SIZE = (errno.EFBIG, errno.EINVAL)  # what a file system says of a file that is too large for it
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ZEROS = bytes(1 << 16)


def extract_into(answers: Iterator[wire.Answer], directory: str, name: bytes, allowed: Allowed) -> Extracted:
    """Write a tree below ``directory``, its top as ``name``; with an empty name its entries directly into it.

    ``answers`` begin with the Entry of the top. Everything is durable on return. Raises OutputExists when something
    is in the way, OutputUnfit, RestoreNoSpace.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as failure:
        raise OutputUnfit(path=directory, reason=failure.strerror) from failure
    try:
        writer = _Writer(top, directory, name, allowed)
        try:
            writer.run(answers)
        except OSError as failure:
            if failure.errno in _NO_ROOM:
                raise RestoreNoSpace(path=directory, needed="some", free=0) from failure
            raise OutputUnfit(path=directory, reason=failure.strerror or str(failure)) from failure
        finally:
            writer.close()
        _sync(top)
        return writer.done
    finally:
        os.close(top)


def extract_stream(answers: Iterator[wire.Answer], write: Callable[[bytes], object], where: str) -> int:
    """The bytes of one file, called ``where``, to ``write``; how many.

    Raises GuestUnreadable when it cannot be read to its end.
    """
    written = 0
    for one in answers:
        if isinstance(one, wire.Data):
            write(one.data)
            written += len(one.data)
        elif isinstance(one, wire.Hole):
            _write_zeros(write, one.length)
            written += one.length
        elif isinstance(one, wire.Problem | wire.FileEnd):
            reason = one.reason if isinstance(one, wire.Problem) else one.problem
            if reason:
                raise GuestUnreadable(where=where, reason=f"after {written} bytes: {reason}")
    return written


def _write_zeros(write: Callable[[bytes], object], length: int) -> None:
    zeros = bytes(min(length, wire.PIECE))
    while length:
        part = min(length, len(zeros))
        write(zeros[:part])
        length -= part


@dataclass(slots=True)
class _Folder:
    """A directory that is being filled: what it gets when everything in it is there."""

    path: bytes
    fd: int
    entry: wire.Entry | None


class _Writer:
    """Turns answers into files. Holds one descriptor per directory on the way down to where it is."""

    def __init__(self, top: int, directory: str, name: bytes, allowed: Allowed) -> None:
        self.done = Extracted()
        self._directory, self._name, self._allowed = directory, name, allowed
        self._top, self._metadata = top, Metadata(self.done, allowed)
        self._folders = [_Folder(b"", os.dup(top), None)]

    def run(self, answers: Iterator[wire.Answer]) -> None:
        """Until the answers end."""
        for one in answers:
            if isinstance(one, wire.Entry):
                self._entry(one, answers)
            elif isinstance(one, wire.Problem):
                self.done.problem(one.path, one.reason)
        while len(self._folders) > 1:
            self._leave()

    def close(self) -> None:
        """Let all directories go."""
        for folder in self._folders:
            os.close(folder.fd)
        self._folders.clear()

    def _entry(self, entry: wire.Entry, answers: Iterator[wire.Answer]) -> None:
        """One entry, and when it is a file the data that follows, even when it is not wanted."""
        path = b"/".join(filter(None, (self._name, entry.path)))
        if not path:
            return  # the directory itself was there before
        parent, _, name = path.rpartition(b"/")
        has_data = entry.kind == "file" and entry.same_as is None
        folder = self._into(parent)
        if folder is None or not wire.is_name(name):
            self.done.problem(entry.path, "its directory could not be made")
            self._skip(answers if has_data else iter(()))
        elif has_data:
            self._file(folder, name, entry, answers)
        else:
            self._other(folder, name, path, entry)

    def _into(self, parent: bytes) -> _Folder | None:
        """Leave directories until the one at ``parent`` is the innermost; None when it is not on the way."""
        while self._folders[-1].path != parent:
            inner = self._folders[-1].path
            if len(self._folders) == 1 or not (inner == b"" or parent == inner or not parent.startswith(inner + b"/")):
                return None
            self._leave()
        return self._folders[-1]

    def _leave(self) -> None:
        folder = self._folders.pop()
        try:
            if folder.entry is not None:
                self._metadata.give(folder.fd, folder.entry)
        finally:
            os.close(folder.fd)

    # --- files ------------------------------------------------------------------------------------

    def _file(self, folder: _Folder, name: bytes, entry: wire.Entry, answers: Iterator[wire.Answer]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, 0o600, dir_fd=folder.fd)
        except OSError as failure:
            self._refused(entry, failure)
            self._skip(answers)
            return
        try:
            problem = self._fill(fd, entry.size, answers)
            if not problem:
                self._metadata.give(fd, entry)
        finally:
            os.close(fd)
        if problem:
            os.unlink(name, dir_fd=folder.fd)
            self.done.problem(entry.path, problem)
        else:
            self.done.files += 1
            self.done.size += entry.size

    def _fill(self, fd: int, size: int, answers: Iterator[wire.Answer]) -> str:
        """The data that follows, ``size`` bytes of it; "" when it is whole, else why not."""
        at, trouble = 0, ""
        for one in answers:
            if isinstance(one, wire.FileEnd):
                short = "" if at == size else "its reader lost the thread"
                return one.problem or trouble or short or _tried(lambda: os.ftruncate(fd, size))
            if not isinstance(one, wire.Data | wire.Hole):
                return "its reader lost the thread"
            start, at = at, at + (len(one.data) if isinstance(one, wire.Data) else one.length)
            if at > size:
                trouble = "it is longer than it says"
            elif isinstance(one, wire.Data):
                trouble = trouble or _tried(partial(self._lay, fd, one.data, start))
        return "its reader ended"

    def _lay(self, fd: int, data: bytes, offset: int) -> None:
        self.done.written += _write_sparse(fd, data, offset)

    @staticmethod
    def _skip(answers: Iterator[wire.Answer]) -> None:
        for one in answers:
            if isinstance(one, wire.FileEnd):
                return

    # --- everything else --------------------------------------------------------------------------

    def _other(self, folder: _Folder, name: bytes, path: bytes, entry: wire.Entry) -> None:
        try:
            if entry.kind == "directory":
                self._enter(folder, name, path, entry)
            elif entry.same_as is not None:
                self._link(folder, name, entry.same_as)
            elif entry.kind == "symlink":
                os.symlink(entry.target or b".", name, dir_fd=folder.fd)
                self._metadata.give_link(folder.fd, name, entry)
                self.done.others += 1
            else:
                self._node(folder, name, entry)
        except OSError as failure:
            self._refused(entry, failure)

    def _enter(self, folder: _Folder, name: bytes, path: bytes, entry: wire.Entry) -> None:
        os.mkdir(name, 0o700, dir_fd=folder.fd)
        fd = open_beneath(folder.fd, os.fsdecode(name), _DIRECTORY)
        self._folders.append(_Folder(path, fd, entry))
        self.done.directories += 1

    def _link(self, folder: _Folder, name: bytes, same_as: bytes) -> None:
        """Another name of a file that was written before."""
        first = b"/".join(filter(None, (self._name, same_as)))
        fd = open_beneath(self._top, os.fsdecode(first), os.O_PATH | os.O_NOFOLLOW)
        try:
            os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd, follow_symlinks=True)
        finally:
            os.close(fd)
        self.done.others += 1

    def _node(self, folder: _Folder, name: bytes, entry: wire.Entry) -> None:
        if entry.kind == "fifo":
            os.mkfifo(name, 0o600, dir_fd=folder.fd)
        elif entry.kind in _NODES and self._allowed.devices:
            os.mknod(name, _NODES[entry.kind] | 0o600, os.makedev(*entry.device), dir_fd=folder.fd)
        else:
            self.done.skipped += 1
            return
        self._metadata.give_node(folder.fd, name, entry)
        self.done.others += 1

    def _refused(self, entry: wire.Entry, failure: OSError) -> None:
        """One name that could not be made; at the top, or for want of room, everything ends."""
        if not entry.path and isinstance(failure, FileExistsError):
            raise OutputExists(path=os.path.join(self._directory, os.fsdecode(self._name))) from failure
        if failure.errno in _NO_ROOM:
            raise failure
        self.done.problem(entry.path, f"it cannot be made here: {failure.strerror}")


def _tried(act: Callable[[], None]) -> str:
    """Why a file cannot be as large as it should be; "" when it can. What else goes wrong is raised."""
    try:
        act()
    except OSError as failure:
        if failure.errno in _NO_SUCH_SIZE:
            return f"it cannot be made here: {failure.strerror}"
        raise
    return ""


def _write_sparse(fd: int, data: bytes, offset: int) -> int:
    """Write what is not zeros, in steps of 64 KiB of the piece; how many bytes. The rest is left a hole."""
    written, view = 0, memoryview(data)
    for at in range(0, len(data), len(_ZEROS)):
        part = view[at : at + len(_ZEROS)]
        if not data.startswith(_ZEROS[: len(part)], at):
            _write_all(fd, part, offset + at)
            written += len(part)
    return written


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _sync(fd: int) -> None:
    """syncfs(2): everything of the file system that ``fd`` lies on is durable. Raises OutputUnfit."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd) != 0:
        raise OutputUnfit(path="the directory", reason=os.strerror(ctypes.get_errno()))
