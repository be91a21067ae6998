"""kill -9 at every named step of a backup, the first one and an incremental one."""

from __future__ import annotations

import os
import shutil

import lab
import pytest
import scene
import story

from graincopy.testing.crash import CrashPoint

STORED = ("indexed", "published", "promoted", "superseded", "cleaned")  # from here on every chunk can be found again
PUBLISHED = ("published", "promoted", "superseded", "cleaned")


@lab.root_test
def test_first_backup(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    empty = os.path.join(tmp_path, "empty")
    shutil.copytree(cli.repo, empty)
    points = scene.steps_of(cli, "backup", *stage.disks)
    assert {point.step for point in points} >= {"opened", "frozen", "snapshotted", "copied", *STORED}
    stage.clear()
    for at in points:
        shutil.rmtree(cli.repo)
        shutil.copytree(empty, cli.repo)
        scene.cut(cli, at, "backup", *stage.disks)
        _must_be_sound(stage, cli, at, before=[])
        cli.ok("targets", "--reap")
        scene.must_be_tidy(cli, stage)
        _must_go_on(stage, cli, at, tmp_path)


@lab.root_test
def test_incremental_backup(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    cli.ok("backup", *stage.disks)
    stage.scribble()
    points = scene.steps_of(cli, "backup", *stage.disks)
    for at in points:
        stage.scribble()
        before = scene.point_ids(cli)
        scene.cut(cli, at, "backup", *stage.disks)
        _must_be_sound(stage, cli, at, before)
        _must_go_on(stage, cli, at, tmp_path)
        assert {disk["change_map"] for disk in cli.ok("show", "latest")["disks"]} == {"extents"}, at


def _must_be_sound(stage: scene.Storage, cli: story.Cli, at: CrashPoint, before: list[str]) -> None:
    stage.must_be_thawed()
    assert {path: story.digest(path) for path in stage.written} == stage.written, at
    now = scene.point_ids(cli)
    assert now[len(now) - len(before) :] == before
    assert len(now) - len(before) == (at.step in PUBLISHED), at
    cli.undamaged()


def _must_go_on(stage: scene.Storage, cli: story.Cli, at: CrashPoint, tmp_path: os.PathLike[str]) -> None:
    """What was published is right; the next backup leaves nothing behind and stores nothing twice."""
    contents = stage.digests()
    if at.step in PUBLISHED:
        scene.must_hold(cli, "latest", contents, os.path.join(tmp_path, "out"))
    rerun = cli.ok("backup", *stage.disks)
    stored = sum(disk["stored_bytes"] for disk in rerun["disks"])
    assert not (at.step in STORED and stored), f"{at}: {stored} bytes were stored again"
    scene.must_be_tidy(cli, stage)
    scene.must_hold(cli, "latest", contents, os.path.join(tmp_path, "out"))


@lab.root_test
@pytest.mark.parametrize(("number", "code"), [("INT", 130), ("TERM", 143)])
def test_interrupted(stage: scene.Storage, cli: story.Cli, number: str, code: int) -> None:
    """Ctrl-C and SIGTERM need no reaper: everything is thawed and taken away by the run itself."""
    cli.ok("backup", *stage.disks)
    for step in ("opened", "prepared", "frozen", "snapshotted", "copied:2", "indexed"):
        stage.scribble()
        before = scene.point_ids(cli)
        done = scene.cut(cli, step, "backup", *stage.disks, number=number)
        assert (done.code, len(done.err.splitlines()) <= 3) == (code, True), f"{step}: {done}"
        stage.must_be_thawed()
        assert scene.point_ids(cli) == before
        scene.must_be_tidy(cli, stage)
    cli.undamaged()
