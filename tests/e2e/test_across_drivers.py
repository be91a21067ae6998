"""One workload whose files lie on volumes of different drivers: a LUN on XFS, a Btrfs subvolume, a locked file."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lab
import pytest
import story
from instants import CLOCK, frozen, image_of, run_id, tag
from story import GRAIN, MIB, Cli, noise

from graincopy.core.errors import SourceInUse
from graincopy.model.volume import Claim
from graincopy.volumes.btrfs import BtrfsDriver
from graincopy.volumes.instant import take_instant
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.reflink import ReflinkDriver

pytestmark = pytest.mark.root


@dataclass
class Ground:
    """A LUN with a datastore on XFS, a subvolume on Btrfs, and a folder where nothing can be snapshotted."""

    xfs: lab.ReflinkFs
    lun: lab.Lun
    btrfs: lab.ReflinkFs
    subvolume: str
    plain: str

    def disks(self) -> list[str]:
        """A disk on each."""
        folders = (self.lun.path, self.subvolume, self.plain)
        return [
            story.make_disk(f"{folder}/disk{n}.raw", 4 * MIB + n, (0, noise(n, MIB)), (3 * MIB, b"end"))
            for n, folder in enumerate(folders)
        ]

    def subvolumes(self) -> list[str]:
        lines = lab.run("btrfs", "subvolume", "list", self.btrfs.path).splitlines()
        return sorted(line.partition(" path ")[2] for line in lines)

    def targets(self) -> list[str]:
        """Names of all that graincopy has on either storage."""
        folders = (f"{self.xfs.path}/.graincopy", f"{self.btrfs.path}/.graincopy.btrfs")
        return [name for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = tmp_path_factory.mktemp("ground")
    with contextlib.ExitStack() as held:
        xfs = held.enter_context(lab.ReflinkFs(folder, "xfs", 512 * MIB, "xfs"))
        lun = held.enter_context(lab.Lun(xfs.path, "lun", 96 * MIB, "ext4", mount_at=folder / "datastore"))
        story.large_blocks(lun)
        btrfs = held.enter_context(lab.ReflinkFs(folder, "btrfs", 1024 * MIB, "btrfs"))
        subvolume = f"{btrfs.path}/vms"
        lab.run("btrfs", "subvolume", "create", subvolume)
        yield Ground(xfs, lun, btrfs, subvolume, "")


@pytest.fixture
def ground(built: Ground, plain: str) -> Iterator[Ground]:
    """Empty."""
    built.plain = plain
    yield built
    assert not frozen(built.lun.path)
    for folder in (built.lun.path, built.subvolume):
        for name in set(os.listdir(folder)) - {"lost+found"}:
            os.unlink(f"{folder}/{name}")
    places = MemoryPlaces()
    places.note(built.btrfs.path)
    places.note(built.xfs.path)
    for driver in (BtrfsDriver(places), ReflinkDriver(places)):
        for target in driver.list_targets():
            driver.delete(target)


@pytest.fixture
def cli(tmp_path: os.PathLike[str]) -> Cli:
    """An empty repository; disk files on Btrfs are snapshotted with their subvolume."""
    return Cli(os.path.join(tmp_path, "graincopy"), config="[btrfs]\nin_place = true\n").init()


def by_name(document: Any) -> list[Any]:
    """The disks as :meth:`Ground.disks` names them."""
    return sorted(document["disks"], key=lambda disk: disk["name"])


def test_one_window_around_all_and_one_instant(ground: Ground, cli: Cli) -> None:
    paths = ground.disks()
    planned = cli.ok("backup", "--dry-run", *paths)["plan"]
    document = cli.backup(*paths)
    assert [disk["driver"] for disk in by_name(document)] == ["reflink", "btrfs", "locked"]
    assert planned["instant"] == document["instant"] == "one"
    assert (document["consistency"], document["freeze_ms"] > 0) == ("crash", True)
    assert len(document["targets_left"]) == 2
    assert len(ground.subvolumes()) == 2
    story.write(paths[0], (GRAIN, b"A"))
    story.write(paths[1], (2 * GRAIN, b"B"), (2 * GRAIN, b"C"))
    story.write(paths[2], (0, b"D"))
    second = cli.backup(*paths)
    told = [(disk["change_map"], disk["read_bytes"]) for disk in by_name(second)]
    assert told[:2] == [("extents", GRAIN), ("extents", GRAIN)]
    assert told[2][0].startswith("compared")
    assert len(ground.subvolumes()) == 2  # the older checkpoint is gone
    after = [story.digest(path) for path in paths]
    restored = cli.ok("restore", "latest~1", "--in-place")
    assert [disk["written_bytes"] for disk in restored["disks"]] == [GRAIN, GRAIN, GRAIN]
    cli.ok("undo", restored["restore"])
    assert [story.digest(path) for path in paths] == after
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert [story.digest(disk["target"]) for disk in by_name(out)] == after
    cli.undamaged()


def test_two_that_move_are_said_to_have_an_instant_each(ground: Ground, cli: Cli) -> None:
    paths = ground.disks()
    other = story.make_disk(f"{ground.subvolume}/other.raw", MIB, (0, b"x"))
    planned = cli.ok("backup", "--dry-run", *paths, other)["plan"]
    document = cli.backup(*paths, other)
    assert planned["instant"] == document["instant"] == "per file"
    assert len(ground.subvolumes()) == 2  # they share a snapshot all the same


def test_without_checkpoints_nothing_stays(ground: Ground, cli: Cli) -> None:
    paths = ground.disks()
    assert cli.backup("--no-checkpoint", *paths)["targets_left"] == []
    assert (ground.targets(), ground.subvolumes()) == ([], ["vms"])


def test_when_one_driver_fails_the_others_leave_nothing(ground: Ground, cli: Cli) -> None:
    paths = ground.disks()
    with open(paths[2], "r+b"):
        done = cli("backup", *paths)
    assert done.code == SourceInUse.exit_code
    assert (ground.targets(), ground.subvolumes()) == ([], ["vms"])
    assert cli.ok("points") == []


def test_ordered_writes_across_drivers_are_never_seen_inverted(ground: Ground) -> None:
    """A writer counts up on the datastore and then on Btrfs, which nobody can freeze, through the page cache."""
    places = MemoryPlaces()
    reflink, btrfs = ReflinkDriver(places), BtrfsDriver(places)
    paths = [story.make_disk(f"{folder}/count", 4096) for folder in (ground.lun.path, ground.subvolume)]
    claims = [driver.resolve(path) for driver, path in zip((reflink, btrfs), paths, strict=True)]
    first, second = (claim for claim in claims if isinstance(claim, Claim))
    stop = threading.Event()

    def count() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            for path in paths:
                lab.write_at(path, (0, number.to_bytes(8, "big")), sync=False)

    writer = threading.Thread(target=count)
    writer.start()
    try:
        shots = [
            take_instant(
                [(reflink, [first.volume]), (btrfs, [second.volume])],
                tag(run_id(number)),
                [ground.lun.path],
                clock=CLOCK,
            ).targets
            for number in range(1, 9)
        ]
    finally:
        stop.set()
        writer.join()
    for taken in shots:
        ahead = image_of(reflink, taken["reflink", first.volume], first)[0][:8]
        behind = image_of(btrfs, taken["btrfs", second.volume], second)[0][:8]
        seen = int.from_bytes(ahead, "big"), int.from_bytes(behind, "big")
        assert seen[1] <= seen[0] <= seen[1] + 1, seen


POINTS = ("prepared", "frozen", "snapshotted", "thawed", "settled", "copied", "indexed", "published", "promoted")


@pytest.mark.parametrize("again", [False, True], ids=["first", "incremental"])
@pytest.mark.parametrize("at", [*POINTS, "superseded"])
def test_killed_anywhere_at_most_the_checkpoints_stay(ground: Ground, cli: Cli, at: str, again: bool) -> None:
    paths = ground.disks()
    if again:
        cli.backup(*paths)
        story.write(paths[1], (0, b"changed"))
    _killed(cli, at, "backup", *paths)
    published = again + (at in ("published", "promoted", "superseded"))
    assert len(cli.ok("points")) == published
    cli.ok("targets", "--reap")
    assert len(ground.subvolumes()) <= 2
    assert len(ground.targets()) in ((2 + 1,) if published else (0,))  # LUN clone, tag, snapshot
    document = cli.backup(*paths)
    assert [disk["change_map"] == "extents" for disk in by_name(document)[:2]] == [bool(published)] * 2
    assert len(ground.subvolumes()) == 2
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert [story.digest(disk["target"]) for disk in by_name(out)] == [story.digest(path) for path in paths]


def _killed(cli: Cli, at: str, *arguments: str) -> None:
    """The command in a child that kills itself at the step; the drivers' order is that of this process."""

    def strike(step: str) -> None:
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            cli(*arguments, step=strike)
        os._exit(98)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
