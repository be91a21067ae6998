"""Wrappers of volume drivers."""

from __future__ import annotations

import errno

import pytest

from graincopy.core.errors import AttachFailed, SnapshotFailed, SourceInUse
from graincopy.core.units import KIB
from graincopy.model.snapshot import Deleted
from graincopy.testing.faults import Fault, FaultPlan, SteppedClock
from graincopy.testing.lab import VolumeLab
from graincopy.testing.memory_lab import MemoryFilesLab, MemoryLab
from graincopy.testing.volume_suite import VolumeSuite
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.memory import MemoryDriver
from graincopy.volumes.memory_storage import MemoryStorage
from graincopy.volumes.wrappers import Faulty, Logged, Retried


def attach_failed() -> AttachFailed:
    return AttachFailed(volume="memory:disk0", reason="a test says so")


class TestWrapped(VolumeSuite):
    """All wrappers together change nothing."""

    @pytest.fixture
    def storage(self) -> VolumeLab:
        def make(storage: MemoryStorage) -> VolumeDriver:
            clock = SteppedClock()
            inner = Retried(Faulty(MemoryDriver(storage), FaultPlan()), clock, on=(AttachFailed,))
            return Logged(inner, lambda event, **facts: None, clock)

        return MemoryFilesLab(make)


def test_the_wrapped_driver_keeps_its_name() -> None:
    inner = MemoryDriver(MemoryStorage())
    assert Faulty(inner, FaultPlan()).name == "memory"


def test_logged_says_what_happened() -> None:
    events: list[tuple[str, object, object]] = []
    lab = MemoryLab(
        lambda storage: Logged(
            MemoryDriver(storage),
            lambda event, **facts: events.append((event, facts["driver"], facts["outcome"])),
            SteppedClock(),
        )
    )
    claim = lab.make(64 * KIB)
    target = lab.snapshot([claim])[claim.volume]
    with lab.driver().open(target, claim):
        pass
    lab.storage.writers.add(claim.path)
    with pytest.raises(SourceInUse), lab.driver().open_for_restore(claim):
        pass
    assert [event for event, _, _ in events] == [
        "volume.resolve",
        "volume.prepare",
        "volume.snapshot",
        "volume.settle",
        "volume.open",
        "volume.open_for_restore",
    ]
    assert {driver for _, driver, _ in events} == {"memory"}
    assert [outcome for _, _, outcome in events[-2:]] == ["MemoryImage", "SourceInUse"]


def test_retried_repeats_what_may_be_repeated() -> None:
    clock = SteppedClock()
    plan = FaultPlan([Fault("open", attach_failed, nth=1), Fault("open", attach_failed, nth=2)])
    lab = MemoryLab(lambda storage: Retried(Faulty(MemoryDriver(storage), plan), clock, (AttachFailed,), first_wait=1))
    claim = lab.make(64 * KIB)
    target = lab.snapshot([claim])[claim.volume]
    with lab.driver().open(target, claim) as image:
        assert image.size == 64 * KIB
    assert clock.slept == [1, 2]


def test_retried_never_takes_a_second_instant() -> None:
    clock = SteppedClock()
    plan = FaultPlan([Fault("snapshot", lambda: SnapshotFailed(volume="x", reason="y"), nth=1)])
    lab = MemoryLab(lambda storage: Retried(Faulty(MemoryDriver(storage), plan), clock, (SnapshotFailed,)))
    claim = lab.make(64 * KIB)
    with pytest.raises(SnapshotFailed):
        lab.snapshot([claim])
    assert clock.slept == []
    assert not lab.footprint()


def test_faulty_reads_fail_where_they_are_told() -> None:
    plan = FaultPlan([Fault("read", lambda: OSError(errno.EIO, "bad sector"), subject="*+8192")])
    lab = MemoryLab(lambda storage: Faulty(MemoryDriver(storage), plan))
    claim = lab.make(64 * KIB)
    target = lab.snapshot([claim])[claim.volume]
    with lab.driver().open(target, claim) as image:
        image.readinto(4096, memoryview(bytearray(4096)))
        with pytest.raises(OSError, match="bad sector"):
            image.readinto(8192, memoryview(bytearray(4096)))


def test_faulty_loses_the_answer_of_what_was_done() -> None:
    plan = FaultPlan([Fault("delete.done", lambda: OSError(errno.EIO, "lost"))])
    storage = MemoryStorage()
    lab = MemoryLab()
    lab.storage = storage
    claim = lab.make(64 * KIB)
    target = lab.snapshot([claim])[claim.volume]
    with pytest.raises(OSError, match="lost"):
        Faulty(MemoryDriver(storage), plan).delete(target)
    assert not lab.footprint()
    assert not isinstance(MemoryDriver(storage).delete(target), Deleted)
