"""Marks: which rows of the index something needs. One bit of knowledge per piece, whatever the number of points."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from graincopy.core.errors import ObjectMissing
from graincopy.core.extent import Mask
from graincopy.repository.format import DIRECTORY_ENTRY_SIZE, Ids
from graincopy.repository.index import Index


class Marks:
    """Rows of ``index`` that were marked.

    Of a piece that is stored twice, one row: not in the packs ``avoid`` if possible, never in packs ``absent``.
    """

    def __init__(self, index: Index, absent: Collection[str] = (), avoid: Collection[str] = ()) -> None:
        self._index, self._absent = index, frozenset(absent)
        self._avoid = self._absent | frozenset(avoid)
        self.mask: Mask = np.zeros(len(index), np.bool_)
        self.missing: dict[bytes, None] = {}

    def mark(self, ids: Ids) -> Mask:
        """Mark the pieces ``ids``, each of which occurs once; which of them were not marked before.

        A piece that the index does not have is remembered in ``missing``, and not new: nothing hangs below it.
        """
        rows = self._index.locate(ids, self._avoid).row
        if self._avoid != self._absent:
            left = np.flatnonzero(rows < 0)
            rows[left] = self._index.locate(ids[left], self._absent).row
        found = rows >= 0
        self.missing.update((piece.tobytes(), None) for piece in ids[~found])
        fresh: Mask = found.copy()
        fresh[found] = ~self.mask[rows[found]]
        self.mask[rows[found]] = True
        return fresh

    def refuse_missing(self) -> None:
        """Raises ObjectMissing when a piece is in no pack that is there."""
        for piece in self.missing:
            found = self._index.locate(np.frombuffer(piece, np.uint8).reshape(1, 32))
            at = int(found.pack[0])
            raise ObjectMissing(name=found.pack_ref(at).name if at >= 0 else f"piece {piece.hex()}")

    def live_bytes(self) -> dict[str, int]:
        """Pack id → marked bytes in it, directory entries included; packs without any are left out."""
        rows = self._index.rows()
        weights = rows.length[self.mask].astype(np.int64) + DIRECTORY_ENTRY_SIZE
        sums = np.bincount(rows.pack[self.mask], weights=weights, minlength=len(rows.packs))
        return {pack.id: int(size) for pack, size in zip(rows.packs, sums.tolist(), strict=True) if size}
