"""Ground for one workload over the volumes of many drivers: with LVM's in the guest of its lab, without it anywhere."""

from __future__ import annotations

import contextlib
import os

import lab
import story
from datacenter import DataCentre
from instants import frozen
from story import MIB, noise


class Ground:
    """A LUN of an array, a LUN image on XFS, a subvolume, a plain folder; and what lies at ``thin``, if anything does.

    Both datastores can be frozen; the subvolume, whose files are volumes, and a thin volume cannot.
    """

    def __init__(self, folder: str, held: contextlib.ExitStack, thin: str | None = None) -> None:
        os.mkdir(f"{folder}/array")
        self.array = held.enter_context(DataCentre(f"{folder}/array", ("ext4", 64)))
        self.xfs = held.enter_context(lab.ReflinkFs(folder, "xfs", 512 * MIB, "xfs"))
        self.lun = held.enter_context(lab.Lun(self.xfs.path, "lun", 64 * MIB, "ext4", mount_at=f"{folder}/lun"))
        story.large_blocks(self.lun)
        self.btrfs = held.enter_context(lab.ReflinkFs(folder, "btrfs", 256 * MIB, "btrfs"))
        subvolume, plain = f"{self.btrfs.path}/vms", f"{folder}/plain"
        lab.run("btrfs", "subvolume", "create", subvolume)
        os.mkdir(plain)
        folders = {
            "flashcopy": self.array.datastores[0],
            "reflink": self.lun.path,
            "btrfs": subvolume,
            "locked": plain,
            **({"lvm-thin": thin} if thin else {}),
        }
        self.paths = {driver: f"{place}/across.raw" for driver, place in folders.items()}
        self.config = f"{self.array.config()}\n[btrfs]\nin_place = true\n[freeze]\nwarn_ms = 60000\ndeadline = 60\n"

    @property
    def frozen_points(self) -> tuple[str, str]:
        """The datastores."""
        return self.array.datastores[0], self.lun.path

    def disks(self, *drivers: str) -> list[str]:
        """A fresh disk on the volume of each of these drivers; all of them, when none is named."""
        chosen = [self.paths[driver] for driver in drivers or self.paths]
        for number, path in enumerate(chosen):
            self.clear(path)
            story.make_disk(path, 2 * MIB, (0, noise(number, MIB)))
        return chosen

    def clear(self, *paths: str) -> None:
        """No disks."""
        for path in paths or self.paths.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def trace(self) -> frozenset[str]:
        """What the array shows, and which subvolumes there are."""
        listed = lab.run("btrfs", "subvolume", "list", self.btrfs.path).splitlines()
        return self.array.array.footprint() | {line.partition(" path ")[2] for line in listed}


def back_up_in_one_window(
    ground: Ground, cli: story.Cli, paths: list[str], drivers: tuple[str, ...], instant: str
) -> None:
    """A backup of ``paths``, each by its driver, both datastores frozen around the snapshots, as said before."""
    held: list[tuple[bool, ...]] = []

    def look(step: str) -> None:
        if step in ("frozen", "snapshotted"):
            held.append(tuple(frozen(point) for point in ground.frozen_points))

    planned = cli.ok("backup", "--dry-run", *paths)["plan"]
    document = cli.ok("backup", *paths, step=look)
    by_path = {disk["path"]: disk for disk in document["disks"]}
    assert tuple(by_path[path]["driver"] for path in paths) == drivers
    assert held == [(True, True)] * 2
    assert (planned["instant"], document["instant"], document["consistency"]) == (instant, instant, "crash")
    assert document["freeze_ms"] > 0
