"""Placements against one dictionary entry per byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import bytes_of, extents, in_normal_form, integers_of, placements

from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State


@given(placements())
def test_states(placement: Placement) -> None:
    table = bytes_of(placement)
    for state in State:
        assert integers_of(placement.in_state(state)) == {b for b, (found, _) in table.items() if found is state}
    assert placement.allocated() | placement.zero() == Extents.whole(placement.size)
    assert not len(placement.allocated() & placement.zero())


@given(placements(), placements())
def test_differs_is_every_byte_in_another_state_or_place(base: Placement, now: Placement) -> None:
    before, after = bytes_of(base), bytes_of(now)
    expected = {
        byte
        for byte, (state, place) in after.items()
        if byte not in before or before[byte] != (state, place) or State.OPAQUE in (state, before[byte][0])
    }
    assert integers_of(now.differs(base)) == expected
    assert in_normal_form(now.differs(base))


@given(placements())
def test_only_what_is_opaque_differs_from_itself(placement: Placement) -> None:
    assert placement.differs(placement) == placement.in_state(State.OPAQUE)


@given(placements(), extents)
def test_to_volume_and_back(placement: Placement, ranges: Extents) -> None:
    places = {byte: place for byte, (_, place) in bytes_of(placement).items() if place is not None}
    asked = integers_of(ranges)
    assert integers_of(placement.to_volume(ranges)) == {place for byte, place in places.items() if byte in asked}
    assert integers_of(placement.to_file(ranges)) == {byte for byte, place in places.items() if place in asked}
    assert in_normal_form(placement.to_volume(ranges)) and in_normal_form(placement.to_file(ranges))


@given(placements(), extents, st.integers(0, 1000))
def test_a_shifted_file_system_shifts_the_volume_side_only(placement: Placement, ranges: Extents, by: int) -> None:
    moved = placement.shift(by)
    assert moved.to_volume(ranges) == placement.to_volume(ranges).shift(by)
    assert moved.to_file(ranges.shift(by)) == placement.to_file(ranges)
    assert moved.allocated() == placement.allocated()


def test_identity_maps_every_byte_to_itself() -> None:
    disk = Placement.identity(100)
    assert disk.to_file(Extents.of((90, 120))) == Extents.of((90, 100))
    assert disk.allocated() == Extents.whole(100)
    assert Placement.identity(0).allocated() == Extents.empty()


def test_a_reflink_inside_the_file_answers_with_both_of_its_places() -> None:
    disk = Placement.of(64, (0, 16, 500, State.WRITTEN), (32, 48, 500, State.WRITTEN))
    assert disk.to_file(Extents.of((508, 512))) == Extents.of((8, 12), (40, 44))
    assert disk.to_volume(Extents.whole(64)) == Extents.of((500, 516))


def test_what_only_moved_on_the_volume_without_being_written_still_reads_as_zeros() -> None:
    base = Placement.of(32, (0, 32, 100, State.UNWRITTEN))
    now = Placement.of(32, (0, 32, 900, State.UNWRITTEN))
    assert now.differs(base) == Extents.empty()


def test_zeroed_in_place_is_a_difference_although_no_block_moved() -> None:
    base = Placement.of(32, (0, 32, 100, State.WRITTEN))
    now = Placement.of(32, (0, 8, 100, State.WRITTEN), (8, 16, 108, State.UNWRITTEN), (16, 32, 116, State.WRITTEN))
    assert now.differs(base) == Extents.of((8, 16))


def test_how_an_extent_is_cut_into_segments_does_not_matter() -> None:
    whole = Placement.of(32, (0, 32, 100, State.WRITTEN))
    cut = Placement.of(32, (0, 5, 100, State.WRITTEN), (5, 32, 105, State.WRITTEN))
    assert whole.differs(cut) == cut.differs(whole) == Extents.empty()


def test_segments_are_clipped_to_the_file() -> None:
    disk = Placement.of(10, (0, 4096, 0, State.WRITTEN), (8192, 12288, 8192, State.WRITTEN))
    assert disk.allocated() == Extents.whole(10)
    assert len(disk.starts) == 1


@pytest.mark.parametrize(
    ("starts", "stops", "why"),
    [([0, 4], [8, 12], "ascending"), ([4, 0], [8, 4], "ascending"), ([0], [0], "ascending"), ([8], [65], "outside")],
)
def test_segments_that_overlap_or_leave_the_file_are_refused(starts: list[int], stops: list[int], why: str) -> None:
    zeros = np.zeros(len(starts), np.int64)
    with pytest.raises(ValueError, match=why):
        Placement(64, np.array(starts), np.array(stops), zeros, zeros.astype(np.uint8))


def test_arrays_of_unequal_length_are_refused() -> None:
    none = np.empty(0, np.int64)
    with pytest.raises(ValueError, match="length"):
        Placement(64, none, none, np.zeros(1, np.int64), none.astype(np.uint8))
