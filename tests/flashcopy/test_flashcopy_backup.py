"""The whole backup and restore on an array: through SSH and real block devices, by the real command line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import lab
import pytest
import scene
import story
from datacenter import DataCentre
from instants import run_id, tag
from story import GRAIN, MIB, Cli, noise

from graincopy.volumes.flashcopy import names

pytestmark = pytest.mark.root

SIZES = (8 * MIB, 4 * MIB + 4097, 6 * MIB, 2 * MIB, 3 * MIB + 1)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataCentre]:
    """Three LUNs with datastores."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with DataCentre(os.fspath(tmp_path_factory.mktemp("array")), ("ext4", 96), ("xfs", 320), ("ext4", 64)) as made:
        yield made


@pytest.fixture
def centre(storage: DataCentre) -> Iterator[DataCentre]:
    """The array without faults and datastores without disks; afterwards it shows what it did before."""
    storage.array.faults = type(storage.array.faults)()
    for point in storage.datastores:
        for name in set(os.listdir(point)) - {"lost+found"}:
            os.unlink(os.path.join(point, name))
    before, traces = storage.array.footprint(), lab.Traces(storage.folder)
    storage.array.log.clear()
    yield storage
    assert storage.array.footprint() == before
    assert not [line for line in storage.array.log if "-force" in line.split()]
    assert traces.gone(), f"left behind: {traces.now()}, before: {traces.before}"


@pytest.fixture
def cli(storage: DataCentre, tmp_path: os.PathLike[str]) -> Cli:
    """An empty repository, and a configuration with the array."""
    return Cli(os.path.join(tmp_path, "graincopy"), config=storage.config()).init()


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GRAINCOPY_")]:
        monkeypatch.delenv(name)


def disks(centre: DataCentre, *datastores: int) -> list[str]:
    """A disk on each of these datastores (they may repeat), and a neighbour on each that no backup names."""
    for number in set(datastores):
        story.make_disk(centre.path(number, "neighbour.raw"), 3 * MIB, (0, noise(90 + number, 3 * MIB)))
    paths = []
    for number, datastore in enumerate(datastores):
        size = SIZES[number]
        pieces = ((0, noise(number, MIB)), (size - 70_000, noise(10 + number, 70_000)))
        paths.append(story.make_disk(centre.path(datastore, f"disk{number}.raw"), size, *pieces))
    return paths


# --- the method -------------------------------------------------------------------------------------


@pytest.mark.parametrize("datastores", [(0, 1, 2), (0, 1, 0, 1), (2, 2, 2, 2, 2)], ids=["3-on-3", "4-on-2", "5-on-1"])
def test_backup_and_restore(centre: DataCentre, cli: Cli, datastores: tuple[int, ...]) -> None:
    paths = disks(centre, *datastores)
    neighbours = {path: story.digest(path) for path in (centre.path(n, "neighbour.raw") for n in set(datastores))}
    first = cli.backup(*paths)
    assert {disk["driver"] for disk in first["disks"]} == {"flashcopy"}
    volumes = {disk["path"]: disk["volume"] for disk in first["disks"]}
    assert volumes == {path: f"flashcopy:lab/{centre.uids[n]}" for path, n in zip(paths, datastores, strict=True)}
    assert (first["consistency"], first["instant"], first["targets_left"]) == ("crash", "one", [])
    assert first["freeze_ms"] > 0
    assert sum(line.startswith("startfcconsistgrp") for line in centre.array.log) == 1
    before = [story.digest(path) for path in paths]

    for number, path in enumerate(paths):
        story.write(path, (number * GRAIN, b"changed"))
    second = cli.backup(*paths)
    assert [disk["change_map"] for disk in second["disks"]] == ["compared: the driver keeps no change map"] * len(paths)
    assert [disk["dirty_bytes"] for disk in second["disks"]] == [GRAIN] * len(paths)
    after = [story.digest(path) for path in paths]

    restored = cli.ok("restore", "latest~1", "--in-place")
    assert [story.digest(path) for path in paths] == before
    assert [disk["differing_bytes"] for disk in restored["disks"]] == [GRAIN] * len(paths)
    cli.ok("undo", restored["restore"])
    assert [story.digest(path) for path in paths] == after
    assert {path: story.digest(path) for path in neighbours} == neighbours
    cli.undamaged()


def test_writers_go_on_while_the_target_is_read(centre: DataCentre, cli: Cli) -> None:
    (path,) = disks(centre, 0)
    before = story.digest(path)
    done = cli.ok("backup", path, step=lambda step: story.write(path, (0, noise(5, MIB))) if step == "thawed" else None)
    assert story.digest(path) != before
    out = cli.ok("restore", done["restore_point"], "--to", f"{cli.folder}/out")
    assert story.digest(out["disks"][0]["target"]) == before


def test_a_target_is_shown_to_this_host_read_only_and_only_while_it_is_needed(centre: DataCentre, cli: Cli) -> None:
    (path,) = disks(centre, 0)
    seen: list[tuple[int, bool]] = []

    def look(step: str) -> None:
        targets = [vdisk for name, vdisk in centre.array.vdisks.items() if name.startswith("gc_")]
        if step == "copied":
            device = centre.plane.device(targets[0].number)
            with open(f"/sys/block/{os.path.basename(device)}/ro", "rb") as file:
                seen.append((len(targets), file.read().strip() == b"1"))

    cli.ok("backup", path, step=look)
    assert seen == [(1, True)]
    assert sorted(os.listdir(centre.plane.by_id)) == sorted(f"wwn-0x{uid}" for uid in centre.uids)


def test_a_lun_that_is_the_disk(centre: DataCentre, cli: Cli) -> None:
    centre.array.make("raw", 4 * MIB, "thishost")
    try:
        device = centre.plane.device(centre.array.vdisks["raw"].number)
        story.write(device, (0, noise(1, MIB)), (4 * MIB - 512, noise(2, 512)))
        first = cli.backup(device)
        assert (first["disks"][0]["driver"], first["freeze_ms"]) == ("flashcopy", None)
        content = story.read(device)
        story.write(device, (GRAIN, noise(3, 100)))
        restored = cli.ok("restore", "latest", "--in-place")
        assert restored["disks"][0]["differing_bytes"] == GRAIN
        assert story.read(device) == content
        cli.ok("undo", restored["restore"])
        assert story.read(device) != content
        (shown,) = cli.ok("volumes", device)
        assert shown["capabilities"]["live_targets"] == 1
    finally:
        centre.array.drop("raw")


def test_a_view_holds_its_volume_and_lets_it_go(centre: DataCentre, cli: Cli) -> None:
    (path,) = disks(centre, 0)
    cli.backup(path)
    before, content = centre.array.footprint(), story.read(path)
    socket = f"{cli.folder}/s"
    serving = scene.start(cli, "serve-nbd", "latest", "--socket", socket)
    try:
        assert scene.wait_until(scene.LONG, lambda: any(m.state == "copying" for m in centre.array.maps.values()))
        done = cli("backup", path)
        lab.run("nbdcopy", f"nbd+unix:///{os.path.basename(path)}?socket={socket}", f"{cli.folder}/seen")
    finally:
        serving.terminate()
        _, err = serving.communicate(timeout=scene.LONG)
    assert (done.code, "is held by a view by pid" in done.err) == (29, True), done
    assert story.read(f"{cli.folder}/seen")[: len(content)] == content, err
    assert centre.array.footprint() == before


# --- one live T per S -------------------------------------------------------------------------------


def test_a_backup_is_refused_while_an_undo_holds_the_volume(centre: DataCentre, cli: Cli) -> None:
    one, other = disks(centre, 0, 1)
    first = cli.backup(one)
    cli.backup(other)
    story.write(one, (0, b"changed"))
    restored = cli.ok("restore", first["restore_point"], "--in-place")
    done = cli("backup", one)
    assert done.code == 29
    assert (
        f"flashcopy:lab/{centre.uids[0]} is held by the undo of restore {restored['restore']} (target gc_" in done.err
    )
    assert "graincopy targets shows the holder" in done.err
    (held,) = cli.ok("targets")["targets"]
    assert (held["role"], held["decision"]) == ("undo", "keep")
    cli.backup(other)  # another volume is nobody's business
    cli.ok("undo", restored["restore"])
    cli.backup(one)


def test_a_backup_waits_for_another_one(centre: DataCentre, cli: Cli, tmp_path: object) -> None:
    one, other = disks(centre, 0, 0)
    patient = Cli(f"{tmp_path}/patient", config=centre.config(wait=60.0)).init()
    with scene.stopped(cli, "copied", "--repo", cli.repo, "backup", one) as held:
        assert cli("backup", other).code == 29
        waiting = scene.start(patient, "--repo", patient.repo, "backup", other)
        assert not scene.wait_until(1.0, lambda: waiting.poll() is not None)
        assert held.go_on().code == 0
        _, err = waiting.communicate(timeout=scene.LONG)
        assert waiting.returncode == 0, err


# --- protection and the queue -----------------------------------------------------------------------


def test_volume_protection_defers_the_deletion(centre: DataCentre, cli: Cli) -> None:
    (path,) = disks(centre, 0)
    centre.array.faults.protection_s = 3600
    cli.backup(path)
    (left,) = cli.ok("targets")["targets"]
    assert (left["decision"], left["reason"]) == ("delete", "its owner is gone and it serves no disk")
    assert cli("backup", path).code == 29
    centre.array.faults.protection_s = 0
    cli.ok("targets", "--reap")


# --- killed -----------------------------------------------------------------------------------------


def test_killed_at_every_step(centre: DataCentre, cli: Cli) -> None:
    paths = disks(centre, 0, 2)
    before = centre.array.footprint()
    steps = scene.steps_of(cli, "backup", *paths)
    assert len(steps) >= 10
    for at in steps:
        scene.cut(cli, at, "--repo", cli.repo, "backup", *paths)
        cli.ok("targets", "--reap")
        assert centre.array.footprint() == before, at
        for path in paths:
            must_be_thawed(os.path.dirname(path))
    cli.backup(*paths)
    cli.undamaged()


MAKING = ("mkvdisk", "mkfcconsistgrp", "mkfcmap", "prestartfcconsistgrp", "startfcconsistgrp", "mkvdiskhostmap")
GOING = ("rmvdiskhostmap", "stopfcconsistgrp", "rmfcmap", "rmfcconsistgrp", "rmvdisk")


@pytest.mark.parametrize("verb", [*MAKING, *GOING])
def test_killed_at_every_command(centre: DataCentre, cli: Cli, verb: str) -> None:
    """The command that the array is just being given takes effect when nobody is there any more to hear of it."""
    paths = disks(centre, 0, 2)
    before = centre.array.footprint()
    with killed_at(centre, cli, verb, "backup", *paths):
        pass
    for path in paths:
        must_be_thawed(os.path.dirname(path))
    cli.ok("targets", "--reap")
    assert centre.array.footprint() == before
    cli.backup(*paths)


@contextmanager
def killed_at(centre: DataCentre, cli: Cli, verb: str, *arguments: str) -> Iterator[None]:
    """A graincopy that is killed while the array handles its first ``verb``."""
    running: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        running[0].kill()
        running[0].wait(scene.LONG)

    centre.array.faults.before[verb] = kill
    running.append(scene.start(cli, *arguments))
    out, err = running[0].communicate(timeout=scene.LONG)
    assert running[0].returncode == -9, (out, err)
    yield


def must_be_thawed(folder: str) -> None:
    """It takes a durable write soon."""
    probe = subprocess.Popen(["dd", "if=/dev/zero", f"of={folder}/probe", "count=1", "conv=fsync", "status=none"])
    try:
        assert probe.wait(scene.LONG) == 0
    except subprocess.TimeoutExpired:
        lab.run("fsfreeze", "--unfreeze", folder, check=False)
        probe.wait(scene.LONG)
        raise AssertionError(f"{folder} is frozen") from None
    os.unlink(f"{folder}/probe")


# --- bad input --------------------------------------------------------------------------------------


def refused(centre: DataCentre, cli: Cli, code: int, *words: str) -> None:
    """A backup fails with ``code`` and one clear sentence; S is as it was, and nothing is left."""
    paths = [path for path in (centre.path(n, f"disk{n}.raw") for n in (0, 1)) if os.path.exists(path)] or disks(
        centre, 0, 1
    )
    before, content = centre.array.footprint(), [story.digest(path) for path in paths]
    done = cli("backup", *paths)
    assert done.code == code, done
    lines = done.err.splitlines()
    assert len(lines) <= 3, done
    for word in words:
        assert word in done.err, done
    assert [story.digest(path) for path in paths] == content
    assert cli.ok("points") == []
    centre.array.faults = type(centre.array.faults)()
    cli.ok("targets", "--reap")
    assert centre.array.footprint() == before


def test_no_licence(centre: DataCentre, cli: Cli) -> None:
    centre.array.faults.unlicensed = True
    refused(centre, cli, 24, "array lab refused mkfcconsistgrp: CMMVC5886E The FlashCopy feature is not licensed.")


def test_too_many_maps(centre: DataCentre, cli: Cli) -> None:
    centre.array.faults.most_maps = 0
    refused(centre, cli, 24, "CMMVC6425E The maximum number of FlashCopy mappings")


def test_pool_full(centre: DataCentre, cli: Cli) -> None:
    centre.array.faults.pool_full = True
    refused(centre, cli, 25, "no space left for the target of flashcopy:lab/")


def test_the_name_exists(centre: DataCentre, cli: Cli) -> None:
    centre.array.faults.refuse["mkvdisk"] = ["CMMVC6035E The action failed because the object already exists."] * 9
    refused(centre, cli, 24, "CMMVC6035E")


def test_garbage(centre: DataCentre, cli: Cli) -> None:
    centre.array.faults.garble["lsfcmap"] = ["<html>502 Bad Gateway</html>\n"] * 99
    refused(centre, cli, 92, "array lab answered lsfcmap with something that cannot be understood: there is no column")


@pytest.mark.parametrize("when", ["lose_before", "lose_after"])
@pytest.mark.parametrize("verb", [*MAKING[3:], *GOING[:2], "lsvdiskhostmap"])
def test_the_line_breaks_in_every_state(centre: DataCentre, cli: Cli, verb: str, when: str) -> None:
    getattr(centre.array.faults, when)[verb] = 1
    paths = disks(centre, 0, 1)
    cli.backup(*paths)
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert [story.digest(disk["target"]) for disk in out["disks"]] == [story.digest(path) for path in paths]


def test_every_connection_is_cut_while_the_array_prepares(centre: DataCentre, cli: Cli) -> None:
    centre.array.faults.preparing_s = 1.0
    centre.array.faults.before["prestartfcconsistgrp"] = lambda: centre.array.faults.before.update(
        lsfcmap=centre.front.hang_up
    )
    cli.backup(*disks(centre, 0, 1))
    assert "lsfcmap" not in centre.array.faults.before
    assert sum(line.startswith("startfcconsistgrp") for line in centre.array.log) == 1


def test_the_line_breaks_for_good_at_the_start(centre: DataCentre, cli: Cli) -> None:
    centre.array.faults.lose_before["startfcconsistgrp"] = 99
    refused(centre, cli, 24, "no target could be made of flashcopy:lab/")


@pytest.mark.parametrize("verb", ["mkvdiskhostmap", "lsvdiskhostmap"], ids=["being-read", "not-yet-read"])
def test_the_target_goes_offline_while_it_is_read(centre: DataCentre, cli: Cli, verb: str) -> None:
    """What was read is not one instant: nothing is published."""

    def offline() -> None:
        centre.array.faults.offline |= {name for name in centre.array.vdisks if name.startswith("gc_")}

    centre.array.faults.before[verb] = offline
    (path,) = disks(centre, 0)
    done = cli("backup", path)
    assert (done.code, cli.ok("points")) == (26, [])
    assert "is gone or no longer readable: the vdisk is offline" in done.err


def test_the_target_is_deleted_under_us(centre: DataCentre, cli: Cli) -> None:
    def drop(step: str) -> None:
        if step == "settled":
            centre.array.drop(next(name for name in centre.array.vdisks if name.startswith("gc_")))

    (path,) = disks(centre, 0)
    done = cli("backup", path, step=drop)
    assert (done.code, cli.ok("points")) == (26, [])
    cli.ok("targets", "--reap")


def test_targets_of_another_host_are_found_by_name_and_left_alone(centre: DataCentre, cli: Cli) -> None:
    """Nobody here can tell whether that host lives: its targets are shown, with the run in their names."""
    other = centre.driver(f"{centre.folder}/other host")
    (stray,) = other.create_targets([names.volume_id("lab", centre.uids[1])], tag(run_id(7)))
    try:
        (found,) = cli.ok("targets")["targets"]
        assert found["id"] == stray.id and run_id(7) in found["id"]
        assert found["decision"] == "keep"
        assert found["reason"].startswith("nobody here can tell whether its owner lives")
        before = centre.array.footprint()
        assert cli("targets", "--reap").code == 0
        assert centre.array.footprint() == before
    finally:
        other.delete(stray)


def test_the_array_cannot_be_logged_in_to(centre: DataCentre, tmp_path: object) -> None:
    stranger = centre.folder + "/stranger"
    with open(stranger, "w", encoding="utf-8") as file:
        with open(centre.front.endpoint.known_hosts, encoding="utf-8") as known:
            host, kind, key = known.read().split()
        file.write(f"{host} {kind} {key[:-6]}AAAAAA\n")
    (path,) = disks(centre, 0)
    for number, (more, word) in enumerate(
        (
            ({"user": "nobody"}, "Permission denied"),
            ({"known_hosts": stranger}, "Host key is not trusted"),
            ({"key_file": "/nonexistent"}, "/nonexistent cannot be read"),
        )
    ):
        cli = Cli(f"{tmp_path}/{number}", config=centre.config(**more)).init()
        done = cli("backup", path)
        assert done.code == 91, done
        assert f"array lab cannot be logged in to: {word}" in done.err
        assert len(done.err.splitlines()) <= 3


def test_an_array_that_is_down_stops_only_its_own_volumes(centre: DataCentre, tmp_path: object) -> None:
    (path,) = disks(centre, 0)
    cli = Cli(f"{tmp_path}/absent", config=centre.config(port=1)).init()
    done = cli("backup", path)
    assert (done.code, "array lab does not answer: 127.0.0.1 port 1" in done.err) == (90, True), done
    elsewhere = story.make_disk(f"{tmp_path}/elsewhere.raw", MIB, (0, noise(1, MIB)))
    cli.backup(elsewhere)
    assert cli("targets").code == 90
    assert cli("targets", "--reap").code == 3


def test_a_password_does_as_well_as_a_key(centre: DataCentre, tmp_path: object) -> None:
    (path,) = disks(centre, 0)
    config = centre.config(key_file="", password_file=centre.front.endpoint.password_file)
    Cli(f"{tmp_path}/password", config=config).init().backup(path)


def test_the_configuration_is_explained_and_checked(centre: DataCentre, cli: Cli, tmp_path: object) -> None:
    assert cli.ok("config", "check")["config"]["flashcopy"]["lab"]["host_name"] == "thishost"
    assert "flashcopy" in cli.ok("doctor")["drivers"]
    for text, word in (
        ('[flashcopy.x]\nhost = "h"\nuser = "u"\n', "host_name"),
        ('[flashcopy.x]\nhost = "h"\nuser = "u"\nhost_name = "n"\nshoes = 2\n', "shoes"),
        ('[flashcopy."a/b"]\nhost = "h"\nuser = "u"\nhost_name = "n"\n', "a/b"),
    ):
        wrong = Cli(f"{tmp_path}/wrong", config=text)("points")
        assert (wrong.code, word in wrong.err) == (60, True), wrong
