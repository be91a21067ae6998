"""The near half of a hybrid view: grains that S still holds as the restore point has them, read from T.

Which grains these are is presumed: from change map and grain maps, or from nothing at all. Each presumption is proved
by the grain's id the first time it is read, and remembered in a bitmap; a wrong one costs a read and nothing else.
Whatever goes wrong with T, the answer is "not from here", and the medium has it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from pyroaring import BitMap64, FrozenBitMap64  # type: ignore[import-not-found,unused-ignore]

from graincopy.core.bitmap import GrainBitmap
from graincopy.core.errors import GraincopyError
from graincopy.core.extent import Extents
from graincopy.core.ids import PieceId
from graincopy.views.image import lay
from graincopy.volumes.base import FileImage

_GONE = frozenset((errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EBADF, errno.ESHUTDOWN, errno.ENOENT))
_MOST_FAILURES = 16  # reads of T that may fail before it is given up
SHARE_BYTES = 256 << 10  # of a large read that one thread reads and proves, while others do the same for the rest
_SHARES = 4
_TRIAL = 256  # grains after which presumptions that are wrong more often than right are given up


class Gate:
    """Lets readers in until it is shut; shutting waits for those who are inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    def enter(self) -> bool:
        """False when it is shut; otherwise :meth:`leave` must follow."""
        with self._changed:
            self._inside += not self._shut
            return not self._shut

    def leave(self) -> None:
        """The reader is out."""
        with self._changed:
            self._inside -= 1
            if self._shut and not self._inside:
                self._changed.notify_all()

    def shut(self) -> None:
        """Nobody comes in any more; returns when nobody is inside. May be repeated."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: not self._inside)


class LocalGrains:
    """The grains of one disk that are read from ``image``, its file in T. Safe to use from several threads.

    ``differing``: grains not to be looked for here. ``trust``: the rest is not proved.
    """

    def __init__(
        self,
        image: FileImage,
        grain_size: int,
        differing: Extents,
        chunk_id: Callable[[memoryview], PieceId],
        *,
        trust: bool = False,
    ) -> None:
        self.lost: str | None = None  # why T is not used any more
        self.mismatches = 0
        self._image = image
        self._grain = grain_size
        self._chunk_id = chunk_id
        self._trust = trust
        self._differing = BitMap64(GrainBitmap.from_extents(differing).grains)
        self._proved = BitMap64()
        self._failures = 0
        self._gate = Gate()
        self._lock = threading.Lock()
        self._helpers = ThreadPoolExecutor(_SHARES - 1, "near")

    # --- what is here -----------------------------------------------------------------------------

    def lacks(self, first: int, stop: int) -> bool:
        """Whether the medium will be asked for any of the grains ``[first, stop)``."""
        return self.lost is not None or self._differing.range_cardinality(first, stop) > 0

    def differing(self, first: int, stop: int) -> Extents:
        """Those of the grains ``[first, stop)`` that are known, or found, not to be here."""
        if self.lost is not None:
            return Extents.of((first, stop))
        part = BitMap64()
        part.add_range(first, stop)
        with self._lock:
            part &= self._differing
        return GrainBitmap(FrozenBitMap64(part)).to_extents()

    # --- reading ----------------------------------------------------------------------------------

    def read_proved(self, first: int, stop: int, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` when all its grains have been proved before; False when not."""
        if self.lost is not None or not self._proved.contains_range(first, stop):
            return False
        return self._guarded(lambda: self._image.readinto(offset, buffer), first, stop)

    def serve(self, first: int, ids: Sequence[bytes | None], offset: int, buffer: memoryview) -> list[bool]:
        """Fill what of ``buffer`` the chunks ``ids`` (of the grains from ``first`` on) hold; which of them that was.

        ``buffer`` may be left with wrong bytes where the answer is False.
        """
        served = [False] * len(ids)
        at = 0
        while at < len(ids) and self.lost is None:
            run = at
            while run < len(ids) and ids[run] is not None and first + run not in self._differing:
                run += 1
            if run > at:
                self._serve_run(first, ids, at, run, served, offset, buffer)
            at = run + 1
        return served

    def _serve_run(
        self,
        first: int,
        ids: Sequence[bytes | None],
        at: int,
        stop: int,
        served: list[bool],
        offset: int,
        buffer: memoryview,
    ) -> None:
        """Grains ``first + at`` to ``first + stop``. Whole grains are read where they belong, torn ones beside it."""
        grain = self._grain
        whole = -(-offset // grain) - first, (offset + len(buffer)) // grain - first
        low, high = max(at, whole[0]), min(stop, whole[1])
        if low < high:
            start = (first + low) * grain
            part = buffer[start - offset : start - offset + (high - low) * grain]
            served[low:high] = self._serve_whole(first + low, ids[low:high], part)
        for number in range(at, stop):
            if not low <= number < high:
                served[number] = self._serve_torn(first + number, ids[number], offset, buffer)

    def _serve_whole(self, first: int, ids: Sequence[bytes | None], buffer: memoryview) -> list[bool]:
        """The grains from ``first`` on, which fill ``buffer``: by several threads where that is worth it."""
        shares = min(_SHARES, len(buffer) // SHARE_BYTES)
        each = -(-len(ids) // max(1, shares))
        others: list[Future[list[bool]]] = []
        with suppress(RuntimeError):  # the view is being closed
            for at in range(each, len(ids), each):
                part = buffer[at * self._grain :]
                others.append(self._helpers.submit(self._look, first + at, ids[at : at + each], part))
        found = self._look(first, ids[:each], buffer)
        for other in others:
            found += other.result()
        return found + [False] * (len(ids) - len(found))

    def _look(self, first: int, ids: Sequence[bytes | None], buffer: memoryview) -> list[bool]:
        """Read grains to where ``buffer`` begins, and say of each whether it is what it should be."""
        grain = self._grain
        part = buffer[: len(ids) * grain]
        if not self._guarded(lambda: self._image.readinto(first * grain, part), first, first + len(ids)):
            return [False] * len(ids)
        return [
            self._prove(first + number, piece, buffer[number * grain : (number + 1) * grain])
            for number, piece in enumerate(ids)
        ]

    def _serve_torn(self, number: int, piece: bytes | None, offset: int, buffer: memoryview) -> bool:
        """A grain of which only a part is wanted: all of it has to be read to prove it."""
        content = memoryview(bytearray(self._grain))
        start = number * self._grain
        if not self._guarded(lambda: self._image.readinto(start, content), number, number + 1):
            return False
        if not self._prove(number, piece, content):
            return False
        lay(content, start, buffer, offset)
        return True

    def _prove(self, grain: int, piece: bytes | None, content: memoryview) -> bool:
        if grain in self._proved:
            return True
        if self._trust or self._chunk_id(content) == piece:
            with self._lock:
                self._proved.add(grain)
            return True
        with self._lock:
            self._differing.add(grain)
            self.mismatches += 1
            if self.mismatches >= _TRIAL and self.mismatches > len(self._proved):
                self.lost = "the volume holds too little of the restore point any more"
        return False

    def _guarded(self, read: Callable[[], None], first: int, stop: int) -> bool:
        """Read while T is attached. What fails is not looked for here again."""
        if not self._gate.enter():
            return False
        try:
            read()
        except (OSError, GraincopyError) as failure:
            self._failed(failure, first, stop)
            return False
        finally:
            self._gate.leave()
        return True

    def _failed(self, failure: OSError | GraincopyError, first: int, stop: int) -> None:
        with self._lock:
            self._proved.remove_range(first, stop)
            self._differing.add_range(first, stop)
            self._failures += 1
            gone = isinstance(failure, GraincopyError) or failure.errno in _GONE
            if gone or self._failures >= _MOST_FAILURES:
                self.lost = f"the snapshot cannot be read: {failure}"

    def close(self) -> None:
        """No read touches T from here on; returns when the last one is over. May be repeated."""
        self.lost = self.lost or "the view is closed"
        self._gate.shut()
        self._helpers.shutdown()
