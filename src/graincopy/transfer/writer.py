"""Packs → grains → S: every grain of a restore point is written once, straight from the medium; nothing is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from graincopy.core.extent import Extents
from graincopy.model.restore_point import MapRoot
from graincopy.repository.grainmap import CHUNK, ZERO, Entries
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
    bills: list[Written] = []

    def make() -> tuple[Callable[[Entries], None], Callable[[], None]]:
        mine = Written()
        bills.append(mine)
        return lambda batch: _write_batch(repository, batch, sink, size, mine, meter), lambda: None

    run_workers(workers if chunks.total > 1 else 1, _batches(repository, root, chunks), make)
    bill.written_bytes += sum(one.written_bytes for one in bills)
    bill.fetched_bytes += sum(one.fetched_bytes for one in bills)
    return bill


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


def _write_batch(
    repository: Repository, batch: Entries, sink: FileSink, size: int, bill: Written, meter: Meter
) -> None:
    grain_size = repository.grain_size
    fetched = repository.fetch(batch.ids)
    for grain, content in zip(batch.grains.tolist(), fetched.pieces, strict=True):
        offset = grain * grain_size
        wanted = memoryview(content)[: max(0, size - offset)]
        sink.write(offset, wanted)
        bill.written_bytes += len(wanted)
    bill.fetched_bytes += fetched.fetched_bytes
    meter.add(len(batch.grains) * grain_size)


def _write_zeros(ranges: Extents, sink: FileSink, meter: Meter) -> int:
    for start, stop in ranges:
        sink.zero(start, stop - start)
        meter.add(stop - start)
    return ranges.total
