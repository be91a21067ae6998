"""What extracted files get besides their bytes: mode, owner, times, extended attributes. And what is kept back."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field

from graincopy.views.guest import wire

_PRIVILEGES = (b"security.capability",)
_MINE_TO_LOSE = (b"security.", b"trusted.", b"system.")  # attributes of this host's policy rather than of the file
_NODES = (stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK)
_MOST_PROBLEMS = 1000


@dataclass(frozen=True, slots=True)
class Allowed:
    """What is recreated only when asked for."""

    devices: bool = False
    setuid: bool = False


@dataclass(slots=True)
class Extracted:
    """What was written. ``problems``: path and why, of what is missing or incomplete; at most 1000 are kept."""

    files: int = 0
    directories: int = 0
    others: int = 0
    size: int = 0  # bytes of files, holes included
    written: int = 0  # bytes of files, without holes
    skipped: int = 0  # device nodes and sockets
    stripped: int = 0  # setuid, setgid and capabilities left off
    failed: int = 0
    problems: list[tuple[bytes, str]] = field(default_factory=list)

    def problem(self, path: bytes, reason: str) -> None:
        """Count one, and keep it."""
        self.failed += 1
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append((path, reason))


class Metadata:
    """Gives files theirs, and counts in ``done`` what is not ``allowed``, and what this host does not take."""

    def __init__(self, done: Extracted, allowed: Allowed) -> None:
        self._done, self._allowed = done, allowed
        self._root = os.geteuid() == 0

    def give(self, fd: int, entry: wire.Entry) -> None:
        """To an open file or directory. Owner first: it takes setuid and capabilities away."""
        try:
            if self._root:
                os.fchown(fd, entry.uid, entry.gid)
            os.fchmod(fd, self._mode(entry))
            for name, value in entry.xattrs.items():
                self._attribute(fd, entry, name, value)
            os.utime(fd, ns=(entry.atime, entry.mtime))
        except (OSError, OverflowError) as failure:
            self._refused(entry, failure)

    def give_link(self, folder: int, name: bytes, entry: wire.Entry) -> None:
        """To a symbolic link called ``name`` in the open directory ``folder``."""
        try:
            if self._root:
                os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
            os.utime(name, ns=(entry.atime, entry.mtime), dir_fd=folder, follow_symlinks=False)
        except (OSError, OverflowError) as failure:
            self._refused(entry, failure)

    def give_node(self, folder: int, name: bytes, entry: wire.Entry) -> None:
        """To a pipe or a device node, which is not to be opened."""
        self.give_link(folder, name, entry)
        node = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            if stat.S_IFMT(os.fstat(node).st_mode) in _NODES:  # somebody may have put a link there: chmod(2) follows it
                os.chmod(f"/proc/self/fd/{node}", self._mode(entry))
        finally:
            os.close(node)

    def _refused(self, entry: wire.Entry, failure: OSError | OverflowError) -> None:
        self._done.problem(entry.path, f"it did not get all of its owner, mode and times: {failure}")

    def _mode(self, entry: wire.Entry) -> int:
        if self._allowed.setuid or not entry.mode & (stat.S_ISUID | stat.S_ISGID):
            return entry.mode
        self._done.stripped += 1
        return entry.mode & ~(stat.S_ISUID | stat.S_ISGID)

    def _attribute(self, fd: int, entry: wire.Entry, name: bytes, value: bytes) -> None:
        if name in _PRIVILEGES and not self._allowed.setuid:
            self._done.stripped += 1
            return
        try:
            os.setxattr(fd, name, value)
        except (OSError, ValueError) as failure:
            if not name.startswith(_MINE_TO_LOSE):
                self._done.problem(entry.path, f"extended attribute {os.fsdecode(name)}: {failure}")
