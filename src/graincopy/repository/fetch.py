"""Fetching: pieces from whichever packs hold them, each pack read in as few ranges as possible."""

from __future__ import annotations

import numpy as np

from graincopy.core.errors import ObjectDamaged, ObjectMissing
from graincopy.repository.format import Ids
from graincopy.repository.index import Index
from graincopy.repository.pack import PackReader
from graincopy.repository.records import PackRef


class Order:
    """An order for pieces, filled from one index after the other until nothing is open."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids
        self._contents: list[bytes | None] = [None] * len(ids)
        self._left = np.arange(len(ids))
        self._failure: ObjectDamaged | ObjectMissing | None = None
        self.fetched_bytes = 0

    @property
    def open(self) -> bool:
        """Whether something is still wanted."""
        return bool(len(self._left))

    def fill(self, index: Index, reader: PackReader) -> None:
        """Fetch what ``index`` can find, packs that fail left out one after the other."""
        failed: set[str] = set()
        while self.open:
            name = self._fill_once(index, reader, failed)
            if name is None:
                return
            failed.add(name)

    def contents(self) -> list[bytes]:
        """Everything, in the order of the ids. Raises ObjectMissing or ObjectDamaged when something is open."""
        if self.open:
            raise self._failure or ObjectMissing(name=f"piece {self._ids[self._left[0]].tobytes().hex()}")
        return [content for content in self._contents if content is not None]

    def _fill_once(self, index: Index, reader: PackReader, without: set[str]) -> str | None:
        """One round over the packs; the name of the pack that failed, with which the round ended."""
        found = index.locate(self._ids[self._left], without)
        wanted, self._left = self._left, self._left[found.pack < 0]
        numbers = sorted(set(found.pack[found.pack >= 0].tolist()))  # numpy.unique would import numpy.ma first
        for at, number in enumerate(numbers):
            here = np.flatnonzero(found.pack == number)
            pack: PackRef = found.pack_ref(number)
            try:
                pieces, read = reader.fetch(pack, self._ids[wanted[here]], found.offset[here], found.length[here])
            except (ObjectDamaged, ObjectMissing) as failure:
                self._failure = failure
                rest = wanted[np.isin(found.pack, numbers[at:])]
                self._left = np.sort(np.concatenate((self._left, rest)))
                return pack.name
            self.fetched_bytes += read
            for place, piece in zip(wanted[here].tolist(), pieces, strict=True):
                self._contents[place] = piece
        return None
