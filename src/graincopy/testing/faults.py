"""Faults on purpose: which call fails, when, and with what. A seed replays a failure.

The wrappers ``Faulty`` of the seams ask a :class:`FaultPlan` at every point. Points are a verb (``put``: the call
failed and had no effect), or a verb with ``.done`` (the effect is there, the answer was lost).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Fault:
    """At the ``nth`` call (from 1; 0: every call) whose point and subject fit the patterns, raise ``error()``."""

    point: str
    error: Callable[[], BaseException]
    subject: str = "*"
    nth: int = 0


class FaultPlan:
    """Raises what its faults say; ``seen`` lists every point that was passed, ``struck`` those that failed."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self.faults = tuple(faults)
        self.seen: list[tuple[str, str]] = []
        self.struck: list[tuple[str, str]] = []
        self._counts = [0] * len(self.faults)

    def __call__(self, point: str, subject: str) -> None:
        self.seen.append((point, subject))
        due = [fault for number, fault in enumerate(self.faults) if self._is_due(number, fault, point, subject)]
        if due:
            self.struck.append((point, subject))
            raise due[0].error()

    def _is_due(self, number: int, fault: Fault, point: str, subject: str) -> bool:
        if not (fnmatchcase(point, fault.point) and fnmatchcase(subject, fault.subject)):
            return False
        self._counts[number] += 1
        return fault.nth in (0, self._counts[number])


class RandomFaults(FaultPlan):
    """Fails each call at the points ``points`` with probability ``share``: the same calls for the same ``seed``."""

    def __init__(self, seed: int, share: float, error: Callable[[], BaseException], points: str = "*") -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._share, self._error, self._points = share, error, points

    def __call__(self, point: str, subject: str) -> None:
        self.seen.append((point, subject))
        if fnmatchcase(point, self._points) and self._random.random() < self._share:
            self.struck.append((point, subject))
            raise self._error()


class SteppedClock:
    """A clock that stands still until somebody sleeps; ``slept`` lists for how long, in seconds."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._now, self._monotonic = now, 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._now += seconds
        self._monotonic += seconds
