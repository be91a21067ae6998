"""Below stage 7: reading and writing what QEMU exports, as a client of the NBD protocol over a unix socket.

libnbd does the same and has no wheel: its Python binding belongs to one distribution's one Python. The part of the
protocol that is needed is small: fixed newstyle handshake, structured replies, metadata contexts.
https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from graincopy.core.extent import Array, Extents
from graincopy.hypervisor.qmp import connect_unix

ALLOCATION = "base:allocation"
HOLE, ZERO = 1, 2  # flags of base:allocation
DIRTY = 1  # flag of qemu:dirty-bitmap:NAME
LONGEST = 32 << 20  # bytes of one request: what every server takes
PATIENCE = 60.0  # seconds for one answer

_MAGIC, _OPTION, _OPTION_REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _SIMPLE, _STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF
_FIXED, _NO_ZEROES = 1, 2
_GO, _STRUCTURED_REPLY, _SET_META = 7, 8, 10
_ACK, _INFO, _META = 1, 3, 4
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _WRITE_ZEROES, _BLOCK_STATUS = 0, 1, 2, 3, 4, 6, 7
_DONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR = 1, 1, 2, 5, 1 << 15
_NOTHING = memoryview(b"")
_ERRORS = {1: errno.EPERM, 5: errno.EIO, 12: errno.ENOMEM, 22: errno.EINVAL, 28: errno.ENOSPC, 75: errno.EOVERFLOW}


class NbdClient:
    """One connection to one export, for one thread at a time. ``size`` is in bytes.

    Every verb raises OSError: with the server's errno when it refused, ConnectionError when the connection ended.
    """

    def __init__(self, path: str, export: str, contexts: Sequence[str] = (), patience: float = PATIENCE) -> None:
        """Raises OSError; FileNotFoundError when the server has no such export, LookupError for a missing context."""
        self.size = 0
        self._flags = 0
        self._handle = 0
        self._contexts: dict[int, str] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(patience)
            connect_unix(self._socket, path)
            self._shake_hands(export, contexts)
        except BaseException:
            self._socket.close()
            raise

    # --- verbs --------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``, which must lie inside the export."""
        for start in range(0, len(buffer), LONGEST):
            piece = buffer[start : start + LONGEST]
            self._send(_READ, offset + start, len(piece))
            self._collect(piece, offset + start)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data``."""
        for start in range(0, len(data), LONGEST):
            piece = data[start : start + LONGEST]
            self._send(_WRITE, offset + start, len(piece))
            self._socket.sendall(piece)
            self._collect()

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, and give its space back where the server can."""
        for start in range(offset, offset + length, LONGEST):
            self._send(_WRITE_ZEROES, start, min(LONGEST, offset + length - start))
            self._collect()

    def flush(self) -> None:
        """Everything written is durable on return."""
        self._send(_FLUSH, 0, 0)
        self._collect()

    def status(self, context: str, start: int = 0, stop: int | None = None) -> tuple[Array, NDArray[np.uint32]]:
        """``context`` over ``[start, stop)``: where each piece ends, and its flags."""
        wanted = next(number for number, name in self._contexts.items() if name == context)
        stop = self.size if stop is None else stop
        parts: list[NDArray[np.uint32]] = []
        at = start
        while at < stop:
            self._send(_BLOCK_STATUS, at, min(stop - at, (1 << 32) - (1 << 20)))
            found = self._collect(context=wanted)
            covered = int(found[:, 0].sum(dtype=np.int64))
            if not covered:
                raise ConnectionError(f"the server says nothing about {context} at {at}")
            parts.append(found)
            at += covered
        table = np.concatenate(parts) if parts else np.empty((0, 2), np.uint32)
        ends = np.minimum(np.cumsum(table[:, 0], dtype=np.int64) + start, stop)
        return ends, np.ascontiguousarray(table[:, 1])

    def extents(self, context: str, flag: int) -> Extents:
        """Bytes of the whole export where ``context`` has ``flag``."""
        ends, flags = self.status(context)
        starts = np.append(0, ends[:-1]).astype(np.int64)
        found = (flags & flag) != 0
        return Extents.from_arrays(starts[found], ends[found])

    def close(self) -> None:
        """Say goodbye; may be repeated."""
        if self._socket.fileno() >= 0:
            with contextlib.suppress(OSError):  # it went first
                self._send(_DISCONNECT, 0, 0)
            self._socket.close()

    # --- handshake ------------------------------------------------------------------------------------

    def _shake_hands(self, export: str, contexts: Sequence[str]) -> None:
        magic, option, flags = struct.unpack(">QQH", self._take(18))
        if (magic, option) != (_MAGIC, _OPTION) or not flags & _FIXED:
            raise ConnectionError("what answers there is no NBD server of our kind")
        self._socket.sendall(struct.pack(">I", _FIXED | (flags & _NO_ZEROES)))
        name = export.encode("utf-8", "surrogateescape")
        list(self._option(_STRUCTURED_REPLY, b""))
        if contexts:
            self._ask_contexts(name, contexts)
        for kind, payload in self._option(_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0)):
            if kind == _INFO and struct.unpack(">H", payload[:2])[0] == 0:
                self.size, self._flags = struct.unpack(">QH", payload[2:12])

    def _ask_contexts(self, name: bytes, contexts: Sequence[str]) -> None:
        queries = b"".join(struct.pack(">I", len(one.encode())) + one.encode() for one in contexts)
        payload = struct.pack(">I", len(name)) + name + struct.pack(">I", len(contexts)) + queries
        for _, answer in self._option(_SET_META, payload):
            self._contexts[struct.unpack(">I", answer[:4])[0]] = answer[4:].decode()
        missing = set(contexts) - set(self._contexts.values())
        if missing:
            raise LookupError(f"the export {name.decode()} has no {min(missing)}")

    def _option(self, option: int, payload: bytes) -> Iterator[tuple[int, bytes]]:
        """The answers to ``option`` before its end. Raises OSError when it is refused."""
        self._socket.sendall(struct.pack(">QII", _OPTION, option, len(payload)) + payload)
        while True:
            magic, of, kind, length = struct.unpack(">QIII", self._take(20))
            answer = self._take(length)
            if (magic, of) != (_OPTION_REPLY, option):
                raise ConnectionError("the NBD server lost its place")
            if kind & 1 << 31:
                text = answer.decode(errors="replace") or f"option {option} was refused ({kind & 0xFFFF})"
                raise FileNotFoundError(errno.ENOENT, text)
            if kind == _ACK:
                return
            yield kind, answer

    # --- requests -------------------------------------------------------------------------------------

    def _send(self, command: int, offset: int, length: int) -> None:
        self._handle += 1
        self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, command, self._handle, offset, length))

    def _collect(
        self, buffer: memoryview = _NOTHING, offset: int = 0, context: int | None = None
    ) -> NDArray[np.uint32]:
        """Every part of the answer; the extents of ``context`` if there were any. Raises OSError after the last one."""
        found = np.empty((0, 2), np.uint32)
        failure: OSError | None = None
        while True:
            (magic,) = struct.unpack(">I", self._take(4))
            if magic == _SIMPLE:
                code, handle = struct.unpack(">IQ", self._take(12))
                if not code and len(buffer):
                    self._fill(buffer)
                flags, kind, failure = _DONE, 0, _error(code) if code else None
            elif magic == _STRUCTURED:
                flags, kind, handle, length = struct.unpack(">HHQI", self._take(16))
                if kind == _CHUNK_DATA:
                    (at,) = struct.unpack(">Q", self._take(8))
                    self._fill(_part(buffer, at - offset, length - 8))
                elif kind == _CHUNK_HOLE:
                    at, size = struct.unpack(">QI", self._take(12))
                    _part(buffer, at - offset, size)[:] = bytes(size)
                elif kind == _CHUNK_STATUS:
                    found = self._extents(length, context, found)
                elif kind & _CHUNK_ERROR:
                    failure = failure or _error(struct.unpack(">I", self._take(length)[:4])[0])
                else:
                    self._take(length)
            else:
                raise ConnectionError("the NBD server lost its place")
            if handle != self._handle:
                raise ConnectionError("the NBD server answers what was not asked")
            if flags & _DONE:
                if failure is not None:
                    raise failure
                return found

    def _extents(self, length: int, context: int | None, so_far: NDArray[np.uint32]) -> NDArray[np.uint32]:
        payload = self._take(length)
        if struct.unpack(">I", payload[:4])[0] != context:
            return so_far
        return np.frombuffer(payload, ">u4", offset=4).astype(np.uint32).reshape(-1, 2)

    def _take(self, length: int) -> bytes:
        data = bytearray(length)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = self._socket.recv_into(buffer[done:])
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")
            done += count


def _part(buffer: memoryview, start: int, length: int) -> memoryview:
    if start < 0 or start + length > len(buffer):
        raise ConnectionError("the NBD server sent what was not asked for")
    return buffer[start : start + length]


def _error(code: int) -> OSError:
    number = _ERRORS.get(code, errno.EIO)
    return OSError(number, os.strerror(number))
