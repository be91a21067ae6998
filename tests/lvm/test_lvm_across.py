"""One workload over the volumes of five drivers, of which two cannot be frozen from outside: LVM's is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import story
import thin
from many_drivers import Ground, back_up_in_one_window
from story import GRAIN

from graincopy.testing.lvm_lab import command, listing

GUEST = True


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, datastores: list[thin.Datastore]) -> Iterator[Ground]:
    command("busybox", "ip", "link", "set", "lo", "up")  # the guest has no other network
    with contextlib.ExitStack() as held:
        made = Ground(os.fspath(tmp_path_factory.mktemp("ground")), held, datastores[1].path)
        yield made
        made.clear()


@pytest.fixture
def cli(ground: Ground, tmp_path: os.PathLike[str]) -> story.Cli:
    return story.Cli(os.path.join(tmp_path, "graincopy"), config=ground.config).init()


def test_one_window_around_all_that_can_be_frozen(ground: Ground, cli: story.Cli) -> None:
    """LVM holds its volume by itself, and the subvolume moves too: so each file has its instant, and that is said."""
    drivers = ("flashcopy", "reflink", "btrfs", "locked", "lvm-thin")
    paths, before = ground.disks(*drivers), (listing(), ground.trace())
    back_up_in_one_window(ground, cli, paths, drivers, "per file")
    old = [story.read(path) for path in paths]

    for path in paths:
        story.write(path, (GRAIN, b"changed"))
    new = [story.read(path) for path in paths]
    again = {disk["path"]: disk for disk in cli.backup(*paths)["disks"]}
    maps = ["compared", "extents", "extents", "compared", "thin_delta"]
    assert [again[path]["change_map"].partition(":")[0] for path in paths] == maps
    restored = cli.ok("restore", "latest~1", "--in-place")
    assert [story.read(path) for path in paths] == old
    cli.ok("undo", restored["restore"])
    assert [story.read(path) for path in paths] == new

    cli.ok("backup", "--no-checkpoint", *paths)
    cli.ok("targets", "--reap")
    assert (listing(), ground.trace()) == before


def test_one_thin_volume_beside_frozen_ones_is_one_instant(ground: Ground, cli: story.Cli) -> None:
    """All else stands still while it is taken: as it was at that moment, so are they."""
    paths, before = ground.disks("flashcopy", "lvm-thin", "reflink"), (listing(), ground.trace())
    document = cli.ok("backup", "--no-checkpoint", *paths)
    assert {disk["driver"] for disk in document["disks"]} == {"flashcopy", "lvm-thin", "reflink"}
    assert (document["instant"], document["targets_left"]) == ("one", [])
    assert document["freeze_ms"] > 0
    assert (listing(), ground.trace()) == before
