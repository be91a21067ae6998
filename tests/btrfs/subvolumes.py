"""What the tests of the btrfs driver share: fresh subvolumes, disks in them, and what the kernel lists."""

from __future__ import annotations

import itertools
import os

import lab
from instants import CLOCK, run_id, tag

from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.volumes.btrfs import BtrfsDriver
from graincopy.volumes.instant import take_instant

_count = itertools.count()
SIZE = 64 * 4096


def make_subvolume(fs: lab.ReflinkFs) -> str:
    """A fresh subvolume in a fresh folder."""
    folder = os.path.join(fs.path, f"t{next(_count)}")
    os.mkdir(folder)
    return create(os.path.join(folder, "vms"))


def create(path: str) -> str:
    lab.run("btrfs", "subvolume", "create", path)
    return path


def listed(point: str) -> list[str]:
    """Paths of all subvolumes below the file system mounted at ``point``, as btrfs-progs lists them."""
    lines = lab.run("btrfs", "subvolume", "list", point).splitlines()
    return sorted(line.partition(" path ")[2] for line in lines)


def take(driver: BtrfsDriver, number: int, *claims: Claim) -> list[Target]:
    """A target of each claim at one instant, through the freeze window where a file lies on a mounted LUN."""
    mounts = [claim.mount for claim in claims if claim.mount]
    volumes = [claim.volume for claim in claims]
    taken = take_instant([(driver, volumes)], tag(run_id(number)), mounts, clock=CLOCK)
    return [taken.targets[driver.name, volume] for volume in volumes]
