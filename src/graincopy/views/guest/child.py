"""The process that reads a guest's file system, and can do nothing else: ``python -I -m … child SOCKET_FD``.

It starts, loads what it needs, gives up everything (``sandbox``), and then answers requests (``wire``) until its socket
ends. Crashing is allowed: the keeper tells.
"""

from __future__ import annotations

import contextlib
import encodings.idna
import encodings.utf_8
import encodings.utf_16_le
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from graincopy.views.guest import wire
from graincopy.views.guest.sandbox import Bounds, give_up
from graincopy.views.guest.tree import FAULTS, Found, Walk, described, find, listing, reason

_LOADED = (encodings.idna, encodings.utf_8, encodings.utf_16_le)  # nothing can be opened later
_ENOUGH = 1 << 16  # bytes


class Line:
    """The socket. What is said is gathered until the keeper is waited for, or there is enough of it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._said = bytearray()

    def say(self, kind: int, data: bytes) -> None:
        """One frame, now or later."""
        if len(data) > _ENOUGH:
            self.flush()
            wire.send(self._write, kind, data)
            return
        self._said += wire.HEADER.pack(kind, len(data))
        self._said += data
        if len(self._said) > _ENOUGH:
            self.flush()

    def hear(self, most: int) -> tuple[int, bytes]:
        """The keeper's next frame, after everything was said."""
        self.flush()
        return wire.receive(lambda length: os.read(self._fd, length), most)

    def flush(self) -> None:
        """Everything has been said on return."""
        said, self._said = self._said, bytearray()
        wire.send_all(self._write, said)

    def _write(self, data: memoryview) -> int:
        return os.write(self._fd, data)


class Disk:
    """The keeper's side of the socket as the bytes of a file system that begins at ``offset``."""

    def __init__(self, line: Line, offset: int) -> None:
        self._line, self._offset = line, offset

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises OSError as the keeper had it."""
        parts = []
        while length:
            asked = min(length, wire.PIECE)
            self._line.say(wire.WANT, wire.WANTED.pack(self._offset + offset, asked))
            kind, data = self._line.hear(wire.PIECE)
            if kind == wire.FAILED:
                (code,) = wire.ERRNO.unpack(data)
                raise OSError(code, f"the disk cannot be read there: {os.strerror(code)}")
            if kind != wire.BYTES or len(data) != asked:
                raise wire.WireBroken("not what was asked for")
            parts.append(data)
            offset, length = offset + asked, length - asked
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Child:
    """Requests in, answers out."""

    def __init__(self, fd: int) -> None:
        self._line = Line(fd)
        self._encoder = msgspec.msgpack.Encoder()

    def run(self) -> None:
        """Until the socket ends."""
        begin = self._request()
        if not isinstance(begin, wire.Begin):
            raise wire.WireBroken("it must begin")
        try:
            tree = _locked_away(begin, Disk(self._line, begin.offset))
        except (*FAULTS, MemoryError) as fault:
            self._say(wire.Broken(reason(fault)))
            self._line.flush()
            return
        self._say(wire.End())
        while True:
            self._answer(tree, self._request())

    def _request(self) -> wire.Request:
        kind, data = self._line.hear(wire.MESSAGE)
        if kind != wire.REQUEST:
            raise wire.WireBroken("not a request")
        request: wire.Request = msgspec.msgpack.decode(data, type=wire.Request)
        return request

    def _answer(self, tree: Any, request: wire.Request) -> None:
        try:
            for one in _answers(tree, request):
                self._say(one)
        except MemoryError:
            self._say(wire.Broken("it takes more memory than a reader of hostile file systems is given"))
        except FAULTS as fault:
            self._say(wire.Broken(reason(fault)))
        else:
            self._say(wire.End())

    def _say(self, answer: wire.Answer) -> None:
        if isinstance(answer, wire.Data):
            self._line.say(wire.DATA, answer.data)
        elif isinstance(answer, wire.Hole):
            self._line.say(wire.HOLE, wire.LENGTH.pack(answer.length))
        else:
            self._line.say(wire.SAID, self._encoder.encode(answer))


def _locked_away(begin: wire.Begin, disk: Disk) -> Any:
    """The tree, made after everything was given up."""
    bounds = Bounds()
    if begin.mount_fd >= 0:
        from graincopy.views.guest.kernel import KernelTree

        give_up(bounds, begin.mount_fd)
        return KernelTree()
    from graincopy.views.guest.tsk import TskTree

    give_up(bounds)
    return TskTree(begin.fs_type, begin.size, disk.read)


def _answers(tree: Any, request: wire.Request) -> Iterator[wire.Answer]:
    assert not isinstance(request, wire.Begin)
    found: Found[Any] | wire.Missing = find(tree, request.path, isinstance(request, wire.List) or _follows(request))
    if isinstance(found, wire.Missing):
        yield found
    elif isinstance(request, wire.Look):
        yield described(tree, found.node)
    elif isinstance(request, wire.List):
        yield from listing(tree, found.node)
    else:
        yield from Walk(tree).run(found.node)


def _follows(request: wire.Request) -> bool:
    return isinstance(request, wire.Fetch) and request.follow


def main() -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the keeper, which ends this by closing the socket
    with contextlib.suppress(wire.WireBroken, BrokenPipeError, ConnectionResetError):  # the keeper is gone
        Child(int(sys.argv[1])).run()
    os._exit(0)


if __name__ == "__main__":
    main()
