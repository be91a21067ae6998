"""Machines that are shut down for a restore, or are not; and machines whose memory lies saved beside their disks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from restore_scene import Scene
from vm_lab import Guest, GuestLab, LabDisk, needs_guests

pytestmark = [pytest.mark.root, needs_guests]
MIB = 1 << 20
STAYS, BUSY = 101, 72


@pytest.fixture(scope="module")
def scene(guests: GuestLab, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(guests, str(tmp_path_factory.mktemp("stop")))


@pytest.fixture
def machine(guests: GuestLab, scene: Scene, request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A machine with one raw disk, off, backed up with the number 1 in its first bytes. The parameter: its options."""
    name = f"stop-{request.node.name.encode().hex()[-12:]}"
    path = guests.file(f"{name}.raw", 16 * MIB, fs=False)
    Path(path).write_bytes(b"\x01" * MIB + bytes(15 * MIB))
    options = {"agent": "no", **getattr(request, "param", {})}
    with guests.guest(name, [LabDisk(dev="vda", path=path)], start=False, options=options) as guest:
        scene.first = scene.run("backup", f"vm:{name}")["restore_point"]
        yield guest
    os.unlink(path)


def content(guest: Guest) -> bytes:
    return Path(guest.disks[0].path).read_bytes()


def change(guest: Guest) -> bytes:
    """Let the running guest write something else; what is on its disk then."""
    code, said = guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=8 seek=4 conv=fsync")
    assert code == 0, said
    return content(guest)


@pytest.mark.parametrize("machine", [{"button": "obey"}], indirect=True, ids=["obeys"])
def test_a_guest_without_an_agent_obeys_the_power_button(scene: Scene, machine: Guest) -> None:
    machine.start()
    change(machine)
    done = scene.run("restore", scene.first, "--in-place", "--stop", "--start")
    assert done["machines"] == [f"{machine.name} was shut down", f"{machine.name} was started"]
    machine.wait_ready()
    code, said = machine.run("dd if=/dev/vda bs=1M count=1 2>/dev/null | tr -d '\\001' | wc -c")
    assert (code, said.strip()) == (0, "0")


def test_one_that_does_not_stays_as_it_is_until_its_plug_is_pulled(scene: Scene, machine: Guest) -> None:
    machine.start()
    before = change(machine)
    words = ("restore", scene.first, "--in-place", "--stop", "--stop-timeout", "2")
    said = scene.run(*words, code=STAYS)
    assert "did not shut down within 2 s" in said and "--force-stop" in said
    assert machine.domain().state()[0] == 1 and content(machine) == before
    assert machine.run("echo alive") == (0, "alive")
    done = scene.run(*words, "--force-stop")
    assert done["machines"] == [f"{machine.name} was shut down"]
    assert content(machine) == b"\x01" * MIB + bytes(15 * MIB)
    assert machine.domain().state()[0] == 5, "nobody asked to start it"
    scene.run("undo", done["restore"])
    assert content(machine) == before


def test_saved_memory_is_never_left_over_other_disks(scene: Scene, machine: Guest) -> None:
    """A guest that goes on from its saved memory takes the disks for what they were: other ones would be destroyed."""
    scene.run("restore", scene.first, "--in-place")
    restore = scene.run("restore", scene.first, "--in-place")["restore"]
    machine.start()
    before = change(machine)
    machine.domain().managedSave(0)
    for words in (("restore", scene.first, "--in-place"), ("undo", restore)):
        for more in ((), ("--dry-run",), ("--stop", "--force-stop"), ("--start",)):
            if words[0] == "restore" or more in ((), ("--dry-run",)):
                said = scene.run(*words, *more, code=BUSY)
                assert "memory" in said and "managedsave-remove" in said and len(said.strip().splitlines()) <= 3
    assert content(machine) == before and machine.domain().hasManagedSaveImage(0)
    point = scene.run("backup", f"vm:{machine.name}")
    assert point["consistency"] == "crash"
    assert any("memory is saved" in note for note in point["notes"])
    machine.domain().create()
    assert machine.run("echo alive") == (0, "alive"), "it went on where it was"
    machine.domain().destroy()
    scene.run("restore", scene.first, "--in-place")
    assert content(machine) == b"\x01" * MIB + bytes(15 * MIB)
