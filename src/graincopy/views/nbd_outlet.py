"""The way of replies to a client: the memory that they are made in, and from there into its socket.

Fresh memory costs more than the bytes that are read into it (each page of it is a fault, and is zeroed first), so a
few buffers are used again and again; and a reply goes into the kernel as it lies there, without being joined or kept.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Sequence

import numpy as np

Part = bytes | bytearray | memoryview

JOIN_BYTES = 64 << 10  # what is left of replies and smaller is copied, so that it holds no buffer
_SMALLEST = 4  # a buffer holds no less than this part of what it can
_PARTS_MOST = 1024  # of one writev(2): IOV_MAX


class Buffers:
    """Up to ``most`` buffers of ``size`` bytes that wait for their next use. Thread-safe."""

    def __init__(self, size: int, most: int) -> None:
        self._size = size
        self._free: deque[memoryview] = deque(maxlen=most)

    def take(self, length: int) -> memoryview:
        """``length`` bytes or more, with anything in them; not many more, for slow clients hold what they get."""
        if not self._size < _SMALLEST * length <= _SMALLEST * self._size:
            return unset(length)
        try:
            return self._free.pop()  # the last one used: the processor still has it near
        except IndexError:
            return unset(self._size)

    def give_back(self, buffer: memoryview) -> None:
        """Nobody looks at what :meth:`take` gave any more."""
        if len(buffer) == self._size:
            self._free.append(buffer)


def unset(length: int) -> memoryview:
    """New memory with anything in it."""
    return np.empty(length, np.uint8).data


class Outlet:
    """Sends to one client. Everything in the loop's thread.

    Straight into the socket while nothing waits for it in ``transport``; only asyncio's own transports tell that
    reliably. TLS has to be asked for every byte.
    """

    def __init__(self, transport: asyncio.Transport, *, tls: bool) -> None:
        self._transport = transport
        straight = isinstance(transport, asyncio.Transport) and not tls
        self._socket: socket.socket | None = transport.get_extra_info("socket") if straight else None

    def send(self, parts: Sequence[Part]) -> bool:
        """Whether nobody reads ``parts`` any more on return; otherwise the transport does, some time."""
        left = [part for part in parts if part]
        if self._socket is not None and not self._transport.get_write_buffer_size():
            left = _send_now(self._socket, left)
        if sum(map(len, left)) <= JOIN_BYTES:
            left = [b"".join(left)] if left else []
            kept = False
        else:
            kept = True
        for part in left:
            self._transport.write(part)
        return not kept


def _send_now(sock: socket.socket, parts: list[Part]) -> list[Part]:
    """What the kernel has no room for."""
    while parts:
        some = parts[:_PARTS_MOST]
        try:
            sent = os.writev(sock.fileno(), some)
        except OSError:  # no room, or nobody there any more: the transport will find out which
            return parts
        parts = _without(parts, sent)
        if sent < sum(map(len, some)):
            return parts
    return parts


def _without(parts: list[Part], count: int) -> list[Part]:
    """``parts`` but for their first ``count`` bytes."""
    for number, part in enumerate(parts):
        if count < len(part):
            return [memoryview(part)[count:], *parts[number + 1 :]]
        count -= len(part)
    return []
