"""kill -9 at every named step of expire and collect: no restore point loses a byte, and the next one finishes."""

from __future__ import annotations

import os
import shutil

import lab
import scene
import story

EXPIRE = ("expire", "--keep-last", "1")
COLLECT = ("collect", "--patience", "0")


def _history(stage: scene.Storage, cli: story.Cli) -> tuple[dict[str, str], list[str]]:
    """Four points, of which the newest shares less than half of the packs of the first; what it holds, and all ids."""
    disk = stage.disks[0]
    cli.ok("backup", disk)
    for _ in range(2):
        stage.scribble(disk)
        cli.ok("backup", disk)
    lab.write_at(disk, (0, story.noise(3, scene.SIZE * 3 // 4)))
    cli.ok("backup", disk)
    return {disk: story.digest(disk)}, scene.point_ids(cli)


def _again(cli: story.Cli, kept: str) -> None:
    """The repository as it was when it was kept."""
    shutil.rmtree(cli.repo)
    shutil.copytree(kept, cli.repo)


@lab.root_test
def test_expire(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    contents, ids = _history(stage, cli)
    kept = os.path.join(tmp_path, "kept")
    shutil.copytree(cli.repo, kept)
    passed = scene.steps_of(cli, *EXPIRE)
    assert [point.step for point in passed] == ["removing"] * 3 + ["removed"]
    assert scene.point_ids(cli) == ids[:1]
    for at in passed:
        _again(cli, kept)
        scene.cut(cli, at, *EXPIRE)
        now = scene.point_ids(cli)
        assert now == [id for id in ids if id in now]
        assert len(now) == (len(ids) - at.count + 1 if at.step == "removing" else 1)
        cli.undamaged()
        cli.ok(*EXPIRE)
        assert scene.point_ids(cli) == ids[:1]
        scene.must_hold(cli, ids[0], contents, os.path.join(tmp_path, "out"))
    cli.ok("targets", "--reap")
    scene.must_be_tidy(cli, stage)


@lab.root_test
def test_collect(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    contents, ids = _history(stage, cli)
    scene.cut(cli, "indexed", "backup", stage.disks[1])  # a dead run, whose packs no point needs
    cli.ok(*EXPIRE)
    kept = os.path.join(tmp_path, "kept")
    shutil.copytree(cli.repo, kept)
    before = cli.size()
    passed = scene.steps_of(cli, *COLLECT)
    assert {point.step for point in passed} >= {"open", "condemn", "mark", "repack", "index", "unindex", "sweep"}
    best = cli.size()
    assert best < before - scene.SIZE
    shown = [point for point in passed if point.count == 1 or point == passed[-1]]
    for at in [*shown, *(point for point in passed if point.step == "sweep" and point.count == 3)]:
        _again(cli, kept)
        scene.cut(cli, at, *COLLECT)
        assert scene.point_ids(cli) == ids[:1]
        cli.undamaged()
        scene.must_hold(cli, ids[0], contents, os.path.join(tmp_path, "out"))
        cli.ok(*COLLECT)
        cli.undamaged()
        assert cli.size() < best + 4096, f"{at}: {cli.size()} bytes instead of {best}"
        assert scene.open_runs(cli) == []
        assert len(story.files_below(f"{cli.repo}/points")) == 1, at
    scene.must_hold(cli, ids[0], contents, os.path.join(tmp_path, "out"))
    stored = [disk["stored_bytes"] for disk in cli.ok("backup", stage.disks[0])["disks"]]
    assert stored == [0]  # nothing changed, and the collected repository still knows all of it


@lab.root_test
def test_backup_after_a_collect_that_died(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    """What a dead collect had condemned is not reused: it may be half swept, and the next collect sweeps the rest."""
    disk, other = stage.disks
    old = story.read(disk)
    _, ids = _history(stage, cli)
    cli.ok(*EXPIRE)
    kept = os.path.join(tmp_path, "kept")
    shutil.copytree(cli.repo, kept)
    lab.write_at(other, (0, old))
    contents = {other: story.digest(other)}
    for at in ("mark", "sweep:2", "pardon"):
        _again(cli, kept)
        scene.cut(cli, at, *COLLECT)
        with scene.stopped(cli, "indexed", "backup", other) as backup:  # it has decided what it reuses
            assert cli(*COLLECT).code == 42, at
            assert backup.go_on().code == 0
        cli.undamaged()
        cli.ok(*COLLECT)
        cli.undamaged()
        scene.must_hold(cli, "latest", contents, os.path.join(tmp_path, "out"))
        assert scene.point_ids(cli)[1:] == ids[:1]
