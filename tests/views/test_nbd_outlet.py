"""How replies leave: in order, whole, and out of memory that is used again only when nobody looks at it any more."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from graincopy.views.nbd_outlet import JOIN_BYTES, Buffers, Outlet


class Waiting(asyncio.Transport):
    """A transport whose client reads nothing: it keeps what it is given, as asyncio does from Python 3.12 on."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.kept: list[Any] = []

    def write(self, data: Any) -> None:
        self.kept.append(data)

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.kept))

    def take(self) -> bytes:
        """What waits, as it is now."""
        kept, self.kept = self.kept, []
        return b"".join(kept)


class Ends:
    """Both ends of a connection; the kernel takes a few dozen KiB of it."""

    def __init__(self) -> None:
        self.server, self.client = socket.socketpair()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.server.setblocking(False)
        self.client.setblocking(False)
        self.transport = Waiting(self.server)

    def arrived(self) -> bytes:
        """What lies in the socket."""
        data = bytearray()
        while True:
            try:
                part = self.client.recv(1 << 20)
            except BlockingIOError:
                return bytes(data)
            if not part:
                return bytes(data)
            data += part


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.server.close()
    made.client.close()


def noise(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def test_what_the_kernel_takes_goes_at_once_and_its_memory_is_free(ends: Ends) -> None:
    memory = bytearray(b"reply")
    assert Outlet(ends.transport, tls=False).send([b"head", memoryview(memory), b""])
    memory[:] = b"XXXXX"
    assert (ends.arrived(), ends.transport.kept) == (b"headreply", [])


def test_what_it_does_not_take_waits_and_holds_its_memory(ends: Ends) -> None:
    parts = [noise(1000), noise(1 << 20, 2)]
    assert not Outlet(ends.transport, tls=False).send(parts)
    arrived = ends.arrived()
    assert 1000 < len(arrived) < 1 << 20
    assert arrived + ends.transport.take() == b"".join(parts)


def test_a_small_rest_is_copied_and_holds_no_memory(ends: Ends) -> None:
    outlet = Outlet(ends.transport, tls=False)
    while outlet.send([bytearray(1000)]) and not ends.transport.kept:
        pass
    ends.transport.take()
    memory = bytearray(noise(JOIN_BYTES))
    assert outlet.send([memoryview(memory)])
    memory[:] = bytes(JOIN_BYTES)
    assert ends.transport.take() == noise(JOIN_BYTES)


def test_nothing_overtakes_what_waits(ends: Ends) -> None:
    outlet = Outlet(ends.transport, tls=False)
    first, second, third = noise(1 << 20), noise(5, 2), noise(7, 3)
    outlet.send([first])
    arrived = ends.arrived()  # there is room again, and still the next has to wait for its turn
    outlet.send([second])
    assert ends.arrived() == b""
    assert arrived + ends.transport.take() == first + second
    outlet.send([third])
    assert (ends.arrived(), ends.transport.kept) == (third, [])


def test_more_parts_than_one_call_takes(ends: Ends) -> None:
    parts = [noise(5, seed) for seed in range(3000)]
    outlet = Outlet(ends.transport, tls=False)
    assert outlet.send(parts)
    assert ends.arrived() + ends.transport.take() == b"".join(parts)


def test_through_tls_every_byte_is_the_transports(ends: Ends) -> None:
    assert not Outlet(ends.transport, tls=True).send([noise(JOIN_BYTES + 1)])
    assert (ends.arrived(), ends.transport.take()) == (b"", noise(JOIN_BYTES + 1))


@pytest.mark.parametrize("which", ["client", "server"])
def test_a_connection_that_is_gone_is_the_transports_to_find_out(ends: Ends, which: str) -> None:
    getattr(ends, which).close()
    assert Outlet(ends.transport, tls=False).send([b"reply"])
    assert ends.transport.take() == b"reply"


def test_buffers_come_back_in_their_size_and_in_bounds() -> None:
    buffers = Buffers(100, 2)
    taken = [buffers.take(length) for length in (26, 100, 50, 101, 25)]
    assert [len(one) for one in taken] == [100, 100, 100, 101, 25]
    for one in taken:
        buffers.give_back(one)
    again = [buffers.take(90) for _ in range(3)]
    assert again[0] is taken[2] and again[1] is taken[1]  # the last one first; large and small ones are not kept
    assert all(again[2] is not one for one in taken)
    assert len({id(one) for one in again}) == 3
