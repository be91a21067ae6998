"""What one host began and another has to end: nobody there can tell whether the first one's process lives.

The commands that this process runs are those of another host; those that run as processes of their own are of this one.
"""

from __future__ import annotations

import os

import lab
import pytest
import scene
import story

from graincopy.app import host

SILENCE = ("targets", "--reap", "--silence", "1")


@pytest.fixture
def other(cli: story.Cli, tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> story.Cli:
    """Another host: the repository and the storage are the same; state, cache and machine id are not."""
    monkeypatch.setattr(host, "_machine_id", lambda: "another")
    return story.Cli(os.path.join(tmp_path, "other"), repo=cli.repo)


def _done(done: story.Done) -> None:
    assert done.code == 0, done


@lab.root_test
@pytest.mark.parametrize("end", ["finished", "undone"])
def test_a_restore_is_ended(stage: scene.Storage, cli: story.Cli, other: story.Cli, end: str) -> None:
    _done(cli.process("backup", *stage.disks))
    contents, before = stage.digests(), stage.scribble()
    scene.cut(cli, "written:1", "restore", "latest", "--in-place")
    assert other("backup", *stage.disks).code == 45
    assert other("restore", "latest", "--in-place").code == 41  # it may still be at it
    other.ok("targets", "--reap")
    assert other("restore", "latest", "--in-place").code == 41
    (open_restore,) = other.ok("targets")["restores"]
    assert other("undo", open_restore["restore"]).code == 41
    other.ok(*SILENCE)
    if end == "finished":
        document = other.ok("restore", "latest", "--in-place")
        assert {disk["how"] for disk in document["disks"]} == {"resumed"}
        assert stage.digests() == contents
    other.ok("undo", open_restore["restore"])
    assert stage.digests() == before
    other.ok("backup", *stage.disks)
    other.undamaged()


@lab.root_test
def test_a_backup_that_may_live_is_left_alone(stage: scene.Storage, cli: story.Cli, other: story.Cli) -> None:
    with scene.stopped(cli, "copied", "backup", *stage.disks) as backup:
        targets = stage.targets()
        other.ok("targets", "--reap")
        assert (stage.targets(), len(scene.open_runs(cli))) == (targets, 1)
        assert other("backup", *stage.disks).code == 41
        _done(backup.go_on())
    assert len(scene.point_ids(other)) == 1
    other.undamaged()


@lab.root_test
def test_a_backup_that_gives_no_sign_of_life_is_fenced(
    stage: scene.Storage, cli: story.Cli, other: story.Cli, tmp_path: os.PathLike[str]
) -> None:
    """It is not dead at all, and loses when it wakes."""
    with scene.stopped(cli, "indexed", "backup", *stage.disks) as backup:
        other.ok(*SILENCE)
        contents = stage.scribble()
        point = other.ok("backup", *stage.disks)["restore_point"]
        answer = backup.go_on()
    assert answer.code == 40, answer
    assert scene.point_ids(other) == [point]
    scene.must_hold(other, point, contents, os.path.join(tmp_path, "out"))
    other.undamaged()
    other.ok("targets", "--reap")
    scene.must_be_tidy(other, stage)
