"""Slow and obvious twins of the core's values, and the strategies that feed both."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State

LIMIT = 96  # small numbers, so that edges meet often

pairs = st.lists(st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)), max_size=8)
extents = pairs.map(Extents.from_pairs)


def integers_of(ranges: Extents) -> set[int]:
    """The set that ``ranges`` stands for, taken from its members alone."""
    return {number for start, stop in ranges for number in range(start, stop)}


def in_normal_form(ranges: Extents) -> bool:
    """Sorted, disjoint, coalesced, no empty member."""
    return bool((np.diff(ranges.bounds) > 0).all()) and len(ranges.bounds) % 2 == 0


@st.composite
def placements(draw: st.DrawFn, limit: int = 48, states: tuple[State, ...] = tuple(State)[1:]) -> Placement:
    """A file of up to ``limit`` bytes whose segments lie anywhere on a volume of twice that, shared bytes included."""
    size = draw(st.integers(0, limit))
    cuts = sorted(draw(st.sets(st.integers(0, size), max_size=10)))
    segments = []
    for start, stop in pairwise(cuts):
        state = draw(st.sampled_from((None, *states)))
        if state is not None:
            place = start + 16 * draw(st.integers(0, 3)) if draw(st.booleans()) else draw(st.integers(0, 2 * limit))
            segments.append((start, stop, place, state))
    return Placement.of(size, *segments)


def bytes_of(placement: Placement) -> dict[int, tuple[State, int | None]]:
    """Each byte of the file → its state, and its volume byte where it is written."""
    table: dict[int, tuple[State, int | None]] = dict.fromkeys(range(placement.size), (State.HOLE, None))
    rows = zip(placement.starts, placement.stops, placement.volume, placement.states, strict=True)
    for start, stop, volume, code in rows:
        state = State(int(code))
        for byte in range(int(start), int(stop)):
            table[byte] = (state, int(volume) + byte - int(start) if state is State.WRITTEN else None)
    return table
