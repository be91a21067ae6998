"""Reading ahead: which stretches of a disk were touched lately, and how far ahead of them it pays to fetch.

A disk is cut into stretches of about 1 MiB. Who enters a stretch near its start, when the one before was touched
not long ago, reads in sequence, whatever the order in which several requests of one reader arrive.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

STRETCH_BYTES = 1 << 20
_REMEMBERED = 32  # stretches; several readers of one disk, each with the stretch it is in and the one before
_FARTHEST = 4  # stretches ahead of a reader that has been reading in sequence for long
_REACH = 64  # stretches among which these are looked for where not all are wanted
_WORKERS = 2
_WAITING = 8  # stretches ordered and not begun; beyond that the medium is busy enough


class Trail:
    """The stretches of one disk that were touched lately. Safe to use from several threads."""

    def __init__(self, grain_size: int, farthest: int = _FARTHEST) -> None:
        self.grains = max(1, STRETCH_BYTES // grain_size)  # of one stretch
        self._farthest = min(farthest, _FARTHEST)
        self._lengths: OrderedDict[int, int] = OrderedDict()  # stretch → how many before it were read in sequence
        self._ordered: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.Lock()

    def touch(self, first: int, stop: int) -> int:
        """Grains ``[first, stop)`` are read; how many stretches in a row that makes before the last one. 0: none."""
        stretch, at = divmod(first, self.grains)
        length = 0
        with self._lock:
            for number in range(stretch, (stop - 1) // self.grains + 1):
                known = self._lengths.get(number)
                if known is None:
                    entered = at * 4 <= self.grains
                    known = self._lengths.get(number - 1, -1) + 1 if entered else 0
                    self._lengths[number] = known
                    if len(self._lengths) > _REMEMBERED:
                        self._lengths.popitem(last=False)
                length, at = known, 0
        return length

    def order(self, stretch: int, length: int, wanted: Callable[[int, int], bool]) -> list[int]:
        """Stretches after ``stretch`` to be fetched ahead now; each is named once as long as it is remembered.

        Those without grains that are ``wanted`` are passed over, so that where few are they are fetched from afar.
        """
        depth = min(length - 1, self._farthest)
        first, beyond = stretch + 1, stretch + 1 + (_REACH if depth == self._farthest else depth)
        if not depth or not wanted(first * self.grains, beyond * self.grains):
            return []
        found = (number for number in range(first, beyond) if wanted(number * self.grains, (number + 1) * self.grains))
        next_ones = list(islice(found, depth))
        with self._lock:
            fresh = [number for number in next_ones if number not in self._ordered]
            self._ordered.update(dict.fromkeys(fresh))
            while len(self._ordered) > _REMEMBERED:
                self._ordered.popitem(last=False)
        return fresh


class Scouts:
    """A few threads, shared by the disks of a view, that fetch ahead. The first order starts them."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._room = threading.BoundedSemaphore(_WAITING)
        self._lock = threading.Lock()
        self._closed = False

    def send(self, errand: Callable[[int], None], stretch: int) -> None:
        """Have ``errand(stretch)`` run soon, unless too much is waiting already."""
        if not self._room.acquire(blocking=False):
            return
        with self._lock:
            if self._closed:
                self._room.release()
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_WORKERS, "read-ahead")
            self._pool.submit(self._run, errand, stretch)

    def _run(self, errand: Callable[[int], None], stretch: int) -> None:
        try:
            if not self._closed:
                errand(stretch)
        finally:
            self._room.release()

    def close(self) -> None:
        """What was not begun is dropped; returns when nobody is out. May be repeated."""
        with self._lock:
            self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True)
