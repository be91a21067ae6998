"""Grain bitmaps, units and ids."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import extents, integers_of

from graincopy.core.bitmap import GrainBitmap
from graincopy.core.extent import Extents
from graincopy.core.ids import digest_id, new_id
from graincopy.core.units import GIB, KIB, MIB, TIB, ceil_div, format_duration, format_size, is_power_of_two, parse_size


@given(extents, extents)
def test_a_bitmap_comes_back_whole_and_keeps_the_algebra(one: Extents, other: Extents) -> None:
    mine, theirs = GrainBitmap.from_extents(one), GrainBitmap.from_extents(other)
    assert GrainBitmap.from_bytes(mine.to_bytes()).to_extents() == one
    assert len(mine) == one.total
    assert integers_of((mine | theirs).to_extents()) == integers_of(one) | integers_of(other)
    assert integers_of((mine - theirs).to_extents()) == integers_of(one) - integers_of(other)


def test_a_bitmap_of_a_whole_large_disk_is_small() -> None:
    grains = Extents.of((0, 1 << 24), (1 << 40, (1 << 40) + 1))
    assert len(GrainBitmap.from_extents(grains).to_bytes()) < 64 * KIB


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"not a bitmap"])
def test_bytes_that_are_no_bitmap_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        GrainBitmap.from_bytes(data)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("64K", 64 * KIB),
        ("64k", 64 * KIB),
        ("4 MiB", 4 * MIB),
        ("4MB", 4 * MIB),
        (" 2G ", 2 * GIB),
        ("256TiB", 256 * TIB),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "64 KK", "1e6", "64Q", "６４x"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (3 * MIB, "3 MiB"), (256 * TIB, "256 TiB")],
)
def test_sizes_are_written(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_a_written_size_is_near_the_real_one(size: int) -> None:
    number, unit = format_size(size).split()
    assert float(number) * parse_size(f"1{unit}") == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.34, "340 ms"), (4.2, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (3599.7, "1 h 0 min")],
)
def test_durations_are_written(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 1 << 70), st.integers(1, 1 << 40))
def test_ceil_div(dividend: int, divisor: int) -> None:
    quotient = ceil_div(dividend, divisor)
    assert (quotient - 1) * divisor < dividend <= quotient * divisor


@given(st.integers(-4, 1 << 20))
def test_powers_of_two(number: int) -> None:
    assert is_power_of_two(number) == (number in {1 << n for n in range(21)})


class Dice:
    """Chance with a seed."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)

    def token(self, size: int) -> bytes:
        return self.source.randbytes(size)

    def below(self, limit: int) -> int:
        return self.source.randrange(limit)


def test_new_ids_have_the_form_and_come_from_the_given_chance() -> None:
    assert new_id(Dice(1)) == new_id(Dice(1)) != new_id(Dice(2))
    assert re.fullmatch("[0-9a-f]{32}", new_id(Dice(3)))


def test_a_digest_depends_on_kind_parts_and_their_borders() -> None:
    names = [
        digest_id("disk", ["a", "b"]),
        digest_id("disk", ["ab"]),
        digest_id("disk", ["b", "a"]),
        digest_id("disk", ["a", "b", ""]),
        digest_id("volume", ["a", "b"]),
        digest_id("disk", ["a\udcff", "b"]),
    ]
    assert len(set(names)) == len(names)
    assert digest_id("disk", ["a", "b"]) == names[0]
