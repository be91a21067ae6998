"""The same commands without any snapshot facility, as any user: the file itself, writers held off while it is read."""

from __future__ import annotations

import os
import threading

import pytest
import story
from story import GRAIN, MIB, Cli, noise

from graincopy.volumes.image import FdImage


@pytest.fixture
def path(plain: str) -> str:
    return story.make_disk(f"{plain}/a.raw", 4 * MIB + 77, (0, noise(1, MIB)), (3 * MIB, noise(2, 5000)))


def test_backup_restore_and_undo_of_a_plain_file(path: str, cli: Cli) -> None:
    first = cli.backup(path)
    assert (first["disks"][0]["driver"], first["freeze_ms"], first["targets_left"]) == ("locked", None, [])
    before = story.read(path)
    story.write(path, (0, b"later"), (2 * MIB, b"into a hole"))
    os.truncate(path, 5 * MIB + 1)
    now = story.read(path)
    second = cli.backup(path)["disks"][0]
    assert second["change_map"] == "compared: the driver keeps no change map"
    assert second["dirty_bytes"] == 2 * GRAIN  # the tail that it grew by is zeros, which were there already
    document = cli.ok("restore", "latest~1", "--in-place")
    assert story.read(path) == before
    assert document["undo"] == "repository"
    cli.ok("undo", document["restore"])
    assert story.read(path) == now
    assert cli.ok("targets")["targets"] == []
    cli.undamaged()


def test_nothing_changed_stores_nothing(path: str, cli: Cli) -> None:
    cli.backup(path)
    again = cli.backup(path)
    assert (again["disks"][0]["dirty_bytes"], again["disks"][0]["stored_bytes"]) == (0, 0)
    assert len(cli.ok("points")) == 2


def test_undo_from_the_repository_refuses_what_changed_since(path: str, cli: Cli) -> None:
    cli.backup(path)
    story.write(path, (0, b"before the restore"))
    before = story.read(path)
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    story.write(path, (5, b"after"))
    assert cli("undo", restore).code == 57
    cli.ok("undo", restore, "--force")
    assert story.read(path) == before


@pytest.mark.parametrize("size", [0, 1, 4 * MIB + 76, 6 * MIB])
def test_undo_from_the_repository_brings_the_size_back(path: str, cli: Cli, size: int) -> None:
    cli.backup(path)
    before = story.read(path)
    os.truncate(path, size)
    story.write(path, (max(0, size - 1), b"e"))
    now = story.read(path)
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    assert story.read(path) == before
    cli.ok("undo", restore)
    assert story.read(path) == now


def test_a_missing_file_is_made_and_taken_away_again(path: str, cli: Cli) -> None:
    os.chmod(path, 0o640)
    cli.backup(path)
    before = story.read(path)
    os.unlink(path)
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    assert story.read(path) == before
    assert os.stat(path).st_mode & 0o777 == 0o640
    assert story.allocated(path) <= 2 * MIB
    cli.ok("undo", restore)
    assert not os.path.exists(path)


def test_a_file_that_somebody_writes_is_refused(path: str, cli: Cli) -> None:
    with open(path, "r+b"):
        done = cli("backup", path)
    assert done.code == 17
    assert f"pid {os.getpid()}" in done.err
    assert cli.ok("points") == []
    cli.backup(path)


def test_a_write_during_the_read_fails_the_backup(path: str, cli: Cli) -> None:
    """The writer waits for the lease to be given back: what the kernel lets it do is what is checked."""
    writers: list[threading.Thread] = []

    def step(name: str) -> None:
        if name == "opened" and not writers:
            return
        if name == "snapshotted":
            writers.append(threading.Thread(target=story.write, args=(path, (0, b"in between"))))
            writers[0].start()
            writers[0].join(0.3)  # it is in open(2) now, breaking the lease

    done = cli("backup", path, step=step)
    writers[0].join(60)
    assert done.code == 18, done
    assert cli.ok("points") == []
    cli.backup(path)
    assert story.read(path).startswith(b"in between")


def test_a_write_after_the_first_read_fails_the_backup(path: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is read may be old or new: it counts only when the lease is looked at after the last read."""
    writers: list[threading.Thread] = []
    real = FdImage.readinto

    def readinto(image: FdImage, offset: int, buffer: memoryview) -> None:
        real(image, offset, buffer)
        if not writers:
            writers.append(threading.Thread(target=story.write, args=(path, (0, b"in between"))))
            writers[0].start()
            writers[0].join(0.3)

    monkeypatch.setattr(FdImage, "readinto", readinto)
    done = cli("backup", path)
    writers[0].join(60)
    assert done.code == 18, done
    assert cli.ok("points") == []
    cli.backup(path)


def test_several_files_make_one_restore_point(plain: str, cli: Cli) -> None:
    paths = [story.make_disk(f"{plain}/d{n}.raw", MIB, (n * GRAIN, noise(n, 1000))) for n in range(3)]
    document = cli.backup(*paths)
    assert document["instant"] == "one"  # writers were held off all the while
    out = cli.ok("restore", document["restore_point"][:8], "--to", f"{cli.folder}/out")
    assert [story.read(disk["target"]) for disk in out["disks"]] == [story.read(path) for path in paths]


def test_a_restore_cut_off_is_finished_or_taken_back(path: str, cli: Cli) -> None:
    def step(name: str) -> None:
        if name == "recorded":
            raise KeyboardInterrupt

    cli.backup(path)
    before = story.read(path)
    story.write(path, (0, b"later"), (2 * MIB, b"into a hole"))
    now = story.read(path)
    assert cli("restore", "latest", "--in-place", step=step).code == 130
    document = cli.ok("restore", "latest", "--in-place")
    assert (story.read(path), document["disks"][0]["how"]) == (before, "resumed")
    cli.ok("undo", document["restore"])
    assert story.read(path) == now


def test_dry_runs_have_no_effect(path: str, cli: Cli) -> None:
    cli.backup(path)
    story.write(path, (0, b"later"))
    digest, size = story.digest(path), cli.size()
    for arguments in (
        ("backup", path),
        ("restore", "latest", "--in-place"),
        ("restore", "latest", "--to", f"{cli.folder}/out"),
        ("expire", "--keep-last", "1"),
        ("collect",),
        ("targets", "--reap"),
    ):
        done = cli(*arguments, "--dry-run")
        assert (done.code, done.err) == (0, ""), arguments
    restore = cli.ok("restore", "latest", "--in-place")["restore"]
    restored = story.digest(path)
    cli.ok("undo", restore, "--dry-run")
    assert story.digest(path) == restored != digest
    assert not os.path.exists(f"{cli.folder}/out")
    assert cli.size() > size
    assert len(cli.ok("points")) == 1
