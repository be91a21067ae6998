"""What every medium can be wrapped in: a log, retries, a speed limit, faults. Drivers hold none of it.

:class:`Wrapped` hands every verb on through one method, ``around``; a wrapper is what it does there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError, MediumFailed
from graincopy.media.base import Buffer, Medium, MediumCapabilities, ObjectEntry
from graincopy.model.snapshot import Absent, Created, Deleted, Existing

T = TypeVar("T")


class Log(Protocol):
    """Takes one structured event (structlog's bound loggers do)."""

    def __call__(self, event: str, **facts: object) -> None: ...


class Fault(Protocol):
    """Asked at every point where a call can go wrong; raises to make it so (``graincopy.testing.faults``)."""

    def __call__(self, point: str, subject: str) -> None: ...


class Wrapped(Medium):
    """A medium that does what ``inner`` does."""

    def __init__(self, inner: Medium) -> None:
        self.inner = inner
        self.url = inner.url

    def around(self, verb: str, name: str, call: Callable[[], T]) -> T:
        """Every verb that touches the medium comes through here."""
        return call()

    def capabilities(self) -> MediumCapabilities:
        return self.inner.capabilities()

    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        return self.around("put", name, lambda: self.inner.put(name, parts))

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self.around("get", name, lambda: self.inner.get(name, offset, length))

    def size(self, name: str) -> int | None:
        return self.around("size", name, lambda: self.inner.size(name))

    def list(self, prefix: str) -> Iterator[ObjectEntry]:
        # taken whole inside the call: a listing that fails half-way is then logged, retried or failed as one
        return iter(self.around("list", prefix, lambda: tuple(self.inner.list(prefix))))

    def delete(self, name: str) -> Deleted | Absent:
        return self.around("delete", name, lambda: self.inner.delete(name))


class Logged(Wrapped):
    """Says of every call what it was, how it ended and how many seconds it took."""

    def __init__(self, inner: Medium, log: Log, clock: Clock) -> None:
        super().__init__(inner)
        self._log, self._clock = log, clock

    def around(self, verb: str, name: str, call: Callable[[], T]) -> T:
        began = self._clock.monotonic()
        outcome = "failed"
        try:
            answer = call()
            outcome = type(answer).__name__
            return answer
        except GraincopyError as error:
            outcome = type(error).__name__
            raise
        finally:
            self._log(f"medium.{verb}", name=name, outcome=outcome, seconds=self._clock.monotonic() - began)


class Retried(Wrapped):
    """Repeats a call that raised MediumFailed, up to ``attempts`` times in all, waiting twice as long each time.

    Only MediumFailed: full, read-only, missing and damaged do not get better by asking again. After a ``put`` whose
    answer was lost the repetition says ``Existing``; callers that race for a name read who holds it.
    """

    def __init__(self, inner: Medium, clock: Clock, attempts: int = 4, first_wait: float = 0.5) -> None:
        if attempts < 1:
            raise ValueError("at least one attempt is needed")
        super().__init__(inner)
        self._clock, self._attempts, self._first_wait = clock, attempts, first_wait

    def around(self, verb: str, name: str, call: Callable[[], T]) -> T:
        for attempt in range(self._attempts - 1):
            try:
                return call()
            except MediumFailed:
                self._clock.sleep(self._first_wait * 2**attempt)
        return call()


class Throttled(Wrapped):
    """Lets at most ``rate`` bytes per second through, all threads together, both directions together."""

    def __init__(self, inner: Medium, clock: Clock, rate: float) -> None:
        if rate <= 0:
            raise ValueError("the rate must be more than nothing")
        super().__init__(inner)
        self._clock, self._rate = clock, rate
        self._lock = threading.Lock()
        self._free_at = clock.monotonic()

    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        self._spend(sum(memoryview(part).nbytes for part in parts))
        return self.inner.put(name, parts)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self.inner.get(name, offset, length)
        self._spend(len(data))
        return data

    def _spend(self, size: int) -> None:
        with self._lock:
            now = self._clock.monotonic()
            self._free_at = max(now, self._free_at) + size / self._rate
            wait = self._free_at - now
        self._clock.sleep(wait)


class Faulty(Wrapped):
    """Fails where ``fault`` says: before a call took effect (``put``), or after it, its answer lost (``put.done``)."""

    def __init__(self, inner: Medium, fault: Fault) -> None:
        super().__init__(inner)
        self._fault = fault

    def around(self, verb: str, name: str, call: Callable[[], T]) -> T:
        self._fault(verb, name)
        answer = call()
        self._fault(f"{verb}.done", name)
        return answer
