"""Disks for the tests of the NBD server, and a program that serves one of them as ``graincopy serve-nbd`` does."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable

from graincopy.core.errors import GraincopyError
from graincopy.views.nbd_listen import listen_tcp, listen_unix
from graincopy.views.nbd_server import Offer, Server, run
from graincopy.views.nbd_tls import server_context
from graincopy.views.overlay import Overlay
from graincopy.views.source import Span

GRAIN = 65536  # bytes


class MemoryDisk:
    """``content`` as a view; grains of nothing but zeros are holes, those in ``local`` lie on this host.

    ``hook`` is called with offset and length before every read, and may raise.
    """

    def __init__(
        self,
        content: bytes,
        name: str = "disk.raw",
        local: Iterable[int] = (),
        hook: Callable[[int, int], None] | None = None,
    ) -> None:
        self.name, self.size = name, len(content)
        self.content, self._local, self._hook = content, frozenset(local), hook

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if self._hook is not None:
            self._hook(offset, len(buffer))
        data = self.content[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        buffer[len(data) :] = bytes(len(buffer) - len(data))

    def extents(self, offset: int, length: int) -> list[Span]:
        stop, spans = min(offset + length, self.size), []
        while offset < stop:
            grain = offset // GRAIN
            end = min((grain + 1) * GRAIN, stop)
            zero = not any(self.content[grain * GRAIN : (grain + 1) * GRAIN])
            spans.append(Span(offset, end, zero, grain in self._local))
            offset = end
        return spans


class FileDisk:
    """A raw file as a view; what it has not allocated is a hole."""

    def __init__(self, path: str) -> None:
        self.name = os.path.basename(path)
        self._fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        got = os.preadv(self._fd, [buffer], offset)
        while got < len(buffer):
            more = os.preadv(self._fd, [buffer[got:]], offset + got)
            if not more:
                buffer[got:] = bytes(len(buffer) - got)
                return
            got += more

    def extents(self, offset: int, length: int) -> list[Span]:
        stop, spans = min(offset + length, self.size), []
        while offset < stop:
            data = min(self._seek(offset, os.SEEK_DATA), stop)
            if data > offset:
                spans.append(Span(offset, data, True, False))
            offset = min(self._seek(data, os.SEEK_HOLE), stop) if data < stop else stop
            if offset > data:
                spans.append(Span(data, offset, False, False))
        return spans

    def _seek(self, offset: int, how: int) -> int:
        try:
            return os.lseek(self._fd, offset, how)
        except OSError as failure:
            if failure.errno != errno.ENXIO:
                raise
            return self.size


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="+")
    parser.add_argument("--socket")
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tls")
    parser.add_argument("--scratch")
    parser.add_argument("--overlay")
    parser.add_argument("--boot", default="this boot")
    wanted = parser.parse_args()
    disks = [FileDisk(path) for path in wanted.file]
    overlays: list[Overlay] = []
    if wanted.scratch:
        overlays = [Overlay.scratch(disk, wanted.scratch) for disk in disks]
    if wanted.overlay:
        overlays = [Overlay.kept(disk, wanted.overlay, "point", wanted.boot) for disk in disks]
    try:
        tls = server_context(wanted.tls) if wanted.tls else None
        listener = (
            listen_unix(wanted.socket, bool(tls)) if wanted.socket else listen_tcp(wanted.bind, wanted.port, bool(tls))
        )
    except GraincopyError as failure:
        sys.stderr.write(f"{failure}\n")
        return failure.exit_code
    server = Server(
        [Offer(overlay, overlay) for overlay in overlays] or [Offer(disk) for disk in disks], time.monotonic, tls
    )
    run(server, listener, lambda: say(listener.uri(disks[0].name)))
    for overlay in overlays:
        overlay.close()
    say(f"{server.clients} {server.sent_bytes} {server.dropped}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
