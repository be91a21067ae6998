"""One workload over an array, a LUN image on XFS, a Btrfs subvolume and a plain folder: one window, one instant."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import scene
import story
from instants import eventually_thawed
from many_drivers import Ground, back_up_in_one_window
from story import GRAIN

pytestmark = pytest.mark.root
DRIVERS = ("flashcopy", "reflink", "btrfs", "locked")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with contextlib.ExitStack() as held:
        yield Ground(os.fspath(tmp_path_factory.mktemp("ground")), held)


@pytest.fixture
def cli(ground: Ground, tmp_path: os.PathLike[str]) -> story.Cli:
    return story.Cli(os.path.join(tmp_path, "graincopy"), config=ground.config).init()


def test_four_drivers_one_window_one_instant(ground: Ground, cli: story.Cli) -> None:
    """The subvolume alone moves, while all else stands still: so all files show its instant."""
    paths, before = ground.disks(), ground.trace()
    back_up_in_one_window(ground, cli, paths, DRIVERS, "one")
    assert sum(line.startswith("startfcconsistgrp") for line in ground.array.array.log) == 1
    old = [story.read(path) for path in paths]
    for path in paths:
        story.write(path, (GRAIN, b"changed"))
    new = [story.read(path) for path in paths]
    again = {disk["path"]: disk for disk in cli.backup(*paths)["disks"]}
    assert [again[path]["dirty_bytes"] for path in paths] == [GRAIN] * 4
    restored = cli.ok("restore", "latest~1", "--in-place")
    assert [story.read(path) for path in paths] == old
    cli.ok("undo", restored["restore"])
    assert [story.read(path) for path in paths] == new
    cli.undamaged()
    cli.ok("backup", "--no-checkpoint", *paths)
    cli.ok("targets", "--reap")
    assert ground.trace() == before


@pytest.mark.parametrize("at", ["prepared", "frozen", "snapshotted", "thawed", "copied"])
def test_killed_in_the_middle_all_are_thawed_and_nothing_is_left(ground: Ground, cli: story.Cli, at: str) -> None:
    paths, before = ground.disks(), ground.trace()
    scene.cut(cli, at, "--repo", cli.repo, "backup", *paths)
    assert all(eventually_thawed(point, scene.LONG) for point in ground.frozen_points)
    cli.ok("targets", "--reap")
    assert ground.trace() == before
