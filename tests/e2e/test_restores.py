"""Stage R on real volumes: any point back in place, taken back again, or written as new files."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import lab
import pytest
import story
from story import GRAIN, MIB, Cli, Stage, noise

pytestmark = pytest.mark.root


class History:
    """A disk with a history of restore points: what it was at each of them."""

    def __init__(self, cli: Cli, path: str) -> None:
        self.cli, self.path = cli, path
        self.points: list[str] = []
        self.states: list[bytes] = []

    def backup(self) -> None:
        self.points.append(self.cli.backup(self.path)["restore_point"])
        self.states.append(story.read(self.path))


@pytest.fixture
def neighbour(stage: Stage) -> str:
    return story.make_disk(stage.path(0, "neighbour.raw"), 2 * MIB, (0, noise(99, 2 * MIB)))


def grown_and_cut(stage: Stage, cli: Cli, lun: int = 0) -> History:
    """Points at which the disk had other sizes and contents, odd ones among them."""
    path = story.make_disk(stage.path(lun, "a.raw"), 4 * MIB, (0, noise(1, 3 * GRAIN)), (2 * MIB, noise(2, 500)))
    history = History(cli, path)
    history.backup()
    os.truncate(path, 6 * MIB + 12345)
    story.write(path, (6 * MIB + 12340, b"grown"), (GRAIN, b"changed"))
    history.backup()
    os.truncate(path, GRAIN + 77)
    history.backup()
    os.truncate(path, 0)
    history.backup()
    os.truncate(path, 3 * MIB + 1)
    story.write(path, (3 * MIB - 9, b"back again"))
    history.backup()
    return history


@pytest.mark.parametrize("lun", [0, 1])
def test_any_point_comes_back_whatever_the_size_is_now(stage: Stage, cli: Cli, lun: int, neighbour: str) -> None:
    before = story.digest(neighbour)
    history = grown_and_cut(stage, cli, lun)
    for index in (0, 3, 1, 4, 2, 0):
        document = cli.ok("restore", history.points[index], "--in-place")
        assert story.read(history.path) == history.states[index], index
        assert document["restore_point"] == history.points[index]
    assert story.allocated(history.path) <= 5 * GRAIN  # holes are holes
    assert story.digest(neighbour) == before
    cli.undamaged()


def test_a_restore_writes_what_differs_and_undo_takes_it_back(stage: Stage, cli: Cli) -> None:
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), 8 * MIB, (0, noise(1, 4 * MIB))))
    history.backup()
    story.write(history.path, (0, b"later"), (5 * MIB, b"where a hole was"))
    history.backup()
    story.write(history.path, (2 * MIB, b"and not backed up"))
    now = story.read(history.path)
    document = cli.ok("restore", "latest~1", "--in-place")
    disk = document["disks"][0]
    assert disk["how"] == "change map"
    assert (disk["differing_bytes"], disk["written_bytes"]) == (3 * GRAIN, 3 * GRAIN)
    assert 0 < disk["fetched_bytes"] < 3 * GRAIN
    assert story.read(history.path) == history.states[0]
    assert [one["restore"] for one in cli.ok("targets")["restores"]] == [document["restore"]]
    undone = cli.ok("undo", document["restore"])
    assert undone["disks"][0]["written_bytes"] == 3 * GRAIN
    assert story.read(history.path) == now
    assert document["undo"] not in stage.targets
    assert cli.ok("targets")["restores"] == []
    assert cli("undo", document["restore"]).code == 56
    assert len(cli.ok("points")) == 2  # an undo is never among them


@pytest.mark.parametrize("size", [5 * MIB + 1, 4097, 0, 9 * MIB])
def test_undo_brings_the_size_back(stage: Stage, cli: Cli, size: int) -> None:
    history = History(cli, story.make_disk(stage.path(1, "a.raw"), 5 * MIB, (0, noise(1, MIB)), (5 * MIB - 2, b"zz")))
    history.backup()
    os.truncate(history.path, size)
    if size:
        story.write(history.path, (size - 1, b"e"))
    now = story.read(history.path)
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    assert story.read(history.path) == history.states[0]
    cli.ok("undo", restore)
    assert story.read(history.path) == now


def test_undo_refuses_what_was_changed_since_unless_forced(stage: Stage, cli: Cli) -> None:
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), 4 * MIB, (0, noise(1, MIB))))
    history.backup()
    story.write(history.path, (0, b"before the restore"))
    before = story.read(history.path)
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    story.write(history.path, (100, b"work of today"))
    worked = story.read(history.path)
    refused = cli("undo", restore)
    assert refused.code == 57
    assert story.read(history.path) == worked
    cli.ok("undo", restore[:6], "--force")
    assert story.read(history.path) == before


def test_a_deleted_file_is_made_anew_with_its_metadata(stage: Stage, cli: Cli) -> None:
    history = History(cli, story.make_disk(stage.path(1, "a.raw"), 4 * MIB, (MIB, noise(1, MIB))))
    os.chmod(history.path, 0o640)
    os.chown(history.path, 107, 64055)
    os.setxattr(history.path, "user.role", b"db\0\xff")
    history.backup()
    os.unlink(history.path)
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    found = os.stat(history.path)
    assert story.read(history.path) == history.states[0]
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o640, 107, 64055)
    assert os.getxattr(history.path, "user.role") == b"db\0\xff"
    assert story.allocated(history.path) <= MIB + GRAIN
    cli.ok("undo", restore)
    assert not os.path.exists(history.path)


def test_metadata_comes_back_onto_a_file_that_is_there(stage: Stage, cli: Cli) -> None:
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), MIB, (0, noise(1, GRAIN))))
    os.chmod(history.path, 0o600)
    os.setxattr(history.path, "user.role", b"db")
    history.backup()
    os.chmod(history.path, 0o666)
    os.chown(history.path, 5, 5)
    os.removexattr(history.path, "user.role")
    os.setxattr(history.path, "user.later", b"x")
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    found = os.stat(history.path)
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, 0, 0)
    assert os.getxattr(history.path, "user.role") == b"db"
    cli.ok("undo", restore)
    assert (stat.S_IMODE(os.stat(history.path).st_mode), os.stat(history.path).st_uid) == (0o666, 5)
    assert os.getxattr(history.path, "user.later") == b"x"


def test_one_disk_of_several_and_the_others_stay(stage: Stage, cli: Cli) -> None:
    paths = [story.make_disk(stage.path(n, f"d{n}.raw"), MIB, (0, noise(n, GRAIN))) for n in range(3)]
    cli.backup(*paths)
    first = story.read(paths[1])
    for path in paths:
        story.write(path, (10, b"later"))
    others = [story.read(paths[0]), story.read(paths[2])]
    cli.ok("restore", "latest", "--disk", "d1.raw", "--in-place")
    assert story.read(paths[1]) == first
    assert [story.read(paths[0]), story.read(paths[2])] == others
    assert cli("restore", "latest", "--disk", "d9.raw", "--in-place").code == 52


def test_compare_finds_what_no_change_map_tells(stage: Stage, cli: Cli) -> None:
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), 4 * MIB, (0, noise(1, MIB))))
    history.backup()
    story.write(history.path, (0, b"later"))
    disk = cli.ok("restore", "latest", "--in-place", "--compare")["disks"][0]
    assert (disk["how"], disk["differing_bytes"], disk["read_bytes"]) == ("compared", GRAIN, MIB)
    assert story.read(history.path) == history.states[0]


def test_the_backup_after_a_restore_builds_on_it(stage: Stage, cli: Cli) -> None:
    history = grown_and_cut(stage, cli)
    cli.ok("restore", history.points[1], "--in-place")
    story.write(history.path, (0, b"after the restore"))
    history.backup()
    for index in (5, 4, 1):
        cli.ok("restore", history.points[index], "--in-place")
        assert story.read(history.path) == history.states[index]


def test_restored_files_are_sparse_whole_and_never_overwrite(stage: Stage, cli: Cli) -> None:
    history = grown_and_cut(stage, cli)
    out = f"{cli.folder}/deep/er/out"
    for index, point in enumerate(history.points):
        disk = cli.ok("restore", point, "--to", f"{out}{index}")["disks"][0]
        assert (disk["name"], disk["target"]) == ("a.raw", f"{out}{index}/a.raw")
        assert story.read(disk["target"]) == history.states[index]
        assert story.allocated(disk["target"]) <= 7 * GRAIN
    preallocated = cli.ok("restore", history.points[1], "--to", f"{out}p", "--preallocate")["disks"][0]["target"]
    assert story.read(preallocated) == history.states[1]
    assert story.allocated(preallocated) >= len(history.states[1])
    assert cli("restore", "latest", "--to", f"{out}1").code == 53
    assert story.read(f"{out}1/a.raw") == history.states[1]
    assert cli("restore", "latest", "--to", f"{out}1/a.raw").code == 54


def cut_at(name: str) -> Callable[[str], None]:
    """A crash point that is not passed: as if Ctrl-C came there."""

    def step(passed: str) -> None:
        if passed == name:
            raise KeyboardInterrupt

    return step


@pytest.mark.parametrize("where", ["recorded", "written"])
@pytest.mark.parametrize("end", ["finished", "undone"])
def test_a_restore_cut_off_is_finished_or_taken_back(stage: Stage, cli: Cli, where: str, end: str) -> None:
    history = grown_and_cut(stage, cli)
    done = cli("restore", history.points[1], "--in-place", step=cut_at(where))
    assert done.code == 130
    assert cli("backup", history.path).code == 45  # a half restored disk is not backed up
    assert cli("restore", history.points[0], "--in-place").code == 45
    open_restores = cli.ok("targets", "--reap")["restores"]
    assert [one["state"] for one in open_restores] == ["open"]
    if end == "undone":
        cli.ok("undo", open_restores[0]["restore"])
        assert story.read(history.path) == history.states[4]
    else:
        document = cli.ok("restore", history.points[1], "--in-place")
        assert (document["restore"], document["disks"][0]["how"]) == (open_restores[0]["restore"], "resumed")
        assert story.read(history.path) == history.states[1]
        cli.ok("undo", document["restore"])
        assert story.read(history.path) == history.states[4]
    history.backup()
    cli.undamaged()


@pytest.mark.parametrize("where", ["opened", "differed", "saved"])
def test_a_restore_cut_off_before_its_record_has_done_nothing(stage: Stage, cli: Cli, where: str) -> None:
    history = grown_and_cut(stage, cli)
    targets = stage.targets
    assert cli("restore", history.points[1], "--in-place", step=cut_at(where)).code == 130
    assert story.read(history.path) == history.states[4]
    assert stage.targets == targets
    assert cli.ok("targets")["restores"] == []


def test_undo_can_be_cut_off_and_repeated(stage: Stage, cli: Cli) -> None:
    history = grown_and_cut(stage, cli)
    restore = cli.ok("restore", history.points[1], "--in-place")["restore"]
    for where in ("opened", "checked", "undone"):
        assert cli("undo", restore, step=cut_at(where)).code == 130
    assert cli("backup", history.path).code == 45
    cli.ok("undo", restore)
    assert story.read(history.path) == history.states[4]
    history.backup()


def test_a_file_in_use_is_not_restored(stage: Stage, cli: Cli) -> None:
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), MIB, (0, noise(1, GRAIN))))
    history.backup()
    story.write(history.path, (0, b"later"))
    with open(history.path, "r+b"):
        refused = cli("restore", "latest", "--in-place")
        assert refused.code == 17
        assert f"pid {os.getpid()}" in refused.err
    assert story.read(history.path).startswith(b"later")
    device = lab.bind(history.path)  # under a loop device it is in use as well
    try:
        assert cli("restore", "latest", "--in-place").code == 17
    finally:
        lab.unbind(device)
    cli.ok("restore", "latest", "--in-place")
    assert story.read(history.path) == history.states[0]


def test_undo_loses_nothing_that_was_added_behind_the_end(stage: Stage, cli: Cli) -> None:
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), MIB, (0, noise(1, MIB))))
    history.backup()
    story.write(history.path, (0, b"before the restore"))
    before = story.read(history.path)
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    story.write(history.path, (MIB + 3 * GRAIN, b"appended"))
    assert cli("undo", restore).code == 57
    assert story.read(history.path).endswith(b"appended")
    cli.ok("undo", restore, "--force")
    assert story.read(history.path) == before


@pytest.mark.parametrize("size", [None, 0, 5 * GRAIN + 1])
def test_undo_brings_back_all_of_a_file_that_was_deleted_or_cut_since(stage: Stage, cli: Cli, size: int | None) -> None:
    history = History(cli, story.make_disk(stage.path(1, "a.raw"), MIB + 5, (0, noise(1, MIB))))
    history.backup()
    story.write(history.path, (0, b"before the restore"))
    before = story.read(history.path)
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    if size is None:
        os.unlink(history.path)
    else:
        os.truncate(history.path, size)
        assert cli("undo", restore).code == 57
    cli.ok("undo", restore, *(("--force",) if size is not None else ()))
    assert story.read(history.path) == before


def test_a_file_that_goes_before_its_restore_is_finished_comes_back_whole(stage: Stage, cli: Cli) -> None:
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), MIB, (0, noise(1, MIB))))
    history.backup()
    story.write(history.path, (0, b"later"))
    assert cli("restore", "latest", "--in-place", step=cut_at("recorded")).code == 130
    os.unlink(history.path)
    cli.ok("restore", "latest", "--in-place")
    assert story.read(history.path) == history.states[0]


@pytest.mark.parametrize("where", ["opened", "differed", "saved"])
def test_a_missing_file_is_not_left_empty_by_a_restore_that_failed(stage: Stage, cli: Cli, where: str) -> None:
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), MIB, (0, noise(1, MIB))))
    history.backup()
    os.unlink(history.path)
    assert cli("restore", "latest", "--in-place", step=cut_at(where)).code == 130
    assert not os.path.exists(history.path)


@pytest.mark.parametrize("where", ["opened", "saved", "recorded"])
def test_a_file_that_somebody_makes_while_its_restore_begins_is_not_overwritten(
    stage: Stage, cli: Cli, where: str
) -> None:
    """It is nowhere stored: neither in the repository nor in an undo snapshot."""
    history = History(cli, story.make_disk(stage.path(0, "a.raw"), MIB, (0, noise(1, MIB))))
    history.backup()
    os.unlink(history.path)
    targets = stage.targets

    def step(name: str) -> None:
        if name == where:
            story.make_disk(history.path, MIB, (0, b"mine"))

    done = cli("restore", "latest", "--in-place", step=step)
    assert done.code == (53 if where != "opened" else 0), done
    if where == "opened":  # seen in time: it is a file that is there, and can be had back
        cli.ok("undo", cli.ok("targets")["restores"][0]["restore"])
    assert story.read(history.path).startswith(b"mine")
    assert (cli.ok("targets")["restores"], stage.targets) == ([], targets)
    cli.ok("restore", "latest", "--in-place")
    assert story.read(history.path) == history.states[0]
