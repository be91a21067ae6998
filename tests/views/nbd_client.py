"""A small NBD client that can misbehave. Its numbers are written out here once more, as the specification has them."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

FIXED, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, SHUTDOWN, TOO_BIG = (0x80000000 + n for n in (1, 2, 3, 5, 6, 7, 9))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE = 1, 2, 4, 8
EPERM, EIO, EINVAL, ENOSPC, ESHUTDOWN = 1, 5, 22, 28, 108
MIB = 1 << 20


def option(number: int, data: bytes = b"") -> bytes:
    """One option as clients send it."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def text(value: bytes) -> bytes:
    """A counted string."""
    return struct.pack(">I", len(value)) + value


def go(name: bytes = b"", number: int = GO, infos: tuple[int, ...] = ()) -> bytes:
    """GO or INFO."""
    return option(number, text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


def meta(number: int, name: bytes, *queries: bytes) -> bytes:
    """LIST or SET of metadata contexts."""
    return option(number, text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries)))


def request(
    command: int, offset: int = 0, length: int = 0, handle: int = 7, flags: int = 0, data: bytes = b""
) -> bytes:
    """One request."""
    return struct.pack(">IHHQQI", 0x25609513, flags, command, handle, offset, length) + data


@dataclass
class OptionReply:
    option: int
    kind: int
    data: bytes


@dataclass
class Reply:
    """All chunks of one structured reply, or a simple one."""

    handle: int
    error: int = 0
    data: dict[int, bytes] = field(default_factory=dict)  # offset → bytes
    holes: list[tuple[int, int]] = field(default_factory=list)
    states: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # context → (length, flags)
    message: bytes = b""

    def content(self, offset: int, length: int) -> bytes:
        """What the reply says the range holds. Fails unless it says it of every byte once."""
        pieces = sorted([*self.data.items(), *((at, bytes(size)) for at, size in self.holes)])
        at = offset
        for start, piece in pieces:
            assert start == at, "a gap, or an overlap"
            at += len(piece)
        assert at == offset + length
        return b"".join(piece for _, piece in pieces)


class Parser:
    """Takes a server's bytes apart; raises AssertionError where they are not what the specification says."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        assert len(self.data) >= count, "the server's bytes end too soon"
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def greeting(self) -> int:
        assert self.take(16) == b"NBDMAGICIHAVEOPT"
        (flags,) = struct.unpack(">H", self.take(2))
        return int(flags)

    def option_reply(self) -> OptionReply:
        magic, number, kind, length = struct.unpack(">QIII", self.take(20))
        assert magic == 0x3E889045565A9
        return OptionReply(number, kind, self.take(length))

    def option_replies(self) -> list[OptionReply]:
        """Up to and with the final one."""
        found = [self.option_reply()]
        while found[-1].kind in (SERVER, REP_INFO, META):
            found.append(self.option_reply())
        return found

    def reply(self, read_length: int = 0) -> Reply:
        """One whole reply. ``read_length``: bytes that follow a simple reply to a READ that did not fail."""
        (magic,) = struct.unpack(">I", self.take(4))
        if magic == 0x67446698:
            error, handle = struct.unpack(">IQ", self.take(12))
            found = Reply(handle, error)
            if read_length and not error:
                found.data[-1] = self.take(read_length)
            return found
        reply: Reply | None = None
        while True:
            assert magic == 0x668E33EF
            flags, kind, handle, length = struct.unpack(">HHQI", self.take(16))
            payload = self.take(length)
            reply = reply or Reply(handle)
            assert reply.handle == handle
            self._chunk(reply, kind, payload)
            if flags & 1:
                return reply
            (magic,) = struct.unpack(">I", self.take(4))

    @staticmethod
    def _chunk(reply: Reply, kind: int, payload: bytes) -> None:
        if kind == 1:
            assert len(payload) >= 9
            reply.data[struct.unpack(">Q", payload[:8])[0]] = payload[8:]
        elif kind == 2:
            offset, length = struct.unpack(">QI", payload)
            assert length
            reply.holes.append((offset, length))
        elif kind == 5:
            context, *flat = struct.unpack(f">{len(payload) // 4}I", payload)
            assert context not in reply.states
            assert flat
            reply.states[context] = list(zip(flat[::2], flat[1::2], strict=True))
        elif kind == 0x8001:
            reply.error, length = struct.unpack(">IH", payload[:6])
            assert reply.error
            assert length == len(payload) - 6
            reply.message = payload[6:]
            reply.message.decode()
        else:
            assert kind == 0, f"a chunk of type {kind}"
            assert not payload


class Client(Parser):
    """The same over a socket."""

    def __init__(self, path: str, *, timeout: float = 20) -> None:
        super().__init__()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(timeout)
        self.socket.connect(path)

    def take(self, count: int) -> bytes:
        while len(self.data) < count:
            more = self.socket.recv(max(65536, count - len(self.data)))
            if not more:
                raise EOFError("the server hung up")
            self.data += more
        return super().take(count)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def begin(self, flags: int = FIXED | NO_ZEROES) -> Client:
        """Greeting and client flags."""
        self.greeting()
        self.send(struct.pack(">I", flags))
        return self

    def open(self, name: bytes = b"", contexts: tuple[bytes, ...] = (), structured: bool = True) -> Client:
        """Into the transmission."""
        self.begin()
        if structured:
            self.send(option(STRUCTURED))
            assert self.option_reply().kind == ACK
        if contexts:
            self.send(meta(SET_META, name, *contexts))
            assert self.option_replies()[-1].kind == ACK
        self.send(go(name))
        assert self.option_replies()[-1].kind == ACK
        return self

    def ask(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> Reply:
        """One request and its reply."""
        self.send(request(command, offset, length, flags=flags, data=data))
        return self.reply()

    def hung_up(self) -> bool:
        """Whether the server closes, now or when its last bytes are read."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
