"""No space: on the medium, on S, for T, for restored files. Nothing is lost, and the same command works afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import lab
import pytest
import story
from story import MIB, Cli, Stage, large_blocks, noise

pytestmark = pytest.mark.root


@contextlib.contextmanager
def tmpfs(path: str, size: int) -> Iterator[str]:
    """A file system in memory that runs full."""
    os.makedirs(path)
    lab.run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", path)
    try:
        yield path
    finally:
        lab.unmount(path)


def fill(path: str) -> str:
    """A file that takes all the space that there is."""
    with open(path, "xb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(MIB)):
            os.fsync(file.fileno())
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            os.fsync(file.fileno())
    return path


def test_the_medium_runs_full_in_the_middle_of_a_backup(stage: Stage, tmp_path: object) -> None:
    path = story.make_disk(stage.path(0, "a.raw"), 24 * MIB, (0, noise(1, 24 * MIB)))
    with tmpfs(f"{tmp_path}/medium", 22 * MIB) as medium:
        cli = Cli(f"{tmp_path}/graincopy", repo=f"{medium}/repo").init()
        done = cli("backup", path)
        assert done.code == 37, done
        assert "collect" in done.err
        assert stage.targets == []
        assert os.listdir(f"{cli.repo}/runs") == []
        assert cli.ok("points") == []
        cli.undamaged()
        lab.run("mount", "-o", f"remount,size={64 * MIB}", medium)
        again = cli.backup(path)
        assert story.digest(cli.ok("restore", "latest", "--to", f"{tmp_path}/o")["disks"][0]["target"]) == story.digest(
            path
        )
        assert again["disks"][0]["size"] == 24 * MIB


def test_the_medium_is_full_when_an_undo_has_to_be_kept(plain: str, tmp_path: object) -> None:
    path = story.make_disk(f"{plain}/a.raw", 4 * MIB, (0, noise(1, 4 * MIB)))
    with tmpfs(f"{tmp_path}/medium", 24 * MIB) as medium:
        cli = Cli(f"{tmp_path}/graincopy", repo=f"{medium}/repo").init()
        cli.backup(path)
        story.write(path, (0, noise(2, 4 * MIB)))
        now = story.digest(path)
        filler = fill(f"{medium}/filler")
        done = cli("restore", "latest", "--in-place")
        assert done.code == 37, done
        assert story.digest(path) == now
        assert cli.ok("targets")["restores"] == []
        os.unlink(filler)
        cli.ok("restore", "latest", "--in-place")
        assert story.read(path) == noise(1, 4 * MIB)


def test_there_is_no_room_on_s_and_nothing_is_written(stage: Stage, cli: Cli) -> None:
    path = story.make_disk(stage.path(2, "a.raw"), 16 * MIB, (0, noise(1, 16 * MIB)))
    cli.backup(path)
    os.truncate(path, 0)
    fill(stage.path(2, "filler"))
    targets = stage.targets
    done = cli("restore", "latest", "--in-place")
    assert done.code == 55, done
    assert os.path.getsize(path) == 0
    assert len(stage.targets) == len(targets)
    assert cli.ok("targets")["restores"] == []
    os.unlink(stage.path(2, "filler"))
    cli.ok("restore", "latest", "--in-place")
    assert story.read(path) == noise(1, 16 * MIB)


def test_there_is_no_room_for_a_file_that_is_missing_and_none_is_made(stage: Stage, cli: Cli) -> None:
    """Also not for the other one, which is there and has room: the record is void, and its undo snapshot goes."""
    path = story.make_disk(stage.path(2, "a.raw"), 16 * MIB, (0, noise(1, 16 * MIB)))
    other = story.make_disk(stage.path(0, "b.raw"), MIB, (0, noise(2, MIB)))
    cli.backup(path, other)
    os.unlink(path)
    story.write(other, (0, b"later"))
    fill(stage.path(2, "filler"))
    targets, now = stage.targets, story.digest(other)
    done = cli("restore", "latest", "--in-place")
    assert done.code == 55, done
    assert not os.path.exists(path)
    assert (story.digest(other), stage.targets) == (now, targets)
    assert cli.ok("targets")["restores"] == []
    os.unlink(stage.path(2, "filler"))
    cli.ok("restore", "latest", "--in-place")
    assert (story.read(path), story.read(other)) == (noise(1, 16 * MIB), noise(2, MIB))


@pytest.mark.parametrize("end", ["finished", "undone"])
def test_the_room_on_s_goes_while_a_restore_runs(stage: Stage, cli: Cli, end: str) -> None:
    path = story.make_disk(stage.path(2, "a.raw"), 16 * MIB, (0, noise(1, 16 * MIB)))
    cli.backup(path)
    os.truncate(path, 5)

    def step(name: str) -> None:
        if name == "recorded":
            fill(stage.path(2, "filler"))

    done = cli("restore", "latest", "--in-place", step=step)
    assert done.code == 55, done
    assert [one["state"] for one in cli.ok("targets")["restores"]] == ["open"]
    os.unlink(stage.path(2, "filler"))
    if end == "finished":
        cli.ok("restore", "latest", "--in-place")
        assert story.read(path) == noise(1, 16 * MIB)
    else:
        cli.ok("undo", cli.ok("targets")["restores"][0]["restore"])
        assert story.read(path) == noise(1, 16 * MIB)[:5]


def test_there_is_no_room_for_t(tmp_path: object, cli: Cli) -> None:
    with (
        lab.ReflinkFs(tmp_path, "xfs", 320 * MIB, "tight") as outer,
        lab.Lun(outer.path, "lun", 32 * MIB, "ext4", mount_at=f"{tmp_path}/ds") as lun,
    ):
        large_blocks(lun)
        path = story.make_disk(f"{lun.path}/a.raw", 4 * MIB, (0, noise(1, 4 * MIB)))
        lab.run("sync", "-f", path)
        lab.run("fallocate", "-l", str(32 * MIB), lun.image)  # or S itself could not be written any more
        filler = fill(f"{outer.path}/filler")
        done = cli("backup", path)
        assert done.code == 25, done
        assert story.files_below(f"{outer.path}/.graincopy") == []
        assert cli.ok("points") == []
        story.write(path, (0, noise(1, 4096)))
        os.sync()  # nothing stays frozen
        os.unlink(filler)
        cli.backup(path)


def test_there_is_no_room_for_restored_files(stage: Stage, tmp_path: object, cli: Cli) -> None:
    path = story.make_disk(stage.path(0, "a.raw"), 8 * MIB, (0, noise(1, 8 * MIB)))
    cli.backup(path)
    with tmpfs(f"{tmp_path}/small", 4 * MIB) as small:
        for more in ((), ("--preallocate",)):
            done = cli("restore", "latest", "--to", f"{small}/out", *more)
            assert done.code == 55, done
            assert story.files_below(small) == []
