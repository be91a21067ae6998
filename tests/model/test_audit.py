"""The choice of grains to audit, and what an audit proves."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import extents, integers_of

from graincopy.core.extent import Extents
from graincopy.core.ids import DiskId
from graincopy.model.audit import AuditAmount, Turns, bound, choose, full_cover_runs, rolling_share, take_turns

NO_BOUNDARIES = np.empty(0, np.int64)
boundary_lists = st.lists(st.integers(0, 96), max_size=5)


def dice(seed: int = 0) -> Callable[[int], int]:
    return random.Random(seed).randrange


@given(extents, extents, boundary_lists, st.integers(0, 120), st.integers(0, 40), st.integers(0, 9))
def test_it_chooses_as_many_clean_grains_as_asked_for(
    clean: Extents, dirty: Extents, edges: list[int], cursor: int, count: int, seed: int
) -> None:
    choice = choose(clean, dirty, np.array(edges, np.int64), cursor, count, dice(seed))
    available = integers_of(clean) - integers_of(dirty)
    assert integers_of(choice.grains) <= available
    assert choice.grains.total == min(count, len(available))


@given(extents, extents, st.integers(1, 20), st.integers(0, 9))
def test_k_runs_look_at_every_clean_grain(clean: Extents, dirty: Extents, count: int, seed: int) -> None:
    clean = clean - dirty
    runs = full_cover_runs(clean.total, rolling_share(count))
    assert runs is not None
    seen, cursor = Extents.empty(), 0
    for run in range(runs):
        choice = choose(clean, dirty, NO_BOUNDARIES, cursor, count, dice(seed + run))
        seen, cursor = seen | choice.grains, choice.next_cursor
    assert seen == clean


@given(extents, extents, boundary_lists, st.integers(0, 120), st.integers(1, 20), st.integers(0, 9))
def test_half_lies_beside_dirty_ranges_and_boundaries_as_far_as_there_are_such_grains(
    clean: Extents, dirty: Extents, edges: list[int], cursor: int, count: int, seed: int
) -> None:
    clean = clean - dirty
    choice = choose(clean, dirty, np.array(edges, np.int64), cursor, count, dice(seed))
    centres = integers_of(dirty) | set(edges)
    near = {grain for grain in integers_of(clean) if any(abs(grain - centre) <= 2 for centre in centres)}
    assert len(integers_of(choice.grains) & near) >= min(count // 2, len(near))


def test_the_rolling_half_goes_on_where_it_stopped_and_wraps() -> None:
    clean = Extents.of((10, 14), (20, 24))
    choice = choose(clean, Extents.empty(), NO_BOUNDARIES, 22, 6, dice())
    assert integers_of(choice.grains) >= {22, 23, 10}
    assert choice.next_cursor == 11


def test_one_grain_a_run_rolls() -> None:
    clean, cursor, seen = Extents.of((3, 5), (9, 10)), 0, []
    for _ in range(4):
        choice = choose(clean, Extents.of((5, 6)), NO_BOUNDARIES, cursor, 1, dice())
        cursor = choice.next_cursor
        seen.append(int(choice.grains.bounds[0]))
    assert seen == [3, 4, 9, 3]


def test_the_random_half_depends_on_the_given_chance_alone() -> None:
    clean, dirty = Extents.whole(100_000), Extents.empty()
    one, same, other = (choose(clean, dirty, NO_BOUNDARIES, 0, 64, dice(seed)) for seed in (1, 1, 2))
    assert one == same
    assert one.grains != other.grains


def test_every_clean_grain_has_a_chance_to_be_topped_up() -> None:
    clean = Extents.whole(40)
    seen = set[int]()
    for seed in range(200):
        seen |= integers_of(choose(clean, Extents.empty(), NO_BOUNDARIES, 0, 4, dice(seed)).grains)
    assert seen == set(range(40))


def test_a_disk_of_256_tib_costs_no_more_than_its_extents() -> None:
    clean = Extents.whole(1 << 32)
    dirty = Extents.from_points(np.arange(0, 1 << 32, 1 << 14))
    choice = choose(clean, dirty, dirty.starts, 1 << 31, 1000, dice())
    assert choice.grains.total == 1000


@pytest.mark.parametrize("count", [0, 1, 2, 64])
def test_a_disk_without_clean_grains(count: int) -> None:
    choice = choose(Extents.empty(), Extents.whole(9), NO_BOUNDARIES, 5, count, dice())
    assert choice.grains == Extents.empty()


def test_no_audit_leaves_the_cursor_where_it_was() -> None:
    assert choose(Extents.whole(9), Extents.empty(), NO_BOUNDARIES, 5, 0, dice()).next_cursor == 5


# --- what it proves ---------------------------------------------------------------------------------


def test_the_bound() -> None:
    assert bound(1_000_000, 64) == pytest.approx(0.0457, abs=1e-4)
    assert bound(1_000_000, 299) == pytest.approx(0.00997, abs=1e-4)
    assert bound(64, 64) == 0.0
    assert bound(0, 0) == 0.0
    assert bound(1000, 0) is None
    assert bound(1000, 1000, 3) == 0.003
    assert bound(1000, 5, 5) == 1.0


@given(st.integers(2, 60), st.data())
def test_with_mismatches_it_is_the_share_at_which_so_few_would_be_seen_once_in_twenty(
    audited: int, data: st.DataObject
) -> None:
    hits = data.draw(st.integers(1, audited - 1))
    share = bound(10_000, audited, hits)
    assert share is not None and hits / audited < share < 1
    seen = sum(comb(audited, i) * share**i * (1 - share) ** (audited - i) for i in range(hits + 1))
    assert seen == pytest.approx(0.05, abs=1e-9)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_bound_sinks_as_more_is_audited(clean: int, audited: int) -> None:
    less, more = bound(clean, audited), bound(clean, audited + 1)
    assert less is not None and more is not None
    assert 0.0 <= more <= less < 1.0


def test_the_bound_holds_for_the_choice() -> None:
    """A map that is wrong about as many grains as the bound allows is caught in at least 95 % of the runs."""
    clean, share = Extents.whole(4096), bound(4096, 64)
    assert share is not None
    wrong = np.sort(np.random.default_rng(7).choice(4096, size=round(share * 4096), replace=False))
    caught = 0
    for seed in range(400):
        cursor = random.Random(seed).randrange(4096)
        chosen = choose(clean, Extents.empty(), NO_BOUNDARIES, cursor, 64, dice(seed)).grains
        caught += bool(chosen.holds(wrong).any())
    assert caught >= 0.93 * 400


def test_full_cover_runs() -> None:
    assert full_cover_runs(100, 32) == 4
    assert full_cover_runs(96, 32) == 3
    assert full_cover_runs(0, 32) == 0
    assert full_cover_runs(100, 0) is None
    assert full_cover_runs(100, 32, every=7) == 28
    assert full_cover_runs(0, 32, every=7) == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 10), st.integers(0, 20))
def test_every_file_has_its_turn(waited: list[int], count: int, rounds: int) -> None:
    """However often there were runs before, and whatever became of their restore points."""
    files = {DiskId(f"{at:02x}"): runs for at, runs in enumerate(waited)}
    every = take_turns(files, AuditAmount(count=count)).every
    assert every == -(-len(files) // count)
    for _ in range(rounds):
        files = after(files, take_turns(files, AuditAmount(count=count)))
    looked_at: set[DiskId] = set()
    for _ in range(every):
        turn = take_turns(files, AuditAmount(count=count))
        assert len(turn.disks) == min(count, len(files))
        looked_at |= turn.disks
        files = after(files, turn)
    assert looked_at == set(files)


def after(waited: dict[DiskId, int], turn: Turns) -> dict[DiskId, int]:
    return {disk: 0 if disk in turn.disks else runs + 1 for disk, runs in waited.items()}


@pytest.mark.parametrize("amount", ["5%", "all", "0", "100"])
def test_a_share_takes_no_turns_nor_does_nothing_or_enough(amount: str) -> None:
    files = dict.fromkeys((DiskId(f"{at:02x}") for at in range(100)), 3)
    assert take_turns(files, AuditAmount.parse(amount)) == Turns(frozenset(files), 1)
    assert take_turns({}, AuditAmount.parse(amount)) == Turns(frozenset(), 1)


@pytest.mark.parametrize(
    ("text", "clean", "grains"),
    [
        ("64", 1000, 64),
        ("64", 10, 10),
        ("0", 1000, 0),
        ("5%", 1000, 50),
        ("5%", 1, 1),
        ("0.5%", 1000, 5),
        ("0%", 1000, 0),
        ("100%", 7, 7),
        ("all", 1000, 1000),
        ("all", 0, 0),
        (" 12 ", 1000, 12),
    ],
)
def test_amounts(text: str, clean: int, grains: int) -> None:
    assert AuditAmount.parse(text).grains(clean) == grains


@pytest.mark.parametrize("text", ["", "-1", "101%", "half", "5 %%", "1e3", "%"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no amount to audit"):
        AuditAmount.parse(text)


def test_amounts_are_shown_as_people_write_them() -> None:
    assert [str(AuditAmount.parse(text)) for text in ("64", "1", "5%", "all")] == ["64 grains", "1 grain", "5%", "all"]
