"""Packs → grains → S: every grain of a restore point is written once, straight from the medium; nothing is merged."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from graincopy.core.extent import Array, Extents
from graincopy.model.restore_point import MapRoot
from graincopy.repository.entries import CHUNK, ZERO, Entries
from graincopy.repository.repository import Repository
from graincopy.transfer.progress import Meter
from graincopy.transfer.workers import run_workers
from graincopy.volumes.base import FileSink

BATCH_BYTES = 4 << 20  # chunks fetched together: enough neighbours for one range of a pack, little enough memory


class Written(msgspec.Struct):
    """The bill of a restore, in bytes."""

    written_bytes: int = 0
    fetched_bytes: int = 0


def write_grains(
    repository: Repository,
    root: MapRoot,
    grains: Extents,
    sink: FileSink,
    size: int,
    *,
    fresh: bool,
    workers: int,
    meter: Meter,
) -> Written:
    """Make ``grains`` of ``sink`` (already ``size`` bytes long) hold what the grain map ``root`` says.

    Zero grains are made to read as zeros, unless the sink is ``fresh``: then it reads as zeros already.
    """
    grain_size = repository.grain_size
    bill = Written()
    chunks, zeros = _split_by_kind(repository, root, grains)
    if not fresh:
        bill.written_bytes += _write_zeros(zeros.to_bytes(grain_size).clip(0, size), sink, meter)
    hands: list[_Hand] = []

    def make() -> tuple[Callable[[Entries], None], Callable[[], None]]:
        hand = _Hand(repository, sink, size, meter, joined=fresh)
        hands.append(hand)
        return hand.write, lambda: None

    run_workers(workers if chunks.total > 1 else 1, _batches(repository, root, chunks), make)
    bill.written_bytes += sum(hand.bill.written_bytes for hand in hands)
    bill.fetched_bytes += sum(hand.bill.fetched_bytes for hand in hands)
    return bill


class _Hand:
    """One worker and its bill."""

    def __init__(self, repository: Repository, sink: FileSink, size: int, meter: Meter, *, joined: bool) -> None:
        """``joined``: neighbouring grains are written together from aligned memory, so that a new file can be written
        past the page cache. Through it, the copy would cost more than the calls."""
        self.bill = Written()
        self._repository, self._sink, self._size, self._meter = repository, sink, size, meter
        self._grain = repository.grain_size
        self._view = memoryview(mmap.mmap(-1, max(BATCH_BYTES, self._grain))) if joined else None

    def write(self, batch: Entries) -> None:
        """Fetch the chunks of ``batch`` and write them."""
        fetched = self._repository.fetch(batch.ids)
        if self._view is None:
            for grain, piece in zip(batch.grains.tolist(), fetched.pieces, strict=True):
                self._put(grain, memoryview(piece))
        else:
            for run in _neighbours(batch.grains):
                pieces = fetched.pieces[run[0] : run[-1] + 1]
                self._put(int(batch.grains[run[0]]), _join(pieces, self._view))
        self.bill.fetched_bytes += fetched.fetched_bytes
        self._meter.add(len(batch.grains) * self._grain)

    def _put(self, grain: int, content: memoryview) -> None:
        offset = grain * self._grain
        wanted = content[: max(0, self._size - offset)]
        self._sink.write(offset, wanted)
        self.bill.written_bytes += len(wanted)


def _join(pieces: Sequence[bytes], buffer: memoryview) -> memoryview:
    """``pieces`` behind each other in ``buffer``."""
    used = 0
    for piece in pieces:
        buffer[used : used + len(piece)] = piece
        used += len(piece)
    return buffer[:used]


def _neighbours(grains: Array) -> list[Array]:
    """Indexes of ascending ``grains``, one array for each run without a gap."""
    return np.split(np.arange(len(grains)), np.flatnonzero(np.diff(grains) != 1) + 1)


def _split_by_kind(repository: Repository, root: MapRoot, grains: Extents) -> tuple[Extents, Extents]:
    """``grains`` that have chunks, and those that are zero."""
    found = Entries.join(list(repository.map.walk(root, grains)))
    chunks = Extents.from_points(found.grains[found.kinds != ZERO])
    return chunks, grains - chunks


def _batches(repository: Repository, root: MapRoot, grains: Extents) -> Iterator[Entries]:
    """The chunk entries of ``grains``, in pieces of about BATCH_BYTES."""
    per_batch = max(1, BATCH_BYTES // repository.grain_size)
    for entries in repository.map.walk(root, grains):
        chunks = entries.pick(entries.kinds == CHUNK)
        for start in range(0, len(chunks), per_batch):
            yield chunks.pick(slice(start, start + per_batch))


def _write_zeros(ranges: Extents, sink: FileSink, meter: Meter) -> int:
    for start, stop in ranges:
        sink.zero(start, stop - start)
        meter.add(stop - start)
    return ranges.total
