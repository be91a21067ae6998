"""The whole method over LVM by the command line: back up, write, again, restore, undo; and kill it everywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import story
import thin
from story import GRAIN, MIB, noise

from graincopy.core.units import KIB
from graincopy.testing.lvm_lab import BLOCK, command, listing

GUEST = True
SIZE = 32 * MIB


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own graincopy."""
    for name in [name for name in os.environ if name.startswith("GRAINCOPY_REPO")]:
        monkeypatch.delenv(name)


@pytest.fixture
def cli(tmp_path: os.PathLike[str]) -> story.Cli:
    return story.Cli(os.path.join(tmp_path, "graincopy")).init()


@pytest.fixture
def volume(thin_storage: thin.ThinStorage) -> Iterator[str]:
    """A thin volume of 32 MiB, of which 1 MiB was ever written; afterwards nothing else is left than before."""
    before = listing()
    path = thin_storage.create("raw-disk", SIZE)
    story.write(path, (0, noise(1, 512 * KIB)), (8 * MIB, noise(2, 512 * KIB)))
    yield path
    thin_storage.remove("raw-disk", *targets())
    assert listing() == before


def targets() -> list[str]:
    """What graincopy has in the volume groups."""
    return command("lvs", "--noheadings", "-o", "lv_name", "-S", "lv_name=~^graincopy-").split()


def test_the_disk_is_the_volume(cli: story.Cli, volume: str) -> None:
    first = cli.backup("/dev/gc-odd.vg_0+/raw-disk")["disks"][0]
    assert (first["driver"], first["volume"]) == ("lvm-thin", "lvm-thin:gc-odd.vg_0+/raw-disk")
    assert (first["path"], first["size"]) == (volume, SIZE)
    assert (first["allocated"], first["read_bytes"]) == (MIB, MIB)  # what has no block is zero, and is not read
    assert len(targets()) == 1
    assert cli.ok("show", "latest")["freeze_ms"] > 0  # LVM suspends it, although there is no file system to freeze

    before = story.read(volume)
    story.write(volume, (100_000, b"changed"), (20 * MIB, b"where nothing was"))
    second = cli.backup(volume)["disks"][0]
    assert (second["change_map"], second["dirty_bytes"]) == ("thin_delta", 2 * GRAIN)
    assert len(targets()) == 1

    story.write(volume, (9 * MIB, b"not backed up"))
    now = story.read(volume)
    document = cli.ok("restore", "latest~1", "--in-place")
    assert document["disks"][0]["how"] == "change map"
    assert document["disks"][0]["differing_bytes"] == 3 * GRAIN
    assert story.read(volume) == before
    assert len(targets()) == 2
    cli.ok("undo", document["restore"])
    assert story.read(volume) == now
    assert len(targets()) == 1
    cli.undamaged()


def test_files_on_two_volumes(cli: story.Cli, datastores: list[thin.Datastore]) -> None:
    """Only the dirty grains of only these files, though the snapshots hold all of both file systems."""
    before = listing()
    paths = [
        story.make_disk(os.path.join(one.path, f"vm{at}.raw"), 4 * MIB, (0, noise(at, MIB)))
        for at, one in enumerate(datastores)
    ]
    other = story.make_disk(os.path.join(datastores[0].path, "neighbour.raw"), 4 * MIB, (0, noise(9, 4 * MIB)))
    untouched = story.digest(other)
    first = cli.backup(*paths)
    assert [disk["driver"] for disk in first["disks"]] == ["lvm-thin"] * 2
    assert [disk["read_bytes"] for disk in first["disks"]] == [MIB] * 2
    assert 0 < first["freeze_ms"] < 60_000  # LVM suspends each by itself
    old = [story.read(path) for path in paths]

    story.write(other, (0, noise(10, 4 * MIB)))
    untouched = story.digest(other)
    for path in paths:
        story.write(path, (MIB // 2, noise(11, GRAIN)), (3 * MIB, b"in a hole"))
    new = [story.read(path) for path in paths]
    second = cli.backup(*paths)
    for disk in second["disks"]:
        assert disk["change_map"] == "thin_delta"
        assert 2 * GRAIN <= disk["dirty_bytes"] <= 6 * GRAIN  # blocks of the pool hold more than this file
    assert len(targets()) == 2

    document = cli.ok("restore", "latest~1", "--in-place")
    assert [story.read(path) for path in paths] == old
    assert story.digest(other) == untouched
    cli.ok("undo", document["restore"])
    assert [story.read(path) for path in paths] == new
    cli.ok("restore", "latest", "--to", os.path.join(cli.folder, "out"))
    for disk in second["disks"]:
        assert story.read(os.path.join(cli.folder, "out", disk["name"])) == story.read(disk["path"])

    assert cli.backup(*paths, "--no-checkpoint")["targets_left"] == []
    cli.ok("targets", "--reap")  # the checkpoints that no newest point names any more
    assert targets() == []
    for path in (*paths, other):
        os.unlink(path)
    assert listing() == before


def killed(cli: story.Cli, step: str, *arguments: str) -> None:
    """Run a command in a process of its own that kills itself at ``step``."""

    def strike(name: str) -> None:
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            cli(*arguments, step=strike)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, f"it did not come to {step}"


def test_from_a_file_onto_a_thin_volume_and_back_to_a_file(
    cli: story.Cli, volume: str, datastores: list[thin.Datastore]
) -> None:
    """A restore onto another kind of storage, both ways; where the file has a hole, the volume's old bytes go."""
    path = story.make_disk(os.path.join(datastores[0].path, "web.raw"), SIZE, (MIB, noise(3, MIB)), (30 * MIB, b"end"))
    point = cli.backup(path)["restore_point"]
    restored = cli.ok("restore", point, "--to", f"{cli.folder}/out", "--onto", f"web.raw={volume}")
    assert restored["disks"][0]["target"] == volume
    content = story.read(path)
    assert story.read(volume) == content
    os.unlink(path)

    disk = cli.backup("--no-checkpoint", volume)["disks"][0]
    assert disk["driver"] == "lvm-thin"
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/back")["disks"][0]["target"]
    assert story.read(out) == content
    cli.ok("targets", "--reap")


STEPS = (
    *("opened", "prepared", "frozen", "snapshotted", "thawed", "settled"),
    *("copied", "indexed", "published", "promoted", "superseded", "cleaned"),
)


def test_killed_anywhere_nothing_is_left(cli: story.Cli, volume: str) -> None:
    """kill -9 at every step, then targets --reap: what was there before, and at most the one checkpoint."""
    clean = listing()
    cli.backup(volume)
    for at, step in enumerate(STEPS):
        story.write(volume, (at * MIB, noise(at, 4096)))
        killed(cli, step, "backup", volume)
        cli.ok("targets", "--reap")
        left = listing() - clean
        assert len(left) <= 1 and clean <= listing(), (step, left ^ clean)
    story.write(volume, (16 * MIB, b"and then"))
    now = story.read(volume)
    assert cli.backup(volume)["disks"][0]["change_map"] == "thin_delta"
    story.write(volume, (0, noise(77, BLOCK)))
    cli.ok("restore", "latest", "--in-place")
    assert story.read(volume) == now
