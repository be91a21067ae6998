"""Where the ranges of a file lie on its volume, and in which state (design: placement)."""

from __future__ import annotations

from enum import IntEnum

import msgspec
import numpy as np
from numpy.typing import NDArray

from graincopy.core.extent import Array, Extents, merge_cuts


class State(IntEnum):
    """What a range of a file is, as far as its placement tells."""

    HOLE = 0  # nothing allocated; reads as zeros
    WRITTEN = 1  # its bytes are the volume's bytes at the placement
    UNWRITTEN = 2  # allocated, reads as zeros
    OPAQUE = 3  # bytes cannot be tied to volume offsets (compressed, inline, unaligned, not yet allocated …)


class Placement(msgspec.Struct, frozen=True, eq=False):
    """Segments of one file, ascending in the file and disjoint there; what no segment covers is a hole.

    ``starts`` and ``stops`` are file bytes, ``volume`` the volume byte of each segment's start, ``states`` a
    :class:`State` other than HOLE. Two segments may share volume bytes (a reflink inside the file).
    """

    size: int
    starts: Array
    stops: Array
    volume: Array
    states: NDArray[np.uint8]

    def __post_init__(self) -> None:
        count = len(self.starts)
        if not count == len(self.stops) == len(self.volume) == len(self.states):
            raise ValueError("placement arrays differ in length")
        if count and (bool((self.stops <= self.starts).any()) or bool((self.starts[1:] < self.stops[:-1]).any())):
            raise ValueError("placement segments must be ascending, disjoint and not empty")
        if count and (int(self.starts[0]) < 0 or int(self.stops[-1]) > self.size):
            raise ValueError("placement reaches outside the file")

    @classmethod
    def of(cls, size: int, *segments: tuple[int, int, int, State]) -> Placement:
        """From ``(file start, file stop, volume start, state)`` segments, clipped to ``size``."""
        table = np.array(sorted(segments), np.int64).reshape(-1, 4)
        return cls.from_arrays(size, table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(np.uint8))

    @classmethod
    def from_arrays(cls, size: int, starts: Array, stops: Array, volume: Array, states: NDArray[np.uint8]) -> Placement:
        """From ascending disjoint segments, clipped to ``size``."""
        stops = np.minimum(stops, size)
        keep = stops > starts
        return cls(size, starts[keep], stops[keep], volume[keep], states[keep])

    @classmethod
    def identity(cls, size: int) -> Placement:
        """The file *is* the volume and all of it is written."""
        return cls.of(size, (0, size, 0, State.WRITTEN))

    def in_state(self, *states: State) -> Extents:
        """File ranges that are in any of ``states`` (HOLE included when asked for)."""
        found = np.isin(self.states, [int(state) for state in states])
        ranges = Extents.from_arrays(self.starts[found], self.stops[found])
        if State.HOLE in states:
            ranges = ranges | (Extents.whole(self.size) - Extents.from_arrays(self.starts, self.stops))
        return ranges

    def allocated(self) -> Extents:
        """File ranges that may hold other bytes than zero."""
        return self.in_state(State.WRITTEN, State.OPAQUE)

    def zero(self) -> Extents:
        """File ranges that read as zeros without looking."""
        return self.in_state(State.HOLE, State.UNWRITTEN)

    def shift(self, distance: int) -> Placement:
        """The same file on a volume in which its file system starts ``distance`` bytes further on."""
        return Placement(self.size, self.starts, self.stops, self.volume + distance, self.states)

    def to_volume(self, ranges: Extents) -> Extents:
        """Volume ranges under the written parts of the file ranges ``ranges``."""
        kept = self.states == State.WRITTEN
        return _carry(ranges, self.starts[kept], self.stops[kept], self.volume[kept])

    def to_file(self, ranges: Extents) -> Extents:
        """File ranges whose written bytes lie in the volume ranges ``ranges`` (placement⁻¹)."""
        kept = self.states == State.WRITTEN
        starts, volume = self.starts[kept], self.volume[kept]
        return _carry(ranges, volume, volume + self.stops[kept] - starts, starts)

    def differs(self, base: Placement) -> Extents:
        """File ranges up to this size whose state or volume position is not the one in ``base``.

        What is opaque on either side is always in the answer: it cannot be called clean by placement.
        """
        ends = np.array(sorted((0, self.size, base.size)), np.int64)
        cuts = merge_cuts(self.starts, self.stops, base.starts, base.stops, ends)
        mine, base_ = self._at(cuts), base._at(cuts)
        unequal = (mine[0] != base_[0]) | (mine[1] != base_[1])
        unequal |= (mine[0] == State.OPAQUE) | (base_[0] == State.OPAQUE)
        unequal |= cuts >= base.size  # a grown tail is dirty
        inside = unequal[:-1] if len(cuts) > 1 else np.empty(0, np.bool_)
        return Extents.from_arrays(cuts[:-1][inside], cuts[1:][inside]).clip(0, self.size)

    def _at(self, offsets: Array) -> tuple[NDArray[np.uint8], Array]:
        """State and volume distance (volume minus file offset; 0 where it does not matter) at each offset."""
        if not len(self.starts):
            return np.zeros(len(offsets), np.uint8), np.zeros(len(offsets), np.int64)
        index = np.searchsorted(self.starts, offsets, side="right") - 1
        covered = (index >= 0) & (offsets < self.stops[index])
        states = np.where(covered, self.states[index], 0).astype(np.uint8)
        distance = np.where(states == State.WRITTEN, self.volume[index] - self.starts[index], 0)
        return states, distance


def _carry(ranges: Extents, starts: Array, stops: Array, onto: Array) -> Extents:
    """``ranges`` cut by the segments ``[starts, stops)`` and moved with them to ``onto``.

    The segments may overlap and need no order: each finds its own run of ``ranges`` by bisection. In ascending order
    they bisect where the last one did, which a processor's cache has: half the time with a million segments.
    """
    order = np.argsort(starts, kind="stable")
    starts, stops, onto = starts[order], stops[order], onto[order]
    first = np.searchsorted(ranges.stops, starts, side="right")
    last = np.maximum(np.searchsorted(ranges.starts, stops, side="left"), first)
    counts = last - first
    segment = np.repeat(np.arange(len(starts)), counts)
    member = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    shift = onto[segment] - starts[segment]
    return Extents.from_arrays(
        np.maximum(ranges.starts[member], starts[segment]) + shift,
        np.minimum(ranges.stops[member], stops[segment]) + shift,
    )
