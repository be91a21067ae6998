"""What goes wrong around subvolumes, by the command line: one clear sentence, S as it was, and no trace."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import lab
import pytest
import scene
import story
from story import GRAIN, MIB, Cli, noise
from subvolumes import create, listed

pytestmark = pytest.mark.root


@pytest.fixture
def cli(tmp_path: os.PathLike[str]) -> Cli:
    """An empty repository; disk files on Btrfs are snapshotted with their subvolume."""
    return Cli(os.path.join(tmp_path, "graincopy"), config="[btrfs]\nin_place = true\n").init()


@pytest.fixture
def path(subvolume: str) -> str:
    """A disk in a subvolume of its own."""
    return story.make_disk(f"{subvolume}/disk.raw", 2 * MIB, (0, noise(1, MIB)))


def snapshots(path: str) -> list[str]:
    """The snapshots that graincopy has of the subvolume of ``path``."""
    folder = os.path.join(os.path.dirname(os.path.dirname(path)), ".graincopy.btrfs")
    return [f"{folder}/{name}" for name in os.listdir(folder) if name.endswith(".snapshot")]


def roll_back(path: str) -> None:
    """The subvolume becomes what a snapshot of it shows, as people roll back."""
    subvolume = os.path.dirname(path)
    lab.run("btrfs", "subvolume", "snapshot", subvolume, f"{subvolume}.new")
    lab.run("btrfs", "subvolume", "delete", subvolume)
    os.rename(f"{subvolume}.new", subvolume)


CHANGES: dict[str, Callable[[str], object]] = {
    "shrinks": lambda path: os.truncate(path, 100_001),
    "grows": lambda path: os.truncate(path, 3 * MIB + 1),
    "is replaced": lambda path: (shutil.copyfile(path, f"{path}.new"), os.rename(f"{path}.new", path)),
    "is rolled back": roll_back,
}


@pytest.mark.parametrize("passed", ["opened", "prepared"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_plan_and_snapshot(path: str, cli: Cli, change: str, passed: str) -> None:
    cli.backup(path)
    done = cli("backup", path, step=lambda step: CHANGES[change](path) if step == passed else None)
    assert done.code in (0, 16), done
    if done.code == 16:
        assert "changed while the backup was starting" in done.err
        cli.backup(path)
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert story.digest(out["disks"][0]["target"]) == story.digest(path)


def test_the_snapshot_is_deleted_under_the_run(btrfs_fs: lab.ReflinkFs, path: str, cli: Cli) -> None:
    """Nothing is published; what is left of T goes with the error."""
    before, content = listed(btrfs_fs.path), story.digest(path)

    def meddle(step: str) -> None:
        if step == "settled":
            lab.run("btrfs", "subvolume", "delete", *snapshots(path))

    done = cli("backup", path, step=meddle)
    assert (done.code, cli.ok("points")) == (26, []), done
    assert len(done.err.splitlines()) <= 3, done
    assert (listed(btrfs_fs.path), story.digest(path)) == (before, content)
    assert cli.ok("targets")["targets"] == []
    cli.backup(path)


def test_a_checkpoint_that_somebody_deleted_is_compared_with_the_reason(path: str, cli: Cli) -> None:
    cli.backup(path)
    lab.run("btrfs", "subvolume", "delete", *snapshots(path))
    story.write(path, (GRAIN, b"changed"))
    disk = cli.backup(path)["disks"][0]
    assert disk["change_map"].startswith("compared: ")
    assert disk["dirty_bytes"] == GRAIN


def test_a_subvolume_moved_to_another_file_system(path: str, cli: Cli, tmp_path: object) -> None:
    """Under its old path there is now a disk on other storage: the same bytes, compared."""
    cli.backup(path)
    with lab.ReflinkFs(tmp_path, "btrfs", 256 * MIB, "elsewhere") as other:
        moved = create(f"{other.path}/vms")
        shutil.copyfile(path, f"{moved}/disk.raw")
        home = os.path.dirname(path)
        lab.run("mount", "--bind", moved, home)
        try:
            story.write(path, (GRAIN, b"changed"))
            disk = cli.ok("backup", path)["disks"][0]
            assert disk["change_map"].startswith("compared: "), disk
            assert disk["dirty_bytes"] == GRAIN
            out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
            assert story.digest(out["disks"][0]["target"]) == story.digest(path)
            cli("targets", "--reap")
        finally:
            lab.unmount(home)


def test_killed_anywhere_without_a_checkpoint_nothing_stays(btrfs_fs: lab.ReflinkFs, path: str, cli: Cli) -> None:
    before = listed(btrfs_fs.path)
    steps = scene.steps_of(cli, "backup", "--no-checkpoint", path)
    assert len(steps) >= 10
    for at in steps:
        scene.cut(cli, at, "--repo", cli.repo, "backup", "--no-checkpoint", path)
        cli.ok("targets", "--reap")
        assert listed(btrfs_fs.path) == before, at
    cli.undamaged()
