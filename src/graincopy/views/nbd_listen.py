"""Where the NBD server listens: a Unix socket that only its owner may use, or TCP.

A socket file that a dead server left is replaced; one that somebody answers at, and any other file, is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from urllib.parse import quote

from graincopy.core.errors import AddressTaken, UsageWrong

BACKLOG = 64
MODE = 0o600  # whoever may open the socket reads the disks


class Listener:
    """A listening socket and the URI that leads to it. Closing removes a socket file if it is still ours."""

    def __init__(self, sock: socket.socket, base_uri: str, tail: str, path: str | None = None) -> None:
        self.socket, self.path = sock, path
        self._base, self._tail = base_uri, tail
        self._inode = _inode(path) if path else None

    def uri(self, name: str) -> str:
        """The NBD URI of the export ``name`` (doc/uri.md of the NBD project); the empty name is the only export."""
        plain = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return f"{self._base}{quote(plain, safe='')}{self._tail}"

    def close(self) -> None:
        """Listen no more. What is connected stays so."""
        self.socket.close()
        bound, self._inode = self._inode, None  # once: a successor's socket may get the same inode number
        if self.path and bound and _inode(self.path) == bound:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def listen_unix(path: str, tls: bool = False) -> Listener:
    """A socket at ``path``. Raises AddressTaken."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), MODE)  # before bind(2), which takes it over: nobody gets in while it is still open
        with _alone_in(path):
            _clear(path)
            sock.bind(path)
            sock.listen(BACKLOG)
    except OSError as failure:
        sock.close()
        raise AddressTaken(address=path, reason=failure.strerror or str(failure)) from failure
    except AddressTaken:
        sock.close()
        raise
    scheme = "nbds+unix" if tls else "nbd+unix"
    return Listener(sock, f"{scheme}:///", f"?socket={quote(os.fsencode(path), safe='/')}", path)


def _clear(path: str) -> None:
    """Remove what a dead server left at ``path``; nothing else. Raises AddressTaken or OSError."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AddressTaken(address=path, reason="there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        number = probe.connect_ex(path)
    if number != errno.ECONNREFUSED:  # 0 and EAGAIN: somebody listens; anything else: we cannot know
        raise AddressTaken(address=path, reason="another server has this socket")
    os.unlink(path)


@contextlib.contextmanager
def _alone_in(path: str) -> Iterator[None]:
    """Of two servers that start at once, one looks and binds after the other. Raises OSError or AddressTaken."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as failure:
            raise AddressTaken(address=path, reason="another server is starting in this folder") from failure
        yield
    finally:
        os.close(fd)


def listen_tcp(host: str, port: int, tls: bool) -> Listener:
    """``host`` and ``port`` (0: any that is free). Off loopback only with TLS. Raises UsageWrong or AddressTaken."""
    address = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as failure:
        raise AddressTaken(address=address, reason=failure.strerror or str(failure)) from failure
    family, kind, protocol, _, place = found[0]
    if not tls and not ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback:
        raise UsageWrong(what=f"{host} can be reached from other hosts; give --tls DIR with certificates")
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError as failure:
        sock.close()
        raise AddressTaken(address=address, reason=failure.strerror or str(failure)) from failure
    shown = f"[{host}]" if ":" in host else host
    return Listener(sock, f"{'nbds' if tls else 'nbd'}://{shown}:{sock.getsockname()[1]}/", "")


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
