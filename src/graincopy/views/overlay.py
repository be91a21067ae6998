"""A view that takes writes: what is written lies in a sparse file of its own, everything else is the view's.

The unit is a block of 4 KiB, the guest's page: what guests write is whole blocks, so next to nothing is copied up from
the view. An overlay is thrown away at the end, or kept with a journal of its blocks beside it (``FILE.map``,
:mod:`graincopy.views.overlay_map`). A kept one survives a crash of the process with every write that was answered, and
a crash of the host with every write that was flushed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import stat
import tempfile
import threading
from collections.abc import Iterator

from pyroaring import BitMap64  # type: ignore[import-not-found,unused-ignore]

from graincopy.core.errors import OverlayUnfit
from graincopy.views.overlay_map import OverlayMap, Whose, to_extents
from graincopy.views.source import Span, ViewDisk

BLOCK = 4096  # bytes
_PUNCH_HOLE_KEEP_SIZE = 0x03  # linux/falloc.h
_NO_HOLES = {errno.EOPNOTSUPP, errno.ENOSYS}


class Overlay:
    """``base`` with changes in the open file ``fd``. Thread-safe."""

    def __init__(self, base: ViewDisk, fd: int, written: BitMap64 | None = None, journal: OverlayMap | None = None):
        self.name, self.size = base.name, base.size
        self._base, self._fd, self._journal = base, fd, journal
        self._written = BitMap64() if written is None else written
        self._lock = threading.Lock()  # of writers: while one holds it no other changes the files
        self._map = threading.Lock()  # of the bitmap, held for an instant only
        self._flushing = threading.Lock()
        self._changes = self._flushed_changes = 0
        self._broken: OSError | None = None

    @classmethod
    def scratch(cls, base: ViewDisk, folder: str) -> Overlay:
        """One that is thrown away: its file has no name, so nothing is left whatever happens. Raises OSError."""
        os.makedirs(folder, mode=0o700, exist_ok=True)
        fd, path = tempfile.mkstemp(prefix="overlay-", dir=folder)
        os.unlink(path)
        os.ftruncate(fd, base.size)
        return cls(base, fd)

    @classmethod
    def kept(cls, base: ViewDisk, path: str, point: str, boot: str) -> Overlay:
        """The overlay at ``path``, made or taken up again. ``boot`` is the host's boot id.

        Raises OverlayUnfit when the file is something else, another point's, in use or damaged; OSError.
        """
        disk = base.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        journal = OverlayMap(f"{path}.map", Whose(point, disk, base.size, BLOCK), boot)
        with contextlib.ExitStack() as undo:
            fd = _lock(path)
            undo.callback(os.close, fd)
            blocks = journal.load()
            size = os.fstat(fd).st_size
            if blocks is None and size:
                raise OverlayUnfit(path=path, reason=f"it exists and is no overlay: there is no {path}.map")
            if blocks is not None and size != base.size and (size or len(blocks)):
                raise OverlayUnfit(path=path, reason=f"it has {size} bytes, and its disk {base.size}")
            if blocks is not None and len(blocks) and int(blocks.stops[-1]) > -(-base.size // BLOCK):
                raise OverlayUnfit(path=path, reason="its map goes beyond the end of the disk")
            os.ftruncate(fd, base.size)
            os.fsync(fd)
            written = BitMap64()
            for start, stop in blocks or ():
                written.add_range(start, stop)
            journal.rewrite(to_extents(written))
            undo.pop_all()
        return cls(base, fd, written, journal)

    # --- reading ----------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """As ViewDisk says."""
        stop = min(offset + len(buffer), self.size)
        buffer[max(0, stop - offset) :] = bytes(len(buffer) - max(0, stop - offset))
        for start, end, own in self._runs(offset, stop):
            piece = buffer[start - offset : end - offset]
            if own:
                self._read_own(start, piece)
            else:
                self._base.readinto(start, piece)

    def extents(self, offset: int, length: int) -> list[Span]:
        """As ViewDisk says; what was written is local."""
        spans: list[Span] = []
        for start, end, own in self._runs(offset, min(offset + length, self.size)):
            for span in self._own_spans(start, end) if own else self._base.extents(start, end - start):
                last = spans[-1] if spans else None
                if last and (last.zero, last.local) == (span.zero, span.local):
                    spans[-1] = Span(last.start, span.stop, span.zero, span.local)
                else:
                    spans.append(span)
        return spans

    def _runs(self, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """``[start, stop)`` cut into ranges (bytes) that are the overlay's own, and that are not."""
        if start >= stop:
            return []
        first, last = start // BLOCK, -(-stop // BLOCK)
        with self._map:
            own = self._written.range_cardinality(first, last)
            if own in (0, last - first):
                return [(start, stop, own > 0)]
            inside = to_extents(self._written & BitMap64(range(first, last)))
        bounds = [start, *(int(bound) * BLOCK for bound in inside.bounds), stop]
        runs = []
        for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
            begin, end = max(begin, start), min(end, stop)
            if begin < end:
                runs.append((begin, end, number % 2 == 1))
        return runs

    def _read_own(self, offset: int, buffer: memoryview) -> None:
        while buffer:
            got = os.preadv(self._fd, [buffer], offset)
            if not got:
                raise OSError(errno.EIO, "the overlay was cut short by somebody")
            buffer, offset = buffer[got:], offset + got

    def _own_spans(self, start: int, stop: int) -> Iterator[Span]:
        while start < stop:
            data = min(_seek(self._fd, start, os.SEEK_DATA, stop), stop)
            if data > start:
                yield Span(start, data, True, True)
            hole = min(_seek(self._fd, data, os.SEEK_HOLE, stop), stop) if data < stop else stop
            if hole > data:
                yield Span(data, hole, False, True)
            start = hole

    # --- writing ----------------------------------------------------------------------------------

    def write(self, offset: int, data: memoryview) -> None:
        """As WritableDisk says. Blocks that are written in part get the rest from the view first."""
        stop = offset + len(data)
        copies = self._copies(offset, stop)
        with self._lock:
            for block, content in copies:
                if block not in self._written:
                    _write_all(self._fd, memoryview(content), block * BLOCK)
            _write_all(self._fd, data, offset)
            self._mark(offset, stop)

    def zero(self, offset: int, length: int) -> None:
        """As WritableDisk says. Whole blocks become holes of the overlay's file."""
        stop = offset + length
        first = min(-(-offset // BLOCK) * BLOCK, stop)
        last = stop if stop == self.size else max(first, stop // BLOCK * BLOCK)
        for start, end in ((offset, first), (last, stop)):
            if start < end:
                self.write(start, memoryview(bytes(end - start)))
        if first < last:
            with self._lock:
                self._punch(first, last - first)
                self._mark(first, last)

    def flush(self) -> None:
        """As WritableDisk says: for a kept overlay, data first, then the journal says that it is there."""
        if self._journal is None:
            return
        with self._lock:
            wanted = self._changes
        with self._flushing:
            if self._broken:
                raise OSError(self._broken.errno, "an earlier flush failed; what was written may be lost")
            if self._flushed_changes >= wanted:
                return
            try:
                self._flush(self._journal)
            except OSError as failure:  # the kernel forgets which pages it lost: no later fsync can be believed
                self._broken = failure
                raise

    def _flush(self, journal: OverlayMap) -> None:
        with self._lock:
            changes, count = self._changes, journal.count
        os.fdatasync(self._fd)
        with self._lock:
            journal.flushed(count)
            if journal.bloated(self._written):
                os.fdatasync(self._fd)
                journal.rewrite(to_extents(self._written))
        self._flushed_changes = changes

    def close(self) -> None:
        """Flush what is kept, and let the files go. Raises OSError when the flush fails."""
        try:
            self.flush()
        finally:
            if self._journal is not None:
                self._journal.close()
            os.close(self._fd)

    def _copies(self, offset: int, stop: int) -> list[tuple[int, bytearray]]:
        """What the view has in blocks that are going to be written in part. Read before the lock: it may take long."""
        edges = {offset // BLOCK} if offset % BLOCK else set()
        if stop % BLOCK and stop != self.size:
            edges.add(stop // BLOCK)
        copies = []
        for block in edges:
            with self._map:
                if block in self._written:
                    continue
            content = bytearray(min(BLOCK, self.size - block * BLOCK))
            self._base.readinto(block * BLOCK, memoryview(content))
            copies.append((block, content))
        return copies

    def _mark(self, offset: int, stop: int) -> None:
        first, last = offset // BLOCK, -(-stop // BLOCK)
        self._changes += 1
        if self._written.range_cardinality(first, last) == last - first:
            return
        if self._journal is not None:
            self._journal.add(first, last)
        with self._map:
            self._written.add_range(first, last)

    def _punch(self, offset: int, length: int) -> None:
        number = _punch_hole(self._fd, offset, length)
        if number in _NO_HOLES:
            piece = memoryview(bytes(min(length, 1 << 20)))
            for start in range(offset, offset + length, len(piece)):
                _write_all(self._fd, piece[: offset + length - start], start)
        elif number:
            raise OSError(number, os.strerror(number))


def _lock(path: str) -> int:
    """The file at ``path``, made where there is none, open and held by us alone. Raises OverlayUnfit."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as failure:
        raise OverlayUnfit(path=path, reason=failure.strerror or str(failure)) from failure
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OverlayUnfit(path=path, reason="it is no regular file")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as failure:
        os.close(fd)
        raise OverlayUnfit(path=path, reason="another graincopy serves it") from failure
    except OverlayUnfit:
        os.close(fd)
        raise
    return fd


def _seek(fd: int, offset: int, how: int, end: int) -> int:
    """Where data or a hole begins from ``offset`` on; ``end`` where there is none any more."""
    try:
        return os.lseek(fd, offset, how)
    except OSError as failure:
        if failure.errno != errno.ENXIO:
            raise
        return end


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        put = os.pwrite(fd, data, offset)
        data, offset = data[put:], offset + put


def _punch_hole(fd: int, offset: int, length: int) -> int:
    """fallocate(2), which the os module lacks; 0, or what went wrong."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate64(fd, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0:
        return 0
    return ctypes.get_errno()
