"""What the tests of the freeze window and of the drivers share: a tag, the machine's clock, whole images."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

import lab
import numpy as np

from graincopy.app.host import SystemClock
from graincopy.core.extent import Extents
from graincopy.core.ids import DiskId, PointId, RepositoryId, WorkloadId
from graincopy.core.placement import Placement
from graincopy.model.change_map import Changed, dirty_file
from graincopy.model.snapshot import CheckpointDisk, Owner, Role, Target, TargetTag
from graincopy.model.volume import Claim
from graincopy.volumes import ioctl
from graincopy.volumes.base import VolumeDriver

OWNER = Owner(host="h" * 32, boot="b", pid=1, started=2, hostname="here")


CLOCK = SystemClock()


def tag(run: str = "1" * 32, role: Role = Role.TARGET, disks: int = 1) -> TargetTag:
    return TargetTag(
        run=PointId(run),
        role=role,
        owner=OWNER,
        repository=RepositoryId("r" * 32),
        disks=tuple(CheckpointDisk(workload=WorkloadId("w" * 24), disk=DiskId(f"{n:024x}")) for n in range(disks)),
        created=1.0,
    )


def run_id(number: int) -> str:
    return f"{number:032x}"


def frozen(point: str) -> bool:
    """Whether somebody holds a freeze; found out by trying, and taken back."""
    fd = os.open(point, os.O_RDONLY)
    try:
        ioctl.freeze(fd)
        ioctl.thaw(fd)
    except OSError as error:
        assert error.errno == errno.EBUSY
        return True
    finally:
        os.close(fd)
    return False


def eventually_thawed(point: str, seconds: float = 8) -> bool:
    end = time.monotonic() + seconds
    while frozen(point):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def image_of(driver: VolumeDriver, target: Target, claim: Claim) -> tuple[bytes, Placement]:
    """All bytes of the file in T, and its placement."""
    with driver.open(target, claim) as image:
        buffer = bytearray(image.size)
        image.readinto(0, memoryview(buffer))
        placement = image.placement()
        image.verify()
    return bytes(buffer), placement


def disk(folder: str, name: str = "disk.raw", size: int = 64 * 4096) -> str:
    """A disk file in which every block differs from every other."""
    path = os.path.join(folder, name)
    lab.write_at(path, (0, os.urandom(size)))
    return path


def claim_of(driver: VolumeDriver, path: str) -> Claim:
    """The driver's claim, which it must make."""
    claim = driver.resolve(path)
    assert isinstance(claim, Claim), claim
    return claim


def dirty_between(driver: VolumeDriver, base: Target, now: Target, claim: Claim) -> tuple[Extents, bytes, bytes]:
    """What the driver's map and the placements call dirty, and both images."""
    changed = driver.changed(base, now)
    assert isinstance(changed, Changed), changed
    before, was = image_of(driver, base, claim)
    after, is_now = image_of(driver, now, claim)
    return dirty_file(was, is_now, changed.extents).dirty, before, after


def unequal(one: bytes, other: bytes, block: int = 4096) -> Extents:
    """Blocks of ``other`` that are not as in ``one``; what ``one`` does not have counts as unequal."""
    size = -(-len(other) // block) * block
    mine = np.frombuffer(one[: len(other)].ljust(size, b"\0"), np.uint8).reshape(-1, block)
    theirs = np.frombuffer(other.ljust(size, b"\0"), np.uint8).reshape(-1, block)
    found = Extents.from_points(np.flatnonzero((mine != theirs).any(axis=1))).to_bytes(block)
    return (found | Extents.of((len(one), len(other)))).clip(0, len(other))


def blocks(*numbers: int) -> Extents:
    """4 KiB blocks as bytes."""
    return Extents.of(*((number * 4096, (number + 1) * 4096) for number in numbers))


def loops_below(folder: str) -> Sequence[str]:
    """Backing files of bound loop devices below ``folder``, however they are bound."""
    return sorted(
        line for line in lab.run("losetup", "--list", "--noheadings", "-O", "BACK-FILE").splitlines() if folder in line
    )


def loops_return_to(before: Sequence[str], folder: str, patience: float = 5.0) -> bool:
    """Whether :func:`loops_below` is ``before`` again; the kernel takes a moment."""
    end = time.monotonic() + patience
    while loops_below(folder) != before:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def everything_below(folder: str) -> Sequence[str]:
    return sorted(os.path.join(where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files))
