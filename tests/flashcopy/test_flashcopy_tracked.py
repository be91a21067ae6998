"""The hypervisor's bitmap as change map of the flashcopy driver: our array, a real QEMU, the real command line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lab
import pytest
import scene
import story
from datacenter import DataCentre
from story import GRAIN, MIB, Cli, noise
from tracked_site import Busy, Oracle, Site, restored

pytestmark = pytest.mark.root

COMPARED = "compared: the driver keeps no change map"
RESTARTED = "compared: QEMU was started anew since, and a raw disk keeps no bitmap"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataCentre]:
    """One LUN with a datastore."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with DataCentre(os.fspath(tmp_path_factory.mktemp("tracked")), ("xfs", 320)) as made:
        yield made


@pytest.fixture
def site(storage: DataCentre) -> Iterator[Site]:
    """A machine with its disks; afterwards the array shows what it did before."""
    storage.array.faults = type(storage.array.faults)()
    for name in os.listdir(storage.datastores[0]):
        os.unlink(storage.path(0, name))
    before, traces = storage.array.footprint(), lab.Traces(storage.folder)
    with contextlib.closing(Site(storage)) as made:
        yield made
    assert storage.array.footprint() == before
    assert traces.gone(), f"left behind: {traces.now()}, before: {traces.before}"


@pytest.fixture
def cli(site: Site, tmp_path: os.PathLike[str]) -> Cli:
    """An empty repository, and a configuration with the array and the machine."""
    return Cli(os.path.join(tmp_path, "graincopy"), config=site.config()).init()


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GRAINCOPY_")]:
        monkeypatch.delenv(name)


def each(document: Any, key: str, *paths: str) -> list[Any]:
    """What the document says of each disk, in the order of ``paths`` where there are any."""
    found = {disk["path"]: disk[key] for disk in document["disks"]}
    return [found[path] for path in paths or found]


def maps(document: Any, *paths: str) -> list[str]:
    """Where the changes of each disk came from."""
    return each(document, "change_map", *paths)


def at(step: str, act: Callable[[], object]) -> Callable[[str], None]:
    """Something that happens when a backup reaches ``step``."""
    return lambda name: act() and None if name == step else None  # type: ignore[func-returns-value]


def must_equal_now(cli: Cli, document: Any) -> None:
    """Each disk of the point holds what the live disk holds; nobody writes now."""
    found = restored(cli, document["restore_point"])
    assert {path: story.read(path) for path in found} == found


# --- the method -------------------------------------------------------------------------------------


def test_only_what_the_machine_wrote_is_read(site: Site, cli: Cli) -> None:
    before = site.centre.array.footprint()
    first = cli.backup(*site.paths, site.other)
    assert {disk["driver"] for disk in first["disks"]} == {"flashcopy"}
    assert site.centre.array.footprint() == before
    assert len(first["targets_left"]) == 2  # a bitmap for each volume, and no T
    for number, path in enumerate(site.paths):
        site.write(path, (number + 1) * GRAIN, b"changed")
    site.write(site.lun, 40 * GRAIN + 100, noise(5, 2 * GRAIN))
    paths = [*site.paths, site.other]
    planned = cli.ok("backup", *paths, "--dry-run")["plan"]
    assert maps(planned, *paths) == ["incremental", "incremental", "incremental", COMPARED]
    assert planned["keep_checkpoint"]
    second = cli.backup(*paths)
    assert maps(second, *paths) == ["bitmap", "bitmap", "bitmap", COMPARED]
    assert each(second, "dirty_bytes", *paths) == [GRAIN, GRAIN, 4 * GRAIN, 0]
    assert each(second, "read_bytes", *paths) == [GRAIN, GRAIN, 4 * GRAIN, 3 * MIB]
    must_equal_now(cli, second)
    assert (len(site.bitmaps()), site.exports()) == (3, 0)
    cli.undamaged()


def test_discards_zeroes_growth_and_a_smaller_disk(site: Site, cli: Cli) -> None:
    path = site.files[0]
    cli.backup(path)
    site.machine.guest(path).zero(MIB, MIB)  # a hole now
    site.machine.guest(path).zero(5 * MIB, GRAIN)  # was one
    size = os.path.getsize(path) + 3 * MIB + 512
    site.grow(path, size)
    second = cli.backup(path)
    assert maps(second) == ["bitmap"]
    assert second["disks"][0]["read_bytes"] < MIB
    assert second["disks"][0]["size"] == size
    must_equal_now(cli, second)
    site.machine.resize(path, 2 * MIB + 512)
    third = cli.backup(path)
    assert (maps(third), third["disks"][0]["size"]) == (["bitmap"], 2 * MIB + 512)
    must_equal_now(cli, third)


def test_what_is_written_all_the_time_is_as_the_target_shows_it(site: Site, cli: Cli) -> None:
    """Many rounds: every point equals a copy of T that was taken below the array."""
    paths = [*site.paths, site.other]
    oracle = Oracle(site)
    for number in range(12):
        with Busy(site, number) as busy:
            done = cli.ok("backup", *paths, "--audit", "0", step=at("settled", oracle.take))
        assert not busy.failures
        shown = oracle.contents()
        found = restored(cli, done["restore_point"])
        assert {path for path in paths if found[path] != shown[path]} == set(), f"round {number}"
        assert maps(done, *site.paths) == ["bitmap" if number else "first backup"] * 3
        if number % 4 == 1:
            site.grow(site.files[0], os.path.getsize(site.files[0]) + MIB)
        if number % 4 == 2:
            site.machine.resize(site.files[1], os.path.getsize(site.files[1]) + 512 * number)


# --- the order of things ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["prepared", "thawed"])
def test_a_write_beside_the_instant_is_dirty_in_the_next_backup(site: Site, cli: Cli, step: str) -> None:
    """After the instant, and before anything is asked of QEMU again: only a bitmap that began before it knows that."""

    def write() -> None:
        for path in site.paths:
            site.write(path, 7 * GRAIN, noise(70, GRAIN))

    cli.ok("backup", *site.paths, step=at(step, write))
    second = cli.ok("backup", *site.paths, "--audit", "0")
    assert maps(second) == ["bitmap"] * 3
    assert each(second, "read_bytes") == [GRAIN] * 3
    must_equal_now(cli, second)


@pytest.mark.parametrize("step", ["prepared", "thawed"])
def test_a_write_beside_the_instant_is_dirty_in_its_own_backup(site: Site, cli: Cli, step: str) -> None:
    """Before the instant, and after everything was prepared: only a copy that is made later knows that."""
    cli.ok("backup", *site.paths)
    oracle = Oracle(site)

    def write() -> None:
        for path in site.paths:
            site.write(path, 7 * GRAIN, noise(70, GRAIN))

    def act(name: str) -> None:
        if name == step:
            write()
        if name == "settled":
            oracle.take()

    second = cli.ok("backup", *site.paths, "--audit", "0", step=act)
    assert maps(second) == ["bitmap"] * 3
    assert each(second, "read_bytes") == [GRAIN] * 3
    shown = oracle.contents()
    assert {path: shown[path] for path in site.paths} == restored(cli, second["restore_point"])


def test_a_write_that_is_on_the_volume_and_not_yet_answered_is_waited_for(site: Site, cli: Cli) -> None:
    """It reached the storage before the instant, and QEMU hears of that seconds later: until then there is no bit."""
    path, data = site.files[0], noise(71, GRAIN)
    cli.ok("backup", path)
    guest = threading.Thread(target=site.write, args=(path, 9 * GRAIN, data))
    tracer: list[subprocess.Popen[bytes]] = []

    def hold() -> None:
        calls = "pwrite64,pwritev"
        command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}"]
        command += ["-e", f"inject={calls}:delay_exit=8s", "-p", str(site.machine.process.pid)]
        tracer.append(subprocess.Popen(command))
        assert scene.wait_until(scene.LONG, lambda: is_traced(site.machine.process.pid))
        guest.start()
        assert scene.wait_until(scene.LONG, lambda: story.read(path)[9 * GRAIN : 10 * GRAIN] == data)

    try:
        second = cli.ok("backup", path, "--audit", "0", step=at("prepared", hold))
    finally:
        for one in tracer:
            one.terminate()
            one.wait(scene.LONG)
    guest.join()
    assert maps(second) == ["bitmap"]
    assert restored(cli, second["restore_point"])[path] == story.read(path)


def is_traced(pid: int) -> bool:
    """Whether every thread of the process has a tracer."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/status", encoding="ascii") as file:
            if "TracerPid:\t0\n" in file.read():
                return False
    return True


def test_a_write_that_stands_still_in_the_frozen_file_system_holds_nobody_up(site: Site, cli: Cli) -> None:
    path = site.files[0]
    cli.ok("backup", path)
    guest = threading.Thread(target=site.write, args=(path, 3 * GRAIN, noise(72, GRAIN)))

    def write() -> None:
        guest.start()
        guest.join(0.3)  # time to get stuck; nothing depends on whether it does

    second = cli.ok("backup", path, "--audit", "0", step=at("frozen", write))
    guest.join()
    third = cli.ok("backup", path, "--audit", "0")
    assert maps(second) == maps(third) == ["bitmap"]
    must_equal_now(cli, third)


# --- when there is no bitmap ------------------------------------------------------------------------


def test_another_qemu_is_compared_and_tracked_from_then_on(site: Site, cli: Cli) -> None:
    cli.backup(*site.paths)
    site.reboot()
    for path in site.paths:
        site.write(path, 2 * GRAIN, b"changed")
    assert maps(cli.backup(*site.paths)) == [RESTARTED] * 3
    site.write(site.lun, 0, b"changed")
    third = cli.backup(*site.paths)
    assert maps(third) == ["bitmap"] * 3
    must_equal_now(cli, third)
    site.reboot(kill=True)
    assert maps(cli.backup(*site.paths)) == [RESTARTED] * 3


def test_a_machine_that_is_off_is_compared_and_leaves_no_checkpoint(site: Site, cli: Cli) -> None:
    cli.backup(*site.paths)
    site.machine.stop()
    story.write(site.files[0], (2 * GRAIN, b"changed"))
    second = cli.backup(*site.paths)
    assert maps(second) == [COMPARED] * 3
    assert second["targets_left"] == []
    must_equal_now(cli, second)
    cli.ok("targets", "--reap")
    assert cli.ok("targets")["targets"] == []
    site.machine.start()
    site.plug()
    third = cli.backup(*site.paths)
    assert maps(third) == ["compared: no checkpoint was kept"] * 3
    assert maps(cli.backup(*site.paths)) == ["bitmap"] * 3


def test_a_file_that_took_anothers_place_is_compared(site: Site, cli: Cli) -> None:
    one, other = site.files
    cli.backup(one)
    site.machine.stop()
    os.rename(one, f"{one}.old")
    os.rename(other, one)
    story.make_disk(other, MIB, (0, noise(3, MIB)))
    site.machine.start()
    site.plug()
    second = cli.backup(one)
    assert maps(second)[0].startswith("compared: ")
    must_equal_now(cli, second)


def test_two_disks_that_change_places_in_a_running_machine_are_compared(site: Site, cli: Cli) -> None:
    one, other = site.files
    cli.backup(one)
    os.rename(one, f"{one}.away")
    os.rename(other, one)
    os.rename(f"{one}.away", other)
    second = cli.backup(one)
    assert maps(second) == ["compared: another file has its path now"]
    must_equal_now(cli, second)


def test_what_lies_beyond_the_end_that_qemu_knows_is_always_read(site: Site, cli: Cli) -> None:
    """The file was made longer by hand, before the machine is told."""
    path = site.files[0]
    size = os.path.getsize(path)
    story.write(path, (size, noise(1, 2 * MIB)))
    cli.backup(path)
    story.write(path, (size + MIB, noise(2, MIB)))  # no bit is set by that
    second = cli.ok("backup", path, "--audit", "0")
    assert maps(second) == ["bitmap"]
    must_equal_now(cli, second)
    story.write(path, (size + 2 * MIB, noise(3, MIB)))
    site.machine.resize(path, size + 3 * MIB)  # now it is told, of all of it
    third = cli.ok("backup", path, "--audit", "0")
    assert maps(third) == ["bitmap"]
    must_equal_now(cli, third)


def test_a_bitmap_that_somebody_stopped_is_not_believed(site: Site, cli: Cli) -> None:
    path = site.files[0]
    cli.backup(path)
    ((node, name),) = (one.split(" ") for one in site.bitmaps())
    with site.machine.monitor() as monitor:
        monitor.run("block-dirty-bitmap-disable", {"node": node, "name": name})
    site.write(path, 0, b"changed")
    second = cli.backup(path)
    assert maps(second) == ["compared: its bitmap was stopped"]
    must_equal_now(cli, second)


def test_a_disk_that_somebody_else_writes_too_is_not_tracked(site: Site, cli: Cli) -> None:
    path = site.files[0]
    cli.backup(path)
    with open(path, "r+b") as file:
        file.write(b"past QEMU")
        file.flush()
        assert maps(cli.backup(path)) == [COMPARED]
        (shown,) = cli.ok("volumes", path)
        assert "several have it open for writing" in str(shown)


# --- nothing is left --------------------------------------------------------------------------------


def test_no_checkpoint_leaves_no_bitmap(site: Site, cli: Cli) -> None:
    done = cli.ok("backup", *site.paths, "--no-checkpoint")
    assert (done["targets_left"], site.bitmaps(), site.exports()) == ([], set(), 0)
    assert maps(cli.backup(*site.paths)) == ["compared: no checkpoint was kept"] * 3
    cli.ok("backup", *site.paths, "--no-checkpoint")
    cli.ok("targets", "--reap")
    assert (cli.ok("targets")["targets"], site.bitmaps()) == ([], set())


@pytest.mark.parametrize("kept", [True, False], ids=["checkpoint", "no-checkpoint"])
def test_killed_at_every_step(site: Site, cli: Cli, kept: bool) -> None:
    """The array as before; in QEMU at most the bitmap of the one checkpoint; and the next backup is right."""
    paths, wish = [site.files[0], site.lun], [] if kept else ["--no-checkpoint"]
    before = site.centre.array.footprint()
    steps = scene.steps_of(cli, "backup", *paths, *wish)
    assert len(steps) >= 10
    for number, step in enumerate(steps if kept else steps[::3]):
        for path in paths:
            site.write(path, number * GRAIN, noise(200 + number, GRAIN))
        scene.cut(cli, step, "--repo", cli.repo, "backup", *paths, *wish)
        cli.ok("targets", "--reap")
        assert site.centre.array.footprint() == before, step
        assert len(site.bitmaps()) <= (2 if kept else 0), step
        assert site.exports() == 0, step
        assert len(cli.ok("targets")["targets"]) == len(site.bitmaps()), step
        site.write(paths[0], 0, noise(300 + number, 512))  # the guest goes on
    done = cli.ok("backup", *paths, "--audit", "0", *wish)
    if kept:
        assert maps(done) == ["bitmap"] * 2
    must_equal_now(cli, done)
    cli.undamaged()


def test_a_target_that_the_array_does_not_let_go_costs_no_checkpoint(site: Site, cli: Cli) -> None:
    path = site.files[0]
    site.centre.array.faults.protection_s = 3600
    cli.backup(path)
    found = {one["id"]: one["decision"] for one in cli.ok("targets")["targets"]}
    assert sorted(found.values()) == ["delete", "keep"]
    site.centre.array.faults.protection_s = 0
    cli.ok("targets", "--reap")
    assert [one["decision"] for one in cli.ok("targets")["targets"]] == ["keep"]
    assert maps(cli.backup(path)) == ["bitmap"]


@pytest.mark.parametrize("verb", ["rmvdiskhostmap", "stopfcconsistgrp", "rmfcmap", "rmvdisk"])
def test_killed_while_the_target_is_taken_down(site: Site, cli: Cli, verb: str) -> None:
    """The point is published and names its checkpoint: it is one in the end."""
    path = site.files[0]
    before = site.centre.array.footprint()
    running: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        running[0].kill()
        running[0].wait(scene.LONG)

    site.centre.array.faults.before[verb] = kill
    running.append(scene.start(cli, "backup", path))
    running[0].communicate(timeout=scene.LONG)
    assert running[0].returncode == -9
    cli.ok("targets", "--reap")
    assert site.centre.array.footprint() == before
    assert len(site.bitmaps()) == 1
    site.write(path, GRAIN, b"changed")
    second = cli.backup(path)
    assert maps(second) == ["bitmap"]
    must_equal_now(cli, second)


# --- others that use it -----------------------------------------------------------------------------


def test_two_repositories_do_not_take_each_others_base_away(site: Site, cli: Cli, tmp_path: object) -> None:
    weekly = Cli(f"{tmp_path}/weekly", config=site.config()).init()
    weekly.configure(site.config())
    path = site.files[0]
    for one in (cli, weekly):
        one.backup(path)
    site.write(path, GRAIN, b"changed")
    assert maps(cli.backup(path)) == ["bitmap"]
    site.write(path, 3 * GRAIN, b"changed")
    done = weekly.backup(path)
    assert (maps(done), done["disks"][0]["read_bytes"]) == (["bitmap"], 2 * GRAIN)
    must_equal_now(weekly, done)
    assert maps(cli.backup(path)) == ["bitmap"]


def test_a_view_reads_what_the_machine_did_not_write_from_the_target(site: Site, cli: Cli) -> None:
    path = site.files[0]
    content = story.read(path)
    cli.backup(path)
    site.write(path, 2 * GRAIN, noise(8, GRAIN))
    before, socket = site.bitmaps(), f"{cli.folder}/s"
    serving = scene.start(cli, "serve-nbd", "latest", "--socket", socket)
    try:
        assert scene.wait_until(scene.LONG, lambda: os.path.exists(socket) or serving.poll() is not None)
        assert scene.wait_until(scene.LONG, lambda: any("@" in name for name in site.bitmaps()))
        lab.run("nbdcopy", f"nbd+unix:///{os.path.basename(path)}?socket={socket}", f"{cli.folder}/seen")
    finally:
        serving.terminate()
        _, err = serving.communicate(timeout=scene.LONG)
    assert story.read(f"{cli.folder}/seen")[: len(content)] == content, err
    assert (site.bitmaps(), site.exports()) == (before, 0)
    assert maps(cli.backup(path)) == ["bitmap"]


def test_restore_and_undo_of_a_machine_that_was_switched_off(site: Site, cli: Cli) -> None:
    path = site.files[0]
    first = cli.backup(path)
    content = story.read(path)
    site.write(path, 2 * GRAIN, noise(8, GRAIN))
    cli.backup(path)
    changed = story.read(path)
    assert cli("restore", first["restore_point"], "--in-place").code == 17
    site.machine.stop()
    done = cli.ok("restore", first["restore_point"], "--in-place")
    assert done["disks"][0]["differing_bytes"] == GRAIN
    assert story.read(path) == content
    site.machine.start()
    site.plug()
    cli.ok("targets", "--reap")
    site.machine.stop()
    cli.ok("undo", done["restore"])
    assert story.read(path) == changed
    site.machine.start()
    site.plug()
    last = cli.backup(path)
    assert maps(last)[0].startswith("compared: ")
    must_equal_now(cli, last)


# --- a monitor that does not answer -----------------------------------------------------------------

PHASES = [("opened", "prepared"), ("thawed", "settled"), ("settled", "copied"), ("published", "cleaned")]


@pytest.mark.parametrize("phase", PHASES, ids=[begin for begin, _ in PHASES])
@pytest.mark.parametrize("how", ["deaf", "killed"])
def test_qemu_does_not_answer(site: Site, cli: Cli, phase: tuple[str, str], how: str) -> None:
    """The backup is done all the same, or says in one sentence why not; the one after that is right."""
    cli.configure(site.config(timeout=1.0))
    path = site.files[0]
    cli.backup(path)
    site.write(path, GRAIN, b"changed")
    with contextlib.ExitStack() as held:

        def act(name: str) -> None:
            if name == phase[0] and how == "deaf":
                held.enter_context(site.deaf())
            if name == phase[0] and how == "killed":
                site.machine.stop(kill=True)
            if name == phase[1]:
                held.close()

        done = cli("backup", path, "--json", step=act)
    assert done.code == 0, done
    word = maps(done.json)[0]
    assert word == "bitmap" if phase[0] == "published" else word.startswith("compared: "), word
    if how == "killed":
        site.machine.start()
        site.plug()
    site.write(path, 2 * GRAIN, b"changed")  # the guest goes on
    third = cli.backup(path)
    must_equal_now(cli, third)
    cli.ok("targets", "--reap")
    assert len(site.bitmaps()) == 1 and site.exports() == 0
    assert maps(cli.backup(path)) == ["bitmap"]


def test_a_monitor_that_never_answers_leaves_the_file_compared(site: Site, cli: Cli) -> None:
    path = site.files[0]
    cli.configure(site.config(timeout=0.5))
    with site.deaf():
        assert maps(cli.backup(path)) == ["first backup"]
        assert maps(cli.backup(path)) == [COMPARED]
        (shown,) = cli.ok("volumes", path)
    assert "what is written is not told: the QEMU at" in str(shown)
    assert site.bitmaps() == set()
