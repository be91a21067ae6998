"""Instant recovery, killed at each of its steps and in the middle of a pull: what the guest wrote is never lost."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest
from restore_scene import Scene
from vm_lab import PATIENCE, Guest, GuestLab, LabDisk, file_in_image, needs_guests, tool, wait

pytestmark = [pytest.mark.root, needs_guests]
MIB = 1 << 20
RUNNING, PAUSED, OFF = 1, 3, 5
BEFORE_THE_START = ("opened", "recorded", "defined", "placed", "served")
WRITER = (
    "(n=0; while :; do n=$((n+1)); echo $n >> /mnt/vdb/log; sync; echo $n > /synced.new; mv /synced.new /synced; done)"
    " </dev/null >/dev/null 2>&1 &"
)


@pytest.fixture(scope="module")
def scene(guests: GuestLab, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(guests, str(tmp_path_factory.mktemp("killed")))


@pytest.fixture(scope="module")
def mill(guests: GuestLab, scene: Scene) -> Iterator[Guest]:
    """A machine, off, whose disks take a moment to be pulled, so that somebody can slow that down; backed up."""
    disks = [LabDisk(dev=dev, path=guests.file(f"mill-{dev}.raw", 192 * MIB)) for dev in ("vda", "vdb")]
    for disk in disks:
        with open(f"{disk.path}.grist", "wb") as file:
            file.write(os.urandom(160 * MIB))
        tool("debugfs", "-w", "-R", f"write {disk.path}.grist grist", disk.path)
    with guests.guest("mill", disks, start=False, options={"fs": "vda,vdb"}) as guest:
        scene.run("backup", "vm:mill")
        yield guest


def slow_down(scene: Scene, name: str) -> None:
    """The pull that runs crawls from now on."""
    import libvirt

    domain = scene.lab.connection().lookupByName(name)

    def crawls() -> bool:
        for dev in ("vda", "vdb"):
            try:
                domain.blockJobSetSpeed(dev, 64 << 10, libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES)
            except libvirt.libvirtError:
                continue
            return True
        return False

    wait(crawls, "no pull is running")


def synced(scene: Scene, name: str) -> int:
    """The last number of which the guest's sync has said that it is on its disk; 0 before the first."""
    return int(scene.ask(name, "cat /synced 2>/dev/null || echo 0")[1])


def test_killed_at_each_step_and_in_the_middle_of_pulls_no_write_is_lost(scene: Scene, mill: Guest) -> None:
    place, name = os.path.join(scene.folder, "vms"), "mill 2"
    command = ("restore", "latest", "--instant", "--to", place, "--as", name)
    scene.killed("recorded", *command)
    (given_up,) = scene.run("targets")["restores"]
    scene.run("undo", given_up["restore"])
    assert scene.run("targets")["restores"] == [], "one that is not wanted any more can be let go"
    for step in BEFORE_THE_START:
        scene.killed(step, *command)
        assert name not in scene.names() or scene.domain_state(name) == OFF, step
    scene.killed("started", *command)
    wait(lambda: scene.domain_state(name) == PAUSED, "it does not stand still without what it has to read")

    last = 0
    for turn in range(3):
        with scene.running(*command) as process:
            wait(lambda: process.poll() is not None or " runs; " in scene.said(), scene.said)
            slow_down(scene, name)
            if not turn:
                assert scene.ask(name, WRITER)[0] == 0
            wait(lambda at=last: synced(scene, name) > at + 5, "it does not write")  # type: ignore[misc]
            last = synced(scene, name)
            process.kill()
            assert process.wait(PATIENCE) == -9
        assert "in use" in scene.run("expire", "--point", "latest", code=46)

    scene.killed("pulled", *command)
    assert scene.domain_state(name) == RUNNING, "it needs nobody any more"
    assert synced(scene, name) >= last
    scene.killed("released", *command)
    scene.killed("finished", *command)
    assert scene.domain_state(name) == RUNNING
    for text in (scene.xml(name), scene.xml(name, inactive=True)):
        assert "nbd" not in text and "urn:graincopy" not in text
    assert synced(scene, name) > last
    last = synced(scene, name)
    check_disks(scene, name, last)
    scene.forget(name)
    scene.run("targets", "--reap")
    assert scene.run("targets")["restores"] == [], "nothing pins the point any more"
    assert not os.path.exists(scene.runtime) or not os.listdir(scene.runtime)


def check_disks(scene: Scene, name: str, last: int) -> None:
    """Pull the plug: every number up to ``last`` is on the disk, and what was restored is as it was."""
    paths = dict(re.findall(r"<source file='([^']*/mill-(vd.)\.raw)'", scene.xml(name)))
    scene.lab.connection().lookupByName(name).destroy()
    for path, dev in paths.items():
        facts = json.loads(tool("qemu-img", "info", "--output=json", path))
        assert facts["format"] == "qcow2" and "backing-filename" not in facts
        tool("qemu-img", "check", "-q", path)
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, f"{path}.plain")
        with open(os.path.join(scene.lab.folder, f"mill-{dev}.raw.grist"), "rb") as file:
            assert file_in_image(f"{path}.plain", "grist") == file.read()
        if dev == "vdb":
            replay(f"{path}.plain")
            lines = file_in_image(f"{path}.plain", "log").split()
            numbers = [int(line) for line in lines]
            assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= last
    assert len(paths) == 2


def replay(image: str) -> None:
    """What a guest does when it starts after a power failure."""
    tool("sh", "-c", f"e2fsck -fy '{image}' >/dev/null || [ $? -eq 1 ]")
