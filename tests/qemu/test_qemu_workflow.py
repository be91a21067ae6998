"""Backup, restore and undo of disks as guests see them, machines on and off, over a real qemu-storage-daemon."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest
from qemu_hands import GRAIN, CutOff, QemuHands

from graincopy.core.errors import GraincopyError, SourceInUse, TargetLost, TargetNoSpace, VolumeUnsupported
from graincopy.core.units import KIB, MIB
from graincopy.hypervisor.nbd import NbdClient
from graincopy.model.snapshot import Role
from graincopy.model.volume import Claim
from graincopy.testing.oracle import content
from graincopy.testing.qemu_lab import QemuLab, bitmaps_of
from graincopy.volumes import qemu_rest
from graincopy.volumes.locked import LockedDriver
from graincopy.volumes.new_file import NewFiles
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.qemu import QemuDriver
from graincopy.volumes.reflink import ReflinkDriver
from graincopy.workflow.export import restore_to

SIZE = 4 * MIB


@pytest.fixture(params=["qcow2", "raw"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QemuLab]:
    """A machine with disks of each format."""
    with contextlib.closing(QemuLab(str(tmp_path), request.param)) as made:
        yield made


@pytest.fixture
def qcow2(tmp_path: Path) -> Iterator[QemuLab]:
    """A machine with qcow2 disks."""
    with contextlib.closing(QemuLab(str(tmp_path), "qcow2")) as made:
        yield made


def filled(machine: QemuLab, seed: int = 1) -> Claim:
    """A disk whose first half is written."""
    claim = machine.make(SIZE)
    machine.write(claim, 0, content(seed, SIZE // 2))
    return claim


def of_ours(machine: QemuLab) -> set[str]:
    """What graincopy has in the machine."""
    return {name for name in machine.machine.nodes() if name.startswith(("gc-", "bitmap "))}


def test_a_running_machine_is_backed_up_by_its_dirty_grains(machine: QemuLab) -> None:
    hands, disk = QemuHands(machine), filled(machine)
    first = hands.backup(disk.path).point.disks[0]
    assert (first.change_map, first.driver) == ("first backup", "qemu")
    assert first.read_bytes == SIZE // 2  # the other half is known to be zero
    machine.write(disk, 5 * GRAIN + 100, b"changed")
    machine.punch(disk, 9 * GRAIN, GRAIN)
    expected = machine.read(disk)
    second = hands.backup(disk.path).point
    (record,) = second.disks
    assert record.change_map == "bitmap"
    assert record.read_bytes <= 2 * GRAIN and record.dirty_bytes == 2 * GRAIN
    assert hands.content(record) == expected
    assert of_ours(machine) == {f"bitmap graincopy-{second.id}"}  # nothing but the checkpoint


def test_without_a_checkpoint_nothing_is_left(machine: QemuLab) -> None:
    hands, disk = QemuHands(machine), filled(machine)
    before = machine.footprint()
    hands.backup(disk.path, keep_checkpoint=False)
    machine.require_no_trace(before)


def test_tracking_survives_an_orderly_restart_in_qcow2_and_not_in_raw(machine: QemuLab) -> None:
    hands, disk = QemuHands(machine), filled(machine)
    hands.backup(disk.path)
    machine.write(disk, 0, b"before")
    with machine.reboot():
        pass
    machine.write(disk, 3 * GRAIN, b"after")
    (record,) = hands.backup(disk.path).point.disks
    if machine.kind == "qcow2":
        assert record.change_map == "bitmap" and record.dirty_bytes == 2 * GRAIN
    else:
        assert "a raw disk keeps no bitmap" in record.change_map
    assert hands.content(record) == machine.read(disk)


def test_a_machine_that_was_killed_is_compared(qcow2: QemuLab) -> None:
    hands, disk = QemuHands(qcow2), filled(qcow2)
    hands.backup(disk.path)
    with qcow2.reboot():  # only a bitmap that was stored once can be found inconsistent
        pass
    qcow2.write(disk, 7 * GRAIN, b"lost by the bitmap")
    qcow2.machine.guest(disk.path).flush()
    with qcow2.reboot(kill=True):
        pass
    (record,) = hands.backup(disk.path).point.disks
    assert record.change_map == "compared: its bitmap is inconsistent: QEMU did not end in order"
    assert hands.content(record) == qcow2.read(disk)
    (record,) = hands.backup(disk.path).point.disks
    assert record.change_map == "bitmap"


def test_a_bitmap_that_somebody_removed_or_stopped_is_not_believed(qcow2: QemuLab) -> None:
    hands, disk = QemuHands(qcow2), filled(qcow2)
    for command, reason in (("disable", "its bitmap was stopped"), ("remove", "its bitmap was removed")):
        point = hands.backup(disk.path).point
        with qcow2.machine.monitor() as monitor:
            node = {"node": qcow2.machine.node(disk.path), "name": f"graincopy-{point.id}"}
            monitor.run(f"block-dirty-bitmap-{command}", node)
        qcow2.write(disk, 2 * GRAIN, command.encode())
        (record,) = hands.backup(disk.path).point.disks
        assert record.change_map == f"compared: {reason}"
        assert hands.content(record) == qcow2.read(disk)


@pytest.mark.parametrize("below", ["locked", "reflink"])
def test_lineage_goes_on_when_the_machine_is_switched_off_and_on(
    below: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    home = request.getfixturevalue("small_xfs").path if below == "reflink" else str(tmp_path)
    drivers = [ReflinkDriver(MemoryPlaces()), LockedDriver()] if below == "reflink" else [LockedDriver()]
    with contextlib.closing(QemuLab(home, "qcow2")) as machine:
        hands, disk = QemuHands(machine, drivers), filled(machine)
        hands.backup(disk.path)
        machine.write(disk, GRAIN, b"while it ran")
        expected = machine.read(disk)
        with machine.switched_off(disk.path):
            (off,) = hands.backup(disk.path).point.disks
            assert (off.change_map, off.dirty_bytes) == ("bitmap", GRAIN)
            assert hands.content(off) == expected
            (still,) = hands.backup(disk.path).point.disks
            assert (still.change_map, still.dirty_bytes) == ("bitmap", 0)
            assert len(bitmaps_of(disk.path)) == 1
        machine.write(disk, 2 * GRAIN, b"while it ran again")
        (on,) = hands.backup(disk.path).point.disks
        assert (on.change_map, on.dirty_bytes) == ("bitmap", GRAIN)
        assert hands.content(on) == machine.read(disk)


@pytest.mark.parametrize("below", ["locked", "reflink"])
def test_restore_in_place_undo_and_the_next_backup(below: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    home = request.getfixturevalue("small_xfs").path if below == "reflink" else str(tmp_path)
    drivers = [ReflinkDriver(MemoryPlaces()), LockedDriver()] if below == "reflink" else [LockedDriver()]
    with contextlib.closing(QemuLab(home, "qcow2")) as machine:
        hands, disk = QemuHands(machine, drivers), filled(machine)
        wanted = machine.read(disk)
        point = hands.backup(disk.path).point
        machine.write(disk, GRAIN, b"a mistake")
        machine.punch(disk, 4 * GRAIN, GRAIN)
        machine.write(disk, SIZE - GRAIN, b"another")
        wrong = machine.read(disk)
        with pytest.raises(SourceInUse):
            hands.restore(point)
        with machine.switched_off(disk.path):
            done = hands.restore(point)
        assert machine.read(disk) == wanted
        assert done.disks[0].differing_bytes == 3 * GRAIN
        assert done.disks[0].how == ("change map" if below == "reflink" else "compared")
        with machine.switched_off(disk.path):
            hands.undo(done.restore)
        assert machine.read(disk) == wrong
        (record,) = hands.backup(disk.path).point.disks
        assert record.change_map == "bitmap" and record.dirty_bytes == 3 * GRAIN
        assert hands.content(record) == wrong


def test_restore_to_a_folder_makes_the_recorded_format(qcow2: QemuLab, tmp_path: Path) -> None:
    hands, disk = QemuHands(qcow2), filled(qcow2)
    point = hands.backup(disk.path).point
    done = restore_to(hands.context(), point, point.disks, NewFiles(str(tmp_path / "out")))
    (restored,) = done.disks
    assert restored.format == "qcow2"
    assert qemu_rest.header_of(restored.target).size == SIZE
    plain = str(tmp_path / "plain")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", restored.target, plain], check=True, timeout=60)
    assert Path(plain).read_bytes() == qcow2.read(disk)
    assert os.listdir(tmp_path / "out") == [os.path.basename(disk.path)]
    assert os.stat(restored.target).st_blocks * 512 < SIZE * 3 // 4  # what is zero takes no room


def test_a_missing_disk_is_made_anew(qcow2: QemuLab) -> None:
    hands, disk = QemuHands(qcow2), filled(qcow2)
    wanted = qcow2.read(disk)
    point = hands.backup(disk.path).point
    qcow2.remove(disk)
    hands.restore(point)
    qcow2.machine.plug(disk.path, "qcow2")
    assert qcow2.read(disk) == wanted


def test_backing_files_are_part_of_what_the_guest_sees(qcow2: QemuLab) -> None:
    base = filled(qcow2)
    qcow2.machine.unplug(base.path)
    top = os.path.join(qcow2.home, "top.qcow2")
    name = os.path.basename(base.path)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", name]
    subprocess.run([*create, "-F", "qcow2", top], check=True, timeout=60)
    hands = QemuHands(qcow2)
    (record,) = hands.backup(top).point.disks
    qcow2.machine.plug(base.path, "qcow2")
    assert hands.content(record) == qcow2.read(base)
    unstated = os.path.join(qcow2.home, "unstated.qcow2")
    subprocess.run([*create, "-F", "qcow2", unstated], check=True, timeout=60)
    head = Path(unstated).read_bytes()
    with open(unstated, "r+b") as file:  # qemu-img no longer leaves the format out: an old one did
        file.seek(head.index(bytes.fromhex("e2792aca")))
        file.write(bytes.fromhex("12345678"))
    with pytest.raises(VolumeUnsupported, match="is not stated"):
        hands.backup(unstated)


def test_a_format_that_is_stated_wrongly_is_refused(qcow2: QemuLab) -> None:
    disk = filled(qcow2)
    hands = QemuHands(qcow2, [])
    answer = QemuDriver(qcow2.places).resolve(disk.path)
    assert not isinstance(answer, Claim) and "QEMU has it open as qcow2" in answer.reason
    stray = os.path.join(qcow2.home, "stray.qcow2")
    Path(stray).write_bytes(b"QFI?" + bytes(2000))
    with pytest.raises(VolumeUnsupported, match="it is not qcow2"):
        hands.backup(stray)


def test_a_running_qemu_that_nobody_told_us_of_is_not_taken_for_off(qcow2: QemuLab) -> None:
    disk = filled(qcow2)
    stranger = QemuDriver(type(qcow2.places)(qcow2.places.state), [LockedDriver()])
    answer = stranger.resolve_guest(disk.path, "qcow2")
    assert not isinstance(answer, Claim) and "has it open for writing" in answer.reason


def test_several_disks_are_one_instant(machine: QemuLab) -> None:
    """The group, as the workflow sees it; the law of the suite has the writer."""
    disks = [filled(machine, seed) for seed in (1, 2)]
    hands = QemuHands(machine)
    outcome = hands.backup(*(disk.path for disk in disks))
    assert outcome.point.instant == "one"
    assert [hands.content(record) for record in outcome.point.disks] == [machine.read(disk) for disk in disks]


# --- trouble --------------------------------------------------------------------------------------------


@pytest.fixture
def small_room(tmp_path: Path) -> Iterator[str]:
    """A folder on a file system with room for next to nothing."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    lab.run("mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(folder))
    try:
        yield str(folder)
    finally:
        lab.unmount(str(folder))


@pytest.mark.root
def test_a_full_target_costs_the_backup_and_not_the_guest(machine: QemuLab, small_room: str) -> None:
    disk = filled(machine)
    places = type(machine.places)(machine.places.state, machine.places.monitors, machine.places.nbd_sockets, small_room)
    driver = QemuDriver(places)
    claim = driver.resolve_guest(disk.path, machine.kind)
    assert isinstance(claim, Claim)
    (target,) = driver.create_targets([claim.volume], machine.tag())
    with driver.open(target, claim) as image:
        machine.write(disk, 0, content(9, SIZE // 2))  # eight times the room, and no error
        machine.machine.guest(disk.path).flush()
        with pytest.raises(TargetNoSpace):
            image.readinto(0, memoryview(bytearray(GRAIN)))
    assert machine.read(disk)[: SIZE // 2] == content(9, SIZE // 2)
    driver.delete(target)
    assert of_ours(machine) == set()
    assert os.listdir(small_room) == []


def test_a_machine_that_ends_takes_its_targets_along(machine: QemuLab) -> None:
    disk = filled(machine)
    driver = machine.driver()
    (target,) = driver.create_targets([disk.volume], machine.tag())
    with driver.open(target, disk) as image, machine.reboot(kill=True):
        with pytest.raises(TargetLost):
            image.readinto(0, memoryview(bytearray(GRAIN)))
        with pytest.raises(TargetLost):
            image.placement()
    with pytest.raises(TargetLost), driver.open(target, disk):
        pass
    driver.delete(target)
    assert driver.list_targets() == () and of_ours(machine) == set()


@pytest.mark.parametrize("step", ["prepared", "snapshotted", "settled", "copied", "indexed"])
def test_what_a_dead_run_left_is_reaped(machine: QemuLab, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hands, disk = QemuHands(machine), filled(machine)
    before = of_ours(machine)
    hands.cut = step
    with monkeypatch.context() as patch:  # killed: it cleans nothing up
        patch.setattr(QemuDriver, "delete", lambda self, target: None)
        with pytest.raises(CutOff):
            hands.backup(disk.path)
    assert of_ours(machine) != before
    machine.write(disk, 0, b"the guest goes on")
    hands.dead = True
    hands.reap()
    assert of_ours(machine) == before
    assert QemuDriver(machine.places).list_targets() == ()


def test_a_run_that_died_after_publishing_is_promoted(machine: QemuLab) -> None:
    hands, disk = QemuHands(machine), filled(machine)
    hands.cut = "published"
    with pytest.raises(CutOff):
        hands.backup(disk.path)
    hands.dead = True
    hands.reap()
    (kept,) = QemuDriver(machine.places).list_targets()
    assert kept.tag.role is Role.CHECKPOINT
    machine.write(disk, 0, b"changed")
    (record,) = hands.backup(disk.path).point.disks
    assert (record.change_map, record.dirty_bytes) == ("bitmap", GRAIN)


def test_another_disk_under_the_same_path_is_compared(machine: QemuLab) -> None:
    hands, disk = QemuHands(machine), filled(machine)
    hands.backup(disk.path)
    machine.recreate_volume(disk)
    (record,) = hands.backup(disk.path).point.disks
    assert record.change_map == "compared: the volume was recreated"
    assert hands.content(record) == bytes(SIZE)


def test_a_disk_that_grew_and_one_that_shrank(machine: QemuLab) -> None:
    hands, disk = QemuHands(machine), filled(machine)
    hands.backup(disk.path)
    for size in (SIZE + MIB, SIZE // 2):
        machine.resize_volume(disk, size)
        (record,) = hands.backup(disk.path).point.disks
        assert record.size == size and hands.content(record) == machine.read(disk)


def test_several_targets_of_one_disk_come_and_go_in_any_order(machine: QemuLab) -> None:
    disk = filled(machine)
    driver = machine.driver()
    shots = []
    for number in range(4):
        machine.write(disk, number * 4 * KIB, content(number, 8 * KIB))
        shots.append((driver.create_targets([disk.volume], machine.tag())[0], machine.read(disk)))
    for gone in (1, 0, 1, 0):
        driver.delete(shots.pop(gone)[0])
        machine.write(disk, 40 * KIB * (len(shots) + 1), content(50 + gone, 9 * KIB))
        for target, expected in shots:
            with driver.open(target, disk) as image:
                found = bytearray(image.size)
                image.readinto(0, memoryview(found))
            assert bytes(found) == expected
    assert of_ours(machine) == set()


def test_reads_over_the_end_of_a_copied_grain_show_the_instant(machine: QemuLab) -> None:
    """QEMU before 8.0 shows S as it is now there (hbitmap_status): requests must not be that long."""
    disk = filled(machine)
    expected = machine.read(disk)
    driver = machine.driver()
    (target,) = driver.create_targets([disk.volume], machine.tag())
    machine.write(disk, 0, content(77, GRAIN))
    machine.punch(disk, 4 * GRAIN, 2 * GRAIN)
    with driver.open(target, disk) as image:
        found = bytearray(len(expected))
        image.readinto(0, memoryview(found))
        holes = image.placement().zero()
    assert bytes(found) == expected
    assert holes.clip(0, SIZE // 2).total == 0  # what is a hole now was none then
    assert holes.total == SIZE // 2


def test_a_reader_in_several_threads(machine: QemuLab) -> None:
    disk = filled(machine)
    expected = machine.read(disk)
    driver = machine.driver()
    (target,) = driver.create_targets([disk.volume], machine.tag())
    wrong: list[int] = []
    with driver.open(target, disk) as image:

        def read(number: int) -> None:
            for at in range(number * 1000, SIZE, 300_000):
                piece = bytearray(70_000)
                image.readinto(at, memoryview(piece))
                if bytes(piece) != expected[at : at + 70_000].ljust(70_000, b"\0"):
                    wrong.append(at)

        threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for at in range(0, SIZE // 2, 3 * GRAIN):
            machine.write(disk, at, b"meanwhile")
        for thread in threads:
            thread.join()
    assert wrong == []


def test_the_socket_of_a_target_is_for_nobody_else(qcow2: QemuLab) -> None:
    """Where the QEMU has no NBD server yet, ours lies in the state folder, mode 0600, and goes with the last target."""
    disk = filled(qcow2)
    with qcow2.machine.monitor() as monitor:
        for guest in list(qcow2.machine._guests.values()):
            guest.close()
        monitor.run("nbd-server-stop")
    driver = QemuDriver(type(qcow2.places)(f"{qcow2._sockets}/state", qcow2.places.monitors))
    (target,) = driver.create_targets([disk.volume], qcow2.tag())
    with driver.open(target, disk) as image:
        image.readinto(0, memoryview(bytearray(GRAIN)))
        (socket,) = [name for name in os.listdir(f"{qcow2._sockets}/state") if name.endswith(".nbd")]
        assert os.stat(f"{qcow2._sockets}/state/{socket}").st_mode & 0o777 == 0o600
    driver.delete(target)
    with pytest.raises(OSError):
        NbdClient(f"{qcow2._sockets}/state/{socket}", "any")


def test_many_threads_may_be_the_first_to_write_back(qcow2: QemuLab) -> None:
    disk = filled(qcow2)
    troubles: list[BaseException] = []
    with qcow2.switched_off(disk.path), QemuDriver(qcow2.places).open_for_restore(disk) as sink:
        barrier = threading.Barrier(6)

        def write(number: int) -> None:
            barrier.wait()
            try:
                sink.write(number * GRAIN, memoryview(content(number, GRAIN)))
            except (GraincopyError, OSError, AssertionError) as error:
                troubles.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sink.sync()
    assert troubles == []
    assert qcow2.read(disk)[: 6 * GRAIN] == b"".join(content(number, GRAIN) for number in range(6))
