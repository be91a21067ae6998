"""Retention as pictures of a calendar, and the properties that protect data."""

from __future__ import annotations

from datetime import UTC, datetime
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import disk, point

from graincopy.core.ids import PointId, WorkloadId
from graincopy.model.restore_point import RestorePoint
from graincopy.model.retention import LAST_GOOD, RetentionPolicy, Verdict, decide

DAY = 86400.0
NOW = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()


def at(*moments: str, incomplete: str = "") -> list[RestorePoint]:
    """Points at these UTC moments ("11-30 09:00", of 2026), oldest first; ``incomplete`` names those that are."""
    return [
        point(
            number,
            disk(),
            time=datetime.fromisoformat(moment if moment[:2] == "20" else f"2026-{moment}")
            .replace(tzinfo=UTC)
            .timestamp(),
            incomplete=moment in incomplete.split(", "),
        )
        for number, moment in enumerate(moments)
    ]


def kept(points: list[RestorePoint], **rules: float) -> list[int]:
    """Sequence numbers of what stays, oldest first."""
    verdicts = decide(points, RetentionPolicy(**rules), NOW, {})  # type: ignore[arg-type]
    return sorted(verdict.point.sequence for verdict in verdicts if verdict.keep)


def test_last() -> None:
    assert kept(at("11-01 00:00", "11-02 00:00", "11-03 00:00"), keep_last=2) == [1, 2]


def test_the_newest_of_each_day_and_only_days_that_have_one_count() -> None:
    points = at("11-20 08:00", "11-27 08:00", "11-29 01:00", "11-29 23:59", "11-30 00:00", "11-30 09:00")
    assert kept(points, keep_daily=3) == [1, 3, 5]


def test_hours_days_weeks_months_and_years_have_their_borders_in_utc() -> None:
    points = at("2025-12-31 23:59", "01-01 00:00", "11-29 23:30", "11-30 00:10", "11-30 00:50")
    assert kept(points, keep_hourly=2) == [2, 4]
    assert kept(points, keep_daily=2) == [2, 4]
    assert kept(points, keep_weekly=2) == [2, 4]  # Sunday the 29th, Monday the 30th
    assert kept(points, keep_monthly=2) == [1, 4]
    assert kept(points, keep_yearly=2) == [0, 4]


def test_the_week_that_crosses_new_year_is_one_week() -> None:
    assert kept(at("2025-12-29 10:00", "01-04 10:00", "01-05 10:00"), keep_weekly=9) == [1, 2]


def test_within_is_a_span_before_now() -> None:
    assert kept(at("11-28 11:59", "11-28 12:00", "11-30 11:00"), keep_within=2 * DAY) == [1, 2]


def test_rules_add_up_and_each_says_why() -> None:
    verdicts = decide(at("11-01 00:00", "11-30 00:00"), RetentionPolicy(keep_last=1, keep_monthly=1), NOW, {})
    newest, oldest = verdicts
    assert newest.reasons == ("last good point", "one of the last 1", "monthly 2026-11")
    assert (oldest.keep, oldest.reasons) == (False, ("no rule keeps it",))


def test_an_empty_policy_keeps_everything() -> None:
    assert kept(at("2001-01-01 00:00", "11-30 00:00", incomplete="11-30 00:00")) == [0, 1]


def test_the_last_good_point_stays_though_no_rule_covers_it() -> None:
    points = at("2001-01-01 00:00")
    assert kept(points, keep_within=1.0) == [0]
    assert decide(points, RetentionPolicy(keep_within=1.0), NOW, {})[0].reasons == (LAST_GOOD,)


def test_an_incomplete_point_takes_no_place_and_goes_when_a_complete_one_follows() -> None:
    points = at("11-28 00:00", "11-29 00:00", "11-30 00:00", incomplete="11-29 00:00")
    assert kept(points, keep_last=2) == [0, 2]
    assert kept(points, keep_daily=2) == [0, 2]
    assert decide(points, RetentionPolicy(keep_last=2), NOW, {})[1].reasons == ("incomplete",)


def test_an_incomplete_point_stays_while_nothing_better_came_after_it() -> None:
    points = at("11-28 00:00", "11-29 00:00", "11-30 00:00", incomplete="11-29 00:00, 11-30 00:00")
    assert kept(points, keep_last=1) == [0, 1, 2]
    assert kept(points[1:], keep_last=1) == [1, 2]


def test_what_is_in_use_stays_and_says_by_whom() -> None:
    verdicts = decide(
        at("11-01 00:00", "11-30 00:00"), RetentionPolicy(keep_last=1), NOW, {PointId("p0"): "restore r1"}
    )
    assert (verdicts[1].keep, verdicts[1].reasons) == (True, ("in use by restore r1",))


def test_each_workload_has_its_own_count() -> None:
    points = [point(n, disk(), workload=WorkloadId(name)) for n, name in enumerate(["web", "db", "web", "db"])]
    verdicts = decide(points, RetentionPolicy(keep_last=1), NOW, {})
    assert [(v.point.workload, v.point.sequence, v.keep) for v in verdicts] == [
        ("web", 2, True),
        ("web", 0, False),
        ("db", 3, True),
        ("db", 1, False),
    ]


def test_the_sequence_orders_points_when_clocks_disagree_by_hours() -> None:
    points = [point(1, disk(), time=NOW), point(2, disk(), time=NOW - 5 * 3600)]
    assert kept(points, keep_last=1) == [2]
    assert kept(points, keep_daily=1) == [2]


def test_clocks_gone_wild_do_not_stop_it() -> None:
    points = [point(1, disk(), time=-1e18), point(2, disk(), time=1e18)]
    assert kept(points, keep_yearly=2) == [1, 2]


@pytest.mark.parametrize("rule", ["keep_last", "keep_yearly", "keep_within"])
def test_a_negative_rule_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match=f"{rule} must not be negative"):
        RetentionPolicy(**{rule: -1})


# --- properties -------------------------------------------------------------------------------------

counts = st.integers(0, 4)
policies = st.builds(
    RetentionPolicy,
    keep_last=counts,
    keep_hourly=counts,
    keep_daily=counts,
    keep_weekly=counts,
    keep_monthly=counts,
    keep_yearly=counts,
    keep_within=st.sampled_from([0.0, 3600.0, 40 * DAY]),
)


@st.composite
def histories(draw: st.DrawFn) -> list[RestorePoint]:
    """Points of two workloads, some incomplete, at times that need not follow their sequence."""
    rows = draw(st.lists(st.tuples(st.sampled_from("wd"), st.floats(0, 400), st.booleans()), max_size=14))
    return [
        point(n, disk(), workload=WorkloadId(name), time=NOW - days * DAY, incomplete=broken)
        for n, (name, days, broken) in enumerate(rows)
    ]


def staying(verdicts: tuple[Verdict, ...]) -> set[PointId]:
    return {verdict.point.id for verdict in verdicts if verdict.keep}


@given(histories(), policies)
def test_every_point_gets_one_verdict_and_every_verdict_a_reason(
    points: list[RestorePoint], policy: RetentionPolicy
) -> None:
    verdicts = decide(points, policy, NOW, {})
    assert sorted(v.point.id for v in verdicts) == sorted(p.id for p in points)
    assert all(verdict.reasons for verdict in verdicts)


@given(histories(), policies)
def test_the_last_good_point_of_no_workload_is_ever_removed(
    points: list[RestorePoint], policy: RetentionPolicy
) -> None:
    stays = staying(decide(points, policy, NOW, {}))
    for workload in {p.workload for p in points}:
        good = [p for p in points if p.workload == workload and not p.incomplete]
        assert not good or max(good, key=lambda p: p.sequence).id in stays


@given(histories(), policies)
def test_expiring_twice_removes_no_more(points: list[RestorePoint], policy: RetentionPolicy) -> None:
    stays = staying(decide(points, policy, NOW, {}))
    left = [p for p in points if p.id in stays]
    assert staying(decide(left, policy, NOW, {})) == stays


@given(histories(), policies, st.sampled_from(RetentionPolicy.__struct_fields__), st.integers(1, 3))
def test_a_more_generous_policy_removes_no_more(
    points: list[RestorePoint], policy: RetentionPolicy, rule: str, more: int
) -> None:
    rules = {name: getattr(policy, name) for name in RetentionPolicy.__struct_fields__}
    generous = RetentionPolicy(**{**rules, rule: rules[rule] + more})
    if not policy.empty:  # an empty policy is no policy, and removes nothing
        assert staying(decide(points, policy, NOW, {})) <= staying(decide(points, generous, NOW, {}))


@given(histories(), policies, st.randoms())
def test_the_order_of_the_input_changes_no_verdict(
    points: list[RestorePoint], policy: RetentionPolicy, dice: Random
) -> None:
    mixed = list(points)
    dice.shuffle(mixed)
    assert staying(decide(mixed, policy, NOW, {})) == staying(decide(points, policy, NOW, {}))


@given(histories(), policies)
def test_incomplete_points_change_nothing_for_complete_ones(
    points: list[RestorePoint], policy: RetentionPolicy
) -> None:
    good = [p for p in points if not p.incomplete]
    alone = staying(decide(good, policy, NOW, {}))
    assert staying(decide(points, policy, NOW, {})) & {p.id for p in good} == alone
