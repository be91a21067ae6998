"""Who has a file open for writing, and a lease that keeps writers out (the ``locked`` driver; restore in place).

fcntl(2), "Leases": a read lease is refused (EAGAIN) while anyone, kernel users such as loop devices included, has the
file open for writing, and makes later writers wait until it is given back or /proc/sys/fs/lease-break-time (45 s) is
over. The signal of a break is set to SIGURG, which is ignored by default, instead of SIGIO, which kills.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterator

import msgspec

from graincopy.core.errors import PathUnfit, PathUnreadable, SourceInUse, SourceWritten
from graincopy.volumes import loop

_NO_LEASES = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.EACCES, errno.EPERM)
OPENING = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: somebody else's lease answers instead of stalling


class Holder(msgspec.Struct, frozen=True):
    """Somebody who has a file open for writing."""

    name: str
    pid: int = 0  # 0: the kernel itself (a loop device)

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})" if self.pid else self.name


def writers_of(found: os.stat_result, own_fds: tuple[int, ...] = ()) -> tuple[Holder, ...]:
    """Who has the file open for writing, as far as /proc and sysfs show it to this user; ``own_fds`` do not count."""
    key = _key(found)
    skipped = {str(fd) for fd in own_fds}
    holders = [
        Holder(_command(pid), int(pid))
        for pid in os.listdir("/proc")
        if pid.isdigit() and _writes(pid, key, skipped if int(pid) == os.getpid() else set())
    ]
    loops = [name for name in loop.loops_of(found.st_dev, found.st_ino) if not loop.is_read_only(name)]
    return (*holders, *(Holder(f"loop device /dev/{name}") for name in loops))


def _key(found: os.stat_result) -> tuple[int, int]:
    """What is the same of one file however it was opened. A device has a node of its own in each mount namespace."""
    if stat.S_ISBLK(found.st_mode):
        return -1, found.st_rdev
    return found.st_dev, found.st_ino


def _writes(pid: str, key: tuple[int, int], skipped: set[str]) -> bool:
    try:
        return any(fd not in skipped and _is_writer(pid, fd, key) for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # it ended, or is not ours to see
        return False


def _is_writer(pid: str, fd: str, key: tuple[int, int]) -> bool:
    try:
        found = os.stat(f"/proc/{pid}/fd/{fd}")
        if _key(found) != key:
            return False
        with open(f"/proc/{pid}/fdinfo/{fd}", "rb") as file:
            flags = next(line for line in file if line.startswith(b"flags:"))
    except (OSError, StopIteration):
        return False
    return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return os.fsdecode(file.read().strip())
    except OSError:
        return "a process"


def in_use(path: str, found: os.stat_result, own_fds: tuple[int, ...] = ()) -> SourceInUse:
    """The error that says who writes ``path``, where that can be told."""
    holders = writers_of(found, own_fds)
    reason = "by " + ", ".join(map(str, holders)) if holders else "by a process that this user may not see"
    return SourceInUse(path=path, reason=reason)


def take(fd: int, kind: int) -> bool | None:
    """Take the lease ``fcntl.F_RDLCK`` (``fd`` read-only) or ``F_WRLCK``.

    False: other users of the file stand against it. None: there are no leases here (a network file system, a block
    device, somebody else's file without CAP_LEASE).
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        if error.errno in _NO_LEASES:
            return None
        raise
    return True


def give_back(fd: int) -> None:
    """End a lease; no error when the kernel ended it before."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def holds(fd: int) -> int:
    """The lease that ``fd`` has; while one is being broken, what the opener needs it to become."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE)


class ReadLease:
    """Writers are held off from ``path``, or at least noticed. Owns ``fd``.

    ``held`` is False where there are no leases: then only times, size and /proc tell of writers.
    """

    def __init__(self, fd: int, path: str) -> None:
        """Raises SourceInUse when anyone has it open for writing; the descriptor is then closed."""
        self.fd, self.path = fd, path
        self.held = False
        try:
            taken = take(fd, fcntl.F_RDLCK)
            self.start = os.fstat(fd)
            if taken is False or (taken is None and writers_of(self.start)):
                raise in_use(path, self.start)
        except BaseException:
            self.close()
            raise
        self.held = bool(taken)

    def check(self) -> None:
        """Raise SourceWritten when anyone wrote, or waits to write, since the lease was taken."""
        now = os.fstat(self.fd)
        lost = holds(self.fd) != fcntl.F_RDLCK if self.held else bool(writers_of(now))
        if lost or changed(self.start, now):
            raise SourceWritten(path=self.path)

    def close(self) -> None:
        """Let writers in; may be repeated."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            give_back(fd)
            os.close(fd)


def changed(before: os.stat_result, now: os.stat_result) -> bool:
    """Size or times of one file differ."""
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (now.st_size, now.st_mtime_ns, now.st_ctime_ns)


def open_regular(path: str) -> int:
    """Read-only descriptor of a regular file. Raises PathUnfit, PathUnreadable, FileNotFoundError."""
    fd = open_existing(path)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PathUnfit(path=path, what="no regular file")
    return fd


def open_existing(path: str) -> int:
    """Read-only descriptor of whatever is at ``path``. Raises PathUnfit, PathUnreadable, FileNotFoundError."""
    try:
        return os.open(path, os.O_RDONLY | OPENING)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PathUnfit(path=path, what="a symbolic link") from error
        if error.errno == errno.EAGAIN:
            raise SourceInUse(path=path, reason="somebody holds a lease on it") from error
        raise PathUnreadable(path=path, reason=error.strerror) from error


@contextlib.contextmanager
def lease_read(path: str) -> Iterator[ReadLease]:
    """Hold writers off from the regular file ``path``.

    Raises SourceInUse when anyone has it open for writing; PathUnfit, PathUnreadable, FileNotFoundError.
    """
    lease = ReadLease(open_regular(path), path)
    try:
        yield lease
    finally:
        lease.close()
