"""Retention: which restore points a policy keeps, and why (``expire``). Per workload, in UTC, as a pure function.

Every rule goes from the newest point to the oldest. A rule "daily 7" keeps the newest point of each of the seven most
recent days that have one; other rules likewise. A point that any rule keeps is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from graincopy.core.ids import PointId, WorkloadId
from graincopy.core.units import format_duration
from graincopy.model.restore_point import RestorePoint, order_key

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_SECOND = 253_402_300_799  # of the year 9999: a wild clock must not stop an expire

LAST_GOOD = "last good point"
NO_POLICY = "no retention policy"
NOT_BETTER = "incomplete, with no complete point after it"
NO_RULE = "no rule keeps it"
INCOMPLETE = "incomplete"


class RetentionPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How many points of one workload are kept by each rule; 0 turns a rule off. All off keeps everything."""

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0  # ISO weeks: Monday to Sunday
    keep_monthly: int = 0
    keep_yearly: int = 0
    keep_within: float = 0.0  # seconds before now

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")

    @property
    def empty(self) -> bool:
        """No rule is on."""
        return self == RetentionPolicy()


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one restore point, with every reason for it."""

    point: RestorePoint
    keep: bool
    reasons: tuple[str, ...]


def decide(
    points: Sequence[RestorePoint], policy: RetentionPolicy, now: float, pinned: Mapping[PointId, str]
) -> tuple[Verdict, ...]:
    """A verdict for each of ``points``: workloads in order of first appearance, newest first within each.

    ``now`` is wall-clock seconds since the epoch; ``pinned`` says who uses a point right now. The last good
    (complete) point of a workload is always kept; incomplete ones take no place in any rule.
    """
    groups: dict[WorkloadId, list[RestorePoint]] = {}
    for point in points:
        groups.setdefault(point.workload, []).append(point)
    return tuple(verdict for group in groups.values() for verdict in _decide_one(group, policy, now, pinned))


def _decide_one(
    points: list[RestorePoint], policy: RetentionPolicy, now: float, pinned: Mapping[PointId, str]
) -> list[Verdict]:
    newest_first = sorted(points, key=order_key, reverse=True)
    good = [point for point in newest_first if not point.incomplete]
    reasons: dict[PointId, list[str]] = {point.id: [] for point in newest_first}
    _protect(newest_first, good, pinned, reasons)
    if policy.empty:
        _mark(newest_first, NO_POLICY, reasons)
    else:
        _apply(policy, now, newest_first, good, reasons)
    return [_verdict(point, reasons[point.id]) for point in newest_first]


def _verdict(point: RestorePoint, reasons: list[str]) -> Verdict:
    refused = INCOMPLETE if point.incomplete else NO_RULE
    return Verdict(point=point, keep=bool(reasons), reasons=tuple(reasons) or (refused,))


def _mark(points: Sequence[RestorePoint], reason: str, reasons: dict[PointId, list[str]]) -> None:
    for point in points:
        reasons[point.id].append(reason)


def _protect(
    newest_first: Sequence[RestorePoint],
    good: Sequence[RestorePoint],
    pinned: Mapping[PointId, str],
    reasons: dict[PointId, list[str]],
) -> None:
    """What no policy can remove: the last good point, what is newer than it, what is in use."""
    newer = newest_first[: newest_first.index(good[0])] if good else newest_first
    _mark(good[:1], LAST_GOOD, reasons)
    _mark(newer, NOT_BETTER, reasons)
    for point in newest_first:
        if point.id in pinned:
            reasons[point.id].append(f"in use by {pinned[point.id]}")


def _apply(
    policy: RetentionPolicy,
    now: float,
    newest_first: Sequence[RestorePoint],
    good: Sequence[RestorePoint],
    reasons: dict[PointId, list[str]],
) -> None:
    if policy.keep_last:
        _mark(good[: policy.keep_last], f"one of the last {policy.keep_last}", reasons)
    _bucket(good, policy.keep_hourly, "hourly", lambda time: f"{time:%Y-%m-%d %H}:00", reasons)
    _bucket(good, policy.keep_daily, "daily", lambda time: f"{time:%Y-%m-%d}", reasons)
    _bucket(good, policy.keep_weekly, "weekly", _iso_week, reasons)
    _bucket(good, policy.keep_monthly, "monthly", lambda time: f"{time:%Y-%m}", reasons)
    _bucket(good, policy.keep_yearly, "yearly", lambda time: f"{time:%Y}", reasons)
    if policy.keep_within:
        recent = [point for point in newest_first if point.time >= now - policy.keep_within]
        _mark(recent, f"within {format_duration(policy.keep_within)}", reasons)


def _bucket(
    good: Sequence[RestorePoint],
    count: int,
    rule: str,
    label: Callable[[datetime], str],
    reasons: dict[PointId, list[str]],
) -> None:
    """Keep the newest point of each of the ``count`` first buckets met; hosts whose clocks disagree may interleave."""
    taken: set[str] = set()
    for point in good:
        bucket = label(_utc(point.time))
        if bucket not in taken and len(taken) < count:
            taken.add(bucket)
            reasons[point.id].append(f"{rule} {bucket}")


def _utc(time: float) -> datetime:
    return _EPOCH + timedelta(seconds=int(min(max(time, 0.0), _LAST_SECOND)))


def _iso_week(time: datetime) -> str:
    year, week, _ = time.isocalendar()
    return f"{year}-W{week:02d}"
