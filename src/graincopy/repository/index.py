"""The index in memory: which pack holds a piece. Immutable sorted arrays; a piece costs 52 bytes.

How it lies on the medium is in segments.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from graincopy.core.extent import Array, Mask
from graincopy.repository.format import Ids, Rows
from graincopy.repository.pack import PackDirectory
from graincopy.repository.records import PackRef

_NO_ROWS = Rows((), np.empty((0, 32), np.uint8), *(np.empty(0, np.uint32) for _ in range(3)))


class _Run(msgspec.Struct, frozen=True, eq=False):
    """Rows sorted by the first eight bytes of their ids. Equal keys follow one another, at most ``repeats``."""

    keys: NDArray[np.uint64]
    rows: Rows
    repeats: int


class Index:
    """Immutable: id → pack, offset, length. Safe to use from several threads."""

    def __init__(self, runs: tuple[_Run, ...] = ()) -> None:
        self._runs = runs
        self.packs: tuple[PackRef, ...] = tuple(pack for run in runs for pack in run.rows.packs)

    @classmethod
    def of(cls, rows: Iterable[Rows]) -> Index:
        """From rows in any order; packs that occur twice are made one."""
        merged = merge_rows(list(rows))
        return cls((_sort(merged),) if len(merged) else ())

    def __len__(self) -> int:
        """Rows, of which several may be about one piece."""
        return sum(len(run.rows) for run in self._runs)

    def adding(self, rows: Rows) -> Index:
        """This index and ``rows``. Runs of like length are merged: adding n packs costs O(n log n) in all."""
        if not len(rows):
            return self
        runs, fresh = list(self._runs), [rows]
        size = len(rows)
        while runs and len(runs[-1].rows) <= 2 * size:
            last = runs.pop().rows
            fresh.append(last)
            size += len(last)
        return Index((*runs, _sort(merge_rows(fresh))))

    def excluding(self, names: Collection[str]) -> Index:
        """This index without what is in the packs of these object names."""
        if not any(pack.name in names for pack in self.packs):
            return self
        rows = self.rows()
        return Index.of([keep_rows(rows, np.array([pack.name not in names for pack in rows.packs])[rows.pack])])

    def known(self, ids: Ids) -> Mask:
        """For each id whether a pack holds it."""
        mask = np.zeros(len(ids), np.bool_)
        wanted = _keys(ids)
        for run in self._runs:
            left = np.flatnonzero(~mask)
            mask[left] = _find(run, wanted[left], ids[left], None) >= 0
        return mask

    def locate(self, ids: Ids, without: Collection[str] = ()) -> Located:
        """Where each of ``ids`` lies, packs of the object names ``without`` left out; -1 where none is known."""
        found = Located(self.packs, *(np.full(len(ids), -1, np.int64) for _ in range(4)))
        wanted = _keys(ids)
        first_pack = first_row = 0
        for run in self._runs:
            left = np.flatnonzero(found.row < 0)
            if not len(left):
                break
            at = _find(run, wanted[left], ids[left], _usable(run, without))
            hit, row = left[at >= 0], at[at >= 0]
            found.row[hit] = row + first_row
            found.pack[hit] = run.rows.pack[row].astype(np.int64) + first_pack
            found.offset[hit] = run.rows.offset[row]
            found.length[hit] = run.rows.length[row]
            first_pack += len(run.rows.packs)
            first_row += len(run.rows)
        return found

    def rows(self) -> Rows:
        """Everything, in the order of the row numbers that :meth:`locate` gives."""
        return self._runs[0].rows if len(self._runs) == 1 else merge_rows([run.rows for run in self._runs])


class Located(msgspec.Struct, frozen=True, eq=False):
    """Columns, one place per id that was asked for. ``pack`` numbers ``packs``; -1 in all: not known."""

    packs: tuple[PackRef, ...]
    row: Array
    pack: Array
    offset: Array
    length: Array


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


def _keys(ids: Ids) -> NDArray[np.uint64]:
    return np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)


def _sort(rows: Rows) -> _Run:
    """Sort, and drop rows that say the very same (a pack that two segments list)."""
    keys = _keys(rows.ids)
    order = np.lexsort((rows.offset, rows.pack, keys))
    keys = keys[order]
    same = np.append(False, keys[1:] == keys[:-1])
    if bool(same.any()):
        before = np.append(order[:1], order[:-1])
        same &= (rows.pack[order] == rows.pack[before]) & (rows.offset[order] == rows.offset[before])
        order, keys = order[~same], keys[~same]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.empty(0, np.int64)
    repeats = int(np.diff(np.append(starts, len(keys))).max()) if len(keys) else 0
    picked = Rows(rows.packs, rows.ids[order], rows.pack[order], rows.offset[order], rows.length[order])
    return _Run(keys, picked, repeats)


def _usable(run: _Run, without: Collection[str]) -> Mask | None:
    """For each pack of ``run`` whether it may be used; None: all may."""
    if not without:
        return None
    return np.array([pack.name not in without for pack in run.rows.packs], np.bool_)


def _find(run: _Run, wanted: NDArray[np.uint64], ids: Ids, usable: Mask | None) -> Array:
    """Row of each id, or -1."""
    found = np.full(len(wanted), -1, np.int64)
    at = np.searchsorted(run.keys, wanted).astype(np.int64)
    left = np.arange(len(wanted))
    for _ in range(run.repeats):
        left = left[at[left] < len(run.keys)]
        left = left[run.keys[at[left]] == wanted[left]]
        row = at[left]
        hit = (run.rows.ids[row] == ids[left]).all(axis=1)
        if usable is not None:
            hit &= usable[run.rows.pack[row]]
        found[left[hit]] = row[hit]
        left = left[~hit]
        at[left] += 1
    return found
