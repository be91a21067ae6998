"""Reaping as a table: what a target is, what is known → what becomes of it."""

from __future__ import annotations

import pytest
from makers import DEAD, LIVE, OTHER_REPO, REPO, STRANGE, disk, point, target

from graincopy.core.ids import PointId, RepositoryId, WorkloadId
from graincopy.model.reap import Decision, Delete, Keep, Promote, ReapLimits, decide, newest_checkpoints
from graincopy.model.restore_point import RestorePoint, RestoreRecord, RestoreState
from graincopy.model.snapshot import Owner, Role, Target

NOW = 10_000.0
TARGET, CHECKPOINT, UNDO, VIEW = Role.TARGET, Role.CHECKPOINT, Role.UNDO, Role.VIEW


def alive(owner: Owner) -> bool | None:
    return {LIVE: True, DEAD: False}.get(owner)


def restore(state: str, expires: float = NOW + 1, opened: float = NOW - 100) -> RestoreState:
    record = RestoreRecord(
        id=PointId("r1"),
        point=PointId("p1"),
        workload=WorkloadId("web"),
        owner=DEAD,
        opened=opened,
        expires=expires,
        disks=(),
    )
    return RestoreState(record=record, state=state)


def what(
    one: Target,
    points: list[RestorePoint] | None = None,
    restores: list[RestoreState] | None = None,
    own: RepositoryId | None = REPO,
    limits: ReapLimits | None = None,
    now: float = NOW,
) -> Decision:
    """The decision about ``one``; None for points or restores: the repository cannot be read."""
    [decision] = decide(
        [one],
        {} if points is None else {REPO: points},
        {} if restores is None else {REPO: restores},
        alive,
        now,
        own,
        limits or ReapLimits(),
    )
    assert decision.target is one
    assert decision.reason
    return decision


NAMED = point(1, disk(checkpoint="t"))
NEWER = point(2, disk(checkpoint="t2"))


@pytest.mark.parametrize("role", [TARGET, UNDO, VIEW])
def test_what_a_live_process_made_is_left_alone(role: Role) -> None:
    decision = what(target("t", role=role, owner=LIVE), [], [])
    assert isinstance(decision, Keep) and not decision.report
    assert "pid 1" in decision.reason


@pytest.mark.parametrize("role", [TARGET, UNDO, VIEW])
def test_another_hosts_owner_cannot_be_judged_from_here(role: Role) -> None:
    decision = what(target("t", role=role, owner=STRANGE), [], [])
    assert isinstance(decision, Keep) and decision.report


@pytest.mark.parametrize(
    ("points", "expected", "reason"),
    [
        ([], Delete, "published nothing"),
        ([NEWER], Delete, "published nothing"),
        ([NAMED], Promote, "before it was made a checkpoint"),
        ([point(1, disk())], Delete, "nobody's newest checkpoint"),
        ([NAMED, NEWER], Delete, "nobody's newest checkpoint"),
        ([point(1, disk(checkpoint="t"), incomplete=True)], Delete, "nobody's newest checkpoint"),
        ([point(1, disk(checkpoint="t", driver="qemu"))], Delete, "nobody's newest checkpoint"),
        (None, Keep, "may be a checkpoint"),
    ],
    ids=["unpublished", "only others", "named", "names none", "superseded", "incomplete", "driver", "unreadable"],
)
def test_the_target_of_a_dead_run(points: list[RestorePoint] | None, expected: type, reason: str) -> None:
    decision = what(target("t", role=TARGET), points)
    assert isinstance(decision, expected)
    assert reason in decision.reason


def test_a_target_that_serves_no_disk_was_never_going_to_be_a_checkpoint() -> None:
    assert isinstance(what(target("t", role=TARGET, disks=()), None), Delete)


def test_an_unreadable_repository_is_reported() -> None:
    decision = what(target("t", role=TARGET), None)
    assert isinstance(decision, Keep) and decision.report


@pytest.mark.parametrize("own", [OTHER_REPO, None])
def test_an_unpublished_target_of_another_readable_repository_goes_too(own: RepositoryId | None) -> None:
    assert isinstance(what(target("t", role=TARGET), [], own=own), Delete)


@pytest.mark.parametrize(
    ("points", "own", "expected"),
    [
        ([NAMED], REPO, Keep),
        ([NAMED, NEWER], REPO, Delete),
        ([NEWER, NAMED], REPO, Delete),
        ([NAMED, point(2, disk(checkpoint="t2"), incomplete=True)], REPO, Keep),
        ([NAMED, point(2, disk("b"))], REPO, Keep),
        ([NAMED, point(2, disk(checkpoint="t2"), workload=WorkloadId("db"))], REPO, Keep),
        ([NAMED, point(2, disk())], REPO, Delete),
        ([], REPO, Delete),
        ([point(1, disk(checkpoint="t"), incomplete=True)], REPO, Delete),
        (None, REPO, Keep),
        ([], OTHER_REPO, Keep),
        ([], None, Keep),
    ],
    ids=[
        "newest",
        "superseded",
        "superseded, any order",
        "newer one incomplete",
        "newer one without the disk",
        "another workload's",
        "newer one kept none",
        "its point is gone",
        "incomplete",
        "unreadable",
        "not ours",
        "no repository",
    ],
)
def test_checkpoints(points: list[RestorePoint] | None, own: RepositoryId | None, expected: type) -> None:
    assert isinstance(what(target("t"), points, own=own), expected)


def test_a_shared_checkpoint_stays_for_the_one_disk_that_still_needs_it() -> None:
    both = point(1, disk("a", checkpoint="t"), disk("b", checkpoint="t"))
    shared = target("t", disks=("a", "b"))
    assert isinstance(what(shared, [both, point(2, disk("a", checkpoint="t2"))]), Keep)
    assert isinstance(what(target("t", disks=("a",)), [both, point(2, disk("a", checkpoint="t2"))]), Delete)


def test_the_owner_of_a_checkpoint_may_be_long_gone_or_alive() -> None:
    for owner in (LIVE, DEAD, STRANGE):
        assert isinstance(what(target("t", owner=owner), [NAMED]), Keep)
        assert isinstance(what(target("t", owner=owner), [NEWER]), Delete)


def test_a_checkpoint_goes_when_it_is_too_old() -> None:
    limits = ReapLimits(checkpoint_max_age=60.0)
    assert isinstance(what(target("t", created=NOW - 61), [NAMED], limits=limits), Delete)
    assert isinstance(what(target("t", created=NOW - 60), [NAMED], limits=limits), Keep)


@pytest.mark.parametrize(
    ("restores", "expected", "report"),
    [
        ([restore("open", expires=0)], Keep, True),
        ([restore("undoing", expires=0)], Keep, True),
        ([restore("done")], Keep, False),
        ([restore("done", expires=NOW)], Delete, False),
        ([restore("undone")], Delete, False),
        ([], Delete, False),
        (None, Keep, True),
    ],
    ids=["open", "undoing", "done", "expired", "undone", "never began", "unreadable"],
)
def test_undo(restores: list[RestoreState] | None, expected: type, report: bool) -> None:
    decision = what(target("u", "r1", role=UNDO), [], restores)
    assert isinstance(decision, expected)
    assert not isinstance(decision, Keep) or decision.report is report


def test_a_lower_age_limit_ends_undos_that_are_done_and_none_that_is_open() -> None:
    limits = ReapLimits(undo_max_age=99.0)
    u = target("u", "r1", role=UNDO)
    assert isinstance(what(u, [], [restore("done")], limits=limits), Delete)
    assert isinstance(what(u, [], [restore("done", opened=NOW - 99)], limits=limits), Keep)
    assert isinstance(what(u, [], [restore("open")], limits=limits), Keep)


def test_a_clock_far_in_the_future_ends_no_restore_that_is_open() -> None:
    assert isinstance(what(target("u", "r1", role=UNDO), [], [restore("open")], now=1e12), Keep)


def test_a_view_ends_with_its_owner() -> None:
    assert isinstance(what(target("v", role=VIEW), None, own=None), Delete)


def test_one_decision_for_each_target_in_order() -> None:
    targets = [target("t2", "p2"), target("t"), target("v", role=VIEW)]
    decisions = decide(targets, {REPO: [NAMED, NEWER]}, {REPO: []}, alive, NOW, REPO)
    assert [(type(one), one.target.id) for one in decisions] == [(Keep, "t2"), (Delete, "t"), (Delete, "v")]


def test_newest_checkpoints_follow_the_sequence_and_not_the_clock() -> None:
    late = point(1, disk(checkpoint="t"), time=9e9)
    assert newest_checkpoints([NEWER, late]) == {("web", "a"): ("reflink", "t2")}
