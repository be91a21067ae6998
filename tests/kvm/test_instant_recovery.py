"""Instant recovery: the machine runs off a view, its disks follow, and nothing that it writes is ever lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from restore_scene import Scene
from vm_lab import PATIENCE, Guest, GuestLab, LabDisk, file_in_image, needs_guests, tool, wait

from graincopy.app.host import SystemClock
from graincopy.core.errors import RecoveryStalled
from graincopy.hypervisor.pull import Pull, QmpPuller, make_overlay, overlay_options
from graincopy.hypervisor.qmp import Monitor, QmpRefused
from graincopy.hypervisor.shown_disks import Export
from graincopy.transfer.progress import Progress
from graincopy.workflow.pulling import TRIES, pull_all

pytestmark = [pytest.mark.root, needs_guests]
MIB = 1 << 20
RUNNING, PAUSED = 1, 3


@pytest.fixture(scope="module")
def scene(guests: GuestLab, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(guests, str(tmp_path_factory.mktemp("instant")))


@pytest.fixture(scope="module")
def shop(guests: GuestLab, scene: Scene) -> Iterator[Guest]:
    """A machine, off, with 24 MiB that mean something on its first disk; backed up."""
    raw = guests.file("shop.raw", 64 * MIB)
    with open(f"{raw}.stock", "wb") as file:
        file.write(os.urandom(24 * MIB))
    tool("debugfs", "-w", "-R", f"write {raw}.stock stock", raw)
    disks = [
        LabDisk(dev="vda", path=raw),
        LabDisk(dev="vdb", path=guests.file("shop.qcow2", 64 * MIB, format="qcow2"), format="qcow2"),
    ]
    with guests.guest("shop", disks, start=False, options={"fs": "vda,vdb"}) as guest:
        scene.run("backup", "vm:shop")
        yield guest


def stock_of(scene: Scene) -> str:
    with open(os.path.join(scene.lab.folder, "shop.raw.stock"), "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def as_raw(path: str) -> str:
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, f"{path}.raw")
    return f"{path}.raw"


def test_killed_again_and_again_the_same_command_goes_on_and_no_write_is_lost(scene: Scene, shop: Guest) -> None:
    place = os.path.join(scene.folder, "vms", "shop2")
    command = ("restore", "latest", "--instant", "--to", place, "--as", "shop 2")
    scene.killed("recorded", *command)
    assert "shop 2" not in scene.names()
    scene.killed("defined", *command)
    scene.killed("started", *command)
    wait(lambda: scene.domain_state("shop 2") == PAUSED, "it does not stand still without what it has to read")
    assert "in use" in scene.run("expire", "--point", "latest", code=46)  # the machine needs it
    half = dict(re.findall(r"<source file='([^']*)' index='\d+'/>\s*<backingStore type='(\w+)'", scene.xml("shop 2")))
    assert half == {f"{place}/shop.raw": "network", f"{place}/shop.qcow2": "network"}
    assert scene.xml("shop 2", inactive=True).count("rerror_policy='stop'") == 2

    with scene.running(*command) as process:
        wait(lambda: process.poll() is not None or " runs; " in scene.said(), scene.said)
        work = "md5sum /mnt/vda/stock && echo mine > /mnt/vdb/written && sync && cat /mnt/vdb/written"
        said = scene.ask("shop 2", work)
        assert said == (0, f"{stock_of(scene)}  /mnt/vda/stock mine")
        assert process.wait(PATIENCE) == 0, scene.said()
    done = json.loads(scene.said().splitlines()[-1])
    assert {disk["how"] for disk in done["disks"]} == {"pulled"}

    for text in (scene.xml("shop 2"), scene.xml("shop 2", inactive=True)):
        assert "nbd" not in text and "urn:graincopy" not in text
    assert "rerror_policy" not in scene.xml("shop 2", inactive=True)
    assert not os.path.exists(scene.runtime)
    assert scene.run("targets")["restores"] == []
    scene.lab.connection().lookupByName("shop 2").destroy()
    for name in ("shop.raw", "shop.qcow2"):
        facts = json.loads(tool("qemu-img", "info", "--output=json", f"{place}/{name}"))
        assert facts["format"] == "qcow2" and "backing-filename" not in facts
    assert file_in_image(as_raw(f"{place}/shop.qcow2"), "written") == b"mine\n"
    stock = file_in_image(as_raw(f"{place}/shop.raw"), "stock")
    assert stock == Path(f"{scene.lab.folder}/shop.raw.stock").read_bytes()
    scene.forget("shop 2")
    scene.run("restore", "latest", "--instant", "--to", place, "--as", "shop 3", code=53)  # these files are somebody's
    assert scene.names() == {"shop"}


# --- without libvirt ----------------------------------------------------------------------------------


class Bare:
    """A QEMU without libvirt and without a guest: qemu-io commands through its monitor are what a guest would do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, str(folder / "qmp")
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-machine", "none", "-display", "none", "-nodefaults", "-S"),
                *("-qmp", f"unix:{self.socket},server=on,wait=off"),
            ]
        )
        try:
            wait(lambda: os.path.exists(self.socket), "no monitor")
            self.monitor = Monitor.connect(self.socket)
        except BaseException:
            kill(self.process)
            raise

    def add(self, node: str, export: Export) -> None:
        for options in overlay_options(node, str(self.folder / f"{node}.qcow2"), export):
            self.monitor.run("blockdev-add", options)

    def io(self, node: str, command: str) -> str:
        return str(self.monitor.run("human-monitor-command", {"command-line": f'qemu-io {node} "{command}"'}))

    def close(self) -> None:
        """In order, so that the image is whole."""
        with contextlib.suppress(OSError, QmpRefused):
            self.monitor.run("quit")
        self.monitor.close()
        try:
            self.process.wait(PATIENCE)
        finally:
            kill(self.process)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def serve(folder: Path, export: Export) -> subprocess.Popen[bytes]:
    """``base`` as the view would show it."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(export.socket)
    line = ["qemu-nbd", "-t", "-r", "-f", "raw", "-k", export.socket, "-x", export.name, str(folder / "base")]
    process = subprocess.Popen(line)
    try:
        wait(lambda: os.path.exists(export.socket), "no export")
    except BaseException:
        kill(process)
        raise
    return process


def test_a_qemu_without_libvirt_pulls_by_its_own_protocol(tmp_path: Path) -> None:
    content = bytearray(os.urandom(8 * MIB))
    (tmp_path / "base").write_bytes(content)
    export = Export(str(tmp_path / "nbd"), "disk one")
    seen: list[Progress] = []
    with contextlib.ExitStack() as held:
        first = serve(tmp_path, export)
        held.callback(kill, first)
        make_overlay(str(tmp_path / "vda.qcow2"), 8 * MIB, export)
        bare = Bare(tmp_path)
        held.callback(bare.close)
        bare.add("vda", export)
        bare.io("vda", "write -P 0x61 1M 64k")
        kill(first)
        puller = QmpPuller(bare.monitor)
        with contextlib.suppress(QmpRefused):
            puller.begin("vda")  # without the view it ends in an error
        assert not puller.look("vda").ended and not puller.revive()
        held.callback(kill, serve(tmp_path, export))
        pull_all(puller, "bare", {"vda": 8 * MIB}, SystemClock(), seen.append)
        assert puller.look("vda") == Pull(0, 0, running=False, ended=True)
        bare.io("vda", "write -P 0x62 2M 64k")
    assert seen[-1] == Progress("vda", 8 * MIB, 8 * MIB)
    content[MIB : MIB + 65536] = b"a" * 65536
    content[2 * MIB : 2 * MIB + 65536] = b"b" * 65536
    assert Path(as_raw(str(tmp_path / "vda.qcow2"))).read_bytes() == content


class Stuck:
    """A machine whose job always ends at once, without an error and without having done anything."""

    begun = 0

    def begin(self, disk: str) -> None:
        self.begun += 1

    def look(self, disk: str) -> Pull:
        return Pull(0, 0, running=False, ended=False)

    def revive(self) -> bool:
        return False


class Sleepless(SystemClock):
    def sleep(self, seconds: float) -> None:
        """No time for that."""


def test_a_job_that_never_gets_anywhere_is_given_up_and_said() -> None:
    stuck = Stuck()
    with pytest.raises(RecoveryStalled, match="vda ends before it is done"):
        pull_all(stuck, "web", {"vda": MIB}, Sleepless(), lambda _: None)
    assert stuck.begun == TRIES + 1


class InTurn(Stuck):
    """Jobs of two looks; one that begins while another runs would be QEMU's end."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}

    def begin(self, disk: str) -> None:
        assert not any(self.left.values()), "two jobs at a time"
        self.left[disk] = 2

    def look(self, disk: str) -> Pull:
        left = self.left.get(disk, -1)
        if left > 0:
            self.left[disk] = left - 1
        return Pull(2 - left, 2, running=left > 0, ended=left == 0)


def test_disks_are_pulled_one_after_the_other() -> None:
    turns = InTurn()
    pull_all(turns, "web", {"vda": MIB, "vdb": MIB, "vdc": MIB}, Sleepless(), lambda _: None)
    assert turns.left == {"vda": 0, "vdb": 0, "vdc": 0}
