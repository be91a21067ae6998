"""The harness itself: it cuts off where it is told to, and says so when it never comes there. Needs no root."""

from __future__ import annotations

import os
import subprocess

import lab
import pytest
import scene
import story

from graincopy.testing.crash import NOT_REACHED, CrashPoint, Passing, crash_points


def test_every_step_each_time_is_a_crash_point() -> None:
    passed = ["opened", "copied", "copied", "published"]
    assert [str(point) for point in crash_points(passed)] == ["opened:1", "copied:1", "copied:2", "published:1"]
    assert CrashPoint.parse("copied") == CrashPoint("copied", 1)
    assert CrashPoint.parse("copied:2") == CrashPoint("copied", 2)


@pytest.mark.parametrize("text", ["", ":1", "copied:", "copied:0", "copied:-1", "copied:x"])
def test_what_is_no_crash_point(text: str) -> None:
    with pytest.raises(ValueError, match="STEP"):
        CrashPoint.parse(text)


def test_it_strikes_once_and_in_time() -> None:
    struck: list[int] = []
    passing = Passing(CrashPoint("copied", 2), lambda: struck.append(len(passing.passed)))
    for step in ("opened", "copied", "frozen", "copied", "copied"):
        passing(step)
    assert struck == [4]
    assert passing.reached


@pytest.fixture
def disk(tmp_path: os.PathLike[str]) -> str:
    """A small disk, wherever the tests lie."""
    path = os.path.join(tmp_path, "disk.raw")
    lab.write_at(path, (0, story.noise(1, 200_000)))
    return path


@pytest.mark.parametrize(("number", "code"), [("KILL", -9), ("TERM", 143), ("INT", 130)])
def test_signals(cli: story.Cli, disk: str, number: str, code: int) -> None:
    assert scene.cut(cli, "copied", "backup", disk, number=number).code == code
    assert scene.point_ids(cli) == []


def test_a_stopped_command_goes_on(cli: story.Cli, disk: str) -> None:
    with scene.stopped(cli, "indexed", "backup", disk) as backup:
        assert scene.point_ids(cli) == []
        assert backup.go_on().code == 0
    assert len(scene.point_ids(cli)) == 1


def test_a_step_that_is_never_reached(cli: story.Cli, disk: str) -> None:
    done = scene.cut(cli, "copied:2", "backup", disk, number="TERM")
    assert (done.code, "did not reach copied:2" in done.err) == (NOT_REACHED, True)
    assert len(scene.point_ids(cli)) == 1


def test_the_list_is_all_that_is_on_stdout(cli: story.Cli, disk: str) -> None:
    done = subprocess.run(
        scene.listing(cli, "backup", disk, "--json"), capture_output=True, timeout=scene.LONG, check=True
    )
    steps = done.stdout.decode().split("\n")
    assert steps[0] == "opened"
    assert steps[-2:] == ["cleaned", ""]
    assert b"restore_point" in done.stderr
