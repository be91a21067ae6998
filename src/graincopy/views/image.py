"""A stored disk as a random-access image: ranged reads through its grain map, what was read lately remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from graincopy.core.errors import GraincopyError
from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State
from graincopy.core.units import MIB, ceil_div
from graincopy.model.restore_point import MapRoot
from graincopy.repository.repository import Repository
from graincopy.views.memory import RUN_GRAINS, ViewMemory
from graincopy.views.readahead import Trail

STEP_BYTES = 4 * MIB  # of a large read that are fetched and handed over at a time; bounds the memory of one reader
_ALONE_BYTES = 8 * MIB  # remembered by an image that shares no memory with others
_SMALL_RUNS = 4  # runs up to which the remembered parts of the map are asked, instead of walking it


def _everything(_first: int, _stop: int) -> bool:
    return True


class StoredImage:
    """``size`` bytes as the grain map ``root`` of ``repository`` holds them. Safe to use from several threads.

    ``wanted`` says whether there are grains in ``[first, stop)`` that are worth fetching before they are asked for.
    """

    def __init__(self, repository: Repository, root: MapRoot, size: int, memory: ViewMemory | None = None) -> None:
        self.size = size
        self.memory = memory or ViewMemory(repository, _ALONE_BYTES)
        self.wanted: Callable[[int, int], bool] = _everything
        self._repository = repository
        self._root = root
        self._grain = repository.grain_size
        self._count = ceil_div(size, self._grain)
        self._trail = Trail(self._grain, self.memory.limit // (16 * max(self._grain, MIB)) if self.memory.scouts else 0)
        self._farthest_seen = -1

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros.

        Raises ObjectMissing, ObjectDamaged or MediumFailed.
        """
        for start, part in self.steps(offset, buffer):
            first, stop = self.grains_of(start, len(part))
            self.pass_by(first, stop)
            self.fill(first, self.ids(first, stop), start, part)

    def steps(self, offset: int, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
        """The read cut into parts that are handled one by one; what lies beyond the end is zeroed here."""
        stop = min(offset + len(buffer), self.size)
        if stop < offset + len(buffer):
            zero(buffer[max(0, stop - offset) :])
        start = offset
        while start < stop:
            until = min(stop, (start // STEP_BYTES + 1) * STEP_BYTES)
            yield start, buffer[start - offset : until - offset]
            start = until

    def grains_of(self, offset: int, length: int) -> tuple[int, int]:
        """Grains ``[first, stop)`` that a range of bytes touches."""
        return offset // self._grain, ceil_div(offset + length, self._grain)

    def ids(self, first: int, stop: int) -> list[bytes | None]:
        """The chunk of each of these grains, None where it is zero."""
        return self.memory.ids(self._root, first, stop)

    def fill(
        self,
        first: int,
        ids: Sequence[bytes | None],
        offset: int,
        buffer: memoryview,
        served: Sequence[bool] | None = None,
    ) -> None:
        """Lay the chunks ``ids`` of the grains from ``first`` on into ``buffer``, which begins at ``offset``.

        What is ``served`` already stays as it is. Everything else is fetched together.
        """
        served = served or [False] * len(ids)
        left = [None if done else piece for piece, done in zip(ids, served, strict=True)]
        held = [piece for piece in left if piece is not None]
        ahead = partial(self._ahead, first, first + len(ids))
        contents = iter(self.memory.pieces.get(held, ahead) if held else ())
        for number, piece in enumerate(ids):
            start = (first + number) * self._grain
            if piece is None:
                zero(_part(self._grain, start, buffer, offset))
            elif left[number] is not None:
                lay(memoryview(next(contents)), start, buffer, offset)

    # --- reading ahead ----------------------------------------------------------------------------

    def pass_by(self, first: int, stop: int) -> None:
        """Grains ``[first, stop)`` are being read, from here or elsewhere: fetch ahead if that is worth it."""
        scouts = self.memory.scouts
        last = (stop - 1) // self._trail.grains
        if scouts is None or last == self._farthest_seen:
            return
        self._farthest_seen = last
        length = self._trail.touch(first, stop)
        if length > 1:
            for stretch in self._trail.order(last, length, self.wanted):
                scouts.send(self._fetch_stretch, stretch)

    def _ahead(self, first: int, stop: int) -> list[bytes]:
        """Chunks up to the end of the stretch that a sequential reader is in: they come with what is fetched anyway."""
        if self.memory.scouts is None or not self._trail.touch(first, stop):
            return []
        return self._wanted_ids(stop, ceil_div(stop, self._trail.grains) * self._trail.grains)

    def _fetch_stretch(self, stretch: int) -> None:
        first = stretch * self._trail.grains
        self.memory.pieces.warm(self._wanted_ids(first, first + self._trail.grains))

    def _wanted_ids(self, first: int, stop: int) -> list[bytes]:
        try:
            found = enumerate(self.ids(first, min(stop, self._count)), first)
        except GraincopyError:
            return []  # whoever reads it in earnest will be told
        return [piece for grain, piece in found if piece is not None and self.wanted(grain, grain + 1)]

    # --- where something is -----------------------------------------------------------------------

    def chunks(self, first: int, stop: int) -> Extents:
        """Those of the grains ``[first, stop)`` that are not zero. Raises as :meth:`readinto`."""
        if stop - first <= _SMALL_RUNS * RUN_GRAINS:
            held = [grain for grain, piece in enumerate(self.ids(first, stop), first) if piece is not None]
            return Extents.from_points(np.array(held, np.int64))
        within = Extents.of((first, stop))
        parts = [
            Extents.from_points(found.grains).bounds.reshape(-1, 2)
            for found in self.memory.map.walk(self._root, within)
        ]
        pairs = np.concatenate(parts) if parts else np.empty((0, 2), np.int64)
        return Extents.from_arrays(pairs[:, 0], pairs[:, 1])

    def placement(self) -> Placement:
        """Which ranges hold something and which read as zeros; positions mean nothing, so all of it is opaque."""
        held = self._repository.map.allocated(self._root).to_bytes(self._grain).clip(0, self.size)
        return Placement.of(self.size, *((start, stop, 0, State.OPAQUE) for start, stop in held))

    def verify(self) -> None:
        """Every piece proved itself by its id when it was fetched."""

    def close(self) -> None:
        """Nothing to release; what several images share is closed by whoever made it."""


def lay(piece: memoryview, piece_offset: int, buffer: memoryview, buffer_offset: int) -> None:
    """Copy the part of ``piece`` that falls into ``buffer``; both know their offset in the image."""
    start = max(piece_offset, buffer_offset)
    stop = min(piece_offset + len(piece), buffer_offset + len(buffer))
    if start < stop:
        part = piece[start - piece_offset : stop - piece_offset]
        buffer[start - buffer_offset : stop - buffer_offset] = part


def zero(buffer: memoryview) -> None:
    """Overwrite with zeros."""
    if len(buffer):
        buffer[:] = bytes(len(buffer))


def _part(length: int, piece_offset: int, buffer: memoryview, buffer_offset: int) -> memoryview:
    """What of ``buffer`` a piece of ``length`` bytes covers."""
    start = max(piece_offset, buffer_offset) - buffer_offset
    return buffer[start : max(start, min(piece_offset + length, buffer_offset + len(buffer)) - buffer_offset)]
