"""The live file on S: held for writing by us alone while a restore writes its differing grains (stage R).

Two phases. Until the first write a *read* lease holds writers off, so that the undo snapshot can still be taken: its
clone opens the file for reading, and under a write lease it would wait for ourselves. The first write exchanges it
for a write lease, and whatever changed in between is noticed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator

from graincopy.core.errors import PathUnfit, PathUnreadable, RestoreNoSpace, SourceInUse, SourceWritten, Unsupported
from graincopy.core.placement import Placement
from graincopy.core.units import MIB
from graincopy.model.workload import FileMetadata
from graincopy.volumes import fiemap, ioctl, leases
from graincopy.volumes.image import fill_zeros, read_fully
from graincopy.volumes.leases import ReadLease, lease_read
from graincopy.volumes.live_calls import punch, set_direct, start_writing_back
from graincopy.volumes.metadata import apply_metadata, metadata_of, read_metadata
from graincopy.volumes.places import sync_directory

__all__ = ["LiveFile", "ReadLease", "apply_metadata", "free_bytes", "lease_read", "open_sink", "read_metadata"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_ZEROS = bytes(MIB)
_SEND_EVERY = 4 * MIB


class LiveFile:
    """A FileSink (volumes/base) over a file, or over a whole block device (exclusively opened, of fixed size)."""

    def __init__(
        self,
        path: str,
        existed: bool,
        lease: ReadLease | None = None,
        fd: int = -1,
        made_in: tuple[str, ...] = (),
        write_lease: bool = False,
        direct: bool = False,
    ) -> None:
        """``direct``: large, aligned writes may go past the page cache, as far as the file system can."""
        self.path, self.existed = path, existed
        self._lease = lease  # phase one
        self._fd, self._write_lease = fd, write_lease  # phase two
        self._turning = threading.Lock()
        self._unsent = 0  # bytes written since the kernel was last told to begin writing back
        self._folders = made_in
        self._block = stat.S_ISBLK(os.fstat(self.fd).st_mode)
        self._began_direct = direct and set_direct(self.fd)
        self._direct = self._began_direct

    @property
    def fd(self) -> int:
        """A descriptor to read from: good until the next verb."""
        return self._lease.fd if self._lease is not None else self._fd

    @property
    def size(self) -> int:
        """Bytes, now."""
        return ioctl.device_size(self.fd) if self._block else os.fstat(self.fd).st_size

    def placement(self) -> Placement:
        """States of the file's ranges, in its own bytes; a block device counts as written all over."""
        return Placement.identity(self.size) if self._block else fiemap.own_placement(self.fd, self.size)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros."""
        fill_zeros(buffer[read_fully(self.fd, offset, buffer) :])

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``. Raises RestoreNoSpace, SourceInUse, SourceWritten or OSError."""
        fd, done = self._writable(), 0
        while done < len(data):
            with self._space_for(len(data) - done):
                done += self._put(fd, offset + done, data[done:])
        self._unsent += 0 if self._direct else done
        if self._unsent >= _SEND_EVERY:  # several workers may count wrong together: it is a hint, sync() is the promise
            self._unsent = 0
            start_writing_back(fd)

    def _put(self, fd: int, offset: int, data: memoryview) -> int:
        """pwrite(2); for good through the page cache from the first write on that O_DIRECT does not take."""
        try:
            return os.pwrite(fd, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._began_direct:
                raise
        self._direct = False
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        return os.pwrite(fd, data, offset)

    def zero(self, offset: int, length: int) -> None:
        """Make the range, as far as it lies in the file, read as zeros: a hole where the file system can."""
        fd = self._writable()
        length = min(length, self.size - offset)
        if length <= 0:
            return
        with self._space_for(length):
            if not punch(fd, offset, length):
                for at in range(offset, offset + length, MIB):
                    self.write(at, memoryview(_ZEROS)[: min(MIB, offset + length - at)])

    def resize(self, size: int) -> None:
        """Cut or extend to ``size`` bytes. Raises Unsupported for a block device of another size."""
        if self._block:
            if size != self.size:
                raise Unsupported(driver=f"block device {self.path}", power=f"have {size} bytes instead of {self.size}")
            return
        with self._space_for(size):
            os.ftruncate(self._writable(), size)

    def sync(self) -> None:
        """Everything written, and the directory entry, is durable on return.

        Raises SourceInUse when somebody opened the file for writing meanwhile: the result is not to be trusted.
        """
        if self._fd >= 0:
            with self._space_for(0):
                os.fsync(self._fd)
            if self._write_lease and leases.holds(self._fd) == fcntl.F_UNLCK:
                raise SourceInUse(path=self.path, reason="somebody opened it during the restore")
        for folder in self._folders:
            sync_directory(folder)
        if self.existed and not self._block:
            with contextlib.suppress(PermissionError):  # a folder that may be entered but not read
                sync_directory(os.path.dirname(self.path))

    def metadata(self) -> FileMetadata:
        """What the file has besides its bytes."""
        return FileMetadata() if self._block else metadata_of(self.fd)

    def free_bytes(self) -> int | None:
        """Room for newly allocated bytes where the file lies; a block device needs none that could be told."""
        return None if self._block else free_bytes(self.path)

    def remove(self) -> None:
        """Take the file away, durably, if its path still leads to it. Raises Unsupported for a block device."""
        if self._block:
            raise Unsupported(driver=f"block device {self.path}", power="be removed")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self.fd)):
                os.unlink(self.path)
        sync_directory(os.path.dirname(self.path))

    def apply(self, metadata: FileMetadata) -> tuple[str, ...]:
        """:func:`apply_metadata` to this file; nothing for a block device."""
        return () if self._block else apply_metadata(self._writable(), metadata)

    def close(self) -> None:
        """Let the file go; may be repeated."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            leases.give_back(fd)
            os.close(fd)

    def __enter__(self) -> LiveFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _writable(self) -> int:
        """Phase two: the same inode opened for writing, others kept out or shown not to write."""
        with self._turning:  # of several workers that write first, one makes the turn
            return self._fd if self._lease is None else self._turn(self._lease)

    def _turn(self, lease: ReadLease) -> int:
        lease.check()
        leases.give_back(lease.fd)  # our own opening for writing would break it
        fd = _reopen(lease.fd, self.path)
        lease.close()
        self._lease = None
        try:
            self._write_lease = self._hold_off(fd, lease.start)
        except BaseException:
            os.close(fd)  # whatever is called next finds no descriptor to write to
            raise
        self._fd = fd
        return fd

    def _hold_off(self, fd: int, before: os.stat_result) -> bool:
        """Take the write lease; False when readers (or the file system) stand against it but nobody writes."""
        taken = leases.take(fd, fcntl.F_WRLCK) is True
        now = os.fstat(fd)
        if not taken and leases.writers_of(now, (fd,)):
            raise leases.in_use(self.path, now, (fd,))
        if leases.changed(before, now):
            raise SourceWritten(path=self.path)
        return taken

    @contextlib.contextmanager
    def _space_for(self, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise RestoreNoSpace(path=self.path, needed=needed, free=free_bytes(self.path)) from error


def open_sink(path: str) -> LiveFile:
    """The file at the real ``path``, for writing; missing files and folders are made (0600, 0755), durable at sync().

    Raises SourceInUse when anyone, loop devices included, has it open for writing; PathUnfit, PathUnreadable.
    """
    try:
        fd = leases.open_existing(path)
    except FileNotFoundError:
        return _create(path)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return LiveFile(path, True, ReadLease(fd, path))
    os.close(fd)
    if not stat.S_ISBLK(mode):
        raise PathUnfit(path=path, what="neither a file nor a block device")
    return LiveFile(path, True, fd=_open_device(path))


def _open_device(path: str) -> int:
    """Exclusively: EBUSY while it is mounted or otherwise claimed. Other writers are only seen in /proc."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise SourceInUse(path=path, reason="it is mounted or claimed") from error
        raise PathUnreadable(path=path, reason=error.strerror) from error
    found = os.fstat(fd)
    if leases.writers_of(found, (fd,)):
        os.close(fd)
        raise leases.in_use(path, found)
    return fd


def _create(path: str) -> LiveFile:
    folders = _make_folders(os.path.dirname(path))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PathUnreadable(path=path, reason=error.strerror) from error
    return LiveFile(path, False, None, fd, folders, write_lease=leases.take(fd, fcntl.F_WRLCK) is True)


def _make_folders(folder: str) -> tuple[str, ...]:
    """Make what is missing of ``folder``; every directory that got an entry, innermost first, ``folder`` included."""
    touched = [folder]
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
        touched.append(folder)
    try:
        for each in reversed(missing):
            os.mkdir(each, 0o755)
    except OSError as error:
        raise PathUnreadable(path=error.filename, reason=error.strerror) from error
    return tuple(touched)


def _reopen(fd: int, path: str) -> int:
    """The same inode for writing, whatever has its path by now."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise SourceInUse(path=path, reason="somebody holds a lease on it") from error
        raise PathUnreadable(path=path, reason=error.strerror) from error


def free_bytes(path: str) -> int:
    """Bytes that this user can still write where ``path`` is or would be."""
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
