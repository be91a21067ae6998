"""The life of a view: T comes and goes, others go on meanwhile, and the bytes are always those of the restore point."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "e2e"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
sys.path.insert(0, os.path.dirname(__file__))

import lab
import story
from view_world import GRAIN, OWNER, World, noise, padded, read, read_in_pieces

from graincopy.app.host import SystemClock
from graincopy.app.viewing_core import view_document, view_lines, view_warnings
from graincopy.core.errors import PointPinned, PointUnknown, SnapshotFailed, VolumeBusy
from graincopy.media.directory import DirectoryMedium
from graincopy.media.wrappers import Throttled
from graincopy.model.snapshot import Owner, Role
from graincopy.repository.collect import collect
from graincopy.testing.faults import SteppedClock
from graincopy.testing.memory_lab import MemoryFilesLab
from graincopy.testing.oracle import Disk, fit, random_operation
from graincopy.volumes.base import FileImage
from graincopy.volumes.locked import LockedDriver
from graincopy.volumes.memory import MemoryDriver
from graincopy.volumes.memory_storage import MemoryStorage
from graincopy.volumes.places import FilePlaces
from graincopy.volumes.reflink import ReflinkDriver
from graincopy.workflow.reap import reap
from graincopy.workflow.restore import restore_in_place
from graincopy.workflow.view import open_view

PATH = "/dev/memory/a"
SIZE = 300 * GRAIN + 123


def nothing() -> None:
    """Happens."""


class Array(MemoryDriver):
    """Reading T fails when it was deleted, as an array's would; ``taken`` volumes admit no T.

    ``events`` tells of reads that are over and of files of T that were closed.
    """

    def __init__(self, storage: MemoryStorage) -> None:
        super().__init__(storage)
        self.taken: set[str] = set()
        self.before_read: Callable[[], None] = nothing
        self.after_snapshot: Callable[[], None] = nothing
        self.events: list[str] = []

    def snapshot(self, group):  # type: ignore[no-untyped-def]
        taken = super().snapshot(group)
        self.after_snapshot()
        return taken

    def prepare(self, volumes, tag):  # type: ignore[no-untyped-def]
        for volume in volumes:
            if volume in self.taken:
                raise VolumeBusy(volume=volume, holder="a restore")
        return super().prepare(volumes, tag)

    @contextmanager
    def open(self, target, claim) -> Iterator[FileImage]:  # type: ignore[no-untyped-def]
        with super().open(target, claim) as image:
            inner = image.readinto

            def readinto(offset: int, buffer: memoryview) -> None:
                if target.id not in self._storage.copies:
                    raise OSError(errno.ENODEV, "the target is gone")
                self.before_read()
                inner(offset, buffer)
                self.events.append("read")

            image.readinto = readinto  # type: ignore[method-assign]
            yield image
            self.events.append("closed")


class Memory(World):
    """One volume in memory with a backup of it."""

    def __init__(self, keep_checkpoint: bool = True) -> None:
        self.storage = MemoryStorage()
        self.volume = self.storage.create("a", SIZE)
        self.volume.write(0, noise(1, 200 * GRAIN))
        self.driver = Array(self.storage)
        super().__init__([self.driver])
        self.content = bytes(self.volume.data)
        self.point = self.backup(PATH, keep_checkpoint=keep_checkpoint)

    def scribble(self, seed: int = 7) -> None:
        chance = random.Random(seed)
        for _ in range(5):
            self.volume.write(chance.randrange(SIZE - 5000), chance.randbytes(5000))


# --- the bytes --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 30), st.booleans(), st.booleans())
def test_any_point_of_a_random_history_is_shown(seed: int, trust: bool, checkpoints: bool) -> None:
    chance = random.Random(seed)
    storage = MemoryFilesLab()
    disk = Disk(storage, chance.choice([300_123, 128 * 1024, 1000]))
    disk.write(0, disk.size, seed=2)

    def go_on(count: int) -> None:
        for _ in range(count):
            operation = fit(random_operation(storage.powers, chance), disk.size, storage.block)
            if operation is not None:
                disk.do(operation)

    world = World([storage.driver()])
    history = []
    for _ in range(3):
        go_on(3)
        point = world.backup(disk.claim.path, keep_checkpoint=checkpoints)
        history.append((point, storage.read(disk.claim)))
    go_on(chance.randrange(4))
    for point, content in history:
        with world.view(point, trust_map=trust) as view:
            shown = view.disks[0]
            assert shown.size == len(content)
            go_on(1)  # S goes on under the view
            for _ in range(6):
                offset, length = chance.randrange(len(content) + 1), chance.randrange(3 * GRAIN)
                assert read(shown, offset, length) == padded(content, offset, length)
            assert read(shown) == content
            assert view.report()[0].findings == ()
            if trust:
                assert view.report()[0].mismatches == 0
    assert Role.VIEW not in world.targets()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_only_what_differs_comes_from_the_medium(checkpoint: bool) -> None:
    world = Memory(checkpoint)
    world.volume.write(50 * GRAIN, b"x" * 3 * GRAIN)
    with world.view(world.point) as view:
        assert read_in_pieces(view.disks[0], 10_000) == world.content
        (report,) = view.report()
    assert report.near == ("change map" if checkpoint else "by trial")
    assert (report.local_bytes, report.medium_bytes) == (197 * GRAIN, 3 * GRAIN)
    assert report.zero_bytes == SIZE - 200 * GRAIN
    assert report.mismatches == (0 if checkpoint else 3)


def test_older_points_share_what_the_maps_share() -> None:
    world = Memory()
    world.volume.write(50 * GRAIN, b"x" * 3 * GRAIN)
    world.backup(PATH)
    world.volume.write(70 * GRAIN, b"x" * GRAIN)
    with world.view(world.point, trust_map=True) as view:
        assert read(view.disks[0]) == world.content
        (report,) = view.report()
    assert (report.near, report.medium_bytes) == ("change map", 4 * GRAIN)


def test_without_hybrid_no_target_is_made() -> None:
    world = Memory()
    world.steps.clear()
    with world.view(world.point, hybrid=False) as view:
        assert read(view.disks[0]) == world.content
        assert view.report()[0].local_bytes == 0
        assert world.targets() == [Role.CHECKPOINT]
    assert world.steps == ["opened", "closing"]


def test_nothing_is_guessed_when_proofs_are_declined() -> None:
    world = Memory(keep_checkpoint=False)
    with world.view(world.point, trust_map=True) as view:
        assert read(view.disks[0]) == world.content
        (report,) = view.report()
    assert report.local_bytes == 0
    assert "unproved grains are not guessed" in report.near


def test_eight_readers_while_the_volume_is_written_all_the_time() -> None:
    world = Memory()
    with world.view(world.point, cache_bytes=20 * GRAIN) as view:
        wrong, over = [0] * 8, threading.Event()

        def work(number: int) -> None:
            chance = random.Random(number)
            for _ in range(100):
                offset, length = chance.randrange(SIZE), chance.randrange(3 * GRAIN)
                wrong[number] += read(view.disks[0], offset, length) != padded(world.content, offset, length)

        def write() -> None:
            for seed in itertools.count():
                world.scribble(seed)
                if over.is_set():
                    return

        readers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        writer = threading.Thread(target=write)
        for thread in (writer, *readers):
            thread.start()
        for thread in readers:
            thread.join(60)
        over.set()
        writer.join(60)
        assert wrong == [0] * 8
        assert view.report()[0].local_bytes > 0


# --- what happens to S and T ------------------------------------------------------------------------


def remove_volume(world: Memory) -> None:
    del world.storage.volumes["a"]


def recreate_volume(world: Memory) -> None:
    world.storage.create("a", SIZE).write(0, noise(9, SIZE))


def resize_volume(world: Memory) -> None:
    world.volume.resize(100 * GRAIN)


def delete_target(world: Memory) -> None:
    (target,) = [one for one in world.driver.list_targets() if one.tag.role is Role.VIEW]
    world.driver.delete(target)
    world.volume.write(0, noise(8, 200 * GRAIN))  # from here on a deleted target shows what S holds


@pytest.mark.parametrize("happens", [remove_volume, recreate_volume, resize_volume, delete_target])
@pytest.mark.parametrize("trust", [False, True])
def test_whatever_happens_under_an_open_view_it_stays_correct(happens: Callable[[Memory], None], trust: bool) -> None:
    world = Memory()
    with world.view(world.point, trust_map=trust) as view:
        assert read(view.disks[0], 0, 50 * GRAIN) == world.content[: 50 * GRAIN]
        happens(world)
        assert read(view.disks[0]) == world.content
        assert view.report()[0].findings == ()
    assert Role.VIEW not in world.targets()


@pytest.mark.parametrize("trust", [False, True])
def test_a_volume_recreated_right_after_the_snapshot_does_not_matter(trust: bool) -> None:
    world = Memory()
    world.driver.after_snapshot = lambda: recreate_volume(world)
    with world.view(world.point, trust_map=trust) as view:
        assert read(view.disks[0]) == world.content
        assert view.report()[0].near == "change map"  # T is still of the volume that was backed up


def test_the_file_in_t_is_closed_after_its_last_reader_has_left() -> None:
    world = Memory()
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(30)

    answers: list[bytes] = []
    with open_view(world.context(), world.point, world.point.disks) as view:
        assert view.wait_settled(60)
        world.driver.events.clear()
        world.driver.before_read = hold
        reader = threading.Thread(target=lambda: answers.append(read(view.disks[0], 0, GRAIN)))
        reader.start()
        assert inside.wait(30)
        closer = threading.Thread(target=view.close)
        closer.start()
        closer.join(0.05)
        assert closer.is_alive()
        go_on.set()
        for thread in (reader, closer):
            thread.join(30)
    assert answers == [world.content[:GRAIN]]
    assert world.driver.events == ["read", "closed"]


@pytest.mark.parametrize("happens", [remove_volume, recreate_volume, resize_volume])
@pytest.mark.parametrize("trust", [False, True])
def test_whatever_happened_before_the_view_it_is_correct(happens: Callable[[Memory], None], trust: bool) -> None:
    world = Memory()
    happens(world)
    with world.view(world.point, trust_map=trust) as view:
        assert read(view.disks[0]) == world.content


def test_a_missing_source_and_a_busy_array_are_reasons_not_errors() -> None:
    world = Memory()
    world.driver.taken.add("memory:a")
    with world.view(world.point) as view:
        assert read(view.disks[0]) == world.content
        assert view.report()[0].near == "nothing: memory:a is held by a restore"
    remove_volume(world)
    with world.view(world.point) as view:
        assert read(view.disks[0]) == world.content
        assert "nothing: " in view.report()[0].near


def test_one_volume_that_cannot_be_snapshotted_does_not_hinder_the_others() -> None:
    world = Memory()
    world.storage.create("b", 10 * GRAIN).write(0, noise(4, 10 * GRAIN))
    point = world.backup(PATH, "/dev/memory/b", name="both")
    world.driver.taken.add("memory:a")
    with world.view(point) as view:
        assert [read(disk) for disk in view.disks] == [world.content, noise(4, 10 * GRAIN)]
        near = {report.name: (report.near, report.local_bytes) for report in view.report()}
    assert near == {"a": ("nothing: memory:a is held by a restore", 0), "b": ("change map", 10 * GRAIN)}


def test_a_target_that_cannot_be_opened_goes_with_the_view() -> None:
    world = Memory()

    def refuse(target: object, claim: object) -> FileImage:
        raise SnapshotFailed(volume="memory:a", reason="no path to it")

    world.driver.open = refuse  # type: ignore[method-assign]
    with world.view(world.point) as view:
        assert read(view.disks[0]) == world.content
        assert world.targets().count(Role.VIEW) == 1
    assert Role.VIEW not in world.targets()


# --- beside others ----------------------------------------------------------------------------------


def test_the_point_is_pinned_while_the_view_is_open() -> None:
    world = Memory()
    repository = world.open()
    with world.view(world.point), pytest.raises(PointPinned, match="view run"):
        repository.delete_point(world.point.id)
    repository.delete_point(world.point.id)


def test_the_view_ends_and_unpins_also_when_its_user_fails() -> None:
    world = Memory()
    with pytest.raises(ZeroDivisionError), world.view(world.point):
        raise ZeroDivisionError
    assert Role.VIEW not in world.targets()
    assert world.open().open_runs() == ()


def test_backups_restores_and_collects_go_on_beside_a_view() -> None:
    world = Memory()
    world.scribble()
    newer = world.backup(PATH)
    later = bytes(world.volume.data)
    with world.view(world.point) as view, world.view(newer, nested=True) as other:
        half = 100 * GRAIN
        assert read(view.disks[0], 0, half) == world.content[:half]
        context = world.context()
        restore_in_place(context, world.point, world.point.disks, compare=False)
        assert bytes(world.volume.data) == world.content
        world.scribble(99)
        newest = world.backup(PATH)
        assert newest.base == newer.id
        world.open().delete_point(newest.id)
        collect(world.open(), alive=context.alive, clock=world.clock, patience=0)
        assert read(view.disks[0]) == world.content
        assert read(other.disks[0]) == later
    assert Role.VIEW not in world.targets()


def test_a_dead_owner_s_view_is_reaped_and_a_living_one_s_is_not() -> None:
    world = Memory()
    ghost = Owner(host="host", boot="boot", pid=7, started=7)
    context = world.context(owner=ghost)
    with open_view(context, world.point, world.point.disks) as view:
        assert view.wait_settled(60)
        run = view.run
        reap(world.context())
        assert world.targets().count(Role.VIEW) == 1
        assert run.id in [one.id for one in world.open().open_runs()]
        world.dead.add(ghost)  # as far as anybody can tell
        reap(world.context())
        assert Role.VIEW not in world.targets()
        assert world.open().open_runs() == ()
        assert read(view.disks[0]) == world.content


def test_a_view_clears_away_what_a_dead_one_left_on_the_same_volume() -> None:
    world = Memory()
    ghost = Owner(host="host", boot="boot", pid=7, started=7)
    with open_view(world.context(owner=ghost), world.point, world.point.disks) as dead:
        assert dead.wait_settled(60)
        world.dead.add(ghost)
        with world.view(world.point, nested=True):
            assert [one.tag.owner for one in world.driver.list_targets() if one.tag.role is Role.VIEW] == [OWNER]


def test_the_heart_beats_while_the_view_is_open() -> None:
    world = Memory()
    repository = world.open()
    with world.view(world.point, beat_s=0.01) as view:
        seen = 0
        while seen < 3:
            seen = repository.heartbeat(view.run.id)
    assert repository.heartbeat(view.run.id) == 0


def test_what_cannot_be_read_is_told_with_the_name_of_the_pack() -> None:
    world = Memory()
    objects = world.medium.inner.store.objects
    (pack,) = [name for name in objects if name.startswith("data/")][:1]
    content = bytearray(objects[pack])
    content[len(content) // 2] ^= 1
    objects[pack] = bytes(content)
    told: list[object] = []
    with world.view(world.point, told=told, hybrid=False) as view:
        bad = 0
        for at in range(0, SIZE, GRAIN):
            try:
                assert read(view.disks[0], at, min(GRAIN, SIZE - at)) == world.content[at : at + GRAIN]
            except OSError as error:
                bad += 1
                assert error.errno == errno.EIO
        assert bad == 1
        assert [pack in str(finding) for finding in told] == [True]
        assert [pack in str(finding) for finding in view.report()[0].findings] == [True]
    with world.view(world.point) as view:
        assert read(view.disks[0]) == world.content  # near: the damaged pack is not needed


# --- real storage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.ReflinkFs]:
    """A file system that can reflink."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab.ReflinkFs(tmp_path_factory.mktemp("views"), request.param, 1024 * lab.MIB) as made:
        yield made


BIG = 64 << 10


class Real(World):
    """A disk file of 32 MiB on a reflink file system, and a repository in a directory."""

    def __init__(self, folder: str, tmp: str, throttled: bool = False) -> None:
        self.disk = os.path.join(folder, "disk.raw")
        self.content = noise(1, 400 * BIG) + bytes(100 * BIG) + noise(2, 12 * BIG + 777)
        lab.write_at(self.disk, (0, self.content))
        repo = os.path.join(tmp, "repo")
        medium = DirectoryMedium.create(repo)
        clock = SteppedClock() if throttled else SystemClock()
        if throttled:
            medium = Throttled(medium, clock, 10e6)
        driver = ReflinkDriver(FilePlaces(os.path.join(tmp, "places")))
        super().__init__([driver, LockedDriver()], medium, BIG, clock)
        self.point = self.backup(self.disk)

    def files(self) -> list[str]:
        """What graincopy has left beside the disk."""
        folder = os.path.join(os.path.dirname(self.disk), ".graincopy")
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


@pytest.fixture
def world(real: lab.ReflinkFs, tmp_path: os.PathLike[str]) -> Iterator[Real]:
    folder = os.path.join(real.path, os.path.basename(tmp_path))
    os.mkdir(folder)
    yield Real(folder, os.fspath(tmp_path))
    lab.run("rm", "-rf", folder)


@pytest.mark.root
def test_real_volume_changes_under_the_view(world: Real) -> None:
    kept = world.files()
    lab.write_at(world.disk, (7 * BIG + 5, b"changed"), sync=False)
    with world.view(world.point) as view:
        assert len(world.files()) == len(kept) + 1
        assert read(view.disks[0], 0, 50 * BIG) == world.content[: 50 * BIG]
        for seed in range(5):
            lab.write_at(world.disk, (seed * 3_000_000 + 99, noise(seed, 500_000)), sync=False)
            assert read_in_pieces(view.disks[0], 777_777) == world.content
        os.truncate(world.disk, 1000)
        assert read(view.disks[0]) == world.content
        (report,) = view.report()
        assert (report.near, report.mismatches, report.findings) == ("change map", 0, ())
        assert report.medium_bytes == 7 * BIG  # one grain, each time
        spans = view.disks[0].extents(0, len(world.content))
        assert sum(span.stop - span.start for span in spans if span.zero) == 100 * BIG
        assert sum(span.stop - span.start for span in spans if not span.zero and not span.local) == BIG
    assert world.files() == kept


@pytest.mark.root
@pytest.mark.parametrize("trust", [False, True])
def test_real_volume_or_target_is_removed_under_the_view(world: Real, trust: bool) -> None:
    with world.view(world.point, trust_map=trust) as view:
        assert read(view.disks[0], 0, 50 * BIG) == world.content[: 50 * BIG]
        os.unlink(world.disk)
        for name in world.files():
            os.unlink(os.path.join(os.path.dirname(world.disk), ".graincopy", name))
        assert read(view.disks[0]) == world.content
        assert view.report()[0].medium_bytes == 0  # the descriptor holds it
    assert world.files() == []
    with world.view(world.point) as view:
        assert read(view.disks[0]) == world.content
        assert "does not exist" in view.report()[0].near
    lab.write_at(world.disk, (0, noise(3, len(world.content))))  # another S, of other content
    with world.view(world.point) as view:
        assert read(view.disks[0]) == world.content
        assert view.report()[0].local_bytes == 0


@pytest.mark.root
def test_throttled_medium_one_percent(real: lab.ReflinkFs, tmp_path: os.PathLike[str]) -> None:
    """Reading all of an image that differs in 1 % takes about 1 % of what the medium alone takes, at 10 MB/s."""
    folder = os.path.join(real.path, os.path.basename(tmp_path))
    os.mkdir(folder)
    world = Real(folder, os.fspath(tmp_path), throttled=True)
    assert isinstance(world.clock, SteppedClock)
    for grain in (3, 99, 201, 350):  # of 412 that hold something
        lab.write_at(world.disk, (grain * BIG + 9, b"changed"))
    cost = {}
    for hybrid in (False, True):
        world.medium.gets.clear()
        with world.view(world.point, hybrid=hybrid, trust_map=False) as view:
            packs, waited = world.medium.bytes, world.clock.monotonic()
            assert read_in_pieces(view.disks[0], 1 << 20) == world.content
            cost[hybrid] = (world.medium.bytes - packs, world.clock.monotonic() - waited)
    lab.run("rm", "-rf", folder)
    assert cost[False][0] > 412 * BIG
    assert 4 * BIG < cost[True][0] < 4 * BIG + 100_000  # and the grain map
    assert cost[True][1] < 0.016 * cost[False][1]
    assert 2.7 < cost[False][1] < 2.9


@pytest.mark.root
def test_locked_has_no_hybrid(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "plain.raw")
    content = noise(1, 20 * BIG)
    lab.write_at(path, (0, content))
    world = World([LockedDriver()], grain=BIG)
    point = world.backup(path)
    with world.view(point) as view:
        with open(path, "r+b") as file:  # nobody is held off
            file.write(b"changed")
        assert read(view.disks[0]) == content
        assert view.report()[0].near == "nothing: the locked driver makes no snapshots"


@pytest.mark.root
def test_disks_on_a_lun_are_read_from_its_target(real: lab.ReflinkFs, tmp_path: os.PathLike[str]) -> None:
    traces = lab.Traces(os.fspath(tmp_path))
    folder = os.path.join(real.path, os.path.basename(tmp_path))
    os.mkdir(folder)
    with lab.Lun(folder, inner="ext4", size=128 * lab.MIB, mount_at=os.path.join(tmp_path, "ds")) as lun:
        contents = {}
        for name in ("a.raw", "b.raw"):
            contents[name] = noise(ord(name[0]), 5_000_000)
            lab.write_at(os.path.join(lun.path, name), (0, contents[name]))
        medium = DirectoryMedium.create(os.path.join(tmp_path, "repo"))
        driver = ReflinkDriver(FilePlaces(os.path.join(tmp_path, "places")))
        world = World([driver, LockedDriver()], medium, BIG, SystemClock())
        point = world.backup(*(os.path.join(lun.path, name) for name in contents))
        lab.write_at(os.path.join(lun.path, "a.raw"), (0, noise(5, 3 * BIG)), sync=False)
        with world.view(point) as view:
            lab.write_at(os.path.join(lun.path, "b.raw"), (0, noise(6, 5_000_000)), sync=False)
            for disk, report in zip(view.disks, view.report(), strict=True):
                assert read_in_pieces(disk, 100_000) == contents[disk.name]
                assert report.near == "change map"
            split = {one.name: one.medium_bytes // BIG for one in view.report()}
            assert 3 <= split["a.raw"] <= 5  # neighbours share blocks of the LUN image
            assert split["b.raw"] <= 1
        assert Role.VIEW not in world.targets()
    lab.run("rm", "-rf", folder)
    assert traces.gone()


OWNER_SCRIPT = """
import sys, time
from graincopy.app.viewing_core import opened_view
from graincopy.app.settings import read_settings
from graincopy.app.wiring import wire
with opened_view(wire(read_settings(sys.argv[1], sys.argv[2])), {"point": "latest"}) as view:
    assert view.wait_settled(60)
    print(view.report()[0].near, flush=True)
    time.sleep(600)
"""


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_target_goes_with_the_process_that_views(
    real: lab.ReflinkFs, tmp_path: os.PathLike[str], number: signal.Signals
) -> None:

    folder = os.path.join(real.path, os.path.basename(tmp_path))
    os.mkdir(folder)
    cli = story.Cli(os.path.join(tmp_path, "cli")).init()
    disk = story.make_disk(os.path.join(folder, "a.raw"), lab.MIB, (0, noise(1, 500_000)))
    point = cli.backup(disk)["restore_point"]
    kept = story.files_below(os.path.join(folder, ".graincopy"))
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER_SCRIPT, cli.config, cli.repo], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"change map\n"
        assert len(story.files_below(os.path.join(folder, ".graincopy"))) == len(kept) + 1
        assert cli("expire", "--keep-last", "1").code == 0
        process.send_signal(number)
        process.wait(30)
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()
    left = story.files_below(os.path.join(folder, ".graincopy"))
    if number is signal.SIGKILL:
        assert len(left) == len(kept) + 1
        cli.ok("targets", "--reap")
    assert story.files_below(os.path.join(folder, ".graincopy")) == kept
    assert cli.ok("points")[0]["restore_point"] == point
    lab.run("rm", "-rf", folder)


def test_a_claim_of_another_host_s_driver_is_no_reason_to_fail() -> None:
    world = Memory()
    world.drivers.clear()
    with world.view(world.point) as view:
        assert read(view.disks[0]) == world.content
        assert "nothing: " in view.report()[0].near


# --- what the operations share ----------------------------------------------------------------------


def test_a_point_named_by_id_is_found_without_reading_any_other() -> None:
    world = Memory()
    points = [world.point, *(world.backup(PATH) for _ in range(4))]
    read_names: list[str] = []
    inner = world.medium.inner
    get = inner.get

    def noted(name: str, offset: int = 0, length: int | None = None) -> bytes:
        read_names.append(name)
        return get(name, offset, length)

    inner.get = noted  # type: ignore[method-assign]
    for text in (points[1].id, points[1].id[:12]):
        repository = world.open()
        read_names.clear()
        assert repository.find_point(text) == points[1]
        assert [name for name in read_names if name.startswith("points/")] == [f"points/{points[1].id}"]
    assert world.open().find_point("latest~1") == points[3]
    with pytest.raises(PointUnknown):
        world.open().find_point("no such point")
    with pytest.raises(PointUnknown):
        world.open().find_point("")


def test_the_report_for_people_and_for_machines() -> None:
    world = Memory()
    world.volume.write(0, b"x" * GRAIN)
    with world.view(world.point) as view:
        read(view.disks[0])
        document = json.loads(json.dumps(view_document(view)))
        head, line = view_lines(view)
        assert view_warnings(view) == ()
    (disk,) = document["disks"]
    assert document["restore_point"] == world.point.id
    assert document["fetched_bytes"] > GRAIN
    assert (disk["name"], disk["near"], disk["medium_bytes"]) == ("a", "change map", GRAIN)
    assert disk["local_bytes"] + disk["medium_bytes"] + disk["zero_bytes"] == SIZE
    assert head.split()[:3] == ["DISK", "FROM", "S"]
    assert line.split() == ["a", "796", "KiB", "4", "KiB", "400", "KiB", "change", "map"]
