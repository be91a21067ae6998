"""One sorted part of the index: the contract, and the kind that is held in memory (52 bytes a piece)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from graincopy.core.extent import Array, Mask
from graincopy.repository.format import Ids
from graincopy.repository.format_segment import Rows
from graincopy.repository.records import PackRef

Keys = NDArray[np.uint64]


class Hits(msgspec.Struct, frozen=True, eq=False):
    """Where ids lie in one run: columns, one place for each id that was asked for; -1 in all: it is not there."""

    row: Array
    pack: Array  # numbers the run's packs
    offset: Array
    length: Array

    @classmethod
    def none(cls, count: int) -> Hits:
        """Nothing is found yet; the columns are to be filled."""
        return cls(*(np.full(count, -1, np.int64) for _ in range(4)))

    def put(self, places: Array, found: Hits, first_row: int = 0, first_pack: int = 0) -> None:
        """Fill in at ``places`` what was ``found`` for them, its rows and packs counted from the given ones."""
        here = found.row >= 0
        at = places[here]
        self.row[at], self.pack[at] = found.row[here] + first_row, found.pack[here] + first_pack
        self.offset[at], self.length[at] = found.offset[here], found.length[here]


class Run(Protocol):
    """Rows sorted by the first eight bytes of their ids."""

    @property
    def packs(self) -> Sequence[PackRef]:
        """Those that the rows lie in."""

    def __len__(self) -> int:
        """Rows."""

    def find(self, keys: Keys, ids: Ids, usable: Mask | None) -> Hits:
        """Where ``ids``, whose keys are ``keys``, lie; only in the packs of which ``usable`` is true (None: all)."""

    def rows(self) -> Rows | None:
        """All of them, in order; None when they are not what was put there."""


class MemoryRun:
    """A run in memory. Immutable."""

    def __init__(self, keys: Keys, rows: Rows) -> None:
        """``rows`` in the order of their ``keys``."""
        self.keys, self._rows = keys, rows
        self.packs = rows.packs

    @classmethod
    def of(cls, rows: Rows) -> MemoryRun:
        """From rows in any order; those that say the very same (a pack that two segments list) become one."""
        keys = keys_of(rows.ids)
        order = np.lexsort((rows.offset, rows.pack, keys))
        keys = keys[order]
        same = np.append(False, keys[1:] == keys[:-1])[: len(keys)]
        if bool(same.any()):
            before = np.append(order[:1], order[:-1])
            same &= (rows.pack[order] == rows.pack[before]) & (rows.offset[order] == rows.offset[before])
            order, keys = order[~same], keys[~same]
        picked = Rows(rows.packs, rows.ids[order], rows.pack[order], rows.offset[order], rows.length[order])
        return cls(keys, picked)

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self) -> Rows:
        """All of them, in order."""
        return self._rows

    def find(self, keys: Keys, ids: Ids, usable: Mask | None) -> Hits:
        """See :class:`Run`."""
        rows, hits = self._rows, Hits.none(len(keys))
        at = np.searchsorted(self.keys, keys).astype(np.int64)
        left = np.arange(len(keys))
        while True:  # several pieces may share a key, and one piece may lie in several packs
            left = left[at[left] < len(self.keys)]
            left = left[self.keys[at[left]] == keys[left]]
            if not len(left):
                return hits
            row = at[left]
            hit = (rows.ids[row] == ids[left]).all(axis=1)
            if usable is not None:
                hit &= usable[rows.pack[row]]
            row = row[hit]
            hits.put(left[hit], Hits(row, rows.pack[row], rows.offset[row], rows.length[row]))
            left = left[~hit]
            at[left] += 1


def keys_of(ids: Ids) -> Keys:
    """The first eight bytes of each id as a number."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)
