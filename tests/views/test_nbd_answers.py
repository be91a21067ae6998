"""What requests are answered with, over a disk in memory: bytes, holes, states, errors, and slow storage."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import BLOCK_STATUS, CACHE, DF, FLUSH, READ, REQ_ONE, WRITE, Parser, Reply
from nbd_disks import GRAIN, MemoryDisk

from graincopy.core.errors import ObjectDamaged
from graincopy.views import nbd_wire as wire
from graincopy.views.nbd_answers import HOLES_FROM, SLOW_S, Answers, Served
from graincopy.views.nbd_handshake import CONTEXTS, Export
from graincopy.views.nbd_outlet import Buffers
from graincopy.views.nbd_protocol import Opened
from graincopy.views.nbd_request import Request
from graincopy.views.nbd_wire import Cmd
from graincopy.views.overlay import Overlay


def image(grains: str) -> bytes:
    """One grain for each letter; '.' is zeros."""
    made = random.Random(grains)
    return b"".join(bytes(GRAIN) if letter == "." else made.randbytes(GRAIN) for letter in grains)


def answers(disk: MemoryDisk, structured: bool = True) -> Answers:
    opened = Opened(Export(disk.name, disk.size, False), structured, CONTEXTS)
    return Answers(disk, None, opened, Buffers(1 << 16, 2))


def instant() -> float:
    """A clock that stands still: no request is ever slow."""
    return 0.0


def serve(found: Answers, *requests: Request, structured: bool = True) -> list[Reply]:
    served = found.serve(requests, instant)
    assert not served.left
    return parsed(served, requests, structured)


def parsed(served: Served, requests: tuple[Request, ...], structured: bool = True) -> list[Reply]:
    parser = Parser(b"".join(bytes(part) for part in served.parts))
    replies = []
    for request in requests[: len(requests) - len(served.left)]:
        length = request.length if request.command == READ and not structured else 0
        replies.append(parser.reply(length))
        assert replies[-1].handle == request.handle
    assert not parser.data
    return replies


def read(offset: int, length: int, handle: int = 1, flags: int = 0) -> Request:
    return Request(READ, flags, handle, offset, length)


@settings(max_examples=150, deadline=None)
@given(st.text("a.", min_size=1, max_size=12), st.data())
def test_reads_of_any_range_are_the_disks_bytes(grains: str, data: st.DataObject) -> None:
    disk = MemoryDisk(image(grains) + b"tail")
    structured = data.draw(st.booleans())
    requests = []
    for number in range(data.draw(st.integers(1, 6))):
        offset = data.draw(st.integers(0, disk.size - 1))
        length = data.draw(st.one_of(st.integers(1, 9000), st.integers(1, disk.size))) if offset else disk.size
        flags = data.draw(st.sampled_from([0, DF])) if structured else 0
        requests.append(read(offset, min(length, disk.size - offset), number, flags))
    found = answers(disk, structured)
    for request, reply in zip(requests, serve(found, *requests, structured=structured), strict=True):
        wanted = disk.content[request.offset : request.offset + request.length]
        if not structured:
            assert reply.data == {-1: wanted}
        else:
            assert reply.content(request.offset, request.length) == wanted
            assert not request.flags or len(reply.data) == 1
            assert all(any(piece) for piece in reply.data.values()) or request.length < HOLES_FROM or request.flags


def test_holes_of_large_reads_are_told_not_sent() -> None:
    disk = MemoryDisk(image("a..b."))
    (reply,) = serve(answers(disk), read(100, 5 * GRAIN - 200))
    assert reply.holes == [(GRAIN, 2 * GRAIN), (4 * GRAIN, GRAIN - 100)]
    assert {at: len(piece) for at, piece in reply.data.items()} == {100: GRAIN - 100, 3 * GRAIN: GRAIN}
    (reply,) = serve(answers(disk), read(0, 5 * GRAIN, flags=DF))
    assert not reply.holes


def test_a_sequential_reader_looks_for_holes_once_for_many_reads() -> None:
    asked = []

    class Counting(MemoryDisk):
        def extents(self, offset: int, length: int):  # type: ignore[no-untyped-def]
            asked.append(offset)
            return super().extents(offset, length)

    disk = Counting(image("abcdefgh........"))
    found = answers(disk)
    for grain in range(16):
        (reply,) = serve(found, read(grain * GRAIN, GRAIN))
        assert reply.content(grain * GRAIN, GRAIN) == disk.content[grain * GRAIN :][:GRAIN]
    assert asked == [0, *range(8 * GRAIN, 16 * GRAIN, GRAIN)]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(errno.EIO, "grain 1 is damaged"), errno.EIO),
        (OSError(errno.ESTALE, "odd"), errno.EIO),
        (ObjectDamaged(name="data/1", reason="it is"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
    ],
)
@pytest.mark.parametrize("length", [512, 2 * HOLES_FROM])
def test_a_read_that_fails_fails_alone(structured: bool, failure: BaseException, error: int, length: int) -> None:
    def bad(offset: int, size: int) -> None:
        if offset < 2 * GRAIN and offset + size > GRAIN:
            raise failure

    disk = MemoryDisk(image("abcdefgh"), hook=bad)
    requests = [read(3 * GRAIN, length, 1), read(GRAIN, length, 2), read(5 * GRAIN, length, 3), read(0, 512, 4)]
    replies = serve(answers(disk, structured), *requests, structured=structured)
    assert [reply.error for reply in replies] == [0, error, 0, 0]
    for request, reply in zip(requests, replies, strict=True):
        if not reply.error:
            content = reply.content(request.offset, request.length) if structured else reply.data[-1]
            assert content == disk.content[request.offset : request.offset + request.length]
    if structured and isinstance(failure, OSError):
        assert replies[1].message == str(failure.strerror).encode()


def test_block_status_in_both_contexts() -> None:
    disk = MemoryDisk(image("aab.c..d"), local={1, 2, 5, 7})
    (reply,) = serve(answers(disk), Request(BLOCK_STATUS, 0, 1, 100, disk.size - 200))
    kib = [GRAIN - 100, GRAIN, GRAIN, GRAIN, GRAIN, GRAIN, GRAIN, GRAIN - 100]
    assert reply.states[1] == [(sum(kib[:3]), 0), (kib[3], 3), (kib[4], 0), (sum(kib[5:7]), 3), (kib[7], 0)]
    assert reply.states[2] == [
        (kib[0], 0), (sum(kib[1:3]), 1), (kib[3], 2), (kib[4], 0), (sum(kib[5:7]), 2), (kib[7], 1),
    ]  # fmt: skip
    (reply,) = serve(answers(disk), Request(BLOCK_STATUS, REQ_ONE, 1, 100, disk.size - 200))
    assert (reply.states[1], reply.states[2]) == ([(sum(kib[:3]), 0)], [(kib[0], 0)])


def test_block_status_that_cannot_be_had_is_an_error() -> None:
    class Gone(MemoryDisk):
        def extents(self, offset: int, length: int):  # type: ignore[no-untyped-def]
            raise OSError(errno.EIO, "the medium is gone")

    (reply,) = serve(answers(Gone(image("a"))), Request(BLOCK_STATUS, 0, 1, 0, 512))
    assert (reply.error, reply.message) == (errno.EIO, b"the medium is gone")


def test_cache_reads_and_flush_of_a_read_only_disk_is_done() -> None:
    touched = []
    disk = MemoryDisk(image("ab"), hook=lambda offset, length: touched.append((offset, length)))
    replies = serve(answers(disk), Request(CACHE, 0, 1, 10, GRAIN), Request(FLUSH, 0, 2, 0, 0))
    assert [reply.error for reply in replies] == [0, 0]
    assert touched == [(10, GRAIN)]


def test_writes_to_a_disk_that_takes_none_are_refused_here_too() -> None:
    (reply,) = serve(answers(MemoryDisk(image("a"))), Request(WRITE, 0, 1, 0, 1, b"x"))
    assert reply.error == errno.EPERM


@pytest.mark.parametrize(
    "requests",
    [
        (Request(WRITE, wire.FUA, 1, 0, 4096, b"x" * 4096),),
        (Request(Cmd.WRITE_ZEROES, wire.FUA, 1, 0, 4096),),
        (Request(Cmd.TRIM, wire.FUA, 1, 0, 4096),),
        (Request(WRITE, 0, 1, 0, 4096, b"x" * 4096), Request(FLUSH, 0, 2, 0, 0)),
        (Request(WRITE, 0, 1, 0, 4096, b"x" * 4096),),
    ],
    ids=["write, FUA", "zeroes, FUA", "trim, FUA", "write, flush", "write"],
)
def test_what_was_flushed_outlives_the_host(requests: tuple[Request, ...], tmp_path: os.PathLike[str]) -> None:
    disk, path = MemoryDisk(image("a")), os.path.join(tmp_path, "overlay")
    overlay = Overlay.kept(disk, path, "ab" * 16, "this boot")
    opened = Opened(Export(disk.name, disk.size, True), True, CONTEXTS)
    serve(Answers(overlay, overlay, opened, Buffers(1 << 16, 2)), *requests)
    again = [shutil.copy(name, f"{tmp_path}/again{name.removeprefix(path)}") for name in (path, f"{path}.map")]
    overlay.close()
    after = Overlay.kept(disk, again[0], "ab" * 16, "the boot after")
    found = bytearray(4096)
    after.readinto(0, memoryview(found))
    after.close()
    flushed = len(requests) > 1 or requests[0].flags
    assert found == ((requests[0].payload or bytes(4096)) if flushed else image("a")[:4096])


@pytest.mark.parametrize("slow_one", range(4))
def test_nobody_waits_behind_a_slow_request(slow_one: int) -> None:
    ticks = itertools.count()
    time = [0.0]

    def hook(_offset: int, _length: int) -> None:
        if next(ticks) == slow_one:
            time[0] += 2 * SLOW_S

    disk = MemoryDisk(image("abcd"), hook=hook)
    requests = tuple(read(at * GRAIN, 512, at) for at in range(4))
    served = answers(disk).serve(requests, lambda: time[0])
    assert served.slow
    assert list(served.left) == list(requests[slow_one + 1 :])
    assert len(parsed(served, requests)) == slow_one + 1
