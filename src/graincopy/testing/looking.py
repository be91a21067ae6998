"""What the volume laws look at: T's bytes and placement, the dirty ranges, and whether they agree with the oracle."""

from __future__ import annotations

import numpy as np

from graincopy.core.placement import Placement
from graincopy.core.units import KIB, MIB
from graincopy.model.change_map import DirtyFile, Unknown, dirty_file, whole_file
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim, VolumeCapabilities
from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import LawBroken, NotTried, require
from graincopy.testing.oracle import Disk
from graincopy.volumes.base import FileImage

DISK_SIZE = 512 * KIB  # bytes


def read_image(image: FileImage) -> bytes:
    """Every byte of ``image``, verified."""
    data = bytearray(image.size)
    with memoryview(data) as view:
        for start in range(0, image.size, MIB):
            image.readinto(start, view[start : start + MIB])
    image.verify()
    return bytes(data)


def look(lab: VolumeLab, target: Target, claim: Claim) -> tuple[bytes, Placement]:
    """Bytes and placement of the file as ``target`` shows it, by a fresh driver object."""
    with lab.driver().open(target, claim) as image:
        return read_image(image), image.placement()


def same(found: bytes, expected: bytes, what: str) -> None:
    """Raise LawBroken with the first difference unless the bytes are equal."""
    if found == expected:
        return
    if len(found) != len(expected):
        raise LawBroken(f"{what}: {len(found)} bytes instead of {len(expected)}")
    first = int(np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(expected, np.uint8))[0])
    raise LawBroken(f"{what}: byte {first} differs")


def powers(lab: VolumeLab, *needed: str) -> VolumeCapabilities:
    """The driver's capabilities. Raises NotTried when one of ``needed`` is not declared."""
    declared = lab.driver().capabilities()
    for power in needed:
        if not getattr(declared, power):
            raise NotTried(f"{lab.driver().name} does not declare {power}")
    return declared


class Moment:
    """One snapshot of some disks, and what each held at that instant."""

    def __init__(self, lab: VolumeLab, *disks: Disk) -> None:
        self.lab = lab
        self.targets = lab.snapshot([disk.claim for disk in disks])
        self.expected = {disk.claim.path: disk.expected for disk in disks}

    def target(self, disk: Disk) -> Target:
        return self.targets[disk.claim.volume]

    def check(self, disk: Disk, what: str) -> Placement:
        """T shows the disk as it was."""
        data, placement = look(self.lab, self.target(disk), disk.claim)
        same(data, self.expected[disk.claim.path], f"{what} ({', '.join(disk.history)})")
        return placement


def dirty_between(lab: VolumeLab, base: Moment, now: Moment, disk: Disk, must_know: bool = False) -> DirtyFile:
    """The central computation, as the backup does it; the whole file where the driver says Unknown."""
    answer = lab.driver().changed(base.target(disk), now.target(disk))
    _, before = look(lab, base.target(disk), disk.claim)
    _, after = look(lab, now.target(disk), disk.claim)
    if isinstance(answer, Unknown):
        require(not must_know, f"the driver does not know what an ordinary write changed: {answer.reason}")
        return whole_file(after)
    return dirty_file(before, after, answer.extents)


def check_change(lab: VolumeLab, base: Moment, now: Moment, disk: Disk) -> DirtyFile:
    """Laws 2 and 4 for one disk: what is not called dirty is equal, and the patch makes one image of the other."""
    told = ", ".join(disk.history)
    base.check(disk, "the older target does not show the disk as it was")
    now.check(disk, "the newer target does not show the disk as it was")
    old, new = base.expected[disk.claim.path], now.expected[disk.claim.path]
    dirty = dirty_between(lab, base, now, disk)
    patched = np.zeros(len(new), np.uint8)
    common = min(len(old), len(new))
    patched[:common] = np.frombuffer(old[:common], np.uint8)
    fresh = np.frombuffer(new, np.uint8)
    for start, stop in dirty.read:
        patched[start:stop] = fresh[start:stop]
    for start, stop in dirty.zero:
        require(not fresh[start:stop].any(), f"[{start}, {stop}) is said to be zero and is not ({told})")
        patched[start:stop] = 0
    same(patched.tobytes(), new, f"called clean, but changed ({told})")
    return dirty


def filled(lab: VolumeLab, size: int = DISK_SIZE, volume: int = 0, compressed: bool = False) -> Disk:
    """A disk full of written bytes."""
    disk = Disk(lab, size, volume, compressed)
    disk.write(0, size, seed=2)
    return disk
