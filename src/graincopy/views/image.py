"""A stored disk as a random-access image: ranged reads through its grain map."""

from __future__ import annotations

import numpy as np

from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State
from graincopy.model.restore_point import MapRoot
from graincopy.repository.grainmap import CHUNK
from graincopy.repository.repository import Repository

PIECE_GRAINS = 64  # fetched at a time; bounds memory to that many grains


class StoredImage:
    """``size`` bytes as the grain map ``root`` of ``repository`` holds them. Keeps nothing between reads."""

    def __init__(self, repository: Repository, root: MapRoot, size: int) -> None:
        self._repository = repository
        self._root = root
        self.size = size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros. Raises ObjectMissing or ObjectDamaged."""
        buffer[:] = bytes(len(buffer))
        grain_size = self._repository.grain_size
        stop = min(offset + len(buffer), self.size)
        for first, last in Extents.of((offset, stop)).to_grains(grain_size).split(PIECE_GRAINS):
            entries = self._repository.map.lookup(self._root, np.arange(first, last))
            held = entries.kinds == CHUNK
            pieces = self._repository.fetch(entries.ids[held]).pieces
            for grain, piece in zip(entries.grains[held].tolist(), pieces, strict=True):
                _lay(memoryview(piece), grain * grain_size, buffer[: stop - offset], offset)

    def placement(self) -> Placement:
        """Which ranges hold something and which read as zeros; positions mean nothing, so all of it is opaque."""
        held = self._repository.map.allocated(self._root).to_bytes(self._repository.grain_size).clip(0, self.size)
        return Placement.of(self.size, *((start, stop, 0, State.OPAQUE) for start, stop in held))

    def verify(self) -> None:
        """Every piece proved itself by its id when it was fetched."""

    def close(self) -> None:
        """Nothing to release."""


def _lay(piece: memoryview, piece_offset: int, buffer: memoryview, buffer_offset: int) -> None:
    """Copy the part of ``piece`` that falls into ``buffer``; both know their offset in the image."""
    start = max(piece_offset, buffer_offset)
    stop = min(piece_offset + len(piece), buffer_offset + len(buffer))
    if start < stop:
        part = piece[start - piece_offset : stop - piece_offset]
        buffer[start - buffer_offset : stop - buffer_offset] = part
