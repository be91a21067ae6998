"""T → grains → packs: read, find zeros, name, leave out what is stored already, seal, pack.

Each worker goes through all of these by itself, with its own buffer and its own open pack, so that the workers
share nothing but the index. A batch is a run of neighbouring grains and one read.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from graincopy.core.errors import ReadIncomplete
from graincopy.core.extent import Extents
from graincopy.core.ids import PieceId
from graincopy.repository.entries import CHUNK, Entries
from graincopy.repository.pack import PackWriter
from graincopy.repository.records import PieceKind
from graincopy.repository.repository import Repository
from graincopy.repository.store import Session
from graincopy.transfer.progress import Meter
from graincopy.transfer.workers import run_workers
from graincopy.volumes.base import Readable

BATCH_BYTES = 1 << 22  # one read; larger ones gain nothing, smaller ones cost calls


class Copied(msgspec.Struct):
    """What came of copying grains: their entries in ascending order, and the bill in bytes."""

    entries: Entries
    read_bytes: int = 0
    stored_bytes: int = 0
    unreadable: Extents = msgspec.field(default_factory=Extents.empty)  # bytes; only where partial reading is allowed


class _Haul(msgspec.Struct):
    """What one worker brings home."""

    entries: list[Entries] = msgspec.field(default_factory=list)
    read_bytes: int = 0
    stored_bytes: int = 0
    unreadable: list[tuple[int, int]] = msgspec.field(default_factory=list)


def copy_grains(
    image: Readable,
    path: str,
    grains: Extents,
    repository: Repository,
    session: Session | None,
    *,
    workers: int,
    meter: Meter,
    allow_partial: bool = False,
) -> Copied:
    """Read ``grains`` of ``image`` and store their chunks, unless stored already; without a session, only name them.

    Raises ReadIncomplete (naming ``path``) when bytes cannot be read and ``allow_partial`` is off.
    """
    hauls: list[_Haul] = []
    grain_size = repository.grain_size

    count = min(workers, max(1, grains.total * grain_size // BATCH_BYTES))

    def make() -> tuple[Callable[[tuple[int, int]], None], Callable[[], None]]:
        hand = _Hand(image, path, repository, session, meter, allow_partial, alone=count == 1)
        hauls.append(hand.haul)
        return hand.copy, hand.finish

    run_workers(count, grains.split(max(1, BATCH_BYTES // grain_size)), make)
    return _join(hauls)


class _Hand:
    """One worker: buffer, open pack, haul."""

    def __init__(
        self,
        image: Readable,
        path: str,
        repository: Repository,
        session: Session | None,
        meter: Meter,
        allow_partial: bool,
        alone: bool,
    ) -> None:
        """``alone``: it works in the thread that owns the session, and leaves its pack open for the next disk."""
        self.haul = _Haul()
        self._image = image
        self._path = path
        self._repository = repository
        self._session = session
        self._grain = repository.grain_size
        self._meter = meter
        self._allow_partial = allow_partial
        self._alone = alone
        self._writer: PackWriter | None = None
        if session is not None:
            self._writer = (session.shared_writer if alone else session.writer)(PieceKind.CHUNK)
        self._view = memoryview(mmap.mmap(-1, max(BATCH_BYTES, self._grain)))

    def copy(self, batch: tuple[int, int]) -> None:
        """Read, name and store the grains ``[start, stop)``."""
        start, stop = batch
        length = (stop - start) * self._grain
        content = self._view[:length]
        self._read(start * self._grain, content)
        entries = self._name(content, start, stop)
        if self._session is not None and self._writer is not None:
            self._store(content, entries, self._session, self._writer)
        self.haul.entries.append(entries)
        self._meter.add(length)

    def finish(self) -> None:
        """Put the pack that is still open, unless others go on filling it."""
        if self._writer is not None and not self._alone:
            self._writer.flush()

    def _read(self, offset: int, content: memoryview) -> None:
        try:
            self._image.readinto(offset, content)
        except OSError as failure:
            if not self._allow_partial:
                raise ReadIncomplete(path=self._path, reason=failure.strerror) from failure
            self._read_what_can_be(offset, content)
        self.haul.read_bytes += min(len(content), max(0, self._image.size - offset))

    def _read_what_can_be(self, offset: int, content: memoryview) -> None:
        for start in range(0, len(content), self._grain):
            piece = content[start : start + self._grain]
            try:
                self._image.readinto(offset + start, piece)
            except OSError:
                piece[:] = bytes(len(piece))
                self.haul.unreadable.append((offset + start, offset + start + len(piece)))

    def _name(self, content: memoryview, start: int, stop: int) -> Entries:
        """The entries of the grains ``[start, stop)`` that ``content`` holds."""
        entries = Entries.zeros(np.arange(start, stop, dtype=np.int64))
        for index in np.flatnonzero(~zero_grains(content, stop - start)).tolist():
            entries.kinds[index] = CHUNK
            entries.ids[index] = np.frombuffer(self._repository.chunk_id(self._piece(content, index)), np.uint8)
        return entries

    def _store(self, content: memoryview, entries: Entries, session: Session, writer: PackWriter) -> None:
        wanted = (entries.kinds == CHUNK) & ~session.known(entries.ids)
        for index in np.flatnonzero(wanted).tolist():
            piece = PieceId(entries.ids[index].tobytes())
            self.haul.stored_bytes += writer.add(piece, self._piece(content, index))

    def _piece(self, content: memoryview, index: int) -> memoryview:
        return content[index * self._grain : (index + 1) * self._grain]


def differ(one: Entries, other: Entries) -> NDArray[np.bool_]:
    """For each grain (the same in both) whether the two say otherwise of it."""
    mask: NDArray[np.bool_] = (one.kinds != other.kinds) | (one.ids != other.ids).any(axis=1)
    return mask


def zero_grains(content: memoryview, count: int) -> NDArray[np.bool_]:
    """Which of the ``count`` equal parts of ``content`` hold nothing but zero bytes.

    The first word decides nearly always; only where it is zero the rest is looked at.
    """
    words = np.frombuffer(content, np.uint64).reshape(count, -1)
    zero: NDArray[np.bool_] = words[:, 0] == 0
    for index in np.flatnonzero(zero).tolist():
        zero[index] = not words[index].any()
    return zero


def _join(hauls: list[_Haul]) -> Copied:
    return Copied(
        Entries.join([part for haul in hauls for part in haul.entries]).settled(),
        sum(haul.read_bytes for haul in hauls),
        sum(haul.stored_bytes for haul in hauls),
        Extents.from_pairs(pair for haul in hauls for pair in haul.unreadable),
    )
