"""An incremental backup of a running guest reads the grains that QEMU calls dirty, and hardly a byte more."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from restore_scene import Scene
from vm_lab import Guest, GuestLab, LabDisk, make_disk, needs_guests, tool

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
SIZE = 256 * MIB


def test_bytes_fetched_are_the_dirty_ones(guests: GuestLab, tmp_path: Path) -> None:
    """40 scattered 4 KiB writes and a stretch of zeros on a qcow2 and a raw disk; nobody writes then."""
    scene = Scene(guests, str(tmp_path))
    disks = []
    for dev, kind in (("vda", "qcow2"), ("vdb", "raw")):
        path = os.path.join(guests.folder, f"few-{dev}.{kind}")
        make_disk(path, SIZE, format=kind, fs=False)
        disks.append(LabDisk(dev=dev, path=path, format=kind))
    with guests.guest("few", disks, options={"agent": "no"}) as guest:
        for dev in ("vda", "vdb"):
            ask(guest, f"dd if=/dev/urandom of=/dev/{dev} bs=1M count=24 seek=100 conv=fsync")
        scene.run("backup", "vm:few")
        for dev in ("vda", "vdb"):
            scatter(guest, dev)
        dirty = dirty_bytes(guest)
        assert len(dirty) == 2 and all(40 * 65536 <= size < 8 * MIB for size in dirty.values()), dirty
        point = scene.run("backup", "vm:few")
        for disk in point["disks"]:
            assert disk["change_map"] == "bitmap"
            known = next(size for path, size in dirty.items() if path == disk["path"])
            assert disk["dirty_bytes"] <= known
            assert disk["read_bytes"] <= known * 1.02, (disk, known)
        assert all(disk["audit_mismatches"] == 0 for disk in point["disks"])
        guest.domain().destroy()
        must_be_what_the_guest_had(scene, disks, str(tmp_path / "out"))


def scatter(guest: Guest, dev: str) -> None:
    dice = random.Random(dev)
    places = " ".join(str(block * 16 + dice.randrange(16)) for block in dice.sample(range(SIZE // 65536), 40))
    ask(guest, f"for at in {places}; do dd if=/dev/urandom of=/dev/{dev} bs=4096 count=1 seek=$at conv=notrunc; done")
    ask(guest, f"dd if=/dev/zero of=/dev/{dev} bs=64k count=8 seek=1640 conv=notrunc,fsync; sync")


def ask(guest: Guest, command: str) -> None:
    code, said = guest.run(command)
    assert code == 0, said


def dirty_bytes(guest: Guest) -> dict[str, int]:
    """By path of the disk: what the bitmap of the last backup counts now, as QEMU says."""
    import libvirt_qemu

    text = libvirt_qemu.qemuMonitorCommand(guest.domain(), '{"execute":"query-named-block-nodes"}', 0)
    found: dict[str, int] = {}
    nodes: list[dict[str, Any]] = json.loads(text)["return"]
    for node in nodes:
        for bitmap in node.get("dirty-bitmaps", ()):
            if bitmap["name"].startswith("graincopy-") and bitmap["recording"]:
                found[node["image"]["filename"]] = bitmap["count"]
    return found


def must_be_what_the_guest_had(scene: Scene, disks: list[LabDisk], to: str) -> None:
    scene.run("restore", "latest", "--to", to)
    for disk in disks:
        restored = os.path.join(to, os.path.basename(disk.path))
        tool("qemu-img", "compare", "-f", disk.format, "-F", disk.format, disk.path, restored)
