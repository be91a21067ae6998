"""Guest file systems that the kernel reads: XFS, Btrfs, and ext4 with features that pytsk3 does not know.

Runs in the locked-away process, whose root directory is the mounted file system, so that there is nothing around it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from graincopy.views.guest.tree import FAULTS, Node, reason
from graincopy.views.guest.wire import Entry

_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character",
    stat.S_IFBLK: "block",
}
_MOST_ATTRIBUTES = 512 << 10  # bytes of extended attributes of one file that are passed on
_LATEST = (1 << 63) - 1  # nanoseconds since the epoch; Btrfs takes any number of seconds from the disk
_NO_XATTRS = (errno.EOPNOTSUPP, errno.ENODATA, errno.EPERM, errno.EACCES, errno.ERANGE)


class KernelNode(Node):
    """An open inode; it is let go with the object."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.facts = os.fstat(fd)
        self.kind = _KINDS[stat.S_IFMT(self.facts.st_mode)]
        self.identity = self.facts.st_dev << 64 | self.facts.st_ino
        self.links = self.facts.st_nlink

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class KernelTree:
    """What lies below the root directory of this process."""

    def root(self) -> KernelNode:
        """The root directory."""
        return KernelNode(os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def entry(self, node: KernelNode, path: bytes) -> Entry:
        """What the kernel says of it."""
        facts = node.facts
        return Entry(
            path=path,
            kind=node.kind,
            mode=stat.S_IMODE(facts.st_mode),
            size=facts.st_size,
            uid=facts.st_uid,
            gid=facts.st_gid,
            mtime=max(-_LATEST, min(facts.st_mtime_ns, _LATEST)),
            atime=max(-_LATEST, min(facts.st_atime_ns, _LATEST)),
            target=os.readlink(b"", dir_fd=node.fd) if node.kind == "symlink" else b"",
            device=(os.major(facts.st_rdev), os.minor(facts.st_rdev)),
            xattrs=_xattrs(node) if node.kind in ("file", "directory") else {},
        )

    def children(self, node: KernelNode) -> Iterator[tuple[bytes, KernelNode | str]]:
        """As the kernel lists them, a buffer at a time."""
        with os.scandir(node.fd) as found:
            for one in found:
                name = os.fsencode(one.name)
                try:
                    child = self.child(node, name)
                except FAULTS as fault:
                    yield name, reason(fault)
                else:
                    yield name, child or "it is listed and not there"

    def child(self, node: KernelNode, name: bytes) -> KernelNode | None:
        """Opened without following a link; a device or a pipe without being opened at all."""
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=node.fd)
        except FileNotFoundError:
            return None
        except OSError as fault:
            if fault.errno == errno.ENAMETOOLONG:
                return None
            raise
        found = KernelNode(fd)
        if found.kind not in ("file", "directory"):
            return found
        return KernelNode(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=node.fd))

    def data(self, node: KernelNode) -> Iterator[tuple[int, int]]:
        """SEEK_DATA and SEEK_HOLE."""
        stop = 0
        while stop < node.facts.st_size:
            try:
                start = os.lseek(node.fd, stop, os.SEEK_DATA)
            except OSError as fault:
                if fault.errno == errno.ENXIO:
                    return
                raise
            stop = os.lseek(node.fd, start, os.SEEK_HOLE)
            yield start, stop

    def read(self, node: KernelNode, offset: int, length: int) -> bytes:
        """pread(2)."""
        return os.pread(node.fd, length, offset)


def _xattrs(node: KernelNode) -> dict[bytes, bytes]:
    """Raises ValueError when they are more than can be passed on."""
    found: dict[bytes, bytes] = {}
    taken = 0
    try:
        for name in os.listxattr(node.fd):
            value = os.getxattr(node.fd, name)
            taken += len(name) + len(value)
            if taken > _MOST_ATTRIBUTES:
                raise ValueError(f"its extended attributes take more than {_MOST_ATTRIBUTES >> 10} KiB")
            found[os.fsencode(name)] = value
    except OSError as fault:
        if fault.errno in _NO_XATTRS:
            return found
        raise
    return found
