"""``graincopy backup vm:NAME`` of running guests with qcow2 disks: snapshots inside QEMU, through libvirt's monitor."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vm_lab import PATIENCE, Guest, GuestLab, LabDisk, make_disk, needs_guests, one_instant, read_records, tool, wait

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
SLOTS = 512


class Command:
    """graincopy with a repository, a state directory and a configuration of its own."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder = folder
        self.config = folder / "config.toml"
        self.config.write_text(
            f'[paths]\nstate = "{folder}/state"\ncache = "{folder}/cache"\n[vm]\nuri = "{uri}"\n'
            "[freeze]\ndeadline = 20\n"
        )
        self.run("init", "--no-encryption")

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "graincopy", "--config", str(self.config), *words]
        environment = {**os.environ, "GRAINCOPY_REPO": str(self.folder / "repo")}
        return subprocess.Popen(line, stdout=-1, stderr=-1, env=environment, stdin=subprocess.DEVNULL)

    def run(self, *words: str) -> Any:
        with self.start(*words, "--json") as process:
            said, complained = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, complained.decode()
        return json.loads(said)


@pytest.fixture
def graincopy(guests: GuestLab, tmp_path: Path) -> Command:
    return Command(tmp_path, guests.uri)


@contextlib.contextmanager
def writing(guests: GuestLab, folder: Path, name: str) -> Iterator[Guest]:
    """A guest that writes records to a qcow2 and a raw disk in turn, record n on the first before the second."""
    disks = []
    for dev, kind in (("vda", "qcow2"), ("vdb", "raw")):
        path = os.path.join(folder, f"{name}-{dev}.{kind}")
        make_disk(path, 32 * MIB, format=kind, fs=False)
        disks.append(LabDisk(dev=dev, path=path, format=kind))
    options = {"writer": "/dev/vda,/dev/vdb", "slots": str(SLOTS), "pause": "500", "agent": "no"}
    with guests.guest(name, disks, options=options) as guest:
        wait(lambda: guest.run("pidof guest_writer")[0] == 0, "the writer does not start")
        yield guest


def of_ours(guest: Guest) -> set[str]:
    """Nodes of graincopy in the guest's QEMU."""
    import libvirt_qemu

    text = libvirt_qemu.qemuMonitorCommand(guest.domain(), '{"execute":"query-named-block-nodes"}', 0)
    return {node["node-name"] for node in json.loads(text)["return"] if node["node-name"].startswith("gc-")}


def test_a_running_guest_is_backed_up_inside_qemu(guests: GuestLab, tmp_path: Path, graincopy: Command) -> None:
    with writing(guests, tmp_path, "inside") as guest:
        for number in range(3):
            time.sleep(0.3)
            point = graincopy.run("backup", "vm:inside")
            assert {disk["driver"] for disk in point["disks"]} >= {"qemu"}, point["disks"]
            disks = {os.path.basename(disk["path"]): disk for disk in point["disks"]}
            assert disks["inside-vda.qcow2"]["representation"] == "guest"
            assert {disk["change_map"] for disk in point["disks"]} == {"bitmap" if number else "first backup"}
            assert graincopy.run("show", "latest")["instant"] == "one"
            assert guest.domain().info()[0] == 1 and guest.domain().jobInfo()[0] == 0
            assert of_ours(guest) <= {name for name in of_ours(guest) if name.endswith("-a")}
    for number in range(3):
        to = tmp_path / f"out{number}"
        graincopy.run("restore", f"latest~{number}", "--to", str(to))
        qcow2 = to / "inside-vda.qcow2"
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(to / "plain"))
        first, second = (
            read_records(path.read_bytes()[: SLOTS * 4096]) for path in (to / "plain", to / "inside-vdb.raw")
        )
        assert one_instant(first, second, SLOTS), (first.last, second.last, first.torn, second.torn)
    done = graincopy.run("restore", "latest~1", "--in-place")  # the guest is off now
    assert {disk["how"] for disk in done["disks"]} <= {"change map", "compared"}
    again = graincopy.run("backup", "vm:inside")
    assert {os.path.basename(d["path"]): d["change_map"] for d in again["disks"]}["inside-vda.qcow2"] == "bitmap"


def test_kill_9_leaves_the_guest_running_and_nothing_for_long(
    guests: GuestLab, tmp_path: Path, graincopy: Command
) -> None:
    with writing(guests, tmp_path, "killed") as guest:
        graincopy.run("backup", "vm:killed")
        for moment in range(5):
            process = graincopy.start("backup", "vm:killed")
            time.sleep(0.6 + 0.25 * moment)
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=PATIENCE)
            wait(lambda: guest.domain().info()[0] == 1, "its guard does not let it go on")
            assert guest.domain().jobInfo()[0] == 0
        point = graincopy.run("backup", "vm:killed")
        assert len(point["targets_left"]) == 2
        assert {name for name in of_ours(guest) if not name.endswith("-a")} == set()
        assert len(graincopy.run("targets")["targets"]) == 2
