"""``graincopy backup vm:NAME`` of running guests, restored: one instant across disks on two volumes, nothing torn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vm_lab import (
    PATIENCE,
    Guest,
    GuestLab,
    LabDisk,
    file_in_image,
    make_disk,
    needs_guests,
    needs_replay,
    one_instant,
    read_records,
    tool,
    wait,
)

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
SLOTS = 512
POINTS = 4


@dataclass
class Command:
    """graincopy with a repository, a state directory and a configuration of its own."""

    folder: Path
    uri: str

    def __post_init__(self) -> None:
        self.config = self.folder / "config.toml"
        self.config.write_text(
            f'[paths]\nstate = "{self.folder}/state"\ncache = "{self.folder}/cache"\n[vm]\nuri = "{self.uri}"\n'
            "[freeze]\ndeadline = 20\n"
        )
        self.run("init", "--no-encryption")

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "GRAINCOPY_REPO": str(self.folder / "repo")}

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "graincopy", "--config", str(self.config), *words]
        return subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.environment, stdin=subprocess.DEVNULL
        )

    def run(self, *words: str, code: int = 0) -> Any:
        with self.start(*words, "--json") as process:
            said, complained = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, complained.decode()
        return json.loads(said) if said else complained.decode()


@pytest.fixture
def graincopy(guests: GuestLab, tmp_path: Path) -> Command:
    return Command(tmp_path, guests.uri)


@pytest.fixture(scope="module")
def stores(guests: GuestLab) -> Iterator[tuple[str, str]]:
    """Two volumes that can be snapshotted: XFS, each on its own loop device."""
    with contextlib.ExitStack() as stack:
        yield tuple(stack.enter_context(store(os.path.join(guests.folder, name))) for name in ("ds1", "ds2"))  # type: ignore[misc]


@contextlib.contextmanager
def store(point: str) -> Iterator[str]:
    os.mkdir(point)
    with open(f"{point}.img", "xb") as file:
        file.truncate(512 * MIB)
    tool("mkfs.xfs", "-q", "-m", "reflink=1", f"{point}.img")
    tool("mount", "-o", "loop", f"{point}.img", point)
    try:
        yield point
    finally:
        tool("umount", "--lazy", point)


@contextlib.contextmanager
def writing(guests: GuestLab, stores: tuple[str, str], name: str, *, fs: bool) -> Iterator[Guest]:
    """A guest that writes to two disks in turn, on a file system with an agent, or straight onto them without."""
    disks = []
    for dev, store in zip(("vda", "vdb"), stores, strict=True):
        path = os.path.join(store, f"{name}-{dev}.raw")
        make_disk(path, 32 * MIB, fs=fs)
        disks.append(LabDisk(dev=dev, path=path))
    files = ("/mnt/vda/records", "/mnt/vdb/records") if fs else ("/dev/vda", "/dev/vdb")
    options = {"writer": ",".join(files), "slots": str(SLOTS), "pause": "500", "agent": "yes" if fs else "no"}
    if fs:
        options["fs"] = "vda,vdb"
    with guests.guest(name, disks, options=options) as guest:
        if fs:
            guest.wait_agent()
        wait(lambda: guest.run("pidof guest_writer")[0] == 0, "the writer does not start")
        yield guest
    for one in disks:
        os.unlink(one.path)


def test_every_point_of_a_writing_guest_is_one_instant(
    guests: GuestLab, stores: tuple[str, str], graincopy: Command
) -> None:
    """Without an agent: the disks are as after one power cut, record n never on the second without the first."""
    last = 0
    with writing(guests, stores, "instant", fs=False) as guest:
        for number in range(POINTS):
            time.sleep(0.3)
            point = graincopy.run("backup", "vm:instant")
            assert point["consistency"] == "crash"
            assert graincopy.run("show", "latest")["instant"] == "one"
            if number:
                assert {disk["driver"] for disk in point["disks"]} == {"reflink"}, point["disks"]
                assert all(disk["read_bytes"] < 16 * MIB for disk in point["disks"]), point["disks"]
        assert guest.domain().info()[0] == 1
    for number in range(POINTS):
        to = graincopy.folder / f"out{number}"
        graincopy.run("restore", f"latest~{POINTS - 1 - number}", "--to", str(to))
        first, second = (
            read_records((to / f"instant-{dev}.raw").read_bytes()[: SLOTS * 4096]) for dev in ("vda", "vdb")
        )
        assert one_instant(first, second, SLOTS), (first.last, second.last, first.torn, second.torn)
        assert first.last > last, "the guest wrote on"
        last = first.last


def test_with_the_agent_no_journal_has_to_be_replayed(
    guests: GuestLab, stores: tuple[str, str], graincopy: Command
) -> None:
    with writing(guests, stores, "calm", fs=True) as guest:
        for _ in range(2):
            point = graincopy.run("backup", "vm:calm")
            assert point["consistency"] == "file-system"
            assert point["freeze_ms"] > 0
        assert needs_replay(guest.disks[0].path), "a mounted file system does need it: this test can fail"
        assert guest.status() == (True, True)
    for number in range(2):
        to = graincopy.folder / f"out{number}"
        graincopy.run("restore", f"latest~{number}", "--to", str(to))
        images = [str(to / f"calm-{dev}.raw") for dev in ("vda", "vdb")]
        assert not any(needs_replay(image) for image in images)
        for image in images:
            tool("e2fsck", "-fn", image)
        first, second = (read_records(file_in_image(image, "/records")) for image in images)
        assert one_instant(first, second, SLOTS)


def test_kill_9_anywhere_in_a_backup_leaves_the_guest_running(
    guests: GuestLab, stores: tuple[str, str], graincopy: Command
) -> None:
    """Ten moments of a run; afterwards the next one cleans up and succeeds."""
    with writing(guests, stores, "hardy", fs=True) as guest:
        graincopy.run("backup", "vm:hardy")
        for moment in range(10):
            process = graincopy.start("backup", "vm:hardy")
            time.sleep(0.3 + 0.15 * moment)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=PATIENCE)
            wait(lambda: guest.status() == (True, True), f"it stands still after kill number {moment}")
            assert guest.domain().jobInfo()[0] == 0, "a job is left in libvirt"
        point = graincopy.run("backup", "vm:hardy")
        assert point["consistency"] == "file-system"
        assert len(point["targets_left"]) <= 2


def test_two_vms_of_a_set_show_one_instant(guests: GuestLab, stores: tuple[str, str], graincopy: Command) -> None:
    with writing(guests, stores, "east", fs=False), writing(guests, stores, "west", fs=True) as west:
        point = graincopy.run("backup", "vm:east", "vm:west")
        assert len(point["disks"]) == 4
        assert point["consistency"] == "crash"
        assert west.status() == (True, True)
        assert graincopy.run("show", "latest")["instant"] == "one"
    to = graincopy.folder / "out"
    graincopy.run("restore", "latest", "--to", str(to))
    names = {disk["path"]: disk["name"] for disk in point["disks"]}
    pair = [next(name for path, name in names.items() if path.endswith(f"east-{dev}.raw")) for dev in ("vda", "vdb")]
    first, second = (read_records((to / name).read_bytes()[: SLOTS * 4096]) for name in pair)
    assert one_instant(first, second, SLOTS)


def test_workloads_lists_what_can_be_backed_up(guests: GuestLab, stores: tuple[str, str], graincopy: Command) -> None:
    path = os.path.join(stores[0], "listed.raw")
    make_disk(path, 4 * MIB, fs=False)
    with guests.guest("listed", [LabDisk(dev="vda", path=path)], start=False):
        found = {one["workload"]: one for one in graincopy.run("workloads")["workloads"]}
        assert found["vm:listed"]["running"] is False
        assert found["vm:listed"]["members"] == ["vda"]
        assert "subsystem:libvirt" in found
        complaint = graincopy.run("backup", "vm:listed", "--exclude", "vdz", code=14)
        assert "no disk vdz to leave out" in complaint
    assert "has no domain listed" in graincopy.run("backup", "vm:listed", code=71)


def test_without_libvirt_the_rest_is_listed(tmp_path: Path) -> None:
    lonely = Command(tmp_path, "qemu+unix:///system?socket=/nowhere")
    found = lonely.run("workloads", code=3)
    assert [one["kind"] for one in found["workloads"]] == ["subsystem", "subsystem"]
    assert "virtual machines are not listed" in found["warnings"][0]
