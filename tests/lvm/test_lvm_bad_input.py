"""What goes wrong around LVM, by the command line: one clear sentence, S as it was, and afterwards no trace."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

import pytest
import story
import thin
from story import GRAIN, MIB, noise
from test_lvm_story import STEPS, killed

from graincopy.testing.lvm_lab import BLOCK, command, listing
from graincopy.volumes.lvm_thin_tools import Lvm

GUEST = True
SIZE = 16 * MIB


@pytest.fixture
def cli(tmp_path: os.PathLike[str]) -> story.Cli:
    return story.Cli(os.path.join(tmp_path, "graincopy")).init()


@pytest.fixture(scope="module")
def pools() -> Iterator[thin.ThinStorage]:
    """A volume group with a pool of 48 MiB that fails writes when it is full, and another pool beside it."""
    made = thin.ThinStorage(thin.SECOND, "small", "pool", size="48M")
    command("lvchange", "-q", "--errorwhenfull", "y", "small/pool")
    command("lvcreate", "-q", "-y", "-T", "-L", "32M", "--chunksize", "64k", "small/other")
    yield made
    made.close()


@pytest.fixture
def small(pools: thin.ThinStorage) -> Iterator[thin.ThinStorage]:
    """The pools, and afterwards nothing in them."""
    yield pools
    pools.remove(*command("lvs", "--noheadings", "-o", "lv_name", "-S", "vg_name=small && segtype=thin").split())


@pytest.fixture
def volume(small: thin.ThinStorage) -> str:
    """A thin volume of which 2 MiB were written."""
    path = small.create("disk", SIZE)
    story.write(path, (0, noise(1, MIB)), (8 * MIB, noise(2, MIB)))
    os.sync()
    return path


def fill(small: thin.ThinStorage, share: float) -> None:
    """Write into a neighbour until that share of the pool's data space is in use."""
    path = small.create("neighbour", 48 * MIB)
    with open(path, "r+b", buffering=0) as file:
        for at in range(0, 48 * MIB, MIB):
            if Lvm().pool_status(small.vg, small.pool).data_used >= share:
                return
            os.pwrite(file.fileno(), noise(at, MIB), at)
            os.fsync(file.fileno())
            command("dmsetup", "status", "small-pool-tpool")  # the kernel commits, and its numbers are those of now


def at(step: str, deed: Callable[[], object]) -> Callable[[str], None]:
    """``deed``, when the run comes to ``step``."""
    return lambda name: deed() if name == step else None  # type: ignore[return-value]


def refused(cli: story.Cli, volume: str, code: int, *words: str, step: Callable[[str], None] | None = None) -> None:
    """A backup ends with ``code`` and one clear sentence; S is as it was; nothing is published and nothing left."""
    before, content = listing(), story.read(volume)
    published = len(cli.ok("points"))
    done = cli("backup", volume, step=step)
    assert done.code == code, done
    assert len(done.err.splitlines()) <= 3 and all(word in done.err for word in words), done
    assert story.read(volume) == content
    assert len(cli.ok("points")) == published
    cli.ok("targets", "--reap")
    assert {line for line in listing() if "neighbour" not in line} == {
        line for line in before if "neighbour" not in line
    }


# --- the pool fills up ------------------------------------------------------------------------------


def test_the_pool_is_full_before_the_run(small: thin.ThinStorage, volume: str, cli: story.Cli) -> None:
    fill(small, 0.96)
    refused(cli, volume, 25, "thin pool small/pool", "of its data space in use, 95% allowed")


@pytest.mark.parametrize("step", ["prepared", "settled"])
def test_the_pool_fills_up_during_the_run(small: thin.ThinStorage, volume: str, cli: story.Cli, step: str) -> None:
    """It gives up before the pool is full, and its T is gone: nobody who writes to the pool is stopped by it."""
    refused(cli, volume, 25, "of its data space in use", step=at(step, lambda: fill(small, 0.96)))
    small.remove("neighbour")
    cli.backup(volume)


def test_the_pool_is_full_to_the_last_block(small: thin.ThinStorage, volume: str, cli: story.Cli) -> None:
    def burst() -> None:
        with pytest.raises(OSError):
            fill(small, 2.0)

    refused(cli, volume, 25, "data space", step=at("settled", burst))
    small.remove("neighbour")
    cli.backup(volume)


# --- S and T are not what they were -----------------------------------------------------------------


def test_the_target_is_removed_under_the_run(small: thin.ThinStorage, volume: str, cli: story.Cli) -> None:
    def remove() -> None:
        small.remove(*command("lvs", "--noheadings", "-o", "lv_name", "-S", "lv_name=~^graincopy-").split())

    refused(cli, volume, 26, "it was removed", step=at("settled", remove))


@pytest.mark.parametrize("passed", ["opened", "prepared"])
@pytest.mark.parametrize("size", [SIZE + MIB, SIZE - MIB], ids=["grows", "shrinks"])
def test_a_volume_resized_between_plan_and_snapshot(
    small: thin.ThinStorage, volume: str, cli: story.Cli, size: int, passed: str
) -> None:
    cli.backup(volume)

    def resize() -> None:
        command("lvresize", "-f", "-y", "-q", "-L", f"{size}b", "small/disk")

    done = cli("backup", volume, step=at(passed, resize))
    assert done.code in (0, 16), done
    if done.code == 16:
        assert len(done.err.splitlines()) <= 3, done
        cli.backup(volume)
    assert cli.ok("show", "latest")["disks"][0]["size"] == size
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert story.read(out["disks"][0]["target"]) == story.read(volume)


def move(small: thin.ThinStorage) -> None:
    """As people move a volume to another pool: copy it, remove it, rename the copy."""
    command("lvcreate", "-q", "-y", "-T", "-V", f"{SIZE}b", "-n", "copy", "small/other")
    command("dd", "if=/dev/small/disk", "of=/dev/mapper/small-copy", "bs=1M", "conv=sparse,fsync")
    small.remove("disk")
    command("lvrename", "-q", "small", "copy", "disk")


def test_a_volume_moved_to_another_pool_is_compared(small: thin.ThinStorage, volume: str, cli: story.Cli) -> None:
    cli.backup(volume)
    move(small)
    story.write(volume, (GRAIN, b"changed"))
    disk = cli.backup(volume)["disks"][0]
    assert disk["change_map"].startswith("compared: "), disk
    assert disk["dirty_bytes"] == GRAIN
    cli.ok("targets", "--reap")
    assert command("lvs", "--noheadings", "-o", "pool_lv", "-S", "lv_name=~^graincopy-").split() == ["other"]
    content = story.read(volume)
    restored = cli.ok("restore", "latest~1", "--in-place")
    assert restored["disks"][0]["differing_bytes"] == GRAIN
    cli.ok("undo", restored["restore"])
    assert story.read(volume) == content


def test_a_volume_moved_to_another_pool_between_plan_and_snapshot(
    small: thin.ThinStorage, volume: str, cli: story.Cli
) -> None:
    content = story.read(volume)
    done = cli("backup", volume, step=at("prepared", lambda: move(small)))
    assert done.code in (16, 24), done
    assert len(done.err.splitlines()) <= 3, done
    assert (cli.ok("points"), story.read(volume)) == ([], content)
    cli.backup(volume)


# --- tools that answer garbage ----------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a script in the place of a tool, from then on."""

    def put(name: str, script: str) -> None:
        folder = os.path.join(tmp_path, "tools")
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(f"#!/bin/sh\n{script}\n")
        os.chmod(os.path.join(folder, name), 0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return put


REAL = "/usr/sbin/thin_delta"
GARBAGE = {
    "nothing": "exit 0",
    "an error": "echo 'metadata contains errors' >&2; exit 1",
    "half an answer": f'{REAL} "$@" | head -c 200',
    "another language": "echo '<html>502 Bad Gateway</html>'",
    "about others": f'{REAL} "$@" | sed \'s/left="/left="9/\'',
    "other blocks": f'{REAL} "$@" | sed \'s/data_block_size="128"/data_block_size="1024"/\'',
}


@pytest.mark.parametrize("said", GARBAGE)
def test_thin_delta_answers_garbage(
    small: thin.ThinStorage, volume: str, cli: story.Cli, tools: Callable[[str, str], None], said: str
) -> None:
    """All is compared, and the reason told; the pool's metadata snapshot is given back."""
    cli.backup(volume)
    story.write(volume, (GRAIN, b"changed"))
    tools("thin_delta", f'case "$1" in -V) exec {REAL} -V;; esac\n{GARBAGE[said]}')
    disk = cli.backup(volume)["disks"][0]
    assert disk["change_map"].startswith("compared: "), disk
    assert "thin_delta" in disk["change_map"]
    assert disk["dirty_bytes"] == GRAIN
    assert Lvm().pool_status("small", "pool").held is None


@pytest.mark.parametrize("step", ["opened", "prepared", "settled"])
def test_lvs_answers_garbage(
    small: thin.ThinStorage, volume: str, cli: story.Cli, tools: Callable[[str, str], None], step: str
) -> None:
    """From a moment of the run on. What cannot be taken away then is, when it answers again."""
    before, content = listing(), story.read(volume)
    done = in_child(cli, step, lambda: tools("lvs", "echo '<html>502 Bad Gateway</html>'"), "backup", volume)
    assert done.code in (24, 26), done
    assert "lvs answered with no report" in done.err and len(done.err.splitlines()) <= 3, done
    assert (cli.ok("points"), story.read(volume)) == ([], content)
    cli.ok("targets", "--reap")
    assert listing() == before


def in_child(cli: story.Cli, step: str, deed: Callable[[], object], *arguments: str) -> story.Done:
    """A command in a process of its own, so that whatever it leaves has no living owner; ``deed`` is done there."""
    answer = os.path.join(cli.folder, "answer")
    child = os.fork()
    if not child:
        try:
            done = cli(*arguments, step=at(step, deed))
            with open(answer, "w", encoding="utf-8") as file:
                json.dump([done.code, done.out, done.err], file)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with open(answer, encoding="utf-8") as file:
        return story.Done(*json.load(file))


def test_lvs_answers_garbage_when_all_is_copied(
    small: thin.ThinStorage, volume: str, cli: story.Cli, tools: Callable[[str, str], None]
) -> None:
    """The restore point is published; that its target is the checkpoint now is made up for by the next run."""
    done = in_child(cli, "copied", lambda: tools("lvs", "echo '<html>502 Bad Gateway</html>'"), "backup", volume)
    assert (done.code, len(cli.ok("points"))) == (3, 1), done
    assert "lvs answered with no report" in done.err, done
    story.write(volume, (GRAIN, b"changed"))
    assert cli.backup(volume)["disks"][0]["change_map"] == "thin_delta"


def test_lvs_answers_garbage_from_the_beginning(
    small: thin.ThinStorage, volume: str, cli: story.Cli, tools: Callable[[str, str], None]
) -> None:
    content = story.read(volume)
    tools("lvs", "echo '<html>502 Bad Gateway</html>'")
    done = cli("backup", volume)
    assert done.code in (15, 24) and len(done.err.splitlines()) <= 3, done
    assert story.read(volume) == content


# --- killed -----------------------------------------------------------------------------------------


def test_killed_while_the_metadata_snapshot_is_held(
    small: thin.ThinStorage,
    volume: str,
    cli: story.Cli,
    tools: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever runs next gives it back; with the checkpoint, all is there to go on from."""
    cli.backup(volume)
    usual = os.environ["PATH"]
    story.write(volume, (GRAIN, b"changed"))
    tools("thin_delta", f'case "$1" in -V) exec {REAL} -V;; esac\nkill -9 $PPID')
    child = os.fork()
    if not child:
        try:
            cli("backup", volume)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    monkeypatch.setenv("PATH", usual)
    assert Lvm().pool_status("small", "pool").held is not None
    cli.ok("targets", "--reap")
    assert Lvm().pool_status("small", "pool").held is None
    assert not any("holds-metadata" in line for line in listing())
    assert cli.backup(volume)["disks"][0]["change_map"] == "thin_delta"


def test_killed_anywhere_without_a_checkpoint_nothing_stays(
    small: thin.ThinStorage, volume: str, cli: story.Cli
) -> None:
    before = listing()
    for number, step in enumerate(one for one in STEPS if one not in ("promoted", "superseded")):
        story.write(volume, (number * BLOCK, noise(number, 4096)))
        killed(cli, step, "backup", "--no-checkpoint", volume)
        cli.ok("targets", "--reap")
        assert listing() == before, step
    cli.undamaged()
