"""The suite can fail: drivers that lie, one way each, and the law that catches them. And the reference driver."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lab as real
import pytest
from msgspec.structs import replace

from graincopy.core.errors import RestoreNoSpace, TargetLost, VolumeUnsupported
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement, State
from graincopy.model.change_map import Changed, ChangeMap
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.testing.faults import SteppedClock
from graincopy.testing.file_lab import FileLab
from graincopy.testing.laws import LawBroken
from graincopy.testing.machines import run_soundness
from graincopy.testing.memory_lab import MemoryFilesLab, MemoryLab
from graincopy.testing.validate import FAILED, OK, SKIPPED, random_walk, validate_volume
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.memory import MemoryDriver, MemoryImage
from graincopy.volumes.memory_storage import GRAIN, Copy, MemoryFile, MemoryStorage
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.reflink import ReflinkDriver


def broken(lab: MemoryLab | FileLab) -> set[str]:
    return {verdict.law for verdict in validate_volume(lab, walks=0) if verdict.outcome == FAILED}


def altered(answer: ChangeMap, alter: Callable[[Extents], Extents]) -> ChangeMap:
    return Changed(alter(answer.extents), answer.source) if isinstance(answer, Changed) else answer


# --- drivers that lie -----------------------------------------------------------------------------


class DropsAnExtent(MemoryDriver):
    def changed(self, base: Target, now: Target) -> ChangeMap:
        return altered(super().changed(base, now), lambda found: Extents(found.bounds[:-2]))


class CallsEverythingChanged(MemoryDriver):
    def changed(self, base: Target, now: Target) -> ChangeMap:
        return altered(super().changed(base, now), lambda found: Extents.whole(now.size))


class AddsToLargeChanges(MemoryDriver):
    def changed(self, base: Target, now: Target) -> ChangeMap:
        last = Extents.of((now.size - GRAIN, now.size))
        return altered(super().changed(base, now), lambda found: found | last if found.total > 100_000 else found)


class ReachesOutside(MemoryDriver):
    def changed(self, base: Target, now: Target) -> ChangeMap:
        return altered(super().changed(base, now), lambda found: found | Extents.of((now.size, now.size + GRAIN)))


class MissesTheGrownTail(MemoryDriver):
    def changed(self, base: Target, now: Target) -> ChangeMap:
        return altered(super().changed(base, now), lambda found: found.clip(0, base.size))


class ForgetsIsolation(MemoryDriver):
    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        taken = super().snapshot(group)
        for volume in self._storage.volumes.values():
            volume.copies.append(_NoCopy())  # so that delete finds one to remove
            volume.copies[:] = [_NoCopy() for _ in volume.copies]
        return taken

    def delete(self, target: Target) -> Deleted | Absent:
        return Absent() if self._storage.copies.pop(target.id, None) is None else Deleted()


class _NoCopy:
    def keep(self, first: int, stop: int) -> None:
        pass


class SnapshotsWhenPreparing(MemoryDriver):
    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        group = super().prepare(volumes, tag)
        super().snapshot(group)
        return group


class OneAfterTheOther(MemoryDriver):
    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        found = []
        for target in group.targets:
            found += super().snapshot(PreparedGroup((target,)))
            time.sleep(0.01)  # lets the law's writer in
        return tuple(found)


class PreparesTwice(MemoryDriver):
    serial = itertools.count()

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        return super().prepare(volumes, replace(tag, run=f"{tag.run}{next(self.serial)}"))


class AlwaysSaysDeleted(MemoryDriver):
    def delete(self, target: Target) -> Deleted:
        super().delete(target)
        return Deleted()


class ForgetsOnRestart(MemoryDriver):
    def __init__(self, storage: MemoryStorage) -> None:
        super().__init__(storage)
        self.mine: set[str] = set()

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        group = super().prepare(volumes, tag)
        self.mine.update(target.id for target in group.targets)
        return group

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        return tuple(target for target in super().list_targets() if target.id in self.mine)


class DeletesTooMuch(MemoryDriver):
    def delete(self, target: Target) -> Deleted | Absent:
        for copy in self._storage.copies.values():
            copy.kept.clear()
        return super().delete(target)


class LeavesTrace(MemoryDriver):
    def delete(self, target: Target) -> Deleted | Absent:
        self._storage.copies[f"{target.id}.left"] = Copy(target)
        return super().delete(target)

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        return tuple(copy.target for place, copy in self._storage.copies.items() if not place.endswith(".left"))


class DeniesItsChangeMap(MemoryDriver):
    def capabilities(self) -> VolumeCapabilities:
        return replace(super().capabilities(), change_map=False)


class UnderstatesItsTargets(MemoryDriver):
    def capabilities(self) -> VolumeCapabilities:
        return replace(super().capabilities(), live_targets=1)


class SameIncarnation(MemoryDriver):
    def describe(self, volume: VolumeId) -> SourceVolume:
        return replace(super().describe(volume), incarnation="always")

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        return tuple(replace(target, incarnation="always") for target in super().snapshot(group))


class KnowsOldNames(MemoryDriver):
    def describe(self, volume: VolumeId) -> SourceVolume:
        known = volume if volume.removeprefix("memory:") in self._storage.volumes else VolumeId(f"{volume}-new")
        return super().describe(known)


class Thick(MemoryDriver):
    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        taken = super().snapshot(group)
        for target in taken:
            copy = self._copy(target)
            copy.keep(0, len(copy.generation))
        return taken


class IgnoresWriters(MemoryDriver):
    def open_for_restore(self, claim: Claim) -> contextlib.AbstractContextManager[FileSink]:
        self._storage.writers.clear()
        return super().open_for_restore(claim)


class NeverZeroes(MemoryDriver):
    @contextlib.contextmanager
    def open_for_restore(self, claim: Claim) -> Iterator[FileSink]:
        with super().open_for_restore(claim) as sink:
            sink.zero = lambda offset, length: None  # type: ignore[method-assign]
            yield sink


class NeverResizes(MemoryDriver):
    @contextlib.contextmanager
    def open_for_restore(self, claim: Claim) -> Iterator[FileSink]:
        with super().open_for_restore(claim) as sink:
            sink.resize = lambda size: None  # type: ignore[method-assign]
            yield sink


LIARS = [
    (DropsAnExtent, "02-soundness-write"),
    (CallsEverythingChanged, "03-precision"),
    (AddsToLargeChanges, "05-composition"),
    (ReachesOutside, "06-normal-form"),
    (MissesTheGrownTail, "12-resize"),
    (ForgetsIsolation, "01-isolation"),
    (SnapshotsWhenPreparing, "01-instant"),
    (OneAfterTheOther, "07-one-instant"),
    (PreparesTwice, "08-idempotence"),
    (AlwaysSaysDeleted, "08-idempotence"),
    (ForgetsOnRestart, "09-restart"),
    (DeletesTooMuch, "10-middle-delete"),
    (LeavesTrace, "14-no-trace"),
    (DeniesItsChangeMap, "11-honesty"),
    (UnderstatesItsTargets, "11-honesty"),
    (SameIncarnation, "12-recreate"),
    (KnowsOldNames, "12-rename"),
    (Thick, "13-thinness"),
    (IgnoresWriters, "15-restore-in-use"),
    (NeverZeroes, "15-restore-write"),
    (NeverResizes, "15-restore-size"),
]


@pytest.mark.parametrize(("liar", "law"), LIARS, ids=lambda value: getattr(value, "__name__", value))
def test_a_lie_is_caught(liar: type[MemoryDriver], law: str) -> None:
    assert law in broken(MemoryLab(liar))


def test_the_truth_is_not_called_a_lie() -> None:
    for lab in (MemoryLab(), MemoryFilesLab()):
        verdicts = list(validate_volume(lab, walks=3))
        assert not [verdict for verdict in verdicts if verdict.outcome == FAILED]
        assert {verdict.outcome for verdict in verdicts} == {OK, SKIPPED}
        assert all(verdict.message for verdict in verdicts if verdict.outcome == SKIPPED)
        assert not lab.storage.copies
        assert not lab.storage.volumes


# --- placements that lie --------------------------------------------------------------------------


class LyingImage(MemoryImage):
    """Gives another placement than it has."""

    lie: Callable[[MemoryFile], Placement]

    def placement(self) -> Placement:
        return type(self).lie(self._file)


def lying_about_placement(lie: Callable[[MemoryFile], Placement]) -> type[MemoryDriver]:
    class Liar(MemoryDriver):
        @contextlib.contextmanager
        def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
            with super().open(target, claim) as image:
                assert isinstance(image, MemoryImage)
                image.__class__ = type("Lying", (LyingImage,), {"lie": staticmethod(lie)})
                yield image

    return Liar


def stateless(file: MemoryFile) -> Placement:
    """As a driver that drops FIEMAP's flags: what is unwritten looks like what is written."""
    blocks = tuple(block and block._replace(state=State.WRITTEN) for block in file.blocks)
    return MemoryFile(file.size, blocks).placement()


def unmoving(file: MemoryFile) -> Placement:
    """As a driver that answers from a cache: nothing is ever anywhere else."""
    return Placement.of(file.size, (0, file.size, 0, State.WRITTEN)) if file.size else Placement.of(0)


@pytest.mark.parametrize(
    ("lie", "laws"),
    [
        (stateless, {"02-soundness-zero-range", "02-soundness-zero-range-torn"}),
        (unmoving, {"02-soundness-insert", "02-soundness-collapse", "02-soundness-reflink-within"}),
    ],
)
def test_a_lie_about_placement_is_caught(lie: Callable[[MemoryFile], Placement], laws: set[str]) -> None:
    assert laws <= broken(MemoryFilesLab(lying_about_placement(lie)))


# --- random walks find what the cases do not ------------------------------------------------------


class DropsSomeSingleGrains(MemoryDriver):
    """Only now and then, and only small ones: no fixed case meets it."""

    def changed(self, base: Target, now: Target) -> ChangeMap:
        def keep(found: Extents) -> Extents:
            kept = [(start, stop) for start, stop in found if stop - start != GRAIN or start // GRAIN % 4 != 3]
            return Extents.from_pairs(kept)

        return altered(super().changed(base, now), keep)


def test_the_machine_finds_a_rare_lie() -> None:
    with pytest.raises(LawBroken, match="called clean, but changed"):
        run_soundness(MemoryFilesLab(DropsSomeSingleGrains), examples=100, steps=20)


def test_a_seeded_walk_finds_a_rare_lie_and_finds_it_again() -> None:
    def found(seed: int) -> str:
        lab = MemoryFilesLab(DropsSomeSingleGrains)
        try:
            random_walk(lab, seed, steps=20)
        except LawBroken as lie:
            return str(lie)
        return ""

    messages = [found(seed) for seed in range(40)]
    assert any(messages)
    assert messages == [found(seed) for seed in range(40)]


# --- a lie on real storage ------------------------------------------------------------------------


class ForgetfulReflink(ReflinkDriver):
    def changed(self, base: Target, now: Target) -> ChangeMap:
        return altered(super().changed(base, now), lambda found: Extents(found.bounds[:-2]))


class SloppyReflink(ReflinkDriver):
    def delete(self, target: Target) -> Deleted | Absent:
        with open(f"{target.id}.left", "wb"):
            return super().delete(target)


@real.root_test
@pytest.mark.parametrize(("liar", "law"), [(ForgetfulReflink, "02-soundness-write"), (SloppyReflink, "14-no-trace")])
def test_a_lie_on_real_storage_is_caught(liar: type[ReflinkDriver], law: str, xfs_dir: str) -> None:
    places = MemoryPlaces()

    def make() -> VolumeDriver:
        return liar(places)

    with contextlib.closing(FileLab([xfs_dir], make, SteppedClock())) as lab:
        lab.patience = 0.0
        assert law in broken(lab)


@real.root_test
def test_a_user_can_try_his_own_storage_and_finds_it_as_it_was(xfs_dir: str) -> None:
    places = MemoryPlaces()
    with contextlib.closing(FileLab([xfs_dir], lambda: ReflinkDriver(places), SteppedClock())) as lab:
        verdicts = list(validate_volume(lab, walks=2))
    assert not [verdict for verdict in verdicts if verdict.outcome == FAILED]
    assert len([verdict for verdict in verdicts if verdict.outcome == OK]) > 35
    assert os.listdir(xfs_dir) == []


def test_storage_that_no_driver_takes_is_said_to_be_so_and_left_clean(tmp_path: Path) -> None:
    class Refuses(MemoryDriver):
        def resolve(self, path: str) -> Refusal:
            return Refusal(path=path, driver=self.name, reason="it is not to its taste")

    with pytest.raises(VolumeUnsupported, match="not to its taste"):
        FileLab([str(tmp_path)], lambda: Refuses(MemoryStorage()), SteppedClock())
    assert list(tmp_path.iterdir()) == []


def test_validation_needs_neither_pytest_nor_hypothesis() -> None:
    program = (
        "import sys, graincopy.testing.validate, graincopy.testing.file_lab, graincopy.testing.medium_labs;"
        "sys.exit(bool({'pytest', 'hypothesis', '_pytest'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


# --- the reference driver itself ------------------------------------------------------------------


def test_files_run_out_of_room() -> None:
    lab = MemoryFilesLab()
    claim = lab.make(0)
    lab.write(claim, 0, bytes(100))
    with lab.driver().open_for_restore(claim) as sink:
        room = sink.free_bytes()
        assert room is not None
        sink.write(0, memoryview(bytes(GRAIN)))
        with pytest.raises(RestoreNoSpace):
            sink.write(0, memoryview(bytes(room + 2 * GRAIN)))


def test_an_empty_target_shows_nothing() -> None:
    lab = MemoryLab()
    claim = lab.make(10_000)
    (target,) = lab.driver().prepare([claim.volume], lab.tag()).targets
    with pytest.raises(TargetLost), lab.driver().open(target, claim):
        pass
