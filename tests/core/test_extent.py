"""Extents against Python's own sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import LIMIT, extents, in_normal_form, integers_of, pairs

from graincopy.core.extent import Extents, merge_cuts

lengths = st.integers(1, 17)


@given(pairs)
def test_pairs_in_any_order_make_the_union_of_their_ranges(given_pairs: list[tuple[int, int]]) -> None:
    made = Extents.from_pairs(given_pairs)
    assert integers_of(made) == {n for start, stop in given_pairs for n in range(start, stop)}
    assert in_normal_form(made)
    assert made == Extents.of(*given_pairs)


@given(extents, extents)
def test_algebra_is_that_of_sets(one: Extents, other: Extents) -> None:
    mine, theirs = integers_of(one), integers_of(other)
    for answer, expected in ((one | other, mine | theirs), (one & other, mine & theirs), (one - other, mine - theirs)):
        assert integers_of(answer) == expected
        assert in_normal_form(answer)
    assert one.covers(other) == (mine >= theirs)
    assert (one == other) == (mine == theirs)
    assert hash(one) != hash(other) or mine == theirs


@given(extents)
def test_looking(ranges: Extents) -> None:
    numbers = integers_of(ranges)
    assert ranges.total == len(numbers)
    assert ranges.points().tolist() == sorted(numbers)
    assert ranges.holds(np.arange(LIMIT + 2)).tolist() == [n in numbers for n in range(LIMIT + 2)]
    assert Extents.from_points(ranges.points()[::-1]) == ranges
    assert len(list(ranges)) == len(ranges) == len(ranges.starts) == len(ranges.stops)


@given(extents, st.integers(0, LIMIT), st.integers(0, LIMIT))
def test_clip_and_shift(ranges: Extents, start: int, stop: int) -> None:
    numbers = integers_of(ranges)
    assert integers_of(ranges.clip(start, stop)) == {n for n in numbers if start <= n < stop}
    assert integers_of(ranges.shift(start).shift(-stop)) == {n + start - stop for n in numbers}


@given(extents, lengths)
def test_rounding_outward_touches_exactly_the_grains_that_hold_a_byte(ranges: Extents, grain: int) -> None:
    touched = {number // grain for number in integers_of(ranges)}
    assert integers_of(ranges.to_grains(grain)) == touched
    assert integers_of(ranges.align(grain)) == {g * grain + i for g in touched for i in range(grain)}
    assert ranges.to_grains(grain).to_bytes(grain) == ranges.align(grain)


@given(extents, lengths)
def test_pieces_put_together_are_the_whole_and_none_is_too_long(ranges: Extents, longest: int) -> None:
    pieces = list(ranges.split(longest))
    assert Extents.from_pairs(pieces) == ranges
    assert sum(stop - start for start, stop in pieces) == ranges.total
    assert all(0 < stop - start <= longest for start, stop in pieces)
    assert pieces == sorted(pieces)


@given(st.lists(st.lists(st.integers(-9, 9)).map(sorted), min_size=1, max_size=4))
def test_merged_cuts_are_the_sorted_set(runs: list[list[int]]) -> None:
    merged = merge_cuts(*(np.array(run, np.int64) for run in runs))
    assert merged.tolist() == sorted({value for run in runs for value in run})


def test_a_volume_of_256_tib_needs_no_more_than_its_members() -> None:
    whole = Extents.whole(256 << 40)
    hole = Extents.of((1 << 40, 2 << 40))
    assert (whole - hole).total == 255 << 40
    assert (whole - hole).to_grains(1 << 16).total == 255 << 24


def test_the_empty_set() -> None:
    empty = Extents.empty()
    assert not len(empty) and empty.total == 0 and list(empty) == []
    assert empty == Extents.whole(0) == Extents.of((5, 5), (7, 3)) == Extents.of((1, 9)).clip(4, 2)
    assert (empty | Extents.of((1, 2))) == Extents.of((1, 2))
    assert empty.covers(empty) and not empty.covers(Extents.of((0, 1)))


@pytest.mark.parametrize("bounds", [[1], [1, 1], [3, 2], [0, 4, 4, 8], [0, 4, 2, 8]])
def test_bounds_that_are_not_in_normal_form_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="strictly increasing"):
        Extents(np.array(bounds, np.int64))


def test_it_cannot_be_changed() -> None:
    ranges = Extents.of((1, 4))
    with pytest.raises(ValueError, match="read-only"):
        ranges.bounds[0] = 0


def test_a_long_set_prints_short() -> None:
    assert repr(Extents.of(*((n, n + 1) for n in range(0, 40, 2)))).endswith("[6, 7), …; 20 in 20)")
