"""One disk of a view: zeros from nowhere, what S still holds from T, the rest from the medium."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError, MediumFailed
from graincopy.core.extent import Extents, merge_cuts
from graincopy.views.hybrid import LocalGrains
from graincopy.views.image import StoredImage
from graincopy.views.source import Span

T = TypeVar("T")
ATTEMPTS = 4
FIRST_WAIT = 0.5  # seconds; twice as long each time, so that a read fails 3.5 s after the medium did
_MOST_FINDINGS = 64


class Finding(msgspec.Struct, frozen=True):
    """Bytes ``[start, stop)`` of a disk were asked for and could not be had."""

    disk: str
    start: int
    stop: int
    what: str

    def __str__(self) -> str:
        return f"{self.disk}: bytes {self.start} to {self.stop} cannot be read: {self.what}"


class Split(msgspec.Struct):
    """Where the bytes that were read came from."""

    local_bytes: int = 0
    medium_bytes: int = 0
    zero_bytes: int = 0


class RestoredDisk:
    """A ViewDisk (views/source). ``tell`` hears of each finding once."""

    def __init__(
        self, name: str, image: StoredImage, grain_size: int, clock: Clock, tell: Callable[[Finding], None]
    ) -> None:
        self.name = name
        self.size = image.size
        self.split = Split()
        self.findings: list[Finding] = []
        self._image = image
        self._grain = grain_size
        self._clock = clock
        self._tell = tell
        self._local: LocalGrains | None = None
        self._lock = threading.Lock()

    # --- the near source --------------------------------------------------------------------------

    def attach(self, local: LocalGrains) -> None:
        """From now on ask ``local`` first."""
        self._image.wanted = local.lacks
        self._local = local

    def detach(self) -> None:
        """From now on everything comes from the medium; T may be closed on return. May be repeated."""
        if self._local is not None:
            self._local.close()

    # --- reading ----------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros. Raises OSError (EIO)."""
        if offset < 0:
            raise OSError(errno.EINVAL, "a negative offset")
        for start, part in self._image.steps(offset, buffer):
            self._attempt(lambda start=start, part=part: self._read(start, part), start, len(part))  # type: ignore[misc]

    def _read(self, offset: int, buffer: memoryview) -> None:
        first, stop = self._image.grains_of(offset, len(buffer))
        self._image.pass_by(first, stop)
        local = self._local
        if local is not None and local.read_proved(first, stop, offset, buffer):
            self._count(local=len(buffer))
            return
        ids = self._image.ids(first, stop)
        served = local.serve(first, ids, offset, buffer) if local is not None else [False] * len(ids)
        self._image.fill(first, ids, offset, buffer, served)
        self._count_grains(first, ids, served, offset, len(buffer))

    def _count_grains(
        self, first: int, ids: Sequence[bytes | None], served: Sequence[bool], offset: int, length: int
    ) -> None:
        split = {"local": 0, "medium": 0, "zero": 0}
        for number, (piece, near) in enumerate(zip(ids, served, strict=True), first):
            start = max(offset, number * self._grain)
            part = min(offset + length, (number + 1) * self._grain) - start
            split["zero" if piece is None else "local" if near else "medium"] += part
        self._count(**split)

    def _count(self, local: int = 0, medium: int = 0, zero: int = 0) -> None:
        with self._lock:
            self.split.local_bytes += local
            self.split.medium_bytes += medium
            self.split.zero_bytes += zero

    # --- what cannot be had -----------------------------------------------------------------------

    def _attempt(self, read: Callable[[], T], offset: int, length: int) -> T:
        """``read()``, repeated while the medium is gone, but not for ever. Raises OSError (EIO)."""
        for attempt in range(ATTEMPTS):
            try:
                return read()
            except MediumFailed as failure:
                if attempt == ATTEMPTS - 1:
                    raise self._finding(failure, offset, length) from failure
            except GraincopyError as failure:
                raise self._finding(failure, offset, length) from failure
            self._clock.sleep(FIRST_WAIT * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _finding(self, failure: GraincopyError, offset: int, length: int) -> OSError:
        finding = Finding(self.name, offset, offset + length, failure.message)
        with self._lock:
            fresh = len(self.findings) < _MOST_FINDINGS and all(finding.what != one.what for one in self.findings)
            if fresh:
                self.findings.append(finding)
        if fresh:
            self._tell(finding)
        return OSError(errno.EIO, str(finding))

    # --- where something is -----------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> list[Span]:
        """The range, cut to the size, as neighbouring spans without a gap. Raises OSError (EIO)."""
        stop = min(offset + length, self.size)
        if not 0 <= offset < stop:
            return []
        first, last = self._image.grains_of(offset, stop - offset)
        chunks = self._attempt(lambda: self._image.chunks(first, last), offset, stop - offset)
        local = self._local
        far = Extents.of((first, last)) if local is None else local.differing(first, last)
        chunks, far = (one.to_bytes(self._grain).clip(offset, stop) for one in (chunks, far))
        return _spans(offset, stop, chunks, far & chunks)


def _spans(start: int, stop: int, chunks: Extents, far: Extents) -> list[Span]:
    """Ranges of bytes by kind; ``far`` lies in ``chunks``, so that every cut is a change."""
    ends = np.array((start, stop), np.int64)
    cuts = merge_cuts(ends, chunks.bounds, far.bounds)
    held, distant = chunks.holds(cuts), far.holds(cuts)
    columns = zip(cuts[:-1].tolist(), cuts[1:].tolist(), held.tolist(), distant.tolist(), strict=False)
    return [Span(begin, end, zero=not full, local=full and not distant) for begin, end, full, distant in columns]
