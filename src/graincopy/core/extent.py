"""Sets of bytes (or grains) as half-open extents, with their algebra on sorted numpy arrays.

A set is held as its *bounds*: ``[start0, stop0, start1, stop1, …]``, int64 and strictly increasing. That one
property says sorted, disjoint, coalesced and without empty members at once, and a point lies inside exactly
when an odd number of bounds is at or below it, which makes every set operation the same few array steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Extents(msgspec.Struct, frozen=True, eq=False):
    """An immutable set of non-negative integers: byte offsets, or grain numbers, as the caller says."""

    bounds: Array

    def __post_init__(self) -> None:
        if len(self.bounds) % 2 or (len(self.bounds) and not bool((np.diff(self.bounds) > 0).all())):
            raise ValueError("extent bounds must be of even number and strictly increasing")
        self.bounds.setflags(write=False)

    # --- making -----------------------------------------------------------------------------------

    @classmethod
    def empty(cls) -> Extents:
        """The set with nothing in it."""
        return cls(np.empty(0, np.int64))

    @classmethod
    def whole(cls, size: int) -> Extents:
        """``[0, size)``."""
        return cls(np.array([0, size] if size else [], np.int64))

    @classmethod
    def of(cls, *pairs: tuple[int, int]) -> Extents:
        """From ``(start, stop)`` pairs in any order, overlapping or not; empty pairs are dropped."""
        return cls.from_pairs(pairs)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]]) -> Extents:
        """Like :meth:`of`, from an iterable."""
        array = np.array(list(pairs), np.int64).reshape(-1, 2)
        return cls.from_arrays(array[:, 0], array[:, 1])

    @classmethod
    def from_arrays(cls, starts: Array, stops: Array) -> Extents:
        """From parallel arrays in any order, overlapping or not; members with stop ≤ start are dropped."""
        keep = stops > starts
        starts, stops = starts[keep], stops[keep]
        if not len(starts):
            return cls.empty()
        order = np.argsort(starts, kind="stable")
        starts, reach = starts[order], np.maximum.accumulate(stops[order])
        fresh = np.append(True, starts[1:] > reach[:-1])  # touching members coalesce
        last = np.append(np.flatnonzero(fresh)[1:] - 1, len(starts) - 1)
        return cls(_interleave(starts[fresh], reach[last]))

    @classmethod
    def from_points(cls, points: NDArray[Any]) -> Extents:
        """Every integer of ``points`` by itself: grain numbers → extents of grains."""
        array = points.astype(np.int64)
        return cls.from_arrays(array, array + 1)

    # --- looking ----------------------------------------------------------------------------------

    @property
    def starts(self) -> Array:
        """Start of each member, ascending."""
        return self.bounds[::2]

    @property
    def stops(self) -> Array:
        """Stop of each member, ascending."""
        return self.bounds[1::2]

    @property
    def total(self) -> int:
        """How many integers are in the set."""
        return int((self.stops - self.starts).sum())

    def __len__(self) -> int:
        """How many members (separate extents) the set has."""
        return len(self.bounds) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.tolist(), self.stops.tolist(), strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and np.array_equal(self.bounds, other.bounds)

    def __hash__(self) -> int:
        return hash(self.bounds.tobytes())

    def __repr__(self) -> str:
        shown = ", ".join(f"[{start}, {stop})" for start, stop in list(self)[:4])
        return f"Extents({shown}{', …' if len(self) > 4 else ''}; {self.total} in {len(self)})"

    def holds(self, points: NDArray[Any]) -> Mask:
        """For each of ``points`` whether it lies in the set."""
        inside: Mask = np.searchsorted(self.bounds, points, side="right") % 2 == 1
        return inside

    def points(self) -> Array:
        """Every integer of the set, ascending; for sets known to be small (grains of one batch)."""
        lengths = self.stops - self.starts
        return np.repeat(self.starts - _before(lengths), lengths) + np.arange(lengths.sum())

    # --- algebra ----------------------------------------------------------------------------------

    def __or__(self, other: Extents) -> Extents:
        return self._combine(other, np.logical_or)

    def __and__(self, other: Extents) -> Extents:
        return self._combine(other, np.logical_and)

    def __sub__(self, other: Extents) -> Extents:
        return self._combine(other, lambda mine, theirs: mine & ~theirs)

    def _combine(self, other: Extents, keep: Callable[[Mask, Mask], Mask]) -> Extents:
        cuts = merge_cuts(self.bounds, other.bounds)
        inside = keep(self.holds(cuts), other.holds(cuts))
        return Extents(cuts[inside != np.append(False, inside[:-1])])

    def covers(self, other: Extents) -> bool:
        """True when no integer of ``other`` is missing here."""
        return len(other - self) == 0

    # --- reshaping --------------------------------------------------------------------------------

    def clip(self, start: int, stop: int) -> Extents:
        """The part inside ``[start, stop)``."""
        if stop <= start:
            return Extents.empty()
        return self & Extents.of((start, stop))

    def shift(self, distance: int) -> Extents:
        """Every member moved by ``distance``, which may be negative."""
        return Extents(self.bounds + distance)

    def align(self, grain: int) -> Extents:
        """Rounded outward to multiples of ``grain``."""
        return Extents.from_arrays(self.starts // grain * grain, -(-self.stops // grain) * grain)

    def to_grains(self, grain: int) -> Extents:
        """Bytes → the numbers of all grains that they touch."""
        return Extents.from_arrays(self.starts // grain, -(-self.stops // grain))

    def to_bytes(self, grain: int) -> Extents:
        """Grain numbers → bytes."""
        return Extents(self.bounds * grain)

    def split(self, longest: int) -> Iterator[tuple[int, int]]:
        """Members cut into ``(start, stop)`` pieces of at most ``longest``, ascending."""
        for start, stop in self:
            for piece in range(start, stop, longest):
                yield piece, min(piece + longest, stop)


def merge_cuts(*sorted_runs: Array) -> Array:
    """Every value of the ascending arrays once, ascending.

    A stable sort finds the runs and merges them: ten times faster here than ``np.unique``, which hashes.
    """
    cuts = np.sort(np.concatenate(sorted_runs), kind="stable")
    return cuts[np.append(True, cuts[1:] != cuts[:-1])] if len(cuts) else cuts


def _interleave(starts: Array, stops: Array) -> Array:
    return np.column_stack((starts, stops)).ravel()


def _before(lengths: Array) -> Array:
    """How much lies before each member."""
    total: Array = np.cumsum(lengths) - lengths
    return total
