"""The central computation against one entry per byte, and against the bytes themselves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from oracles import bytes_of, extents, integers_of, placements

from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State
from graincopy.model.change_map import DirtyFile, dirty_file, to_grains, whole_file

VOLUME = 160
OPAQUE = {"base": 251, "now": 252}  # stand-ins for bytes that no volume offset tells

grains = st.integers(1, 13)
images = st.binary(min_size=VOLUME, max_size=VOLUME).map(bytearray)


@given(placements(), placements(), extents)
def test_dirty_is_what_changed_its_place_or_lies_on_changed_volume_bytes(
    base: Placement, now: Placement, volume: Extents
) -> None:
    before, after, rewritten = bytes_of(base), bytes_of(now), integers_of(volume)
    expected = {
        byte
        for byte, (state, place) in after.items()
        if before.get(byte) != (state, place) or state is State.OPAQUE or place in rewritten
    }
    dirty = dirty_file(base, now, volume)
    zero = {byte for byte in expected if after[byte][0] in (State.HOLE, State.UNWRITTEN)}
    assert integers_of(dirty.dirty) == expected
    assert integers_of(dirty.zero) == zero
    assert integers_of(dirty.read) == expected - zero


@given(placements(), extents, grains)
def test_a_dirty_grain_is_read_unless_all_of_it_is_zero(now: Placement, touched: Extents, grain: int) -> None:
    touched = touched.clip(0, now.size)
    dirty = DirtyFile(read=touched & now.allocated(), zero=touched & now.zero())
    rounded = to_grains(dirty, now, grain)
    hit = {byte // grain for byte in integers_of(touched)}
    filled = {byte // grain for byte, (state, _) in bytes_of(now).items() if state in (State.WRITTEN, State.OPAQUE)}
    assert integers_of(rounded.read) == hit & filled
    assert integers_of(rounded.zero) == hit - filled


@given(placements())
def test_without_a_base_all_that_is_allocated_is_read(now: Placement) -> None:
    whole = whole_file(now)
    assert whole.read == now.allocated()
    assert whole.dirty == Extents.whole(now.size)


@given(placements(), placements(), images, st.lists(st.tuples(st.integers(0, VOLUME - 1), st.integers(0, 255))), grains)
def test_the_base_patched_with_its_dirty_grains_is_the_file_as_it_is_now(
    base: Placement, now: Placement, image: bytearray, writes: list[tuple[int, int]], grain: int
) -> None:
    """Soundness end to end: whatever was written, moved, punched, cut or grown, nothing that changed is missed."""
    later = bytearray(image)
    for offset, value in writes:
        later[offset] = value
    volume = Extents.from_pairs((i, i + 1) for i in range(VOLUME) if image[i] != later[i])
    old, new = content(base, image, OPAQUE["base"]), content(now, later, OPAQUE["now"])
    dirty = to_grains(dirty_file(base, now, volume), now, grain, base.size)

    count = -(-len(new) // grain)
    padded = new.ljust(count * grain, b"\0")
    patched = bytearray(old.ljust(count * grain, b"\0")[: count * grain])
    for start, stop in dirty.read.to_bytes(grain):
        patched[start:stop] = padded[start:stop]
    for start, stop in dirty.zero.to_bytes(grain):
        patched[start:stop] = bytes(stop - start)
    assert patched == padded


def content(placement: Placement, image: bytearray, opaque: int) -> bytes:
    """What the file reads as."""
    table = bytes_of(placement)
    return bytes(opaque if s is State.OPAQUE else 0 if v is None else image[v] for s, v in table.values())


def test_nothing_written_nothing_dirty() -> None:
    disk = Placement.of(64, (0, 16, 100, State.WRITTEN), (32, 64, 300, State.UNWRITTEN))
    assert dirty_file(disk, disk, Extents.of((0, 100), (300, 400))).dirty == Extents.empty()


def test_a_neighbours_write_on_the_same_volume_is_not_ours() -> None:
    disk = Placement.of(64, (0, 64, 100, State.WRITTEN))
    dirty = dirty_file(disk, disk, Extents.of((90, 101), (163, 500)))
    assert dirty.read == Extents.of((0, 1), (63, 64))


def test_moved_onto_blocks_that_nobody_rewrote() -> None:
    base = Placement.of(64, (0, 64, 100, State.WRITTEN))
    now = Placement.of(64, (0, 32, 100, State.WRITTEN), (32, 64, 900, State.WRITTEN))
    assert dirty_file(base, now, Extents.empty()).read == Extents.of((32, 64))


def test_a_punched_hole_is_zero_and_is_not_read() -> None:
    base = Placement.of(64, (0, 64, 100, State.WRITTEN))
    now = Placement.of(64, (0, 16, 100, State.WRITTEN), (48, 64, 148, State.WRITTEN))
    dirty = dirty_file(base, now, Extents.empty())
    assert (dirty.read, dirty.zero) == (Extents.empty(), Extents.of((16, 48)))
    assert to_grains(dirty, now, 16).zero == Extents.of((1, 3))
    assert to_grains(dirty, now, 32).read == Extents.of((0, 2))  # a grain of which a part is kept has to be read


def test_a_cut_inside_a_grain_makes_that_grain_new() -> None:
    base = Placement.of(64, (0, 64, 100, State.WRITTEN))
    now = Placement.of(40, (0, 40, 100, State.WRITTEN))
    dirty = dirty_file(base, now, Extents.empty())
    assert to_grains(dirty, now, 16).read == Extents.empty()
    assert to_grains(dirty, now, 16, size_before=64).read == Extents.of((2, 3))
