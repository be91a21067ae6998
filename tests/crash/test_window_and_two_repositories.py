"""The freeze window survives whatever happens to its run; two repositories never take each other's base away."""

from __future__ import annotations

import os
import subprocess

import lab
import pytest
import scene
import story

DEADLINE = 1.5  # seconds; short, so that a test need not wait for the usual ten


def _is_frozen(stage: scene.Storage) -> bool:
    """Whether a write to the first datastore has to wait. The write is done when it is thawed."""
    probe = os.path.join(stage.luns[0].path, "frozen")
    process = subprocess.Popen(["dd", "if=/dev/zero", f"of={probe}", "count=1", "conv=fsync", "status=none"])
    try:
        process.wait(0.3)
    except subprocess.TimeoutExpired:
        return True
    finally:
        process.wait(scene.LONG)
        os.unlink(probe)
    return False


@lab.root_test
@pytest.mark.parametrize("at", ["frozen", "snapshotted"])
def test_killed_inside_the_window(stage: scene.Storage, cli: story.Cli, at: str) -> None:
    """The guard does not wait for the deadline: it notices its parent's death."""
    cli.configure("[freeze]\ndeadline = 30.0")
    scene.cut(cli, at, "backup", *stage.disks)
    stage.must_be_thawed()
    assert scene.point_ids(cli) == []
    cli.ok("targets", "--reap")
    scene.must_be_tidy(cli, stage)


@lab.root_test
@pytest.mark.parametrize("at", ["frozen", "snapshotted"])
def test_stopped_inside_the_window(stage: scene.Storage, cli: story.Cli, at: str) -> None:
    """Thawed at the deadline, although nobody can ask for it; woken, the run knows that its snapshot is worthless."""
    cli.configure(f"[freeze]\ndeadline = {DEADLINE}")
    with scene.stopped(cli, at, "backup", *stage.disks) as backup:
        assert _is_frozen(stage), "the step is not inside the window"
        stage.must_be_thawed()
        answer = backup.go_on()
    assert answer.code == 23, answer
    assert (scene.point_ids(cli), stage.targets(), scene.open_runs(cli)) == ([], [], [])
    cli.ok("backup", *stage.disks)
    cli.undamaged()


@lab.root_test
def test_two_repositories_in_turn(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    """Each keeps its checkpoint and stays right, whenever the other one's backup is killed."""
    other = story.Cli(os.path.join(tmp_path, "other")).init()
    out = os.path.join(tmp_path, "out")
    for each in (cli, other):
        each.ok("backup", *stage.disks)
    for at in ("copied", "published", "promoted", "superseded"):
        for one, two in ((cli, other), (other, cli)):
            stage.scribble()
            scene.cut(one, at, "backup", *stage.disks)
            contents = stage.scribble()
            for each in (two, one):
                done = each.ok("backup", *stage.disks)
                assert {disk["change_map"] for disk in done["disks"]} == {"extents"}, (at, done)
                scene.must_hold(each, "latest", contents, out)
    kept = [disk["checkpoint"] for each in (cli, other) for disk in each.ok("show", "latest")["disks"]]
    for each in (cli, other):
        each.ok("targets", "--reap")
        scene.must_be_tidy(each, stage, others=kept)
        each.undamaged()
