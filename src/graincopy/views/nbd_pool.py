"""Threads of the NBD server that touch disks, so that the loop that touches sockets never waits.

Not :mod:`concurrent.futures`: its threads are waited for at the end of the process, and a read from a medium that
is gone may take longer than a server may take to end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Pool(Generic[T]):
    """``size`` threads. ``post`` hands over what a job gave, in the thread of the job; None when the job crashed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._jobs: queue.SimpleQueue[tuple[Callable[[], T], Callable[[T | None], None]] | None] = queue.SimpleQueue()
        for _ in range(size):
            self._start()

    def submit(self, work: Callable[[], T], post: Callable[[T | None], None]) -> None:
        """Have ``work`` done by the next free thread."""
        self._jobs.put((work, post))

    def close(self) -> None:
        """Let the threads end when they have done what waits; nobody waits for them."""
        for _ in range(self.size):
            self._jobs.put(None)

    def _start(self) -> None:
        threading.Thread(target=self._run, name="nbd", daemon=True).start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, post = job
            done: T | None = None
            try:
                done = work()
            finally:
                if done is None:  # a bug: this thread ends with its traceback, another one takes its place
                    self._start()
                post(done)
