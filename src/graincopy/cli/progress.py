"""Progress on stderr: a bar on a terminal, JSON lines when asked for, otherwise nothing."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID

    from graincopy.transfer.progress import Progress

EVERY_SECONDS = 0.5


class JsonLines:
    """One JSON object a line, about twice a second: what, done and total in bytes, rate in bytes per second, ETA."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._shown = 0.0
        self._begun: dict[str, float] = {}

    def __call__(self, report: Progress) -> None:
        now = time.monotonic()
        with self._lock:
            begun = self._begun.setdefault(report.what, now)
            if now - self._shown < EVERY_SECONDS and report.done < report.total:
                return
            self._shown = now
            rate = report.done / (now - begun) if now > begun else 0.0
            eta = (report.total - report.done) / rate if rate else None
            line = {"what": report.what, "done": report.done, "total": report.total, "rate": round(rate), "eta_s": eta}
            self._out.write(json.dumps(line) + "\n")
            self._out.flush()

    def close(self) -> None:
        """Nothing to take down."""


class Bar:
    """A bar for each transfer, from its second second on: what is over sooner is not worth a flicker."""

    PATIENCE_SECONDS = 1.0

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import (
            Progress as Bars,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        rest = (TransferSpeedColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, *rest, console=Console(stderr=True), transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._running = False

    def __call__(self, report: Progress) -> None:
        with self._lock:
            if not self._running and time.monotonic() - self._begun > self.PATIENCE_SECONDS:
                self._bars.start()
                self._running = True
            if report.what not in self._tasks:
                self._tasks[report.what] = self._bars.add_task(report.what, total=report.total)
            self._bars.update(self._tasks[report.what], completed=report.done, total=report.total)

    def close(self) -> None:
        """Take the bars down."""
        if self._running:
            self._bars.stop()


def make(kind: str) -> JsonLines | Bar | None:
    """What ``--progress`` asks for; ``auto`` is a bar on a terminal and nothing elsewhere."""
    if kind == "json":
        return JsonLines(sys.stderr)
    if kind == "bar" or (kind == "auto" and sys.stderr.isatty()):
        return Bar()
    return None
