"""kill -9 at every named step of a restore in place and of its undo."""

from __future__ import annotations

import os
import subprocess

import lab
import scene
import story

from graincopy.testing.crash import CrashPoint

RECORDED = ("recorded", "written", "done")  # from here on the restore may have written, and can be undone


def _real(cli: story.Cli, *arguments: str) -> story.Done:
    """A process of its own: what it leaves on storage has a dead owner, as in real life."""
    return cli.process(*arguments, timeout=scene.LONG)


def _two_points(stage: scene.Storage, cli: story.Cli) -> tuple[str, dict[str, str]]:
    """An older point and what it holds; the disks are further on, and have a newer point."""
    cli.ok("backup", *stage.disks)
    older = scene.point_ids(cli)[0]
    contents = stage.digests()
    stage.scribble()
    cli.ok("backup", *stage.disks)
    return older, contents


def _restore(point: str) -> tuple[str, ...]:
    return ("restore", point, "--in-place")


def _restores(cli: story.Cli, state: str) -> list[str]:
    return [one["restore"] for one in cli.ok("targets")["restores"] if one["state"] == state]


def _must_be_sound(stage: scene.Storage, cli: story.Cli, points: list[str]) -> None:
    stage.must_be_thawed()
    assert scene.point_ids(cli) == points
    assert story.digest(stage.neighbour) == stage.written[stage.neighbour]
    cli.undamaged()


@lab.root_test
def test_restore_resumed(stage: scene.Storage, cli: story.Cli) -> None:
    """The same command finishes it."""
    older, contents = _two_points(stage, cli)
    points = scene.point_ids(cli)
    passed = scene.steps_of(cli, *_restore(older))
    assert {point.step for point in passed} >= {"opened", "frozen", "saved", *RECORDED}
    assert stage.digests() == contents
    undos = 1
    for at in passed:
        before = stage.scribble()
        scene.cut(cli, at, *_restore(older))
        _must_be_sound(stage, cli, points)
        if at.step not in RECORDED:
            assert stage.digests() == before, at
        elif at.step != "done":
            assert cli("backup", *stage.disks).code == 45, at  # half a restore is no state to keep
        cli.ok(*_restore(older))
        assert stage.digests() == contents, at
        undos += 1
        if at.step == "done":  # it was finished before; the second one is a restore of its own
            undos += 1
        cli.ok("targets", "--reap")
        scene.must_be_tidy(cli, stage, undos=undos * len(stage.luns))
    _must_be_sound(stage, cli, points)


@lab.root_test
def test_restore_undone(stage: scene.Storage, cli: story.Cli) -> None:
    """Once it may have written, ``undo`` takes it back; before, there is nothing to take back."""
    older, _ = _two_points(stage, cli)
    points = scene.point_ids(cli)
    passed = scene.steps_of(cli, *_restore(older))
    cli.ok("undo", _restores(cli, "done")[0])
    for at in passed:
        before = stage.scribble()
        scene.cut(cli, at, *_restore(older))
        found = _restores(cli, "done" if at.step == "done" else "open")
        assert len(found) == (at.step in RECORDED), at
        for restore in found:
            cli.ok("undo", restore)
        assert stage.digests() == before, at
        cli.ok("targets", "--reap")
        scene.must_be_tidy(cli, stage)
    _must_be_sound(stage, cli, points)


@lab.root_test
def test_undo(stage: scene.Storage, cli: story.Cli) -> None:
    """An undo that was cut off is finished by the same command."""
    older, contents = _two_points(stage, cli)
    points = scene.point_ids(cli)
    before = stage.digests()
    assert _real(cli, *_restore(older)).code == 0
    passed = scene.steps_of(cli, "undo", _restores(cli, "done")[0])
    assert {point.step for point in passed} >= {"opened", "checked", "undone", "marked", "cleaned"}
    for at in passed:
        assert _real(cli, *_restore(older)).code == 0
        assert stage.digests() == contents
        restore = _restores(cli, "done")[0]
        scene.cut(cli, at, "undo", restore)
        _must_be_sound(stage, cli, points)
        _finish_undo(cli, at, restore)
        assert stage.digests() == before, at
        cli.ok("targets", "--reap")
        scene.must_be_tidy(cli, stage)
    assert cli.ok("backup", *stage.disks)["base"] == points[0]


def _finish_undo(cli: story.Cli, at: CrashPoint, restore: str) -> None:
    done = cli("undo", restore)
    assert done.code == (56 if at.step in ("marked", "cleaned") else 0), f"{at}: {done}"  # 56: it is undone already


@lab.root_test
def test_restore_of_a_missing_file(stage: scene.Storage, cli: story.Cli) -> None:
    """Killed or not: undone, a file that was not there is not there again; without a record it never was."""
    older, contents = _two_points(stage, cli)
    gone = stage.disks[1]
    os.unlink(gone)
    passed = scene.steps_of(cli, *_restore(older))
    assert stage.digests() == contents
    cli.ok("undo", _restores(cli, "done")[0])
    assert not os.path.exists(gone)
    for at in passed:
        scene.cut(cli, at, *_restore(older))
        found = _restores(cli, "done" if at.step == "done" else "open")
        assert len(found) == (at.step in RECORDED), at
        for restore in found:
            cli.ok("undo", restore)
        assert not os.path.exists(gone), at
    cli.ok("targets", "--reap")
    scene.must_be_tidy(cli, stage)


@lab.root_test
def test_locked_driver_keeps_the_undo_in_the_repository(cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    """Where S has no snapshots, what is overwritten goes to the repository first: it survives kill and collect."""
    disk = _unsnapshottable(os.fspath(tmp_path))
    try:
        lab.write_at(disk, (0, story.noise(1, scene.SIZE)))
        older = cli.ok("backup", disk)["restore_point"]
        content = story.digest(disk)
        lab.write_at(disk, (5000, story.noise(2, 9000)))
        cli.ok("backup", disk)
        for at in scene.steps_of(cli, *_restore(older)):
            lab.write_at(disk, (70000, os.urandom(300)), (scene.SIZE - 1000, os.urandom(1000)))
            before, earlier = story.digest(disk), _restores(cli, "done")
            scene.cut(cli, at, *_restore(older))
            found = sorted({*_restores(cli, "done"), *_restores(cli, "open")} - set(earlier))
            assert len(found) == (at.step in RECORDED), at
            cli.ok("collect", "--patience", "1")
            for restore in found:
                cli.ok("undo", restore)
            assert story.digest(disk) == before, at
            cli.ok(*_restore(older))
            assert story.digest(disk) == content
        cli.undamaged()
        assert scene.open_runs(cli) == []
    finally:
        os.unlink(disk)


def _unsnapshottable(folder: str) -> str:
    """A path for a disk where files cannot be cloned."""
    probe = os.path.join(folder, "probe")
    lab.write_at(probe, (0, b"probe"))
    clones = subprocess.run(["cp", "--reflink=always", probe, f"{probe}2"], capture_output=True, check=False)
    return os.path.join("/dev/shm" if clones.returncode == 0 else folder, f"graincopy-crash-{os.getpid()}.raw")
