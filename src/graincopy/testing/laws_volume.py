"""The laws of every volume driver (``volumes/base.py``), as plain functions over a lab.

Each makes its own disks, does what the law is about, and raises LawBroken when the driver got it wrong, NotTried
when the driver or the lab declares that it lacks what the law needs.
"""

from __future__ import annotations

import threading

import numpy as np

from graincopy.core.errors import SnapshotFailed
from graincopy.core.extent import Extents
from graincopy.core.units import KIB
from graincopy.model.change_map import Changed, Unknown
from graincopy.model.snapshot import Target
from graincopy.model.volume import VolumeCapabilities
from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import Law, LawBroken, require
from graincopy.testing.laws_soundness import soundness_laws
from graincopy.testing.laws_targets import target_laws
from graincopy.testing.looking import Moment, dirty_between, filled, look, powers, same
from graincopy.testing.oracle import Disk, Operation
from graincopy.volumes.base import VolumeDriver

# --- 1 isolation ------------------------------------------------------------------------------------


def picture(lab: VolumeLab) -> None:
    """T shows what S held at the instant, however it was written, flushed or not."""
    ways = [how for how in ("buffered", "mmap", "direct") if how in lab.powers]
    disk = filled(lab)
    for number, how in enumerate(ways * 3):
        disk.write(number * 48 * KIB, 8 * KIB, seed=10 + number, how=how)
    Moment(lab, disk).check(disk, "T does not show S")


def isolation(lab: VolumeLab) -> None:
    powers(lab, "snapshots")
    disk = filled(lab)
    moment = Moment(lab, disk)
    for number, how in enumerate(how for how in ("buffered", "mmap", "direct") if how in lab.powers):
        disk.write(number * 64 * KIB, 16 * KIB, seed=20 + number, how=how)
        moment.check(disk, f"a {how} write to S shows in T")
    for operation in (Operation("punch", 0, 64 * KIB), Operation("truncate", length=100 * KIB)):
        if operation.verb in lab.powers:
            disk.do(operation)
            moment.check(disk, f"{operation} of S shows in T")


def at_the_instant(lab: VolumeLab) -> None:
    """T shows S as of ``snapshot``, not as of ``prepare``; what is still in the page cache then is part of it."""
    powers(lab, "snapshots")
    disk = filled(lab)
    tag = lab.tag()
    prepared = lab.driver().prepare([disk.claim.volume], tag)
    lab.taken.extend(prepared.targets)
    disk.write(100_000, 50_000, seed=24)
    if "mmap" in lab.powers:
        disk.write(300_000, 5_000, seed=25, how="mmap")
    target = lab.snapshot([disk.claim], tag)[disk.claim.volume]
    same(look(lab, target, disk.claim)[0], disk.expected, "a write between prepare and snapshot is not in T")


# --- 3 precision, 5 composition, 6 normal form ------------------------------------------------------


def precision(lab: VolumeLab) -> None:
    grain = _exact(lab).grain
    disk = filled(lab)
    base = Moment(lab, disk)
    still = Moment(lab, disk)
    calm = dirty_between(lab, base, still, disk, must_know=True).dirty
    require(not calm.total, f"nothing was written, and {calm} is called dirty")
    disk.plain.touched = Extents.empty()
    for number in range(6):
        disk.write(number * 80 * KIB + number * 1000, 1 + number * 700, seed=40 + number)
    found = dirty_between(lab, still, Moment(lab, disk), disk, must_know=True).dirty.align(grain)
    allowed = disk.plain.touched.align(max(grain, lab.block))
    require(allowed.covers(found), f"{found - allowed} is called dirty and was never touched")


def composition(lab: VolumeLab) -> None:
    _exact(lab)
    disk = filled(lab)
    a = Moment(lab, disk)
    disk.write(0, 64 * KIB, seed=50)
    b = Moment(lab, disk)
    disk.write(32 * KIB, 64 * KIB, seed=51)
    disk.write(400 * KIB, 8 * KIB, seed=52)
    c = Moment(lab, disk)
    driver = lab.driver()
    ab, bc, ac = (_known(driver, x.target(disk), y.target(disk)) for x, y in ((a, b), (b, c), (a, c)))
    require((ab | bc).covers(ac), f"{ac - (ab | bc)} changed from a to c, but neither from a to b nor from b to c")


def normal_form(lab: VolumeLab) -> None:
    powers(lab, "change_map", "snapshots")
    disk = filled(lab)
    base = Moment(lab, disk)
    for offset in range(0, 256 * KIB, 16 * KIB):
        disk.write(offset, 12 * KIB, seed=60)
    now = Moment(lab, disk)
    target = now.target(disk)
    bounds = _known(lab.driver(), base.target(disk), target).bounds
    require(bool((np.diff(bounds) > 0).all()) and len(bounds) % 2 == 0, f"not sorted and coalesced: {bounds}")
    require(bool(len(bounds)) and int(bounds[0]) >= 0, "no change is told, or one before the volume's beginning")
    require(int(bounds[-1]) <= target.size, f"a change at {bounds[-1]} lies outside the volume of {target.size} bytes")


def _exact(lab: VolumeLab) -> VolumeCapabilities:
    """The driver is exact: always, or on the file system of this lab."""
    declared = powers(lab, "change_map", "snapshots")
    if not declared.exact:
        lab.need("exact")
    return declared


def _known(driver: VolumeDriver, base: Target, now: Target) -> Extents:
    answer = driver.changed(base, now)
    if not isinstance(answer, Changed):
        raise LawBroken(f"the driver does not know what an ordinary write changed: {answer.reason}")
    return answer.extents


# --- 7 one instant ----------------------------------------------------------------------------------


def one_instant(lab: VolumeLab) -> None:
    """A writer counts up on one volume and then on another; no snapshot shows the second ahead of the first."""
    if "one_instant" not in lab.powers:
        require(
            not lab.driver().capabilities().group_instant, "the driver declares group_instant, its lab no one_instant"
        )
    lab.need("one_instant", "two_volumes")
    powers(lab, "snapshots")
    first, second = Disk(lab, 64 * KIB, volume=0), Disk(lab, 64 * KIB, volume=1)
    require(first.claim.volume != second.claim.volume, "the lab put both disks on one volume")
    stop = threading.Event()

    def count() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            for disk in (first, second):
                lab.write(disk.claim, 0, number.to_bytes(8, "big"))

    writer = threading.Thread(target=count)
    writer.start()
    try:
        shots = [_shown_now(lab, first, second) for _ in range(4)]
    finally:
        stop.set()
        writer.join()
    for ahead, behind in shots:
        require(behind <= ahead <= behind + 1, f"written in order, seen as {ahead} and then {behind}")


def _shown_now(lab: VolumeLab, *disks: Disk) -> tuple[int, ...]:
    """The number at the beginning of each disk, as one snapshot shows it."""
    targets = lab.snapshot([disk.claim for disk in disks])
    shown = tuple(int.from_bytes(look(lab, targets[disk.claim.volume], disk.claim)[0][:8], "big") for disk in disks)
    lab.make_room()
    return shown


# --- 12 resize, recreate, rename --------------------------------------------------------------------


def resize(lab: VolumeLab) -> None:
    powers(lab, "change_map", "snapshots")
    lab.need("resize_volume")
    for factor in (1.5, 0.5):
        disk = filled(lab)
        base = Moment(lab, disk)
        size = lab.driver().describe(disk.claim.volume).size
        lab.resize_volume(disk.claim, int(size * factor))
        now = lab.snapshot([disk.claim])[disk.claim.volume]
        require(now.size == int(size * factor), f"T has {now.size} bytes after a resize to {int(size * factor)}")
        require(base.target(disk).size == size, "the older T does not keep its size")
        answer = lab.driver().changed(base.target(disk), now)
        if isinstance(answer, Changed) and now.size > size:
            tail = Extents.of((size, now.size))
            require(answer.extents.covers(tail), "the grown tail of the volume is not called changed")


def recreate(lab: VolumeLab) -> None:
    powers(lab, "change_map", "snapshots")
    lab.need("recreate_volume")
    disk = filled(lab)
    base = Moment(lab, disk)
    lab.recreate_volume(disk.claim)
    now = lab.snapshot([disk.claim])[disk.claim.volume]
    require(now.incarnation != base.target(disk).incarnation, "the recreated volume has the same incarnation")
    answer = lab.driver().changed(base.target(disk), now)
    require(isinstance(answer, Unknown), "changes between two incarnations of a volume are said to be known")


def rename(lab: VolumeLab) -> None:
    lab.need("rename_volume")
    disk = filled(lab)
    renamed = lab.rename_volume(disk.claim)
    require(renamed.volume != disk.claim.volume, "the renamed volume has the same id")
    try:
        lab.driver().describe(disk.claim.volume)
    except SnapshotFailed:
        return
    raise LawBroken("the volume is still described under the name that it no longer has")


def volume_laws() -> tuple[Law[VolumeLab], ...]:
    """Every law of the contract but the way back."""
    return (
        Law("01-picture", "T shows S as of the instant, whatever way it was written", picture),
        Law("01-isolation", "writes to S after the snapshot never show in T", isolation),
        Law("01-instant", "T shows S as of snapshot, not as of prepare", at_the_instant),
        *soundness_laws(),
        Law("03-precision", "changed() holds no clean grain, or exact is not declared", precision),
        Law("05-composition", "changed(a, c) lies in changed(a, b) and changed(b, c)", composition),
        Law("06-normal-form", "sorted, disjoint, coalesced, inside the volume", normal_form),
        Law("07-one-instant", "ordered writes across volumes are never seen inverted", one_instant),
        Law("12-resize", "resizing S is noticed", resize),
        Law("12-recreate", "recreating S is noticed", recreate),
        Law("12-rename", "renaming S is noticed", rename),
        *target_laws(),
    )
