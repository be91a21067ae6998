"""Random histories against plain bytes: whatever was written, backed up, restored, undone or expired in between, every
restore point restores exactly, at any time, in two repositories that share the storage.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hands import DRIVERS, CutOff, Hands, MemoryFolder
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from graincopy.core.errors import PathMissing, RestoreOpen, RestoreUnknown, UndoConflict
from graincopy.model.retention import RetentionPolicy
from graincopy.model.volume import Claim
from graincopy.repository.check import check
from graincopy.repository.collect import collect
from graincopy.volumes.memory_storage import GRAIN
from graincopy.workflow.expire import expire
from graincopy.workflow.expire import plan as plan_expire
from graincopy.workflow.export import restore_to

LARGEST = 24 * GRAIN
REPOSITORIES = st.integers(0, 1)
MOSTLY = st.sampled_from([0, 0, 0, 1])
DISKS = st.integers(0, 2)
PLACES = st.integers(0, LARGEST)
LENGTHS = st.integers(1, 5 * GRAIN)
GRAINS = st.integers(0, 10)
CHANGES = st.one_of(
    st.tuples(st.just("write"), st.tuples(DISKS, PLACES, LENGTHS, st.integers(0, 3))),
    st.tuples(st.just("write"), st.tuples(DISKS, PLACES, LENGTHS, st.integers(0, 3))),
    st.tuples(st.just("resize"), st.tuples(DISKS, PLACES)),
    st.tuples(
        st.just("zero"), st.tuples(DISKS, PLACES, LENGTHS, st.sampled_from(["punch", "zero_range", "preallocate"]))
    ),
    st.tuples(st.just("shift"), st.tuples(DISKS, GRAINS, st.integers(1, 6), st.sampled_from(["collapse", "insert"]))),
    st.tuples(st.just("reflink"), st.tuples(st.integers(0, 1), st.integers(0, 1), GRAINS, GRAINS)),
    st.tuples(st.just("replace"), st.tuples(DISKS, PLACES)),
    st.tuples(st.just("remove"), st.tuples(DISKS)),
)


@dataclass
class Known:
    """What the oracle knows of one restore point."""

    id: str
    repository: int
    contents: dict[str, bytes]  # path → bytes


@dataclass
class Restored:
    """What the oracle knows of one restore that was begun."""

    id: str
    point: str
    repository: int
    before: dict[str, bytes | None]
    touched: set[str] = field(default_factory=set)  # paths written since


class Histories(RuleBasedStateMachine):
    """Three disks on two volumes, two repositories, one workload of all disks and one of the first alone."""

    driver = "reference"

    @initialize(sizes=st.tuples(*[st.integers(0, LARGEST)] * 3))
    def start(self, sizes: tuple[int, int, int]) -> None:
        self.hands = Hands(DRIVERS[self.driver])
        self.claims = [self.hands.lab.make(size, volume) for size, volume in zip(sizes, (0, 0, 1), strict=True)]
        self.workloads = [self.hands.workload("all", self.claims), self.hands.workload("first", self.claims[:1])]
        self.points: list[Known] = []
        self.restored: list[Restored] = []
        self.open: dict[int, Known] = {}  # by repository: the point whose restore was cut off
        for number, claim in enumerate(self.claims):
            self.hands.lab.write(claim, 0, random.Random(number).randbytes(self.size(claim)))
        for _ in range(2):
            self.hands.new_repository()

    # --- what happens to the disks ----------------------------------------------------------------

    def live(self, claim: Claim) -> bytes | None:
        volume = self.hands.storage.volumes[claim.volume.removeprefix("memory:")]
        return self.hands.lab.read(claim) if claim.inner_path in volume.files else None

    def size(self, claim: Claim) -> int:
        content = self.live(claim)
        return -1 if content is None else len(content)

    def touch(self, claim: Claim) -> None:
        for one in self.restored:
            one.touched.add(claim.path)

    @rule(changes=st.lists(CHANGES, min_size=1, max_size=4))
    def change(self, changes: list[tuple[str, tuple[object, ...]]]) -> None:
        """One rule for all that can happen to disks, so that half of the steps are graincopy's."""
        for verb, arguments in changes:
            getattr(self, verb)(*arguments)

    def write(self, disk: int, at: int, length: int, seed: int) -> None:
        """Few seeds, so that content repeats; a missing file is made anew."""
        self.touch(self.claims[disk])
        content = bytes(length) if seed == 0 else random.Random(seed).randbytes(length)
        self.hands.lab.write(self.claims[disk], at, content)

    def resize(self, disk: int, size: int) -> None:
        self.touch(self.claims[disk])
        self.hands.lab.truncate(self.claims[disk], size)

    def zero(self, disk: int, at: int, length: int, how: str) -> None:
        if at < self.size(self.claims[disk]):
            self.touch(self.claims[disk])
            getattr(self.hands.lab, how)(self.claims[disk], at, length)

    def shift(self, disk: int, at: int, length: int, how: str) -> None:
        size = self.size(self.claims[disk])
        if (at + length) * GRAIN < size <= LARGEST:
            self.touch(self.claims[disk])
            getattr(self.hands.lab, how)(self.claims[disk], at * GRAIN, length * GRAIN)

    def reflink(self, disk: int, donor: int, start: int, onto: int) -> None:
        room = min(self.size(self.claims[disk]), self.size(self.claims[donor])) // GRAIN - max(start, onto)
        if room > 0:
            self.touch(self.claims[disk])
            lengths = (start * GRAIN, onto * GRAIN, room * GRAIN)
            self.hands.lab.reflink_from(self.claims[disk], self.claims[donor], *lengths)

    def remove(self, disk: int) -> None:
        if self.size(self.claims[disk]) >= 0:
            self.touch(self.claims[disk])
            self.hands.lab.remove(self.claims[disk])

    def replace(self, disk: int, size: int) -> None:
        if self.size(self.claims[disk]) >= 0:
            self.touch(self.claims[disk])
            self.hands.lab.rename_over(self.claims[disk], random.Random(4).randbytes(size))

    @rule(which=st.integers(0, 9), really=st.sampled_from([False, False, True]))
    def lose_a_checkpoint(self, which: int, really: bool) -> None:
        copies = sorted(id for id, copy in self.hands.storage.copies.items() if copy.target.tag.role == "checkpoint")
        if copies and really:
            driver = self.hands.lab.driver()
            driver.delete(self.hands.storage.copies[copies[which % len(copies)]].target)

    # --- what graincopy does ----------------------------------------------------------------------

    def busy(self, repository: int, workload: int) -> bool:
        """Whether an unfinished restore stands against it."""
        paths = {file.path for file in self.workloads[workload].files}
        return repository in self.open and bool(paths & set(self.open[repository].contents))

    @rule(changes=st.lists(CHANGES, min_size=1, max_size=4))
    def change_and_back_up(self, changes: list[tuple[str, tuple[object, ...]]]) -> None:
        """The nightly one: chains of incremental backups are what finds mistakes."""
        self.change(changes)
        self.backup(0, 0, True)

    @rule(repository=MOSTLY, workload=MOSTLY, keep=MOSTLY.map(lambda number: not number))
    def backup(self, repository: int, workload: int, keep: bool) -> None:
        wanted = self.workloads[workload]
        held = {claim.path: self.live(claim) for claim in self.claims[: len(wanted.files)]}
        before = self.hands.stores[repository].used
        if self.busy(repository, workload):
            with pytest.raises(RestoreOpen):
                self.hands.backup(wanted, repository)
            return
        if None in held.values() and keep:  # as a user would: the missing one comes back first
            for path, content in held.items():
                if content is None:
                    self.write(self.claims.index(self.at(path)), 0, LARGEST // 2, 2)
            return
        if None in held.values():
            with pytest.raises(PathMissing):
                self.hands.backup(wanted, repository)
            return
        done = self.hands.backup(wanted, repository, keep_checkpoint=keep)
        assert done.warnings == ()
        stored = sum(disk.stored_bytes for disk in done.point.disks)
        assert self.hands.stores[repository].used - before == stored + done.metadata_bytes
        contents = {path: content for path, content in held.items() if content is not None}
        self.points.append(Known(done.point.id, repository, contents))

    @precondition(lambda self: self.points)
    @rule(which=st.integers(0, 9), compare=st.booleans(), cut=st.sampled_from([None, None, "recorded", "written"]))
    def restore(self, which: int, compare: bool, cut: str | None) -> None:
        known = self.points[which % len(self.points)]
        repository = known.repository
        point = self.hands.context(repository).repository.point(known.id)  # type: ignore[arg-type]
        before = {claim.path: self.live(claim) for claim in self.claims if claim.path in known.contents}
        opened = self.open.get(repository)
        if opened is not None and opened is not known and set(opened.contents) & set(known.contents):
            with pytest.raises(RestoreOpen):
                self.hands.restore(point, repository)
            return
        self.hands.cut = cut
        try:
            done = self.hands.restore(point, repository, compare)
        except CutOff:
            self.open[repository] = known
            if opened is None:
                states = self.hands.context(repository).repository.restores()
                newest = next(one for one in states if one.state == "open")
                self.note(Restored(newest.record.id, known.id, repository, before), known)
            return
        finally:
            self.hands.cut = None
        if opened is known:
            del self.open[repository]
        else:
            self.note(Restored(done.restore, known.id, repository, before), known)
        assert {path: self.live(self.at(path)) for path in known.contents} == known.contents

    def note(self, restored: Restored, known: Known) -> None:
        for one in self.restored:
            one.touched |= set(known.contents)
        self.restored.append(restored)

    def at(self, path: str) -> Claim:
        return next(claim for claim in self.claims if claim.path == path)

    @precondition(lambda self: self.restored)
    @rule(cut=st.sampled_from([None, None, "checked", "undone"]))
    def undo(self, cut: str | None) -> None:
        """The newest restore: exactly as before where nobody touched the disk since; elsewhere refused, then forced."""
        restored = self.restored[-1]
        if restored.point not in {one.id for one in self.points}:
            with pytest.raises(RestoreUnknown):
                self.hands.undo(restored.id, restored.repository)
            self.restored.pop()
            return
        clean = not restored.touched & set(restored.before)
        if cut is not None and clean:
            self.hands.cut = cut
            with pytest.raises(CutOff):
                self.hands.undo(restored.id, restored.repository)
        try:
            self.hands.undo(restored.id, restored.repository)
        except UndoConflict:
            assert not clean
            self.hands.undo(restored.id, restored.repository, force=True)
        self.restored.pop()
        self.open.pop(restored.repository, None)
        for path, content in restored.before.items():
            self.touch(self.at(path))
            if path not in restored.touched:
                assert self.live(self.at(path)) == content
            elif content is not None:
                assert self.size(self.at(path)) == len(content)

    @rule(repository=REPOSITORIES, keep=st.integers(1, 3))
    def expire(self, repository: int, keep: int) -> None:
        self.hands.clock.time += 30 * 86400  # undo records do not pin for ever
        context = self.hands.context(repository)
        removed = expire(context, plan_expire(context, RetentionPolicy(keep_last=keep)))
        self.points = [one for one in self.points if one.id not in removed]
        left = {point.id for point in context.repository.points()}
        assert left == {one.id for one in self.points if one.repository == repository}

    @rule(repository=REPOSITORIES)
    def collect(self, repository: int) -> None:
        context = self.hands.context(repository)
        collect(context.repository, alive=context.alive, clock=context.clock, patience=0, step=context.step)

    # --- what is always true ----------------------------------------------------------------------

    @precondition(lambda self: self.points)
    @rule(which=st.integers(0, 9))
    def export(self, which: int) -> None:
        known = self.points[which % len(self.points)]
        context = self.hands.context(known.repository)
        point = context.repository.point(known.id)  # type: ignore[arg-type]
        folder = MemoryFolder()
        restore_to(context, point, point.disks, folder)
        assert {f"/{name}": content for name, content in folder.files.items()} == {
            f"/{path.rpartition('/')[2]}": content for path, content in known.contents.items()
        }

    @invariant()
    def the_newest_and_the_oldest_point_hold_what_was_there(self) -> None:
        for known in {id(one): one for one in (getattr(self, "points", None) or [])[:1] + self.points[-1:]}.values():
            self.holds(known)

    def holds(self, known: Known) -> None:
        point = self.hands.context(known.repository).repository.point(known.id)  # type: ignore[arg-type]
        found = {disk.path: self.hands.content(disk, known.repository) for disk in point.disks}
        assert found == known.contents

    def teardown(self) -> None:
        for known in getattr(self, "points", []):
            self.holds(known)
        for number in range(len(self.hands.stores)) if hasattr(self, "hands") else ():
            context = self.hands.context(number)
            assert check(context.repository, data=True) == ()
            assert context.repository.open_runs() == ()


@pytest.mark.parametrize("driver", sorted(DRIVERS))
def test_every_point_restores_exactly_at_any_time(driver: str) -> None:
    machine = type("Histories", (Histories,), {"driver": driver})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=10,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
