"""Ctrl-C and SIGTERM at any moment: everything thawed, T removed or tagged, 130 or 143, and the next command works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import story
from story import MIB, Cli, Done, Stage, noise

BACKUP = ("opened", "prepared", "frozen", "snapshotted", "thawed", "settled", "copied", "indexed")
PUBLISHED = ("published", "promoted", "superseded", "cleaned")
RESTORE = ("opened", "prepared", "frozen", "snapshotted", "differed", "saved", "recorded", "written", "done")
BOTH = ("frozen", "copied", "recorded")  # elsewhere the signals take turns
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])

HARNESS = """
import os, signal, sys
from graincopy.cli.main import run

def step(name):
    if name == sys.argv[1]:
        os.kill(os.getpid(), int(sys.argv[2]))

sys.exit(run(sys.argv[3:], step))
"""


def at_steps(steps: tuple[str, ...]) -> pytest.MarkDecorator:
    """Each step with a signal, the signals taking turns, and some with both."""
    turns = [(step, (signal.SIGINT, signal.SIGTERM)[turn % 2]) for turn, step in enumerate(steps)]
    turns += [(step, (signal.SIGTERM, signal.SIGINT)[steps.index(step) % 2]) for step in BOTH if step in steps]
    return pytest.mark.parametrize(("step", "number"), turns, ids=[f"{step}-{number.name}" for step, number in turns])


def signalled(cli: Cli, step: str, number: int, *arguments: str) -> Done:
    """The command as a process that gets signal ``number`` when it passes ``step``."""
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, step, str(int(number)), "--config", cli.config, *arguments],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, **cli.environ},
    )
    return Done(done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))


def ended_well(done: Done, number: int) -> None:
    assert done.code == 128 + number, done
    assert "Traceback" not in done.err
    assert 1 <= done.err.count("\n") <= 3


@pytest.fixture
def path(stage: Stage, cli: Cli) -> str:
    """A disk that has been backed up and then changed."""
    made = story.make_disk(stage.path(0, "a.raw"), 4 * MIB, (0, noise(1, MIB)))
    cli.backup(made)
    story.write(made, (0, b"changed"), (3 * MIB, noise(2, MIB)))
    return made


@pytest.mark.root
@at_steps(BACKUP)
def test_a_backup_that_is_stopped(stage: Stage, cli: Cli, path: str, step: str, number: int) -> None:
    targets = stage.targets
    ended_well(signalled(cli, step, number, "backup", path), number)
    story.write(path, (MIB, b"not frozen"))  # it would hang
    os.sync()
    assert stage.targets == targets
    assert os.listdir(f"{cli.repo}/runs") == []
    assert len(cli.ok("points")) == 1
    document = cli.backup(path)
    assert document["disks"][0]["change_map"] == "extents"
    cli.undamaged()


@pytest.mark.root
@at_steps(PUBLISHED)
def test_a_backup_that_is_stopped_after_it_was_published(
    stage: Stage, cli: Cli, path: str, step: str, number: int
) -> None:
    ended_well(signalled(cli, step, number, "backup", path), number)
    points = cli.ok("points")
    assert len(points) == 2
    cli.ok("targets", "--reap")
    assert len(stage.targets) == 1
    assert points[0]["disks"][0]["checkpoint"] == stage.targets[0]
    document = cli.backup(path)
    assert (document["disks"][0]["change_map"], document["disks"][0]["dirty_bytes"]) == ("extents", 0)
    assert len(stage.targets) == 1
    assert os.listdir(f"{cli.repo}/runs") == []


@pytest.mark.root
@at_steps(RESTORE)
def test_a_restore_that_is_stopped(stage: Stage, cli: Cli, path: str, step: str, number: int) -> None:
    now = story.read(path)
    ended_well(signalled(cli, step, number, "restore", "latest", "--in-place"), number)
    assert os.listdir(f"{cli.repo}/runs") == []
    restores = cli.ok("targets")["restores"]
    if RESTORE.index(step) < RESTORE.index("recorded"):
        assert restores == []
        assert story.read(path) == now
        assert len(stage.targets) == 1
    else:
        assert [one["state"] for one in restores] == ["done" if step == "done" else "open"]
        cli.ok("undo", restores[0]["restore"])
        assert story.read(path) == now
    cli.ok("restore", "latest", "--in-place")
    assert story.read(path) == noise(1, MIB) + bytes(3 * MIB)


@SIGNALS
def test_a_backup_of_a_plain_file_that_is_stopped(plain: str, cli: Cli, number: int) -> None:
    path = story.make_disk(f"{plain}/a.raw", MIB, (0, noise(1, MIB)))
    for step in ("snapshotted", "indexed"):
        ended_well(signalled(cli, step, number, "backup", path), number)
    assert cli.ok("points") == []
    assert os.listdir(f"{cli.repo}/runs") == []
    assert cli.backup(path)["disks"][0]["stored_bytes"] == 0  # what was stored is found again
    cli.undamaged()


@SIGNALS
def test_files_half_written_leave_nothing(plain: str, cli: Cli, number: int) -> None:
    paths = [story.make_disk(f"{plain}/{name}.raw", MIB, (0, noise(1, MIB))) for name in "ab"]
    cli.backup(*paths)
    ended_well(signalled(cli, "written", number, "restore", "latest", "--to", f"{plain}/out"), number)
    assert os.listdir(f"{plain}/out") == ["a.raw"]  # whole; the other one is not there at all
    assert story.digest(f"{plain}/out/a.raw") == story.digest(paths[0])


@pytest.mark.parametrize(
    ("number", "command"),
    [(signal.SIGINT, ("expire", "--keep-last", "1")), (signal.SIGTERM, ("collect", "--patience", "0"))],
)
def test_keeping_in_order_that_is_stopped(plain: str, cli: Cli, number: int, command: tuple[str, ...]) -> None:
    path = story.make_disk(f"{plain}/a.raw", MIB, (0, noise(1, MIB)))
    for turn in range(3):
        story.write(path, (0, noise(turn, MIB)))
        cli.backup(path)
    if command[0] == "collect":
        cli.ok("expire", "--keep-last", "1")
    for step in {"expire": ("removing",), "collect": ("open", "mark", "condemn", "sweep")}[command[0]]:
        ended_well(signalled(cli, step, number, *command), number)
        cli.undamaged()
    cli.ok(*command)
    cli.ok("collect", "--patience", "0")
    cli.undamaged()
    assert [point["disks"][0]["size"] for point in cli.ok("points")] == [MIB]
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")["disks"][0]["target"]
    assert story.digest(out) == story.digest(path)


def test_a_reader_that_goes_away_ends_the_command_quietly(plain: str, cli: Cli) -> None:
    for number in range(3):
        cli.backup(story.make_disk(f"{plain}/{number}.raw", MIB))
    process = subprocess.Popen(
        cli.command("points"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **cli.environ}
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    complaint = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), complaint) == (141, b"")
