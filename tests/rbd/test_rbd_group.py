"""Several images at one instant: Ceph's group snapshot, what it can go wrong with, and that nothing of it stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import scene
import story
from alternating import last_of
from guests import MIB, TIMEOUT, Guest
from story import Cli, noise

from graincopy.app.host import SystemClock
from graincopy.core.errors import SnapshotFailed, TargetLost
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.model.change_map import Changed
from graincopy.model.snapshot import Role
from graincopy.testing.rbd_lab import RbdLab
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.rbd import RbdDriver

HERE = os.path.dirname(__file__)
SIZE = 8 * MIB


@pytest.fixture
def pair(guest: Guest) -> list[str]:
    """Two images with something in them."""
    paths = [guest.make(name, SIZE) for name in ("one", "two")]
    for number, name in enumerate(("one", "two")):
        guest.write(name, (5 * MIB, noise(number, MIB)))
    return paths


@contextmanager
def writing(guest: Guest, *names: str) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody writes to the images while the block runs; it must have been able to go on, to the end."""
    process = subprocess.Popen(
        [sys.executable, os.path.join(HERE, "alternating.py"), guest.conf, *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield process
        out, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0 and int(out.split()[0]) > 0, out
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=TIMEOUT)


def restored(cli: Cli, point: str, folder: str, names: Sequence[str] = ("one", "two")) -> list[bytes]:
    """The images as ``point`` has them."""
    cli.ok("restore", point, "--to", folder)
    return [story.read(os.path.join(folder, name)) for name in names]


def test_every_point_is_one_instant(guest: Guest, cli: Cli) -> None:
    """A record is on an image only if it is on those before it, and then the one before it is on all of them."""
    names = [f"disk{number}" for number in range(6)]
    paths = [guest.make(name, SIZE) for name in names]
    points = []
    with writing(guest, *names):
        for _ in range(5):
            document = cli.backup(*paths)
            points.append(document["restore_point"])
            assert document["instant"] == "one"
            assert guest.groups() == [] and len(guest.traces()) == 2 * len(
                names
            )  # one snapshot of each, and its record
    assert {disk["change_map"] for disk in document["disks"]} == {"rbd fast-diff"}
    seen = [[last_of(data) for data in restored(cli, point, f"{cli.folder}/{point}", names)] for point in points]
    assert all(sorted(shown, reverse=True) == shown and shown[0] <= shown[-1] + 1 for shown in seen), seen
    assert sorted(seen) == seen and seen[0] != seen[-1]
    cli.backup(*paths)
    assert restored(cli, "latest", f"{cli.folder}/quiet", names) == [guest.read(name) for name in names]


def test_a_plan_and_volumes_tell_of_it(guest: Guest, cli: Cli, pair: list[str]) -> None:
    assert cli.ok("backup", "--dry-run", *pair)["plan"]["instant"] == "one"
    assert (
        cli.ok("backup", "--dry-run", pair[0], guest.make("plain", SIZE, features=1))["plan"]["instant"] == "per file"
    )
    (answer,) = cli.ok("volumes", "rbd:rbd/plain")
    assert "an instant of its own: it has no exclusive-lock" in answer["claim"]["why"]


def _driver(guest: Guest) -> RbdDriver:
    return RbdDriver(guest.cluster, MemoryPlaces(), SystemClock())


def test_what_came_and_went_around_the_instant_is_dirty(ceph: str, guest: Guest, pair: list[str]) -> None:
    """In neither end of the diff, but in the restore point: an object that is newer than U and older than the next T.

    The first of the two snapshots is made here, by the name that it has: the driver keeps it, and the instant comes
    after the write.
    """
    driver, lab = _driver(guest), RbdLab(ceph, MemoryPlaces(), SystemClock())
    tag = lab.tag()
    volumes = [VolumeId(path) for path in pair]
    prepared = driver.prepare(volumes, tag)
    guest.rbd("snap", "create", f"one@graincopy.{tag.run}")
    guest.write("one", (2 * MIB, noise(5, 4096)))
    base = driver.settle(driver.snapshot(prepared))
    claim = driver.resolve(pair[0])
    with driver.open(base[0], claim) as image:  # type: ignore[arg-type]
        found = bytearray(4096)
        image.readinto(2 * MIB, memoryview(found))
    assert bytes(found) == noise(5, 4096)
    base = tuple(driver.retag(target, lab.tag(Role.CHECKPOINT)) for target in base)
    guest.discard("one", 2 * MIB, MIB)
    now = driver.create_targets(volumes, lab.tag())
    answer = _driver(guest).changed(base[0], now[0])
    assert isinstance(answer, Changed) and answer.extents.covers(Extents.of((2 * MIB, 2 * MIB + 4096))), answer
    for target in (*base, *now):
        driver.delete(target)
    assert guest.traces() == []


def test_an_image_in_somebodys_group_has_its_own_instant(guest: Guest, cli: Cli, pair: list[str]) -> None:
    guest.rbd("group", "create", "theirs")
    guest.rbd("group", "image", "add", "theirs", "one")
    (answer,) = cli.ok("volumes", pair[0])
    assert "it is in the group theirs of somebody" in answer["claim"]["why"]
    assert cli.backup(*pair)["instant"] == "per file"
    assert guest.rbd("group", "image", "ls", "theirs").split() == ["rbd/one"]
    guest.rbd("group", "rm", "theirs")
    assert cli.backup(*pair)["instant"] == "one"


def test_it_was_put_into_a_group_after_the_plan(guest: Guest, cli: Cli, pair: list[str]) -> None:
    """One instant was promised: what cannot keep that is no backup."""
    driver, lab = _driver(guest), RbdLab(guest.conf, MemoryPlaces(), SystemClock())
    for path in pair:
        driver.resolve(path)
    guest.rbd("group", "create", "theirs")
    guest.rbd("group", "image", "add", "theirs", "two")
    with pytest.raises(SnapshotFailed, match="group theirs"):
        driver.prepare([VolumeId(path) for path in pair], lab.tag())
    guest.rbd("group", "rm", "theirs")
    assert guest.traces() == []


def test_a_client_that_keeps_the_lock(guest: Guest, cli: Cli, pair: list[str]) -> None:
    with guest.open("two") as image:
        image.lock()
        done = cli("backup", *pair)
        assert done.code == SnapshotFailed.exit_code and "[rbd] groups = false" in done.err, done
        assert guest.traces() == []
        cli.configure(f'[rbd]\nconf = "{guest.conf}"\ngroups = false\n')
        assert cli.backup(*pair)["instant"] == "per file"
        image.write(0, memoryview(b"still mine"))


def test_the_group_is_deleted_under_us(guest: Guest, cli: Cli, pair: list[str]) -> None:
    def strike(step: str) -> None:
        if step == "settled":
            guest.rbd("group", "rm", *guest.groups())

    done = cli("backup", *pair, step=strike)
    assert done.code == TargetLost.exit_code and "deleted by somebody else" in done.err, done
    assert cli.ok("points") == [] and guest.traces() == []


def test_two_backups_of_the_same_images_at_once(guest: Guest, cli: Cli, pair: list[str], tmp_path: object) -> None:
    """An image can be in one group only: the second waits until the first has had its instant."""
    other = Cli(f"{tmp_path}/other", config=f'[rbd]\nconf = "{guest.conf}"\n').init()
    with scene.stopped(cli, "prepared", "backup", *pair) as halted:
        second = scene.start(other, "backup", *reversed(pair))
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(3)
        assert halted.go_on().code == 0
        _, err = second.communicate(timeout=TIMEOUT)
        assert second.returncode == 0, err
    assert guest.groups() == [] and len(guest.traces()) == 8


def _struck(cli: Cli, call: str, when: str, count: int, *arguments: str) -> int:
    command = [sys.executable, os.path.join(HERE, "killed_in_group.py"), call, when, str(count), "--"]
    done = subprocess.run(
        [*command, "--config", cli.config, *arguments],
        env={**os.environ, **cli.environ},
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    return done.returncode


CALLS = [("create", 1), ("join", 1), ("join", 2), ("take", 1), ("leave", 1), ("leave", 2), ("remove", 1)]


@pytest.mark.parametrize(("call", "count"), CALLS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_every_call(guest: Guest, cli: Cli, pair: list[str], call: str, count: int, when: str) -> None:
    """What was before is there afterwards, and what others had; the next backup has one instant again."""
    guest.rbd("snap", "create", "one@theirs")
    assert _struck(cli, call, when, count, "backup", *pair) == -9
    guest.await_alone("one")
    guest.await_alone("two")
    cli("targets", "--reap")
    published = len(cli.ok("points"))
    assert guest.groups() == [] and len(guest.traces()) == 1 + 4 * published, guest.traces()
    assert cli.backup(*pair)["instant"] == "one"
    assert restored(cli, "latest", f"{cli.folder}/out") == [guest.read("one"), guest.read("two")]


def test_killed_in_the_middle_of_the_instant(guest: Guest, cli: Cli, pair: list[str], long_watches: None) -> None:
    """Whoever writes goes on at once: the guard has the dead client given up, with the rights that its user has."""
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\nid = "backup"\nkeyring = "{guest.user("backup", cli.folder)}"\n')
    for _ in range(2):
        with writing(guest, "one", "two"):
            assert _struck(cli, "take", "locked", 1, "backup", *pair) == -9
        guest.await_alone("one")
        guest.await_alone("two")
        cli("targets", "--reap")
        assert guest.traces() == []
    assert cli.backup(*pair)["instant"] == "one"


def test_a_process_that_ends_by_itself_is_not_given_up(guest: Guest, cli: Cli, pair: list[str]) -> None:
    """Neither after a backup nor after one that failed, and its guard has ended before it."""
    before = guest.given_up()
    assert cli.process("backup", *pair).code == 0
    with guest.open("two") as image:
        image.lock()
        assert cli.process("backup", *pair).code == SnapshotFailed.exit_code
    assert guest.given_up() == before
