"""A machine of libvirt with raw disks on an array: the array takes the snapshot, its QEMU tells what changed.

Its QEMU runs as a user of its own, and has a /dev of its own, as distributions have it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import story
import vm_lab
from datacenter import DataCentre
from vm_image import GuestImage
from vm_lab import Guest, GuestLab, LabDisk, needs_guests

from graincopy.testing.array_ssh import HOST

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
USER = 64055  # libvirt-qemu, in Debian and in the lab
OURS = f"/var/tmp/graincopy-qemu-{USER}"


@pytest.fixture(scope="module")
def own_guests() -> Iterator[GuestLab]:
    """A libvirtd whose QEMUs run as ``libvirt-qemu``, each with its own devices."""
    usual = vm_lab._QEMU.replace('"root"', '"libvirt-qemu"').replace("namespaces = []", 'namespaces = ["mount"]')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vm_lab, "_QEMU", usual)
        with GuestLab() as lab:
            os.chmod(lab.folder, 0o711)
            os.chmod(os.path.join(lab.folder, "guests"), 0o711)
            kernel, initrd = (shutil.copy(path, lab.folder) for path in (lab.image.kernel, lab.image.initrd))
            lab.image = GuestImage(kernel, initrd)
            yield lab


@pytest.fixture(scope="module")
def centre(own_guests: GuestLab) -> Iterator[DataCentre]:
    folder = os.path.join(own_guests.folder, "array")
    os.mkdir(folder, 0o755)
    with DataCentre(folder, ("xfs", 320)) as made:
        made.array.make("raw", 8 * MIB, HOST)
        yield made
        made.array.drop("raw")


@pytest.fixture(scope="module")
def shop(own_guests: GuestLab, centre: DataCentre) -> Iterator[Guest]:
    """vda is a file on a LUN, vdb a LUN."""
    lun = centre.plane.device(centre.array.vdisks["raw"].number)
    file = story.make_disk(centre.path(0, "shop.raw"), 16 * MIB, (0, story.noise(1, 8 * MIB)))
    disks = [LabDisk(dev="vda", path=file), LabDisk(dev="vdb", kind="block", source=f"<source dev='{lun}'/>")]
    with own_guests.guest("shop", disks, start=False, options={"agent": "no", "button": "obey"}) as guest:
        os.chown(guest.folder, USER, USER)
        guest.start()
        yield guest


@pytest.fixture(scope="module")
def cli(own_guests: GuestLab, centre: DataCentre, tmp_path_factory: pytest.TempPathFactory) -> story.Cli:
    config = f'{centre.config()}\n[vm]\nuri = "{own_guests.uri}"\n'
    return story.Cli(os.fspath(tmp_path_factory.mktemp("cli")), config=config).init()


def mark(guest: Guest, text: str) -> None:
    for dev in ("vda", "vdb"):
        code, said = guest.run(f"echo {text} | dd of=/dev/{dev} bs=4096 seek=100 conv=sync,fsync")
        assert code == 0, said


def disks_of(document: Any, key: str) -> list[Any]:
    return [disk[key] for disk in document["disks"] if disk["driver"] == "flashcopy"]


def must_equal_now(cli: story.Cli, document: Any) -> None:
    out = cli.ok("restore", document["restore_point"], "--to", f"{cli.folder}/out")
    shown = {disk["name"]: disk["path"] for disk in document["disks"] if disk["driver"] == "flashcopy"}
    found = {disk["name"]: disk["target"] for disk in out["disks"] if disk["name"] in shown}
    assert len(found) == 2
    for name, target in found.items():
        assert story.read(target) == story.read(shown[name]), name
    shutil.rmtree(f"{cli.folder}/out")


def test_only_what_the_guest_wrote_is_read(shop: Guest, centre: DataCentre, cli: story.Cli) -> None:
    mark(shop, "first")
    before = centre.array.footprint()
    cli.ok("backup", "vm:shop")
    mark(shop, "second")
    again = cli.ok("backup", "vm:shop", "--audit", "all")
    assert disks_of(again, "change_map") == ["bitmap", "bitmap"]
    assert disks_of(again, "read_bytes") == [65536, 65536]
    assert disks_of(again, "audit_mismatches") == [0, 0]
    must_equal_now(cli, again)
    assert centre.array.footprint() == before
    assert not os.path.exists(OURS), "its socket goes, and the folder"
    assert shop.run("echo alive") == (0, "alive")


def test_a_lun_of_a_running_machine_is_not_written(shop: Guest, centre: DataCentre, cli: story.Cli) -> None:
    """Its QEMU opened it by a device node that only that QEMU sees."""
    lun = centre.plane.device(centre.array.vdisks["raw"].number)
    done = cli.ok("backup", lun)
    mark(shop, "later")
    refused = cli("restore", done["restore_point"], "--in-place")
    assert (refused.code, "qemu-system" in refused.err) == (17, True), refused
    assert shop.run("dd if=/dev/vdb bs=4096 skip=100 count=1 2>/dev/null | head -c 5") == (0, "later")


def test_switched_off_and_on_it_is_compared(shop: Guest, cli: story.Cli) -> None:
    shop.domain().destroy()
    off = cli.ok("backup", "vm:shop")
    assert disks_of(off, "change_map") == ["compared: the driver keeps no change map"] * 2
    shop.start()
    mark(shop, "third")
    on = cli.ok("backup", "vm:shop")
    assert disks_of(on, "change_map") == ["compared: no checkpoint was kept"] * 2
    mark(shop, "fourth")
    last = cli.ok("backup", "vm:shop")
    assert disks_of(last, "change_map") == ["bitmap", "bitmap"]
    must_equal_now(cli, last)
