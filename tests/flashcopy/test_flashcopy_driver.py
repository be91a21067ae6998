"""What the driver says to the array, and what becomes of it: states, groups, one T per S, whatever the line does."""

from __future__ import annotations

import pytest
from array_world import ARRAY, GIB, HOST, DirectLine, World

from graincopy.core.errors import (
    ArrayGarbled,
    ArrayUnreachable,
    GraincopyError,
    SnapshotFailed,
    TargetLost,
    TargetNoSpace,
    VolumeBusy,
)
from graincopy.core.ids import VolumeId
from graincopy.model.snapshot import Absent, Deleted, Role
from graincopy.volumes.flashcopy import names
from graincopy.volumes.flashcopy.connection import Lost, Reply

STEPS = ("mkvdisk", "mkfcconsistgrp", "mkfcmap", "prestartfcconsistgrp", "startfcconsistgrp")
UNDOING = ("stopfcconsistgrp", "rmfcmap", "rmfcconsistgrp", "rmvdisk")


# --- the method -------------------------------------------------------------------------------------


def test_a_group_of_three_is_taken_and_leaves_nothing(world: World) -> None:
    targets = world.take(0, 1, 2)
    assert [target.size for target in targets] == [GIB, 2 * GIB, 3 * GIB]
    assert world.states() == {"copying"}
    assert len(world.array.groups) == 1
    assert [call for call in world.plane.calls if call.startswith("clone")] == ["clone [(1, 4), (2, 5), (3, 6)]"]
    world.delete(targets)
    assert world.untouched()


def test_what_is_said_is_what_the_facts_ask_for(world: World) -> None:
    (target,) = world.take(0)
    name = target.id.removeprefix(f"{ARRAY}/")
    run = target.tag.run
    assert run in name
    assert len(name) <= 63
    thin = "-rsize 0% -autoexpand -warning 0 -grainsize 256"
    assert world.said("mkvdisk") == [f"mkvdisk -mdiskgrp Pool0 -iogrp 0 -size {GIB} -unit b {thin} -name {name}"]
    (mapping,) = world.said("mkfcmap")
    assert mapping.startswith(f"mkfcmap -source ds0 -target {name} -copyrate 0 -consistgrp gc_{run}_g")
    world.delete([target])
    assert not [line for line in world.array.log if "-force" in line.split()]
    changed = [line.split()[0] for line in world.array.log if not line.startswith("ls")]
    assert changed == [*STEPS, *UNDOING]


def test_prepare_takes_its_time_and_the_instant_is_one_command(world: World) -> None:
    world.array.faults.preparing_s = 42
    driver = world.driver()
    prepared = driver.prepare(world.volumes[:2], world.tag())
    assert world.states() == {"prepared"}
    world.array.log.clear()
    driver.snapshot(prepared)
    assert [line.split()[0] for line in world.array.log] == ["startfcconsistgrp"]
    assert world.states() == {"copying"}


def test_the_array_is_given_up_when_it_never_gets_prepared(world: World) -> None:
    world.array.faults.preparing_s = 1e9
    with pytest.raises(SnapshotFailed, match="has not prepared it within 300 s"):
        world.take(0)
    assert world.untouched()


def test_a_repeated_run_finds_its_targets_and_keeps_its_instant(world: World) -> None:
    tag = world.tag()
    first = world.driver().create_targets(world.volumes[:2], tag)
    again = world.driver().create_targets(world.volumes[:2], tag)
    assert first == again
    assert len(world.said("startfcconsistgrp")) == 1
    world.delete(first)
    assert world.untouched()


def test_warnings_may_come_with_success(world: World) -> None:
    world.array.faults.warn = True
    world.delete(world.take(0, 1))
    assert world.untouched()


def test_a_renamed_source_is_found_by_its_uid(world: World) -> None:
    world.array.rename("ds0", "a new name")
    (target,) = world.take(0)
    assert "'a new name'" in world.said("mkfcmap")[0]
    world.delete([target])


def test_a_source_in_another_pool_gets_its_target_there(world: World) -> None:
    world.array.vdisks["ds0"].pool = "Pool7"
    (target,) = world.take(0)
    assert "-mdiskgrp Pool7" in world.said("mkvdisk")[0]
    world.delete([target])


# --- one live T per S -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.UNDO, Role.VIEW])
def test_who_comes_second_is_refused_and_told_by_whom(world: World, role: Role) -> None:
    held = world.take(0, role=role)
    holder = {Role.UNDO: f"the undo of restore {1:032x}", Role.VIEW: "a view by pid 1 on here"}[role]
    with pytest.raises(VolumeBusy, match=rf"is held by {holder} \(target {held[0].id.split('/')[1]}\)"):
        world.take(1, 0)
    assert len(world.array.maps) == 1
    world.delete(held)
    world.delete(world.take(1, 0))
    assert world.untouched()


def test_a_view_does_not_wait(world: World) -> None:
    world.wait = 1000.0
    held = world.take(0)
    began = world.clock.time
    with pytest.raises(VolumeBusy, match=f"run {1:032x} by pid 1 on here"):
        world.take(0, role=Role.VIEW)
    assert world.clock.time == began
    world.delete(held)


def test_a_target_of_another_host_counts_too(world: World, tmp_path: object) -> None:
    theirs = world.driver(f"{tmp_path}/theirs").create_targets(world.volumes[:1], world.tag())
    with pytest.raises(VolumeBusy, match=f"target {theirs[0].id.split('/')[1]} of another host on array lab"):
        world.take(0)


def test_it_waits_as_long_as_the_configuration_says(world: World) -> None:
    world.wait = 100.0
    held = world.take(0)
    world.array.faults.before["lsvdisk"] = lambda: None
    began = world.clock.time

    def end_later(seconds: float) -> None:
        world.clock.time += seconds
        if world.clock.time - began > 30 and world.array.maps:
            world.clock.sleep = type(world.clock).sleep.__get__(world.clock)  # type: ignore[method-assign]
            world.delete(held)

    world.clock.sleep = end_later  # type: ignore[method-assign]
    taken = world.take(0)
    assert 30 < world.clock.time - began < 40
    world.delete(taken)


def test_of_two_that_begin_at_once_one_sees_the_other(world: World, tmp_path: object) -> None:
    """The other host makes its mapping after we looked and before ours is there."""
    others: list[object] = []

    def rival() -> None:
        others.extend(world.driver(f"{tmp_path}/theirs").create_targets(world.volumes[:1], world.tag()))

    world.array.faults.before["mkfcconsistgrp"] = rival
    with pytest.raises(VolumeBusy):
        world.take(0)
    assert len(world.array.maps) == len(others) == 1
    assert world.states() == {"copying"}


def test_somebody_elses_copies_of_the_source_do_not_matter(world: World) -> None:
    world.array.make("golden", GIB)
    assert not world.array.execute("mkfcmap -source ds0 -target golden -copyrate 50").status
    before = world.array.footprint()
    world.delete(world.take(0))
    assert world.array.footprint() == before


# --- the line breaks --------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["lose_before", "lose_after"])
@pytest.mark.parametrize("verb", [*STEPS, *UNDOING, "lsvdisk", "lsfcmap", "lsfcconsistgrp"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_broken_line_changes_nothing(world: World, verb: str, when: str, times: int) -> None:
    getattr(world.array.faults, when)[verb] = times
    targets = world.take(0, 1)
    assert world.states() == {"copying"}
    assert len(world.array.maps) == 2
    clones = [call for call in world.plane.calls if call.startswith("clone")]
    assert clones == ["clone [(1, 4), (2, 5)]"]  # one instant, whatever was said twice
    world.delete(targets)
    assert world.untouched()


class CutInState(DirectLine):
    """Breaks at the first command of each kind that is given while the mappings are in ``state``."""

    def __init__(self, world: World, state: str, takes_effect: bool) -> None:
        super().__init__(world.array)
        self._world, self._state, self._takes_effect = world, state, takes_effect
        self.cut: list[str] = []

    def run(self, line: str) -> Reply:
        verb = line.split()[0]
        if self._state in self._world.states() and verb not in self.cut:
            self.cut.append(verb)
            if self._takes_effect:
                super().run(line)
            raise Lost(f"cut in {self._state}")
        return super().run(line)


@pytest.mark.parametrize("takes_effect", [False, True])
@pytest.mark.parametrize(
    ("state", "verbs"),
    [
        ("idle_or_copied", {"lsfcmap", "prestartfcconsistgrp"}),
        ("preparing", {"lsfcmap"}),
        ("prepared", {"startfcconsistgrp"}),
        ("copying", {"lsvdisk", "lsfcmap", "stopfcconsistgrp"}),
        ("stopping", {"lsfcmap"}),
        ("stopped", {"lsfcmap", "rmfcmap"}),
    ],
)
def test_the_line_breaks_in_every_state_of_the_mapping(
    world: World, state: str, verbs: set[str], takes_effect: bool
) -> None:
    """The state is read again: the run goes on with its one instant, and what it made goes away."""
    world.array.faults.preparing_s = world.array.faults.stopping_s = 2.0
    line = world.line = CutInState(world, state, takes_effect)
    targets = world.take(0, 1)
    assert world.states() == {"copying"}
    clones = [call for call in world.plane.calls if call.startswith("clone")]
    assert clones == ["clone [(1, 4), (2, 5)]"]
    for target in targets:
        world.driver().settle([target])
    world.delete(targets)
    assert set(line.cut) >= verbs
    assert world.untouched()


@pytest.mark.parametrize("verb", [*STEPS, "lsvdisk", "lsfcmap", "lsfcconsistgrp"])
def test_a_line_that_stays_broken_is_one_sentence_and_later_nothing_is_left(world: World, verb: str) -> None:
    faults = world.array.faults
    faults.lose_before[verb] = 1000
    with pytest.raises((ArrayUnreachable, SnapshotFailed)):
        world.take(0, 1)
    faults.lose_before.clear()
    world.delete(world.driver().list_targets())
    assert world.untouched()


def test_an_array_that_dies_for_good_leaves_targets_doomed_for_the_next_run(world: World) -> None:
    world.array.faults.before["startfcconsistgrp"] = lambda: setattr(world.line, "dead", True)
    world.array.faults.lose_before["startfcconsistgrp"] = 1
    with pytest.raises(ArrayUnreachable, match="array lab does not answer: dead") as caught:
        world.take(0, 1)
    assert len(caught.value.__notes__) == 2
    world.line.dead = False
    assert all(target.tag.owner.boot == "" for target in world.driver().list_targets())
    world.delete(world.take(2))  # any later run tries again what was put off
    assert world.untouched()


@pytest.mark.parametrize("verb", ["lsvdisk", "lsfcmap", "lsfcconsistgrp"])
@pytest.mark.parametrize(
    "garbage", ["<html>busy</html>\n", "id!status\n1!a\n", "id!name!status\n1!2\n", "\x00\xff\xfe\n", "a!b!c!d\n"]
)
def test_garbage_is_asked_again_and_then_is_one_sentence(world: World, verb: str, garbage: str) -> None:
    world.array.faults.garble[verb] = [garbage] * 2
    world.delete(world.take(0))
    world.array.faults.garble[verb] = [garbage] * 1000
    with pytest.raises(ArrayGarbled, match=f"array lab answered {verb} with something that cannot be understood"):
        world.take(0)
    world.array.faults.garble.clear()
    world.delete(world.driver().list_targets())
    assert world.untouched()


# --- the array says no ------------------------------------------------------------------------------


def refused(world: World) -> str:
    """What taking a target of ds0 and ds1 is refused with; afterwards nothing is left."""
    with pytest.raises(GraincopyError) as caught:
        world.take(0, 1)
    assert world.untouched()
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_no_licence(world: World) -> None:
    world.array.faults.unlicensed = True
    assert "SnapshotFailed" in refused(world)
    assert "CMMVC5886E The FlashCopy feature is not licensed." in refused(world)


def test_256_maps(world: World) -> None:
    world.array.faults.most_maps = 0
    assert "CMMVC6425E" in refused(world)


def test_pool_full(world: World) -> None:
    world.array.faults.pool_full = True
    assert refused(world).startswith(f"{TargetNoSpace.__name__}: no space left for the target of flashcopy:lab/")


@pytest.mark.parametrize("verb", [*STEPS])
def test_any_other_no_is_told_in_the_arrays_words(world: World, verb: str) -> None:
    world.array.faults.refuse[verb] = ["CMMVC9999E A reason that nobody thought of."] * 9
    said = refused(world)
    assert said.startswith("SnapshotFailed: no target could be made of flashcopy:lab/")
    assert said.endswith(f"array lab refused {verb}: CMMVC9999E A reason that nobody thought of.")


def test_a_name_that_exists_with_another_size(world: World) -> None:
    tag = world.tag()
    with pytest.raises(SnapshotFailed):
        world.array.faults.unlicensed = True
        world.driver().prepare(world.volumes[:1], tag)
    world.array.faults.unlicensed = False
    name = world.said("mkvdisk")[0].split()[-1]
    world.array.make(name, 5 * GIB)
    with pytest.raises(SnapshotFailed, match="is there already, with 5368709120 bytes instead of 1073741824"):
        world.driver().prepare(world.volumes[:1], tag)


def test_a_source_resized_between_plan_and_start(world: World) -> None:
    world.array.faults.before["mkfcmap"] = lambda: world.array.resize("ds0", 2 * GIB)
    assert "CMMVC5924E" in refused(world)


def test_a_source_moved_to_another_pool_between_plan_and_start(world: World) -> None:
    """It stays the same vdisk: the run goes on, and the next one makes T where S is now."""
    world.array.faults.before["mkfcmap"] = lambda: setattr(world.array.vdisks["ds0"], "pool", "Pool7")
    world.delete(world.take(0))
    world.delete(world.take(0))
    assert [line.split()[2] for line in world.said("mkvdisk")] == ["Pool0", "Pool7"]
    assert world.untouched()


def test_a_source_that_is_gone(world: World) -> None:
    world.array.drop("ds0")
    world.before = world.array.footprint()
    assert f"array lab has no vdisk with the uid {world.uids[0]}" in refused(world)


def test_an_array_that_is_not_configured(world: World) -> None:
    with pytest.raises(SnapshotFailed, match="no array other is configured"):
        world.driver().describe(VolumeId("flashcopy:other/00"))


def test_a_target_deleted_or_taken_offline_under_us(world: World) -> None:
    world.array.make("ds3", GIB, HOST)
    world.before = world.array.footprint()
    gone, offline, stopped = world.take(0)[0], world.take(1)[0], world.take(2)[0]
    unmapped = world.driver().create_targets(
        [names.volume_id(ARRAY, world.array.vdisks["ds3"].uid.lower())], world.tag()
    )[0]
    world.array.drop(gone.id.split("/")[1])
    world.array.faults.offline.add(offline.id.split("/")[1])
    group = next(one.group for one in world.array.maps.values() if one.source == "ds2")
    world.array.execute(f"stopfcconsistgrp {group}")
    world.array.maps = {number: one for number, one in world.array.maps.items() if one.source != "ds3"}
    for target, why in (
        (gone, "has no such vdisk"),
        (offline, "the vdisk is offline"),
        (stopped, "the vdisk is offline"),
        (unmapped, "it is in no mapping, so it does not show the instant"),
    ):
        with pytest.raises(TargetLost, match=why):
            world.driver().settle([target])
    world.array.faults.offline.clear()
    world.delete(world.driver().list_targets())
    assert world.untouched()


# --- deleting ---------------------------------------------------------------------------------------


def test_delete_says_what_it_did(world: World) -> None:
    (target,) = world.take(0)
    assert isinstance(world.driver().delete(target), Deleted)
    assert isinstance(world.driver().delete(target), Absent)


def test_a_member_of_a_group_waits_for_the_others(world: World) -> None:
    """Stopping takes all targets of the group offline."""
    first, second = world.take(0, 1)
    assert isinstance(world.driver().delete(first), Deleted)
    world.driver().settle([second])
    assert not world.said("stopfcconsistgrp")
    world.driver().delete(second)
    assert world.untouched()


def test_volume_protection_defers_and_a_later_run_ends_it(world: World) -> None:
    (target,) = world.take(0)
    name = target.id.split("/")[1]
    world.array.execute(f"mkvdiskhostmap -host {HOST} {name}")
    world.array.faults.protection_s = 900
    assert isinstance(world.driver().delete(target), Deleted)
    assert not world.said("stopfcconsistgrp")  # what a host may still read is not taken offline
    (listed,) = world.driver().list_targets()
    assert (listed.id, listed.tag.role, listed.tag.disks, listed.tag.owner.boot) == (target.id, "target", (), "")
    with pytest.raises(VolumeBusy, match=r"which is being deleted \(rmvdiskhostmap: CMMVC8783E"):
        world.take(0)
    world.clock.time += 901
    world.delete(world.take(0))
    assert world.untouched()


def test_only_the_vdisk_is_protected(world: World) -> None:
    (target,) = world.take(0)
    world.array.faults.refuse["rmvdisk"] = ["CMMVC8783E protected"] * 2
    assert isinstance(world.driver().delete(target), Deleted)
    assert not world.array.maps
    assert not world.array.groups
    world.delete(world.take(0))  # it holds nobody up any more
    world.delete(world.driver().list_targets())
    assert world.untouched()


def test_a_slow_stop_is_left_to_itself(world: World) -> None:
    (target,) = world.take(0)
    world.array.faults.stopping_s = 500
    world.driver().delete(target)
    assert world.states() == {"stopping"}
    world.clock.time += 500
    world.driver().delete(target)
    assert world.untouched()


def test_orphans_are_found_by_name_and_never_given_to_the_reaper(world: World, tmp_path: object) -> None:
    world.driver(f"{tmp_path}/theirs").create_targets(world.volumes[:1], world.tag())
    world.array.execute(f"mkfcconsistgrp -name gc_{'f' * 32}_g00000000")
    world.array.execute("mkfcconsistgrp -name gc_of_somebody")
    world.array.make("gc_notours", GIB)
    theirs, stray = world.driver().list_targets()
    assert theirs.tag.owner.host == ""  # nobody can tell whether it lives
    assert (theirs.volume, theirs.tag.run, theirs.size) == (world.volumes[0], f"{1:032x}", GIB)
    assert stray.id == f"lab/gc_{'f' * 32}_g00000000"
    world.delete([theirs, stray])
    assert world.array.footprint() - world.before == {"gc_of_somebody", "vdisk gc_notours"}


def test_a_note_without_a_target_is_forgotten_in_time(world: World) -> None:
    driver = world.driver()
    notes = driver._arrays[ARRAY].notes
    world.array.faults.before["mkvdisk"] = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # killed in between
    driver_prepare = world.driver()
    with pytest.raises(KeyboardInterrupt):
        driver_prepare.prepare(world.volumes[:1], world.tag())
    assert list(notes.all()) == []  # an interrupt cleans up by itself
    tag = world.tag()
    prepared = driver.prepare(world.volumes[:1], tag)
    world.array.drop(prepared.targets[0].id.split("/")[1])
    assert len(list(notes.all())) == 1
    world.clock.time += 86401
    world.delete(world.take(1))
    assert list(notes.all()) == []
