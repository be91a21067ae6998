"""The index: which pack holds a piece. A few sorted runs, in memory (index_run.py) or in files (index_cache.py).

How it lies on the medium is in segments.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain

import msgspec
import numpy as np

from graincopy.core.extent import Array, Mask
from graincopy.repository.format import Ids
from graincopy.repository.format_segment import Rows
from graincopy.repository.index_run import Hits, MemoryRun, Run, keys_of
from graincopy.repository.pack import PackDirectory
from graincopy.repository.records import PackRef

LONGEST = 1 << 22  # rows of a run that was merged: half a gigabyte while it is sorted
_NO_ROWS = Rows((), np.empty((0, 32), np.uint8), *(np.empty(0, np.uint32) for _ in range(3)))


class Index:
    """Immutable: id → pack, offset, length. Safe to use from several threads."""

    def __init__(self, runs: tuple[Run, ...] = (), without: frozenset[str] = frozenset()) -> None:
        """What is in the packs of the object names ``without`` is not known."""
        self._runs, self._without = runs, without
        self._usable = tuple(_usable(run, without) for run in runs)

    @classmethod
    def of(cls, rows: Iterable[Rows]) -> Index:
        """From rows in any order; packs that occur twice are made one."""
        run = MemoryRun.of(merge_rows(list(rows)))
        return cls((run,) if len(run) else ())

    @property
    def packs(self) -> tuple[PackRef, ...]:
        """Every pack, also those that do not count; one that two runs list occurs twice."""
        return tuple(chain.from_iterable(run.packs for run in self._runs))

    def __len__(self) -> int:
        """Rows, of which several may be about one piece."""
        return sum(len(run) for run in self._runs)

    def adding(self, rows: Rows) -> Index:
        """This index and ``rows``. Runs of like length are merged: adding n packs costs O(n log n) in all."""
        if not len(rows):
            return self
        runs, merged = merged_with(self._runs, [rows])
        return Index((*runs, merged), self._without)

    def excluding(self, names: Collection[str]) -> Index:
        """This index, in which what is in the packs of these object names is not known."""
        return Index(self._runs, self._without | frozenset(names))

    def known(self, ids: Ids) -> Mask:
        """For each id whether a pack holds it."""
        mask = np.zeros(len(ids), np.bool_)
        keys = keys_of(ids)
        for run, usable in zip(self._runs, self._usable, strict=True):
            left = np.flatnonzero(~mask)
            mask[left] = run.find(keys[left], ids[left], usable).row >= 0
        return mask

    def locate(self, ids: Ids, without: Collection[str] = ()) -> Located:
        """Where each of ``ids`` lies, packs of the object names ``without`` left out; -1 where none is known."""
        hits, keys = Hits.none(len(ids)), keys_of(ids)
        first_row = first_pack = 0
        for run in self._runs:
            left = np.flatnonzero(hits.row < 0)
            if not len(left):
                break
            found = run.find(keys[left], ids[left], _usable(run, self._without.union(without)))
            hits.put(left, found, first_row, first_pack)
            first_row, first_pack = first_row + len(run), first_pack + len(run.packs)
        return Located(tuple(run.packs for run in self._runs), hits.row, hits.pack, hits.offset, hits.length)

    def rows(self) -> Rows:
        """Everything, in the order of the row numbers that :meth:`locate` gives; of an index that was loaded whole."""
        found = [run.rows() for run in self._runs]
        whole = [rows for rows in found if rows is not None]
        assert len(whole) == len(found)  # it is in memory
        return whole[0] if len(whole) == 1 else merge_rows(whole)


class Located(msgspec.Struct, frozen=True, eq=False):
    """Columns, one place per id that was asked for. ``pack`` numbers the packs of all tables; -1 in all: not known."""

    tables: tuple[Sequence[PackRef], ...]
    row: Array
    pack: Array
    offset: Array
    length: Array

    def pack_ref(self, number: int) -> PackRef:
        """The pack that ``pack`` calls ``number``. Raises IndexError."""
        for table in self.tables:
            if number < len(table):
                return table[number]
            number -= len(table)
        raise IndexError(number)


def merged_with(runs: Sequence[Run], fresh: Sequence[Rows]) -> tuple[tuple[Run, ...], MemoryRun]:
    """``fresh`` as one run, together with the last of ``runs`` that are not much longer; and the others.

    So there are few runs, and n parts that come one by one cost O(n log n) in all. No run gets longer than ``LONGEST``.
    """
    left, parts = list(runs), list(fresh)
    size = sum(len(rows) for rows in parts)
    while left and len(left[-1]) <= min(2 * size, LONGEST - size):
        last = left[-1].rows()
        if last is None:
            break
        left.pop()
        parts.append(last)
        size += len(last)
    return tuple(left), MemoryRun.of(merge_rows(parts))


def merge_rows(many: Sequence[Rows]) -> Rows:
    """All rows under one table of packs, each pack once."""
    if not many:
        return _NO_ROWS
    packs = tuple(dict.fromkeys(pack for rows in many for pack in rows.packs))
    number = {pack: at for at, pack in enumerate(packs)}
    renumbered = [np.array([number[pack] for pack in rows.packs], np.uint32)[rows.pack] for rows in many]
    return Rows(
        packs,
        np.concatenate([rows.ids for rows in many]),
        np.concatenate(renumbered),
        np.concatenate([rows.offset for rows in many]),
        np.concatenate([rows.length for rows in many]),
    )


def rows_of(directory: PackDirectory) -> Rows:
    """What one pack holds, as index rows."""
    count = len(directory.ids)
    return Rows(
        (directory.pack,),
        directory.ids,
        np.zeros(count, np.uint32),
        directory.offsets.astype(np.uint32),
        directory.lengths.astype(np.uint32),
    )


def keep_rows(rows: Rows, keep: Mask) -> Rows:
    """The rows of ``keep``, and only the packs that they need."""
    used, pack = np.unique(rows.pack[keep], return_inverse=True)
    packs = tuple(rows.packs[at] for at in used.tolist())
    return Rows(packs, rows.ids[keep], pack.astype(np.uint32), rows.offset[keep], rows.length[keep])


def _usable(run: Run, without: Collection[str]) -> Mask | None:
    """For each pack of ``run`` whether it may be used; None: all may."""
    if not without:
        return None
    return np.array([pack.name not in without for pack in run.packs], np.bool_)
