"""What a request is answered with: the only part of the NBD server that reads and writes disks. No socket here.

A batch of requests becomes a list of buffers for the socket. The replies to neighbouring small reads lie in one
buffer, headers included, so that a client with many requests under way costs one pass through everything and not one
for each request.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from graincopy.core.errors import GraincopyError
from graincopy.views import nbd_wire as wire
from graincopy.views.nbd_handshake import ALLOCATION, context_id
from graincopy.views.nbd_outlet import Buffers, Part, unset
from graincopy.views.nbd_protocol import Opened
from graincopy.views.nbd_request import Request
from graincopy.views.nbd_wire import Cmd
from graincopy.views.source import Span, ViewDisk

HOLES_FROM = 64 << 10  # bytes of a read from which on looking for holes is worth a look into the grain map
HOLES_AHEAD = 16 << 20  # bytes looked at together, so that a sequential reader looks once for many reads
HOLES_MOST = 64  # chunks of one reply; more fragments than that are sent as plain bytes
STATUS_REACH = 1 << 30  # bytes that one BLOCK_STATUS looks at; clients ask on from where the answer ended
WRITABLE_REACH = 64 << 20  # the same where writes may have left a patchwork of blocks
CACHE_PIECE = 1 << 20  # bytes
SLOW_S = 0.001  # a request that took longer waited for storage: others should not wait behind it


class WritableDisk(ViewDisk, Protocol):
    """A view that takes writes. Every method may be called from several threads at once; all raise OSError."""

    def write(self, offset: int, data: memoryview) -> None:
        """Lay ``data`` at ``offset``; it lies inside the disk."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros."""

    def flush(self) -> None:
        """All writes that returned before are on stable storage after this, if the disk is one that is kept."""


class Served(msgspec.Struct, frozen=True):
    """Replies to the first requests of a batch, and those that were left over because an earlier one was slow.

    ``borrowed``: the buffers that ``parts`` lie in, to be given back once these are sent.
    """

    parts: list[Part]
    left: Sequence[Request]
    slow: bool
    borrowed: Sequence[memoryview] = ()


class _Watch:
    """Notices the first request that is slow."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic, self._begun, self.slow = monotonic, monotonic(), False

    def lap(self) -> None:
        now = self._monotonic()
        self.slow = now - self._begun > SLOW_S
        self._begun = now


class Answers:
    """Answers the requests of one connection. Thread-safe."""

    def __init__(self, disk: ViewDisk, writable: WritableDisk | None, opened: Opened, buffers: Buffers) -> None:
        self._disk, self._writable, self._buffers = disk, writable, buffers
        self._structured, self._contexts = opened.structured, opened.contexts
        self._plain = (0, 0)  # a range known to have no hole; replaced as a whole, so that no thread sees half of it

    def serve(self, requests: Sequence[Request], monotonic: Callable[[], float]) -> Served:
        """Answer ``requests`` in order until one is slow. ``monotonic`` gives seconds."""
        parts: list[Part] = []
        borrowed: list[memoryview] = []
        watch = _Watch(monotonic)
        at = 0
        while at < len(requests) and not watch.slow:
            run = self._run_of_reads(requests, at)
            if run > at:
                borrowed.append(self._buffers.take(self._room(requests[at:run])))
                at += self._read_plain(requests[at:run], borrowed[-1], parts, watch)
            else:
                parts += self._other(requests[at])
                at += 1
                watch.lap()
        return Served(parts, requests[at:], watch.slow, borrowed)

    # --- reads ------------------------------------------------------------------------------------

    def _run_of_reads(self, requests: Sequence[Request], at: int) -> int:
        """Where the reads end that begin with number ``at`` and need no look for holes."""
        while at < len(requests) and requests[at].command == Cmd.READ and not self._may_have_holes(requests[at]):
            at += 1
        return at

    def _may_have_holes(self, request: Request) -> bool:
        if request.length < HOLES_FROM or not self._structured or request.flags & wire.DF:
            return False
        start, stop = self._plain
        return not (start <= request.offset and request.offset + request.length <= stop)

    @property
    def _head(self) -> int:
        """Bytes before the data of a read."""
        return wire.DATA_CHUNK.size if self._structured else wire.SIMPLE.size

    def _room(self, reads: Sequence[Request]) -> int:
        """Bytes that the replies to ``reads`` take."""
        return sum(read.length for read in reads) + len(reads) * self._head

    def _read_plain(self, reads: Sequence[Request], buffer: memoryview, parts: list[Part], watch: _Watch) -> int:
        """Answer ``reads`` out of ``buffer``, until one is slow; how many were answered."""
        head = self._head
        first = at = number = 0
        while number < len(reads) and not watch.slow:
            read = reads[number]
            stop = at + head + read.length
            try:
                self._disk.readinto(read.offset, buffer[at + head : stop])
                buffer[at : at + head] = self._data_head(read)
                at = stop
            except (OSError, GraincopyError, MemoryError) as failure:
                parts += [buffer[first:at], self._failed(read, failure)]
                first = at
            number += 1
            watch.lap()
        parts.append(buffer[first:at])
        return number

    def _data_head(self, read: Request) -> bytes:
        if self._structured:
            return wire.data_chunk(read.handle, read.offset, read.length, True)
        return wire.simple(read.handle)

    def _read_with_holes(self, read: Request) -> list[Part]:
        """Zeros are not sent, only told."""
        spans = self._disk.extents(read.offset, max(read.length, min(HOLES_AHEAD, self._disk.size - read.offset)))
        if spans and not spans[0].zero:
            self._plain = (spans[0].start, _first_zero(spans))
        pieces = _pieces(spans, read.offset, read.offset + read.length)
        if not 0 < len(pieces) <= HOLES_MOST:
            pieces = [(read.offset, read.length, False)]
        parts: list[Part] = []
        for offset, length, zero in pieces:
            done = offset + length == read.offset + read.length
            if zero:
                parts.append(wire.hole_chunk(read.handle, offset, length, done))
                continue
            head = wire.data_chunk(read.handle, offset, length, done)
            buffer = unset(len(head) + length)
            buffer[: len(head)] = head
            self._disk.readinto(offset, buffer[len(head) :])
            parts.append(buffer)
        return parts

    # --- everything else --------------------------------------------------------------------------

    def _other(self, request: Request) -> list[Part]:
        try:
            return _COMMANDS[request.command](self, request)
        except (OSError, GraincopyError, MemoryError) as failure:
            return [self._failed(request, failure)]

    def _failed(self, request: Request, failure: OSError | GraincopyError | MemoryError) -> bytes:
        if isinstance(failure, MemoryError):
            return wire.failure(self._structured, request.handle, errno.ENOMEM, "out of memory")
        number = failure.errno if isinstance(failure, OSError) else errno.EIO
        text = failure.strerror if isinstance(failure, OSError) and failure.strerror else str(failure)
        return wire.failure(self._structured, request.handle, wire.wire_error(number), text)

    def _target(self) -> WritableDisk:
        if self._writable is None:
            raise OSError(errno.EPERM, "the export is read-only")
        return self._writable

    def _done(self, request: Request) -> list[Part]:
        if self._writable is not None and request.flags & wire.FUA:
            self._writable.flush()
        return [wire.simple(request.handle)]

    def _write(self, request: Request) -> list[Part]:
        self._target().write(request.offset, memoryview(request.payload))
        return self._done(request)

    def _zero(self, request: Request) -> list[Part]:
        self._plain = (0, 0)
        self._target().zero(request.offset, request.length)
        return self._done(request)

    def _flush(self, request: Request) -> list[Part]:
        if self._writable is not None:
            self._writable.flush()
        return [wire.simple(request.handle)]

    def _cache(self, request: Request) -> list[Part]:
        """Read, and forget: what lies on the medium is in the view's cache afterwards."""
        scratch = memoryview(bytearray(min(CACHE_PIECE, request.length)))
        stop = request.offset + request.length
        for offset in range(request.offset, stop, CACHE_PIECE):
            self._disk.readinto(offset, scratch[: stop - offset])
        return [wire.simple(request.handle)]

    def _block_status(self, request: Request) -> list[Part]:
        reach = STATUS_REACH if self._writable is None else WRITABLE_REACH
        spans = self._disk.extents(request.offset, min(request.length, reach))
        most = 1 if request.flags & wire.REQ_ONE else len(spans)
        if not most:
            raise OSError(errno.EIO, "nothing is known of this range")
        last = self._contexts[-1]
        return [
            wire.status_chunk(request.handle, context_id(context), _states(spans, context)[:most], context == last)
            for context in self._contexts
        ]


_COMMANDS: dict[int, Callable[[Answers, Request], list[Part]]] = {
    Cmd.READ: Answers._read_with_holes,
    Cmd.WRITE: Answers._write,
    Cmd.FLUSH: Answers._flush,
    Cmd.TRIM: Answers._zero,
    Cmd.WRITE_ZEROES: Answers._zero,
    Cmd.CACHE: Answers._cache,
    Cmd.BLOCK_STATUS: Answers._block_status,
}


def _first_zero(spans: Sequence[Span]) -> int:
    """Where the bytes that begin ``spans`` end."""
    return next((span.start for span in spans if span.zero), spans[-1].stop)


def _pieces(spans: Sequence[Span], start: int, stop: int) -> list[tuple[int, int, bool]]:
    """``spans`` inside ``[start, stop)`` as (offset, length, zero), alternating."""
    pieces: list[tuple[int, int, bool]] = []
    for span in spans:
        offset, length = max(span.start, start), min(span.stop, stop) - max(span.start, start)
        if length <= 0:
            continue
        if pieces and pieces[-1][2] == span.zero:
            offset, length = pieces[-1][0], pieces[-1][1] + length
            pieces.pop()
        pieces.append((offset, length, span.zero))
    return pieces


def _states(spans: Sequence[Span], context: str) -> list[tuple[int, int]]:
    """``spans`` as (length, flags) of one metadata context, equal neighbours joined."""
    states: list[tuple[int, int]] = []
    for span in spans:
        if context == ALLOCATION:
            flags = wire.STATE_HOLE | wire.STATE_ZERO if span.zero else 0
        else:
            flags = 2 if span.zero else int(span.local)
        length = span.stop - span.start
        if states and states[-1][1] == flags:
            length += states.pop()[0]
        states.append((length, flags))
    return states
