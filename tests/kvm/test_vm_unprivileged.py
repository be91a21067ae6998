"""A QEMU that runs as a user of its own, as distributions have it: scratch file, sockets and restored disks are its."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import vm_lab
from restore_scene import Scene
from vm_image import GuestImage
from vm_lab import Guest, GuestLab, LabDisk, make_disk, needs_guests

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
USER = 64055  # libvirt-qemu, in Debian and in the lab


@pytest.fixture(scope="module")
def own_guests() -> Iterator[GuestLab]:
    """A libvirtd whose QEMUs run as ``libvirt-qemu`` and are given their files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vm_lab, "_QEMU", vm_lab._QEMU.replace('"root"', '"libvirt-qemu"'))
        with GuestLab() as lab:
            os.chmod(lab.folder, 0o711)
            os.chmod(os.path.join(lab.folder, "guests"), 0o711)
            kernel, initrd = (shutil.copy(path, lab.folder) for path in (lab.image.kernel, lab.image.initrd))
            lab.image = GuestImage(kernel, initrd)
            yield lab


@pytest.fixture(scope="module")
def scene(own_guests: GuestLab, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(own_guests, str(tmp_path_factory.mktemp("theirs")))


@pytest.fixture(scope="module")
def web(own_guests: GuestLab) -> Iterator[Guest]:
    """A running guest with a qcow2 and a raw disk, nobody in it but its own user."""
    disks = []
    for dev, kind in (("vda", "qcow2"), ("vdb", "raw")):
        path = os.path.join(own_guests.folder, f"their-{dev}.{kind}")
        make_disk(path, 32 * MIB, format=kind, fs=False)
        disks.append(LabDisk(dev=dev, path=path, format=kind))
    with own_guests.guest("web", disks, start=False, options={"agent": "no", "button": "obey"}) as guest:
        os.chown(guest.folder, USER, USER)
        guest.start()
        (qemu,) = own_guests.processes("qemu-system")
        assert os.stat(f"/proc/{qemu}").st_uid == USER
        yield guest


def mark(guest: Guest, text: str) -> None:
    for dev in ("vda", "vdb"):
        code, said = guest.run(f"echo {text} | dd of=/dev/{dev} bs=4096 seek=100 conv=sync,fsync")
        assert code == 0, said


def test_it_is_backed_up_inside_its_qemu(scene: Scene, web: Guest) -> None:
    mark(web, "first")
    scene.first = scene.run("backup", "vm:web")["restore_point"]
    mark(web, "second")
    again = scene.run("backup", "vm:web", "--audit", "all")
    for disk in again["disks"]:
        assert (disk["driver"], disk["change_map"], disk["audit_mismatches"]) == ("qemu", "bitmap", 0)
        assert disk["dirty_bytes"] <= 4 * 65536
    assert not os.path.exists(f"/var/tmp/graincopy-qemu-{USER}"), "scratch files and sockets go, and their folders"
    assert web.run("echo alive") == (0, "alive")


def test_it_goes_back_in_place_and_starts(scene: Scene, web: Guest) -> None:
    done = scene.run("restore", scene.first, "--in-place", "--stop", "--start")
    assert done["machines"] == ["web was shut down", "web was started"]
    web.wait_ready()
    for dev in ("vda", "vdb"):
        assert web.run(f"dd if=/dev/{dev} bs=4096 skip=100 count=1 2>/dev/null | head -c 5") == (0, "first")


@pytest.mark.parametrize("how", [("--start",), ("--instant",)], ids=" ".join)
def test_a_copy_of_it_runs(scene: Scene, web: Guest, how: tuple[str, ...]) -> None:
    place = os.path.join(scene.lab.folder, f"copy{''.join(how)}")
    try:
        scene.run("restore", scene.first, "--to", place, "--as", "web copy", *how)
        assert scene.domain_state("web copy") == 1
        read = "dd if=/dev/vdb bs=4096 skip=100 count=1 2>/dev/null | head -c 5"
        assert scene.ask("web copy", read) == (0, "first")
        assert {Path(place, name).stat().st_uid for name in os.listdir(place)} == {USER}
    finally:
        scene.forget("web copy")


def test_it_is_tried(scene: Scene, web: Guest) -> None:
    found = scene.run("verify", scene.first, "--boot", "--until", "console:GUEST-READY", "--timeout", "90")
    assert found["alive"]
