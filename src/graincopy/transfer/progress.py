"""How far a transfer is: counted here, shown by the faces."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

ProgressSink = Callable[["Progress"], None]


class Progress(msgspec.Struct, frozen=True):
    """One report: ``done`` of ``total`` bytes of ``what``."""

    what: str
    done: int
    total: int


class Meter:
    """Adds up what several workers report; one per transfer. Plain additions are atomic enough for a display."""

    def __init__(self, what: str, total: int, sink: ProgressSink) -> None:
        self._what = what
        self._total = total
        self._sink = sink
        self._done = 0
        sink(Progress(what, 0, total))

    def add(self, size: int) -> None:
        """``size`` more bytes are done."""
        self._done += size
        self._sink(Progress(self._what, self._done, self._total))


def silent(_report: Progress) -> None:
    """Shows nothing."""
