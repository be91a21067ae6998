"""Collect gives space back and nothing else: not when others are at work, not when it is killed anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from shelves import (
    OWNER,
    FixedClock,
    Hooked,
    back_up,
    content_of,
    grain,
    make,
    objects,
    point_of,
    reopen,
    store_grains,
    total,
)
from test_repository import record

from graincopy.core.errors import ObjectDamaged, ObjectMissing, PointPinned, RunFenced, RunsOpen
from graincopy.core.ids import PointId, WorkloadId
from graincopy.media.memory import MemoryMedium
from graincopy.model.restore_point import MapRoot, RestoreDisk
from graincopy.model.snapshot import Owner
from graincopy.repository.check import check
from graincopy.repository.collect import collect
from graincopy.repository.collect_plan import CollectOutcome, CollectPlan, plan_collect
from graincopy.repository.pack import list_packs
from graincopy.repository.records import PackRef, PieceKind
from graincopy.repository.repository import Repository

DEAD = Owner(host="host", boot="boot", pid=666, started=1)


def alive(owner: Owner) -> bool | None:
    return {OWNER: True, DEAD: False}.get(owner)


def run_collect(repository: Repository, **wishes) -> CollectOutcome:
    wishes = {"alive": alive, "clock": repository.clock, "patience": 0} | wishes
    return collect(repository, **wishes)


def history(repository: Repository) -> list:
    """Three points over one disk: chunks that are in all, in some, in one."""
    first = back_up(repository, {at: grain(at) for at in range(60)})
    second = back_up(repository, {at: grain(f"second {at}") for at in range(5, 50)}, base=first)
    third = back_up(repository, {at: grain(f"third {at}") for at in range(20, 30)}, base=second)
    return [first, second, third]


def contents(repository: Repository) -> dict[PointId, dict[int, bytes]]:
    return {point.id: content_of(repository, point) for point in repository.points()}


def left_over(repository: Repository) -> list[str]:
    return [name for name in objects(repository) if name.startswith(("condemned/", "runs/", "beats/"))]


# --- the plan is a value --------------------------------------------------------------------------


def packs(*sizes: int) -> list[PackRef]:
    return [PackRef(f"{number:032x}", PieceKind.CHUNK, size) for number, size in enumerate(sizes)]


def test_the_plan_as_a_picture() -> None:
    whole, half, sparse, dead = packs(100, 100, 100, 70)
    plan = plan_collect([whole, half, sparse, dead], {whole.id: 100, half.id: 50, sparse.id: 49})
    assert plan == CollectPlan(packs=4, stored_bytes=370, sweep=(dead,), repack=(sparse,), live_in_repack=49)
    assert plan.freed_bytes == 121
    assert plan.lines()[1].startswith("1 hold nothing")


# --- alone ----------------------------------------------------------------------------------------


def test_space_comes_back_and_what_is_left_is_whole() -> None:
    repository = make()
    first, second, third = history(repository)
    expected = contents(repository)
    assert run_collect(repository).freed_bytes == 0, "everything is needed"
    repository.delete_point(first.id)
    before = total(repository)
    planned = run_collect(reopen(repository), dry_run=True)
    assert total(repository) == before
    outcome = run_collect(reopen(repository))
    assert outcome.swept == planned.swept > 0
    assert outcome.repacked == planned.repacked > 0
    assert before - total(repository) >= outcome.freed_bytes > 40 * 4096
    later = reopen(repository)
    assert contents(later) == {id: expected[id] for id in (second.id, third.id)}
    assert check(later, data=True) == ()
    assert left_over(repository) == []
    assert run_collect(reopen(repository)).swept == 0, "once is enough"


def test_without_points_nothing_is_left_but_the_keys() -> None:
    repository = make()
    empty = set(objects(repository))
    for point in history(repository):
        repository.delete_point(point.id)
    run_collect(reopen(repository))
    assert set(objects(repository)) == empty


def test_segments_are_merged() -> None:
    repository = make()
    points = [back_up(repository, {at: grain(at)}) for at in range(12)]
    expected = contents(repository)
    run_collect(reopen(repository))
    assert len([name for name in objects(repository) if name.startswith("index/")]) == 1
    assert contents(reopen(repository)) == expected
    assert len(points) == 12


def test_a_collect_that_has_nothing_to_sweep_waits_for_nobody() -> None:
    repository = make()
    history(repository)
    repository.open_run("backup", WorkloadId("w"))
    assert run_collect(reopen(repository)).swept == 0


def test_rows_of_packs_that_are_gone_leave_the_index() -> None:
    repository = make()
    point = back_up(repository, {1: grain(1)})
    other = back_up(repository, {2: grain(2)})
    lost = next(pack for pack in repository.load_index(fresh=True).packs if pack.kind is PieceKind.CHUNK)
    repository.medium.delete(lost.name)
    with pytest.raises(ObjectMissing):
        run_collect(reopen(repository))  # a restore point needs it: say so, sweep nothing
    broken = [one for one in (point, other) if not _whole(repository, one)]
    repository.delete_point(broken[0].id)
    run_collect(reopen(repository))
    assert lost not in reopen(repository).load_index().packs
    assert check(reopen(repository), data=True) == ()


def test_a_lost_chunk_pack_is_noticed_also_between_plan_and_sweep() -> None:
    repository = make()
    first, *_ = history(repository)
    repository.delete_point(first.id)
    planned = run_collect(reopen(repository), dry_run=True)
    assert planned.swept
    before = {pack.name for pack in list_packs(repository.medium)}
    newest = repository.load_index(fresh=True)
    lost = max((pack for pack in newest.packs if pack.kind is PieceKind.CHUNK), key=lambda pack: pack.size)

    def step(name: str) -> None:
        if name == "mark":
            repository.medium.delete(lost.name)

    with pytest.raises(ObjectMissing, match=lost.id):
        run_collect(reopen(repository, seed="collector"), step=step)
    assert {pack.name for pack in list_packs(repository.medium)} == before - {lost.name}
    assert left_over(repository) == []


def _whole(repository: Repository, point) -> bool:
    try:
        content_of(repository, point)
    except ObjectMissing:
        return False
    return True


def test_a_damaged_point_stops_collect_because_nobody_knows_what_it_needs() -> None:
    repository = make()
    first, *_ = history(repository)
    name = f"points/{first.id}"
    whole = repository.medium.get(name)
    repository.medium.delete(name)
    repository.medium.put(name, [whole[:-2]])
    before = objects(repository)
    with pytest.raises(ObjectDamaged):
        run_collect(reopen(repository))
    assert objects(repository) == before


# --- with others ----------------------------------------------------------------------------------


def test_a_dead_local_run_is_fenced_and_buried_and_its_packs_swept() -> None:
    repository = make()
    dying = reopen(repository, owner=DEAD)
    run = dying.open_run("backup", WorkloadId("w"))
    session = dying.session(run)
    store_grains(session, {1: grain(1)})
    session.finish()
    outcome = run_collect(reopen(repository, seed="collector"))
    assert (outcome.fenced, outcome.swept) == ((run.id,), 1)
    assert left_over(repository) == []
    assert repository.tombstones() == (), "the dead do not come back"
    assert list_packs(repository.medium) == ()


@pytest.mark.parametrize("owner", [OWNER, Owner(host="far", boot="b", pid=1, started=1)])
def test_a_run_that_may_live_is_waited_for_and_nothing_is_swept(owner: Owner) -> None:
    repository = make()
    first, *_ = history(repository)
    repository.delete_point(first.id)
    other = reopen(repository, owner=owner)
    run = other.open_run("backup", WorkloadId("w"))
    before = objects(repository)
    clock = FixedClock()
    with pytest.raises(RunsOpen, match="1 runs"):
        run_collect(reopen(repository, seed="collector"), clock=clock, patience=30)
    assert clock.time >= 1_000_030
    assert objects(repository) == before
    assert not repository.is_fenced(run.id)


def test_a_run_that_ends_in_time_is_waited_for_and_what_it_reused_stays() -> None:
    """A backup lists the index → the last old reference to a chunk that it reuses is expired → collect sweeps."""
    repository = make()
    old = back_up(repository, {at: grain(at) for at in range(20)})
    slow = reopen(repository, seed="slow")
    run = slow.open_run("backup", WorkloadId("w"))
    session = slow.session(run)  # lists the index
    repository.delete_point(old.id)
    entries = store_grains(session, {at: grain(at) for at in range(3)})
    assert session.data_bytes == 0, "all of it is reused"
    root = session.update_map(MapRoot(), 100, entries)
    session.finish()
    clock = FixedClock()
    point = point_of(run, slow, root, 100, 2)
    clock.on_sleep = lambda: slow.publish(point)
    run_collect(reopen(repository, seed="collector"), clock=clock, patience=30)
    later = reopen(repository)
    assert content_of(later, point) == {at: grain(at) for at in range(3)}
    assert check(later, data=True) == ()


def test_a_run_that_is_stopped_before_its_publish_and_woken_after_the_sweep_loses_cleanly() -> None:
    repository = make()
    old = back_up(repository, {at: grain(at) for at in range(20)})
    slow = reopen(repository, seed="slow")
    run = slow.open_run("backup", WorkloadId("w"))
    slow.beat(run)
    session = slow.session(run)
    repository.delete_point(old.id)
    entries = store_grains(session, {at: grain(at) for at in range(3)} | {50: grain("new")})
    root = session.update_map(MapRoot(), 100, entries)
    outcome = run_collect(reopen(repository, seed="collector"), clock=FixedClock(), patience=100, silence=30)
    assert outcome.fenced == (run.id,)
    session.finish()  # woken: it puts packs and a segment, and does not know
    with pytest.raises(RunFenced):
        slow.publish(point_of(run, slow, root, 100, 2))
    later = reopen(repository, seed="later")
    assert later.points() == ()
    again = back_up(later, {at: grain(at) for at in range(3)} | {50: grain("new")})
    assert content_of(reopen(repository), again)[2] == grain(2)
    assert check(reopen(repository), data=True) == ()
    run_collect(reopen(repository, seed="collector 2"))
    assert content_of(reopen(repository), again)[50] == grain("new")
    assert later.is_fenced(run.id), "its owner is not provably dead"


def test_a_run_that_gives_signs_of_life_is_not_fenced() -> None:
    repository = make()
    first, *_ = history(repository)
    repository.delete_point(first.id)
    slow = reopen(repository, seed="slow")
    run = slow.open_run("backup", WorkloadId("w"))
    clock = FixedClock()
    clock.on_sleep = lambda: slow.beat(run)
    with pytest.raises(RunsOpen):
        run_collect(reopen(repository, seed="collector"), clock=clock, patience=100, silence=10)
    assert not slow.is_fenced(run.id)


def test_a_run_whose_record_is_damaged_is_waited_for_and_fenced_when_it_is_silent() -> None:
    repository = make()
    first, *_ = history(repository)
    repository.delete_point(first.id)
    run = reopen(repository, seed="slow").open_run("backup", WorkloadId("w"))
    repository.medium.delete(f"runs/{run.id}")
    repository.medium.put(f"runs/{run.id}", [b"rubbish"])
    with pytest.raises(RunsOpen, match="damaged"):
        run_collect(reopen(repository, seed="collector"), clock=FixedClock(), patience=5)
    outcome = run_collect(reopen(repository, seed="collector 2"), clock=FixedClock(), patience=5, silence=3)
    assert outcome.fenced == (run.id,)
    assert outcome.swept > 0
    assert left_over(repository) == []


def test_a_sparse_pack_that_cannot_be_read_is_kept_and_named() -> None:
    repository = make()
    first = back_up(repository, {at: grain(at) for at in range(60)})
    (sparse,) = [pack for pack in list_packs(repository.medium) if pack.kind is PieceKind.CHUNK]
    last = back_up(repository, {at: grain(f"new {at}") for at in range(50)}, base=first)
    repository.delete_point(first.id)
    found = repository.load_index(fresh=True).locate(repository.codec.piece_ids(PieceKind.CHUNK, [grain(59)]))
    whole = bytearray(repository.medium.get(sparse.name))
    whole[int(found.offset[0]) + 99] ^= 1  # the nine live ones before it have been stored anew by then
    repository.medium.delete(sparse.name)
    repository.medium.put(sparse.name, [whole])
    assert run_collect(repository).kept_damaged == (sparse.name,)
    assert repository.medium.get(sparse.name) == whole
    opened = reopen(repository)
    with pytest.raises(ObjectDamaged):
        content_of(opened, last)
    others = opened.map.lookup(last.disks[0].root, np.arange(59))
    assert dict(opened.read_chunks(others)) == {at: grain(f"new {at}" if at < 50 else at) for at in range(59)}


def test_damaged_condemnations_are_dropped_by_the_next_collect() -> None:
    repository = make()
    history(repository)
    repository.medium.put("condemned/" + "a" * 32, [b"rubbish"])
    with pytest.raises(ObjectDamaged):
        repository.session(repository.open_run("backup", None))
    run_collect(reopen(repository, seed="collector"), alive=lambda owner: False)
    assert left_over(repository) == []


def test_one_collect_at_a_time_and_a_dead_one_is_taken_over() -> None:
    repository = make()
    first, *_ = history(repository)
    repository.delete_point(first.id)
    other = reopen(repository, seed="other").open_run("collect", None)
    with pytest.raises(RunsOpen, match="another collect"):
        run_collect(reopen(repository, seed="collector"))
    repository.close_run(other)
    dead = reopen(repository, seed="dead", owner=DEAD).open_run("collect", None)
    assert run_collect(reopen(repository, seed="collector")).fenced == (dead.id,)


def test_a_view_is_not_waited_for_and_keeps_what_it_pins() -> None:
    repository = make()
    first, second, third = history(repository)
    expected = contents(repository)
    viewer = reopen(repository, seed="viewer")
    viewer.open_run("view", None, pins=(first.id,))
    repository.delete_point(second.id)
    with pytest.raises(PointPinned):
        repository.delete_point(first.id)
    run_collect(reopen(repository, seed="collector"))
    assert content_of(viewer, first) == expected[first.id], "also with the index of before"
    assert content_of(viewer, third) == expected[third.id]


def test_an_undo_that_lies_in_the_repository_is_kept_until_it_is_undone() -> None:
    repository = make()
    point = back_up(repository, {1: grain(1)})
    run = repository.open_run("restore", None, pins=(point.id,))
    session = repository.session(run)
    root = session.update_map(MapRoot(), 100, store_grains(session, {7: grain("before")}))
    session.finish()
    disk = RestoreDisk(
        disk="d",
        name="n",
        path="p",
        size=4096,
        size_before=4096,
        grains=b"",
        metadata_before=None,
        undo_target=None,
        undo_driver=None,
        undo_root=root,
    )
    import msgspec

    repository.put_restore(msgspec.structs.replace(record(run.id, point.id), disks=(disk,)))
    repository.close_run(run)
    run_collect(reopen(repository))
    (kept,) = reopen(repository).undo_roots()
    found = dict(pair for part in repository.map.walk(kept) for pair in reopen(repository).read_chunks(part))
    assert found == {7: grain("before")}
    repository.mark_restore(run.id, "undone")
    assert run_collect(reopen(repository)).swept == 2


def phases(repository: Repository, base) -> list[Callable[[], object]]:
    """A backup in steps between which anything can happen."""
    state: dict = {}

    def opened() -> None:
        state["run"] = repository.open_run("backup", WorkloadId("w"), pins=(base.id,))

    def listed() -> None:
        state["session"] = repository.session(state["run"])

    def stored() -> None:
        wanted = {at: grain(at) for at in range(5, 25)} | {at: grain(f"new {at}") for at in range(3)}
        state["entries"] = store_grains(state["session"], wanted)

    def mapped() -> None:
        state["root"] = state["session"].update_map(base.disks[0].root, 100, state["entries"])

    def finished() -> None:
        state["session"].finish()

    def published() -> None:
        repository.publish(point_of(state["run"], repository, state["root"], 100, 9))

    return [opened, listed, stored, mapped, finished, published]


def expected_of_phases(base: dict[int, bytes]) -> dict[int, bytes]:
    return base | {at: grain(at) for at in range(5, 25)} | {at: grain(f"new {at}") for at in range(3)}


def steps_of_a_collect() -> int:
    repository = make()
    first, *_ = history(repository)
    repository.delete_point(first.id)
    seen: list[str] = []
    run_collect(reopen(repository, seed="collector"), step=seen.append)
    assert {"condemn", "mark", "repack", "index", "unindex", "sweep", "pardon"} <= set(seen)
    return len(seen)


STEPS = steps_of_a_collect()


@pytest.mark.parametrize("at", range(STEPS))
@pytest.mark.parametrize("before", range(7))
def test_a_backup_at_any_moment_of_a_collect_is_whole(at: int, before: int) -> None:
    """``before`` phases of a backup, then collect up to step ``at``, there the rest of the backup, then the rest."""
    repository = make()
    first, second, third = history(repository)
    expected = contents(repository)
    backup = phases(reopen(repository, seed="backup"), third)
    for phase in backup[:before]:
        phase()
    repository.delete_point(first.id)
    count = itertools.count()

    def step(name: str) -> None:
        if next(count) == at:
            for phase in backup[before:]:
                phase()

    clock = FixedClock()  # whoever is waited for gets its chance
    clock.on_sleep = lambda: None if next(count) > at else step_all(backup, before, count, at)
    run_collect(reopen(repository, seed="collector"), step=step, clock=clock, patience=20)
    later = reopen(repository)
    newest = later.points()[0]
    assert content_of(later, newest) == expected_of_phases(expected[third.id])
    for point in (second, third):
        assert content_of(later, point) == expected[point.id]
    assert check(later, data=True) == ()
    assert left_over(repository) == []


def step_all(backup, before: int, count, at: int) -> None:
    """The collect waits and will not come to step ``at`` before the backup ends: end it now."""
    for phase in backup[before:]:
        phase()
    for _ in range(at + 1):
        next(count)


@pytest.mark.parametrize("other", ["backup", "expire", "backup and expire"])
def test_somebody_else_between_any_two_operations_of_a_collect(other: str) -> None:
    for at in itertools.count():
        repository = make()
        first, second, third = history(repository)
        expected = contents(repository)
        repository.delete_point(first.id)

        def act(repository=repository, second=second, third=third) -> None:
            somebody = reopen(repository, seed="somebody")
            if "backup" in other:
                for phase in phases(somebody, third):
                    phase()
            if "expire" in other:
                somebody.delete_point(second.id)

        medium = Hooked(repository.medium, at, act)
        run_collect(reopen(repository, seed="collector", medium=medium), patience=5)
        if medium.left >= 0:
            assert at > 50
            return
        later = reopen(repository)
        assert content_of(later, third) == expected[third.id]
        if "backup" in other:
            assert content_of(later, later.points()[0]) == expected_of_phases(expected[third.id])
        assert check(later, data=True) == (), f"operation {at}"
        assert left_over(repository) == []


# --- killed ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """kill -9."""


class Mortal(MemoryMedium):
    """Lets so many effects pass, then nothing any more: what was running is dead, its clean-up included."""

    def __init__(self, medium: MemoryMedium, effects: int) -> None:
        super().__init__(medium.store)
        self.effects = effects

    def _spend(self) -> None:
        if self.effects <= 0:
            raise Killed
        self.effects -= 1

    def put(self, name, parts):
        self._spend()
        return super().put(name, parts)

    def delete(self, name):
        self._spend()
        return super().delete(name)


@pytest.mark.parametrize("victim", ["collect", "backup", "expire"])
def test_killed_at_any_effect_nothing_is_lost_and_the_next_collect_finishes(victim: str) -> None:
    for effects in range(60):
        repository = make()
        first, second, third = history(repository)
        expected = contents(repository)
        if victim == "collect":
            repository.delete_point(first.id)
        dying = reopen(repository, seed="dying", owner=DEAD, medium=Mortal(repository.medium, effects))
        try:
            if victim == "collect":
                run_collect(dying)
            elif victim == "expire":
                dying.delete_point(first.id)
            else:
                for phase in phases(dying, third):
                    phase()
            died = False
        except Killed:
            died = True
        later = reopen(repository, seed="later")
        assert check(later, data=True) == (), f"after {effects} effects"
        for point in later.points():
            if point.id in expected:
                assert content_of(later, point) == expected[point.id]
        again = back_up(later, {at: grain(at) for at in range(5, 50)}, base=third)
        run_collect(reopen(repository, seed="collector"))
        last = reopen(repository, seed="last")
        assert content_of(last, again)[7] == grain(7)
        assert content_of(last, second) == expected[second.id]
        assert check(last, data=True) == ()
        assert left_over(repository) == []
        assert last.tombstones() == ()
        live = {pack.name for pack in last.load_index().packs}
        assert {pack.name for pack in list_packs(repository.medium)} == live
        if not died:
            assert effects > 2
            return
    raise AssertionError("the victim never came to its end")
