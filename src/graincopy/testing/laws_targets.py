"""Laws 8-11, 13 and 14 of every volume driver: how targets behave as things on storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graincopy.core.errors import Unsupported, VolumeBusy
from graincopy.core.units import KIB, MIB
from graincopy.model.snapshot import Absent, Deleted, Role, Target
from graincopy.model.volume import Refusal, VolumeCapabilities
from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import Law, LawBroken, require
from graincopy.testing.looking import Moment, check_change, filled, look, powers, read_image, same
from graincopy.testing.oracle import Disk
from graincopy.volumes.base import VolumeDriver

SLACK = 256 * KIB  # bytes that a target may take for its own bookkeeping (law 13)


# --- 8 idempotence, 9 restart, 10 middle delete -----------------------------------------------------


def idempotence(lab: VolumeLab) -> None:
    disk = filled(lab)
    driver, tag = lab.driver(), lab.tag()
    before = lab.footprint()
    prepared = [driver.prepare([disk.claim.volume], tag).targets for _ in range(2)]
    lab.taken.extend(prepared[0])
    require(_ids(prepared[0]) == _ids(prepared[1]), "prepared twice under one run id, there are two targets")
    taken = [lab.snapshot([disk.claim], tag)[disk.claim.volume] for _ in range(2)]
    require(_ids(taken) == _ids(prepared[0]) * 2, "taken twice under one run id, a target changed its id")
    target = taken[0]
    data, _ = look(lab, target, disk.claim)
    same(data, disk.expected, "prepared and taken twice, T does not show S")
    if driver.capabilities().checkpoints:
        checkpoint = lab.tag(Role.CHECKPOINT)
        driver.retag(driver.retag(target, checkpoint), checkpoint)
    require(isinstance(driver.delete(target), Deleted), "the first delete does not say Deleted")
    require(isinstance(driver.delete(target), Absent), "the second delete does not say Absent")
    lab.require_no_trace(before)


def restart(lab: VolumeLab) -> None:
    declared = powers(lab, "snapshots")
    disk = filled(lab)
    moment = Moment(lab, disk)
    target = moment.target(disk)
    found = {item.id: item for item in lab.driver().list_targets()}
    require(target.id in found, "a fresh driver object does not list the target")
    require(found[target.id].tag == target.tag, "the tag did not survive")
    require(found[target.id].size == target.size, "the recorded size did not survive")
    require(found[target.id].incarnation == target.incarnation, "the recorded incarnation did not survive")
    moment.check(disk, "a fresh driver object shows something else")
    if declared.checkpoints:
        kept = lab.tag(Role.CHECKPOINT)
        lab.driver().retag(target, kept)
        tags = [item.tag for item in lab.driver().list_targets([disk.claim.volume]) if item.id == target.id]
        require(tags == [kept], "the new tag did not survive")
    require(isinstance(lab.driver().delete(target), Deleted), "a fresh driver object cannot delete the target")


def middle_delete(lab: VolumeLab) -> None:
    powers(lab, "change_map", "snapshots")
    disk = filled(lab)
    moments = [Moment(lab, disk)]
    for number in range(2):
        disk.write(number * 128 * KIB, 64 * KIB, seed=70 + number)
        moments.append(Moment(lab, disk))
    first, middle, last = moments
    before = lab.driver().changed(first.target(disk), last.target(disk))
    lab.driver().delete(middle.target(disk))
    disk.write(64 * KIB, 128 * KIB, seed=80)
    require(lab.driver().changed(first.target(disk), last.target(disk)) == before, "changed() gives another answer")
    check_change(lab, first, last, disk)


def _ids(targets: Sequence[Target]) -> list[str]:
    return [target.id for target in targets]


# --- 11 honesty ----------------------------------------------------------------------------------


def honesty(lab: VolumeLab) -> None:
    driver = lab.driver()
    declared = driver.capabilities()
    disk = filled(lab)
    before = lab.footprint()
    refused = driver.resolve(disk.claim.path + ".missing")
    require(isinstance(refused, Refusal) and bool(refused.reason), "a path that does not exist is not refused")
    require(driver.resolve(disk.claim.path) == disk.claim, "resolve gives two answers for one path")
    group = driver.prepare([disk.claim.volume], lab.tag())
    lab.taken.extend(group.targets)
    (target,) = driver.settle(driver.snapshot(group))
    require(target.driver == driver.name == disk.claim.driver, "the target or the claim bears another driver's name")
    _answers(declared.change_map, "change_map", lambda: driver.changed(target, target))
    _answers(declared.checkpoints, "checkpoints", lambda: driver.retag(target, lab.tag(Role.CHECKPOINT)))
    _live_targets(lab, driver, declared, disk)
    driver.delete(target)
    lab.reset_targets()
    lab.require_no_trace(before)


def _answers(declared: bool, power: str, call: Callable[[], object]) -> None:
    try:
        call()
    except Unsupported as error:
        require(not declared, f"{power} is declared and refused: {error}")
    else:
        require(declared, f"{power} is not declared and works all the same")


def _live_targets(lab: VolumeLab, driver: VolumeDriver, declared: VolumeCapabilities, disk: Disk) -> None:
    """The target that exists is the first; the declared number of them can be made, and no more."""
    if not declared.live_targets:
        return
    for _ in range(declared.live_targets - 1):
        lab.taken.extend(driver.create_targets([disk.claim.volume], lab.tag()))
    try:
        lab.taken.extend(driver.prepare([disk.claim.volume], lab.tag()).targets)
    except VolumeBusy:
        return
    raise LawBroken(f"only {declared.live_targets} targets at once are declared, but more were made")


# --- 13 thinness, 14 no trace -----------------------------------------------------------------------


def thinness(lab: VolumeLab) -> None:
    grain = powers(lab, "snapshots").grain
    disk = filled(lab, 4 * MIB)
    target = Moment(lab, disk).target(disk)
    require(target.size == lab.driver().describe(disk.claim.volume).size, "T has not exactly the size of S")
    early = lab.allocated(target)
    require(early <= SLACK, f"T takes {early} bytes right after it was made")
    dirtied = 0
    few = lab.driver().capabilities().live_targets == 1  # then no second snapshot flushes what is written
    how = "direct" if few and "direct" in lab.powers else "buffered"
    for number in range(48):
        disk.write(number * 64 * KIB, 4 * KIB, seed=90 + number, how=how)
        dirtied += max(4 * KIB, grain)
    later = lab.allocated(target)
    lab.make_room()
    after = Moment(lab, disk)
    later = later if few else lab.allocated(target)
    require(later <= dirtied + 2 * SLACK, f"T takes {later} bytes after S was dirtied in {dirtied}")
    after.check(disk, "T does not show S")


def no_trace(lab: VolumeLab) -> None:
    disk = filled(lab)
    before = lab.footprint()
    driver = lab.driver()
    others = {target.id for target in driver.list_targets([disk.claim.volume])}  # real backups of the same volume
    prepared = driver.prepare([disk.claim.volume], lab.tag())
    lab.taken.extend(prepared.targets)
    driver.delete(prepared.targets[0])
    lab.require_no_trace(before)
    for _ in range(2):
        for target in lab.snapshot([disk.claim]).values():
            with lab.driver().open(target, disk.claim) as image:
                read_image(image)
        lab.make_room()
    lab.reset_targets()
    lab.require_no_trace(before)
    listed = {target.id for target in lab.driver().list_targets([disk.claim.volume])}
    require(listed == others, "a deleted target is still listed")


def target_laws() -> tuple[Law[VolumeLab], ...]:
    """Targets as things on storage."""
    return (
        Law("08-idempotence", "every verb may be repeated and says what it did", idempotence),
        Law("09-restart", "a fresh driver object sees the same world", restart),
        Law("10-middle-delete", "deleting one target leaves the others as they are", middle_delete),
        Law("11-honesty", "a declared power works, an undeclared one raises Unsupported", honesty),
        Law("13-thinness", "T takes next to nothing and grows only with what S dirties", thinness),
        Law("14-no-trace", "after delete no object of ours is left", no_trace),
    )
