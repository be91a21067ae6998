"""What happens between plan and snapshot, and between hosts whose clocks disagree: no error, and the right bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
import story
from story import MIB, Cli, Stage, noise

from graincopy.app import host

pytestmark = pytest.mark.root

CHANGES: dict[str, Callable[[str], object]] = {
    "shrinks": lambda path: os.truncate(path, 100_001),
    "grows": lambda path: os.truncate(path, 3 * MIB + 1),
    "is written": lambda path: story.write(path, (0, b"in between")),
    "is replaced": lambda path: (shutil.copyfile(path, f"{path}.new"), os.rename(f"{path}.new", path)),
    "is replaced by another": lambda path: (
        story.make_disk(f"{path}.new", MIB, (0, noise(9, 99_999))),
        os.rename(f"{path}.new", path),
    ),
}


@pytest.mark.parametrize("where", ["lun", "in place"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_the_backup_starts(stage: Stage, cli: Cli, where: str, change: str) -> None:
    folder = stage.path(0) if where == "lun" else stage.outer.path
    path = f"{folder}/a.raw"
    if os.path.exists(path):
        os.unlink(path)
    story.make_disk(path, 2 * MIB, (0, noise(1, MIB)))
    for passed in ("opened", "prepared"):
        cli.backup(path)

        def step(name: str, passed: str = passed) -> None:
            if name == passed:
                CHANGES[change](path)

        done = cli("backup", path, step=step)
        assert done.code in (0, 16), done
        if done.code == 16:
            assert "changed while the backup was starting" in done.err
            cli.backup(path)
        out = cli.ok("restore", "latest", "--to", f"{cli.folder}/{passed}")["disks"][0]["target"]
        assert story.digest(out) == story.digest(path)
    os.unlink(path)


def test_clocks_that_disagree_by_hours_do_not_reorder_points(
    stage: Stage, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = story.make_disk(stage.path(0, "a.raw"), MIB, (0, noise(1, MIB)))
    states, real = [], host.SystemClock.now
    for turn, hours in enumerate((0, 9, -7, 3, -30)):
        monkeypatch.setattr(host.SystemClock, "now", lambda clock, hours=hours: real(clock) + 3600 * hours)
        story.write(path, (0, f"host {turn}".encode()))
        document = cli.backup(path)
        assert document["disks"][0]["change_map"] == ("extents" if turn else "first backup")
        states.append(story.digest(path))
    points = cli.ok("points")
    assert [point["sequence"] for point in points] == sorted((point["sequence"] for point in points), reverse=True)
    for back, digest in enumerate(reversed(states)):
        out = cli.ok("restore", f"latest~{back}", "--to", f"{cli.folder}/{back}")["disks"][0]["target"]
        assert story.digest(out) == digest
    cli.ok("expire", "--keep-last", "2")
    left = f"{cli.folder}/left"
    assert story.digest(cli.ok("restore", "latest", "--to", left)["disks"][0]["target"]) == states[-1]


def test_a_datastore_that_is_not_mounted_is_not_restored_onto_the_folder_below(stage: Stage, cli: Cli) -> None:
    path = story.make_disk(stage.path(2, "a.raw"), MIB, (0, noise(1, MIB)))
    cli.backup(path)
    lun = stage.luns[2]
    lun.unmount()
    try:
        done = cli("restore", "latest", "--in-place")
        assert done.code == 15, done
        assert "is not mounted" in done.err
        assert os.listdir(lun.path) == []
    finally:
        lun.mount()
    cli.ok("restore", "latest", "--in-place")
    assert story.read(path) == noise(1, MIB)
