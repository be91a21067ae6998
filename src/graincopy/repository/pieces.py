"""Pieces by id: the index that says where each lies, read once and again when it turns out to be old, and the packs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from graincopy.core.errors import ObjectDamaged, ObjectMissing
from graincopy.core.units import MIB
from graincopy.media.base import Medium
from graincopy.repository import segments
from graincopy.repository.codec import Codec
from graincopy.repository.entries import CHUNK, Entries, distinct_ids
from graincopy.repository.fetch import Order
from graincopy.repository.format import Ids
from graincopy.repository.index import Index, rows_of
from graincopy.repository.index_cache import IndexCache
from graincopy.repository.pack import PackReader, list_packs

_READ_BATCH = 8 * MIB  # bytes of content that read_chunks holds at a time


class Fetched(NamedTuple):
    """Contents in the order asked for, and the bytes that were read from packs to get them."""

    pieces: list[bytes]
    fetched_bytes: int


class Pieces:
    """The pieces of one repository. Safe to use from several threads."""

    def __init__(
        self, medium: Medium, codec: Codec, cache: IndexCache, fenced: Callable[[str], bool], grain_size: int
    ) -> None:
        """``fenced`` tells whose index segments are passed over; ``grain_size`` is in bytes."""
        self.reader = PackReader(codec, medium)
        self._medium, self._codec, self._cache, self._fenced = medium, codec, cache, fenced
        self._grain_size = grain_size
        self._index: Index | None = None
        self._lock = threading.Lock()

    def load_index(self, fresh: bool = False, rebuild: bool = False) -> Index:
        """Where every piece lies. ``fresh``: read the medium again; ``rebuild``: packs that no segment lists too."""
        with self._lock:
            if self._index is not None and not fresh and not rebuild:
                return self._index
        loaded = self._load(whole=rebuild)
        if loaded.damaged and not rebuild:
            loaded = self._load(whole=True)
        found = self._with_unlisted_packs(loaded.index) if loaded.damaged or rebuild else loaded.index
        with self._lock:
            self._index = found
        return found

    def _load(self, *, whole: bool) -> segments.Loaded:
        return segments.load(self._medium, self._codec, self._cache, self._fenced, whole=whole)

    def _with_unlisted_packs(self, known: Index) -> Index:
        """``known`` and what lies in packs that it does not have, as far as their directories can be read."""
        listed = {pack.id for pack in known.packs}
        rows = [known.rows()]
        for pack in list_packs(self._medium):
            if pack.id not in listed:
                try:
                    rows.append(rows_of(self.reader.directory(pack)))
                except (ObjectDamaged, ObjectMissing):
                    continue  # nothing can be found in it; check reports it
        return Index.of(rows) if len(rows) > 1 else known

    def fetch(self, ids: Ids, extra: Index | None = None) -> Fetched:
        """Contents of pieces, in the order of ``ids``. ``extra`` is looked into first.

        Where a pack fails, another one that holds the piece will do. A pack that is missing may have been moved
        by a collect: the index is read again, and then rebuilt from the packs. Raises ObjectMissing or
        ObjectDamaged.
        """
        order = Order(ids)
        if extra is not None:
            order.fill(extra, self.reader)
        for again in ({}, {"fresh": True}, {"rebuild": True}):
            if order.open:
                order.fill(self.load_index(**again), self.reader)
                if again.get("rebuild"):
                    self._cache.clear()  # it lacked what the medium has, or others will read the medium once more
        return Fetched(order.contents(), order.fetched_bytes)

    def read_nodes(self, ids: Ids) -> list[bytes]:
        """Contents of grain-map nodes, in the order of ``ids``."""
        return self.fetch(ids).pieces

    def read_chunks(self, entries: Entries) -> Iterator[tuple[int, bytes]]:
        """Grain number and content for every entry that is a chunk (a ZERO entry has none), in their order."""
        chunks = entries.pick(entries.kinds == CHUNK)
        batch = max(1, _READ_BATCH // self._grain_size)
        for start in range(0, len(chunks), batch):
            part = chunks.pick(slice(start, start + batch))
            ids = distinct_ids(part.ids)
            by_id = {piece.tobytes(): content for piece, content in zip(ids, self.fetch(ids).pieces, strict=True)}
            for grain, piece in zip(part.grains.tolist(), part.ids, strict=True):
                yield grain, by_id[piece.tobytes()]
