"""Stages 8 and R, beside them: signs of life of a long run, for collectors on other hosts."""

from __future__ import annotations

from graincopy.core.clock import Clock
from graincopy.model.restore_point import RunRecord
from graincopy.repository.repository import Repository
from graincopy.transfer.progress import Progress, ProgressSink

BEAT_SECONDS = 30.0


class Heart:
    """A progress sink that also lets the run's heart beat in the repository, about every BEAT_SECONDS."""

    def __init__(self, repository: Repository, run: RunRecord, clock: Clock, sink: ProgressSink) -> None:
        self._repository = repository
        self._run = run
        self._clock = clock
        self._sink = sink
        self._last = clock.monotonic()

    def __call__(self, report: Progress) -> None:
        self._sink(report)
        now = self._clock.monotonic()
        if now - self._last >= BEAT_SECONDS:
            self._last = now
            self._repository.beat(self._run)
