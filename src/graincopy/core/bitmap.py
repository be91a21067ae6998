"""Grain bitmaps: sets of grain numbers in a form that is small enough to store (Roaring, 64 bit).

Working sets are :class:`~graincopy.core.extent.Extents`; a bitmap is what a record keeps of them.
Format: the portable 64-bit Roaring serialisation, https://github.com/RoaringBitmap/RoaringFormatSpec
"""

from __future__ import annotations

import msgspec
import numpy as np
from pyroaring import BitMap64, FrozenBitMap64  # type: ignore[import-not-found,unused-ignore]

from graincopy.core.extent import Extents


class GrainBitmap(msgspec.Struct, frozen=True):
    """An immutable set of grain numbers."""

    grains: FrozenBitMap64

    @classmethod
    def from_extents(cls, grains: Extents) -> GrainBitmap:
        """From extents of grain numbers."""
        bits = BitMap64()
        for start, stop in grains:
            bits.add_range(start, stop)
        return cls(FrozenBitMap64(bits))

    @classmethod
    def from_bytes(cls, data: bytes) -> GrainBitmap:
        """From what :meth:`to_bytes` gave. Raises ValueError when it is something else."""
        if not data:
            raise ValueError("no bytes are no grain bitmap")
        return cls(FrozenBitMap64.deserialize(data))

    def to_bytes(self) -> bytes:
        """Portable serialisation."""
        data: bytes = self.grains.serialize()
        return data

    def to_extents(self) -> Extents:
        """As extents of grain numbers. A set and itself moved on by one differ exactly at its bounds."""
        bounds = self.grains ^ self.grains.shift(1)
        return Extents(np.array(list(bounds), np.int64))

    def __len__(self) -> int:
        return len(self.grains)

    def __or__(self, other: GrainBitmap) -> GrainBitmap:
        return GrainBitmap(self.grains | other.grains)

    def __sub__(self, other: GrainBitmap) -> GrainBitmap:
        return GrainBitmap(self.grains - other.grains)
