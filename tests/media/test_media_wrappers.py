"""Wrappers of media, and the fault plans that drive one of them."""

from __future__ import annotations

import pytest

from graincopy.core.errors import MediumFailed, MediumFull, ObjectMissing
from graincopy.media.base import Medium
from graincopy.media.memory import MemoryMedium
from graincopy.media.wrappers import Faulty, Logged, Retried, Throttled, Wrapped
from graincopy.model.snapshot import Created, Deleted, Existing
from graincopy.testing.faults import Fault, FaultPlan, RandomFaults, SteppedClock
from graincopy.testing.laws_medium import MediumLab
from graincopy.testing.medium_labs import MemoryMediumLab
from graincopy.testing.medium_suite import MediumSuite


def failed() -> MediumFailed:
    return MediumFailed(url="memory:", reason="a test says so")


class TestWrapped(MediumSuite):
    """All wrappers together change nothing."""

    @pytest.fixture
    def place(self) -> MediumLab:
        class Lab(MemoryMediumLab):
            def medium(self) -> Medium:
                clock = SteppedClock()
                inner = Faulty(Wrapped(MemoryMedium(self.store)), FaultPlan())
                return Logged(Retried(Throttled(inner, clock, 1e9), clock), lambda event, **facts: None, clock)

        return Lab()


def test_logged_says_what_happened_and_how_long_it_took() -> None:
    clock = SteppedClock()
    events: list[tuple[str, dict[str, object]]] = []
    medium = Logged(Throttled(MemoryMedium(), clock, 10), lambda event, **facts: events.append((event, facts)), clock)
    medium.put("a", [b"12345"])
    with pytest.raises(ObjectMissing):
        medium.get("b")
    assert events == [
        ("medium.put", {"name": "a", "outcome": "Created", "seconds": 0.5}),
        ("medium.get", {"name": "b", "outcome": "ObjectMissing", "seconds": 0.0}),
    ]


def test_retried_waits_longer_each_time_and_then_gives_up() -> None:
    clock = SteppedClock()
    plan = FaultPlan([Fault("put", failed)])
    with pytest.raises(MediumFailed):
        Retried(Faulty(MemoryMedium(), plan), clock, attempts=4, first_wait=1).put("a", [b""])
    assert clock.slept == [1, 2, 4]
    assert len(plan.struck) == 4


def test_retried_succeeds_after_a_failure_and_reads_a_lost_answer_as_existing() -> None:
    clock = SteppedClock()
    once = Retried(Faulty(MemoryMedium(), FaultPlan([Fault("put", failed, nth=1)])), clock)
    assert isinstance(once.put("a", [b"x"]), Created)
    lost = Retried(Faulty(MemoryMedium(), FaultPlan([Fault("put.done", failed, nth=1)])), clock)
    assert isinstance(lost.put("a", [b"x"]), Existing)
    listing = Retried(Faulty(lost, FaultPlan([Fault("list", failed, nth=1)])), clock)
    assert [entry.name for entry in listing.list("")] == ["a"]


def test_retried_does_not_repeat_what_will_not_get_better() -> None:
    clock = SteppedClock()
    full = FaultPlan([Fault("put", lambda: MediumFull(url="memory:"))])
    medium = Retried(Faulty(MemoryMedium(), full), clock)
    with pytest.raises(MediumFull):
        medium.put("a", [b""])
    with pytest.raises(ObjectMissing):
        medium.get("a")
    assert clock.slept == []
    assert len(full.struck) == 1


def test_throttled_keeps_the_rate_over_all_calls() -> None:
    clock = SteppedClock()
    medium = Throttled(MemoryMedium(), clock, rate=1000)
    for number in range(10):
        medium.put(f"a{number}", [b"x" * 300, b"y" * 200])
        medium.get(f"a{number}", 0, 100)
    assert clock.monotonic() == pytest.approx(10 * 600 / 1000)


def test_faults_strike_where_they_are_told() -> None:
    plan = FaultPlan([Fault("delete", failed, subject="b*", nth=2)])
    medium = Faulty(MemoryMedium(), plan)
    for name in ("a", "b1", "b2", "b3"):
        medium.put(name, [b""])
    assert isinstance(medium.delete("a"), Deleted)
    medium.delete("b1")
    with pytest.raises(MediumFailed):
        medium.delete("b2")
    assert medium.inner.size("b2") == 0
    medium.delete("b3")
    assert plan.struck == [("delete", "b2")]
    assert ("put.done", "a") in plan.seen


def test_random_faults_replay() -> None:
    def struck(seed: int) -> list[tuple[str, str]]:
        plan = RandomFaults(seed, 0.3, failed, "put*")
        medium = Faulty(MemoryMedium(), plan)
        for number in range(50):
            try:
                medium.put(f"a{number}", [b""])
            except MediumFailed:
                continue
        return plan.struck

    assert struck(1) == struck(1)
    assert struck(1) != struck(2)
    assert 5 < len(struck(1)) < 50
