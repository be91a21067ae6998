"""kill -9 at every named step of the backup of a running guest: the guest does not notice, and nothing stays."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from restore_scene import Scene
from test_vm_backup import store
from vm_lab import PATIENCE, Guest, GuestLab, LabDisk, make_disk, needs_guests, tool, wait

from graincopy.testing import crash

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20


def test_kill_9_at_every_step_of_a_backup(guests: GuestLab, tmp_path: Path) -> None:
    """Disks inside QEMU and cloned ones, a guest with an agent. What nobody writes to stays as it is, bit by bit."""
    scene = Scene(guests, str(tmp_path))
    with store(os.path.join(guests.folder, "stalls")) as cloned:
        disks = [
            disk_of(guests.folder, "vda", "qcow2", fs=True),
            disk_of(guests.folder, "vdb", "qcow2", fs=False),
            disk_of(cloned, "vdc", "raw", fs=False),
        ]
        with guests.guest("stall", disks, options={"fs": "vda"}) as guest:
            guest.wait_agent()
            fill(guest)
            before = digests(guest)
            assert {disk["driver"] for disk in scene.run("backup", "vm:stall")["disks"]} == {"qemu", "reflink"}
            steps = [step for step in steps_of(scene, "backup", "vm:stall") if str(step) != "copied:2"]
            assert len(steps) >= 10, steps
            for step in steps:
                scene.killed(str(step), "backup", "vm:stall")
                wait(lambda: guest.status() == (True, True), f"it stands still after {step}")
                assert guest.domain().jobInfo()[0] == 0, step
            point = scene.run("backup", "vm:stall")
            assert point["consistency"] == "file-system"
            assert {disk["change_map"] for disk in point["disks"]} == {"bitmap", "extents"}
            must_be_tidy(scene, guest)
            assert digests(guest) == before
        for name, digest in zip(("vdb.qcow2", "vdc.raw"), before[1:], strict=True):
            image = os.path.join(cloned if name.endswith("raw") else guests.folder, f"stall-{name}")
            assert digest_of_image(image) == digest, f"{name} is what the guest saw all the time"


def disk_of(folder: str, dev: str, kind: str, *, fs: bool) -> LabDisk:
    path = os.path.join(folder, f"stall-{dev}.{kind}")
    make_disk(path, 32 * MIB, format=kind, fs=fs)
    return LabDisk(dev=dev, path=path, format=kind)


def fill(guest: Guest) -> None:
    """8 MiB of noise on each disk, written by the guest."""
    for where in ("/mnt/vda/stock", "/dev/vdb", "/dev/vdc"):
        code, said = guest.run(f"dd if=/dev/urandom of={where} bs=1M count=8 conv=notrunc,fsync")
        assert code == 0, said


def digests(guest: Guest) -> list[str]:
    """What the guest reads from its disks, past its page cache: the file, and two disks whole."""
    code, said = guest.run("sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum /mnt/vda/stock /dev/vdb /dev/vdc")
    assert code == 0, said
    return [word for word in said.split() if len(word) == 64]


def digest_of_image(image: str) -> str:
    """Of what a guest reads from a disk whose machine is off."""
    if image.endswith(".qcow2"):
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, f"{image}.raw")
        image = f"{image}.raw"
    with open(image, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def steps_of(scene: Scene, *arguments: str) -> tuple[crash.CrashPoint, ...]:
    """Run a command to its end; every point where it can be cut off."""
    line = crash.command(["--config", scene.config, *arguments])
    done = subprocess.run(line, capture_output=True, text=True, timeout=4 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return crash.crash_points(done.stdout.split())


def must_be_tidy(scene: Scene, guest: Guest) -> None:
    """One checkpoint for each disk and nothing else: in QEMU, in the state folder, on the datastore."""
    targets: Any = scene.run("targets")["targets"]
    assert len(targets) == 3, targets
    nodes, bitmaps = of_ours(guest)
    assert nodes <= {name for name in nodes if name.endswith("-a")}
    assert len(bitmaps) == 2, bitmaps
    folder = os.path.join(scene.state, "qemu", "scratch")
    assert not os.path.isdir(folder) or os.listdir(folder) == []
    clones = Path(os.path.dirname(guest.disks[2].path), ".graincopy")
    assert len([path for path in clones.rglob("*") if path.is_file()]) == 1


def of_ours(guest: Guest) -> tuple[set[str], set[tuple[str, str]]]:
    """Nodes of graincopy in the guest's QEMU, and its bitmaps, each with the node of its disk."""
    import libvirt_qemu

    text = libvirt_qemu.qemuMonitorCommand(guest.domain(), '{"execute":"query-named-block-nodes"}', 0)
    nodes = json.loads(text)["return"]
    bitmaps = {
        (bitmap["name"], node["node-name"])
        for node in nodes
        for bitmap in node.get("dirty-bitmaps", ())
        if bitmap["name"].startswith("graincopy-")
    }
    return {node["node-name"] for node in nodes if node["node-name"].startswith("gc-")}, bitmaps
