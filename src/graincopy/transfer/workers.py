"""The one place in transfer that starts threads: a few workers that take work from one iterator.

The libraries underneath (reads, BLAKE3, zstd, AES) release the interpreter lock, so two workers use two cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

Work = TypeVar("Work")
Make = Callable[[], tuple[Callable[[Work], None], Callable[[], None]]]  # (do one piece, finish)


def run_workers(count: int, work: Iterator[Work], make: Make[Work]) -> None:
    """Give each piece of ``work`` to one of ``count`` workers, each made by ``make``.

    Returns when all is done and every worker has finished; the first exception stops the others and is raised.
    With a count of one nothing is started: the work is done in order, in the calling thread.
    """
    if count > 1:
        _Crew(work, make).run(count)
        return
    do, finish = make()
    for piece in work:
        do(piece)
    finish()


class _Crew(Generic[Work]):
    """Workers that share an iterator, and the word to stop."""

    def __init__(self, work: Iterator[Work], make: Make[Work]) -> None:
        self._work = work
        self._make = make
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, count: int) -> None:
        with ThreadPoolExecutor(count, "transfer") as pool:
            workers = [pool.submit(self._labour) for _ in range(count)]
            try:
                wait(workers, return_when=FIRST_EXCEPTION)
            finally:
                self._stopped = any(not worker.done() or worker.exception() for worker in workers)
            for worker in workers:
                worker.result()

    def _labour(self) -> None:
        do, finish = self._make()
        for piece in self._share():
            do(piece)
        if not self._stopped:
            finish()

    def _share(self) -> Iterator[Work]:
        """Pieces of the common work, until there is none left or somebody failed."""
        while not self._stopped:
            with self._lock:
                piece = next(self._work, self)
            if piece is self:
                return
            yield piece  # type: ignore[misc]
