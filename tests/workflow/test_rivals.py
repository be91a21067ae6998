"""Of runs that begin on one workload at one moment exactly one goes on, whatever their clocks say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

import pytest
from hands import Hands
from msgspec.structs import replace

from graincopy.core.bitmap import GrainBitmap
from graincopy.core.clock import Clock
from graincopy.core.errors import RestoreOpen, WorkloadBusy
from graincopy.core.extent import Extents
from graincopy.core.ids import PointId, WorkloadId
from graincopy.model.restore_point import RestoreDisk, RestoreRecord, RunRecord
from graincopy.model.workload import Workload
from graincopy.repository.repository import Repository
from graincopy.workflow.backup import BackupWish, backup
from graincopy.workflow.context import Context
from graincopy.workflow.restore import restore_in_place
from graincopy.workflow.survey import refuse_busy
from graincopy.workloads.memory import MemorySource

KIND = WorkloadId("the same")


@dataclass
class Skewed:
    """A host's clock: ``skew`` beside everybody else's. Whoever sleeps lets the others act."""

    clock: Clock
    skew: float = 0.0
    others: list[Callable[[], object]] = field(default_factory=list)

    def now(self) -> float:
        return self.clock.now() + self.skew

    def monotonic(self) -> float:
        return self.clock.monotonic()

    def sleep(self, seconds: float) -> None:
        self.clock.sleep(seconds)
        if self.others:
            self.others.pop(0)()


@dataclass
class Rival:
    """One host with a run."""

    context: Context
    clock: Skewed
    run: RunRecord

    def goes_on(self) -> bool:
        """Whether it may work; one that may not has ended its run."""
        try:
            refuse_busy(self.context, self.run)
        except WorkloadBusy:
            self.context.repository.close_run(self.run)
            return False
        return True


@pytest.fixture
def hands() -> Hands:
    made = Hands()
    made.new_repository()
    return made


def rival(hands: Hands, skew: float = 0.0, kind: str = "backup") -> Rival:
    context = hands.context()
    clock = Skewed(hands.clock, skew)
    repository = Repository.open(
        context.repository.medium, passphrase=None, clock=clock, chance=context.chance, owner=context.owner
    )
    context = replace(context, repository=repository, clock=clock)
    return Rival(context, clock, repository.open_run(kind, KIND))


SKEWS = [0.0, 7200.0, -7200.0]


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("skews", list(permutations(SKEWS)))
def test_of_three_that_are_all_open_one_goes_on(hands: Hands, order: tuple[int, ...], skews: tuple[float, ...]) -> None:
    """They look in any order; who waits lets the next one look meanwhile."""
    rivals = [rival(hands, skew) for skew in skews]
    went_on: list[bool] = []
    left = [rivals[at] for at in order]

    def next_one() -> None:
        if left:
            one = left.pop(0)
            one.clock.others = [next_one, next_one]
            went_on.append(one.goes_on())

    while left:
        next_one()
    assert sorted(went_on) == [False, False, True]


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("kind", ["backup", "restore", "undo"])
def test_whoever_is_at_work_already_is_not_disturbed(hands: Hands, skew: float, kind: str) -> None:
    """A later run yields, also when its clock says that it came first; at once when the clocks agree."""
    first = rival(hands, kind=kind)
    assert first.goes_on()
    second, began = rival(hands, skew), hands.clock.monotonic()
    assert not second.goes_on()
    assert (hands.clock.monotonic() == began) == (skew >= 0)
    assert [run.id for run in first.context.repository.open_runs()] == [first.run.id]


def test_one_that_stands_still_before_it_looks_keeps_nobody_waiting_for_ever(hands: Hands) -> None:
    """Nobody can tell it from one at work. It goes on when it wakes and nobody else is there."""
    stopped = rival(hands, skew=100.0)
    second = rival(hands)
    assert not second.goes_on()
    assert stopped.goes_on()


def test_what_ended_while_we_waited_has_made_our_survey_old(hands: Hands) -> None:
    claim = hands.lab.make(4096)
    workload = hands.workload("w", [claim])
    late = rival(hands, skew=7200.0)

    def publish() -> None:
        hands.clock.time += 1
        point = hands.backup(workload).point
        late.context.repository.publish(replace(point, id=late.run.id))

    early = rival(hands)
    early.clock.others = [publish]
    assert not early.goes_on()


def test_other_workloads_and_the_dead_are_no_rivals(hands: Hands) -> None:
    first, second = rival(hands), rival(hands, skew=5.0)
    refuse_busy(replace(first.context, alive=lambda owner: False), second.run)
    other = second.context.repository.open_run("backup", WorkloadId("another"))
    refuse_busy(second.context, other)


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_a_restore_that_began_and_died_while_we_opened_is_seen(hands: Hands, command: str) -> None:
    """It was not there when we looked first; it would be taken for the state of the disk, or be overwritten."""
    workload = hands.workload("w", [hands.lab.make(4096)])
    point = hands.backup(workload).point
    context = hands.context()

    def die(step: str) -> None:
        if step == "opened":
            run = context.repository.open_run("restore", workload.id)
            context.repository.put_restore(half_done(run, point.id, workload))
            context.repository.close_run(run)

    context = replace(context, step=die)
    with pytest.raises((RestoreOpen, WorkloadBusy)):
        if command == "backup":
            backup(context, MemorySource([workload]), workload, BackupWish())
        else:
            restore_in_place(context, point, point.disks, compare=False)
    assert context.repository.open_runs() == ()
    assert len(context.repository.points()) == 1


def half_done(run: RunRecord, point: PointId, workload: Workload) -> RestoreRecord:
    disk = RestoreDisk(
        disk=workload.files[0].disk,
        name=workload.files[0].name,
        path=workload.files[0].path,
        size=4096,
        size_before=4096,
        grains=GrainBitmap.from_extents(Extents.of((0, 1))).to_bytes(),
        metadata_before=None,
        undo_target=None,
        undo_driver=None,
        undo_root=None,
    )
    return RestoreRecord(
        id=run.id, point=point, workload=workload.id, owner=run.owner, opened=0.0, expires=1e12, disks=(disk,)
    )
