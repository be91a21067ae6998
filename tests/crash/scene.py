"""What the crash tests share: disks on real datastores, commands that are cut off, and what must hold afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lab
import story

from graincopy.testing.crash import CrashPoint, command, crash_points

MIB = lab.MIB
SIZE = 2 * MIB + 777  # bytes of a disk: no multiple of anything
SOON = 15.0  # seconds within which a thawed datastore takes a write, on a machine that has much else to do
LONG = 60.0  # seconds; no command here takes that long


@dataclass
class Storage:
    """Two datastores; a workload with a disk on each, and a neighbour that nobody may touch."""

    folder: str
    outer: lab.ReflinkFs
    luns: list[lab.Lun]
    seed: int = 0
    written: dict[str, str] = field(default_factory=dict)  # path → sha256 as last written by the test

    @property
    def disks(self) -> list[str]:
        """The workload."""
        return [os.path.join(lun.path, f"disk{at}.raw") for at, lun in enumerate(self.luns)]

    @property
    def neighbour(self) -> str:
        """A disk on the first datastore that no backup names."""
        return os.path.join(self.luns[0].path, "neighbour.raw")

    def clear(self) -> None:
        """Fresh disks with new content, no targets."""
        for target in self.targets():
            os.unlink(target)
        for path in (*self.disks, self.neighbour):
            self.renew(path)

    def renew(self, path: str) -> str:
        """New content for all of ``path``; its sha256."""
        self.seed += 1
        lab.write_at(path, (0, story.noise(self.seed, SIZE)), sync=False)
        os.truncate(path, SIZE)
        return self._note(path)

    def scribble(self, *paths: str) -> dict[str, str]:
        """Some ordinary writes into ``paths`` (the workload without any), and the sha256 of each."""
        for path in paths or self.disks:
            self.seed += 1
            at = (self.seed * 7919 * 512) % (SIZE - 5000)
            story.write(path, (at, story.noise(self.seed, 4096)), (SIZE - 100, story.noise(self.seed, 100)))
            self._note(path)
        return {path: self.written[path] for path in paths or self.disks}

    def _note(self, path: str) -> str:
        self.written[path] = story.digest(path)
        return self.written[path]

    def digests(self) -> dict[str, str]:
        """What the workload's disks hold now."""
        return {path: story.digest(path) for path in self.disks}

    def targets(self) -> list[str]:
        """Every file of ours on the storage."""
        places = [self.outer.path, *(lun.path for lun in self.luns)]
        return [path for place in places for path in story.files_below(os.path.join(place, ".graincopy"))]

    def must_be_thawed(self) -> None:
        """Both datastores take a durable write soon."""
        for lun in self.luns:
            probe = os.path.join(lun.path, "probe")
            process = subprocess.Popen(["dd", "if=/dev/zero", f"of={probe}", "count=1", "conv=fsync", "status=none"])
            try:
                assert process.wait(SOON) == 0
            except subprocess.TimeoutExpired:
                lab.run("fsfreeze", "--unfreeze", lun.path, check=False)  # else nothing could be taken down
                process.wait(LONG)
                raise AssertionError(f"{lun.path} is frozen") from None
            os.unlink(probe)


def steps_of(cli: story.Cli, *arguments: str) -> tuple[CrashPoint, ...]:
    """Run a command to its end; every point where it could have been cut off."""
    done = subprocess.run(listing(cli, *arguments), capture_output=True, timeout=LONG, check=False)
    assert done.returncode == 0, done.stderr
    found = crash_points(done.stdout.decode().split())
    assert found
    return found


def listing(cli: story.Cli, *arguments: str) -> tuple[str, ...]:
    """The process that runs a command to its end and prints its steps."""
    return command(["--config", cli.config, "--repo", cli.repo, *arguments])


def cut(cli: story.Cli, at: CrashPoint | str, *arguments: str, number: str = "KILL") -> story.Done:
    """Run a command as a real process that signals itself ``at`` a step; a kill must have killed it."""
    done = subprocess.run(
        _command(cli, at, number, arguments), capture_output=True, timeout=LONG, check=False, env=_environ(cli)
    )
    result = story.Done(done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))
    if number == "KILL":
        assert result.code == -signal.SIGKILL, f"{at}: {result}"
    return result


@dataclass
class Stopped:
    """A command that stands still in the middle."""

    process: subprocess.Popen[bytes]

    def go_on(self) -> story.Done:
        """Wake it, and let it come to its end."""
        self.process.send_signal(signal.SIGCONT)
        out, err = self.process.communicate(timeout=LONG)
        return story.Done(self.process.returncode, os.fsdecode(out), os.fsdecode(err))


@contextmanager
def stopped(cli: story.Cli, at: str, *arguments: str) -> Iterator[Stopped]:
    """A command that has stopped itself (SIGSTOP) ``at`` a step. It does not outlive the block."""
    process = start(cli, *arguments, at=at)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            process.returncode = os.waitstatus_to_exitcode(status)
            raise AssertionError(f"it ended before {at}: {process.communicate()}")
        yield Stopped(process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=LONG)


def start(cli: story.Cli, *arguments: str, at: str | None = None) -> subprocess.Popen[bytes]:
    """Begin a command as a process of its own; ``at``: with a stop there."""
    line = cli.command(*arguments) if at is None else _command(cli, at, "STOP", arguments)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environ(cli))


def _command(cli: story.Cli, at: CrashPoint | str, number: str, arguments: Sequence[str]) -> tuple[str, ...]:
    point = at if isinstance(at, CrashPoint) else CrashPoint.parse(at)
    return command(["--config", cli.config, *arguments], point, number)


def _environ(cli: story.Cli) -> dict[str, str]:
    return {**os.environ, **cli.environ}


# --- what must hold -------------------------------------------------------------------------------


def point_ids(cli: story.Cli) -> list[str]:
    """Ids of all restore points that are listed, newest first."""
    return [point["restore_point"] for point in cli.ok("points")]


def must_hold(cli: story.Cli, point: str, contents: dict[str, str], folder: str) -> None:
    """``point`` restores to files with these sha256, by path of the disk."""
    names = {disk["path"]: disk["name"] for disk in cli.ok("show", point)["disks"]}
    assert set(names) == set(contents)
    cli.ok("restore", point, "--to", folder)
    assert {path: story.digest(os.path.join(folder, names[path])) for path in contents} == contents
    for name in names.values():
        os.unlink(os.path.join(folder, name))


def must_be_tidy(cli: story.Cli, stage: Storage, undos: int = 0, others: Sequence[str] = ()) -> None:
    """Nothing of ours is left but the checkpoint that the newest point names, ``undos`` undo targets and ``others``."""
    points = point_ids(cli)
    disks = cli.ok("show", points[0])["disks"] if points else []
    wanted = {disk["checkpoint"] for disk in disks if disk["checkpoint"]} | set(others)
    found = set(stage.targets())
    assert wanted <= found
    assert len(found - wanted) == undos, found - wanted
    assert open_runs(cli) == []


def open_runs(cli: story.Cli) -> list[str]:
    """Objects that a run has in the repository while it is open."""
    return [path for kind in ("runs", "beats", "condemned") for path in story.files_below(f"{cli.repo}/{kind}")]


def wait_until(seconds: float, true: Any, pause: float = 0.05) -> bool:
    """Whether ``true()`` becomes true within ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True
