"""Virtual machines brought back: in place under libvirt's eyes, and anew under another name."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from restore_scene import Scene
from vm_lab import Guest, GuestLab, LabDisk, file_in_image, needs_guests, tool

from graincopy.hypervisor.owned import INSTANT, MachineTag, read_tag, write_tag
from graincopy.hypervisor.shown_disks import Export, has_screen, isolate, show_disks, stack_on, stand_alone
from graincopy.hypervisor.sign import Sign, parse_sign
from graincopy.model.snapshot import Owner

pytestmark = [pytest.mark.root, needs_guests]
MIB = 1 << 20
CARD = "<interface type='user'><mac address='52:54:00:aa:bb:01'/><model type='virtio'/></interface>"


@pytest.fixture(scope="module")
def scene(guests: GuestLab, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(guests, str(tmp_path_factory.mktemp("back")))


@pytest.fixture(scope="module")
def web(guests: GuestLab, scene: Scene) -> Iterator[Guest]:
    """A machine, off, with a raw and a qcow2 disk that both say "first"; backed up like that."""
    raws = [guests.file(f"web-{dev}.raw", 48 * MIB) for dev in ("vda", "vdb")]
    for raw in raws:
        write_into(raw, "first")
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raws[1], raws[1].replace(".raw", ".qcow2"))
    os.unlink(raws[1])
    disks = [
        LabDisk(dev="vda", path=raws[0]),
        LabDisk(dev="vdb", path=raws[1].replace(".raw", ".qcow2"), format="qcow2"),
    ]
    with guests.guest("web", disks, start=False, options={"fs": "vda,vdb"}, devices=CARD) as guest:
        scene.first = scene.run("backup", "vm:web")["restore_point"]
        yield guest


def write_into(raw: str, text: str) -> None:
    """The file "says" with ``text`` in the ext4 at ``raw``."""
    with open(f"{raw}.text", "w") as file:
        file.write(text)
    subprocess.run(["debugfs", "-w", "-R", "rm says", raw], check=False, capture_output=True)
    tool("debugfs", "-w", "-R", f"write {raw}.text says", raw)


def says(path: str) -> bytes:
    """What the file in the image at ``path`` says."""
    if path.endswith("qcow2"):
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, f"{path}.raw")
        path += ".raw"
    return file_in_image(path, "says")


# --- in place ---------------------------------------------------------------------------------------


def test_in_place_needs_the_machine_off_then_starts_it_and_the_next_backup_is_incremental(
    scene: Scene, web: Guest
) -> None:
    web.start().wait_agent()
    assert web.run("echo second > /mnt/vda/says; echo second > /mnt/vdb/says; sync")[0] == 0
    second = scene.run("backup", "vm:web")
    assert second["consistency"] == "file-system"
    before = [Path(disk.path).read_bytes() for disk in web.disks]
    assert "running" in scene.run("restore", scene.first, "--in-place", code=75)
    assert "shut down" in scene.run("restore", scene.first, "--in-place", "--stop", "--stop-timeout", "1", code=101)
    assert scene.domain_state("web") == 1
    assert [Path(disk.path).read_bytes() for disk in web.disks] == before

    # The agent shuts down by /sbin/shutdown, which this small guest does not have.
    script = r"mkdir -p /sbin; printf '#!/bin/sh\n(sleep 1; poweroff -f) &\n' >/sbin/shutdown"
    assert web.run(f"{script}; chmod +x /sbin/shutdown")[0] == 0
    done = scene.run("restore", scene.first, "--in-place", "--stop", "--start")
    assert done["machines"] == ["web was shut down", "web was started"] and done["undo"]
    web.wait_ready()
    assert web.run("cat /mnt/vda/says /mnt/vdb/says") == (0, "firstfirst")
    web.domain().destroy()

    third = scene.run("backup", "vm:web")
    assert third["base"] == second["restore_point"]
    maps = {disk["name"]: disk["change_map"] for disk in third["disks"]}
    assert maps["web-vdb.qcow2"] == "bitmap"
    assert [says(disk.path) for disk in web.disks] == [b"first", b"first"]


def test_a_machine_that_was_deleted_is_defined_again(scene: Scene, web: Guest) -> None:
    xml = scene.xml("web", inactive=True)
    scene.forget("web")
    for disk in web.disks:
        os.unlink(disk.path)
    done = scene.run("restore", scene.first, "--in-place")
    assert done["machines"] == ["web was defined again"]
    uuid = re.search("<uuid>.*</uuid>", xml)
    assert uuid is not None and uuid.group() in scene.xml("web", inactive=True)
    assert [says(disk.path) for disk in web.disks] == [b"first", b"first"]


# --- what would be done -----------------------------------------------------------------------------


def test_a_plan_in_place_says_what_becomes_of_the_machine(scene: Scene, web: Guest) -> None:
    before, restores = [Path(disk.path).read_bytes() for disk in web.disks], scene.run("targets")["restores"]
    words = ("restore", scene.first, "--in-place", "--dry-run")
    plan = scene.run(*words, "--start")
    (found,) = plan["machines"]
    assert (found["name"], found["uuid"]) == ("web", web.domain().UUIDString())
    assert found["steps"] == ["is off", "is started when its disks are back"]
    assert {disk["path"] for disk in plan["plan"]["disks"]} == {disk.path for disk in web.disks}
    assert [Path(disk.path).read_bytes() for disk in web.disks] == before
    web.start()
    assert "running" in scene.run(*words, code=75)
    (found,) = scene.run(*words, "--stop", "--force-stop", "--stop-timeout", "7")["machines"]
    assert found["steps"] == ["is shut down before, within 7 s, then its plug is pulled", "stays off"]
    shown = subprocess.run(scene.command(*words, "--stop"), capture_output=True, text=True, check=True).stdout
    assert "Machine web\n  is shut down before, within 120 s, else nothing is written" in shown
    assert scene.domain_state("web") == 1
    web.domain().destroy()
    assert scene.run("targets")["restores"] == restores


@pytest.mark.parametrize("how", [(), ("--start",), ("--instant",)], ids=" ".join)
def test_a_plan_under_another_name_says_what_the_copy_would_be(scene: Scene, web: Guest, how: tuple[str, ...]) -> None:
    place = os.path.join(scene.folder, "vms", "planned")
    words = ("restore", scene.first, "--to", place, "--dry-run", *how, "--as")
    plan = scene.run(*words, "web plan")
    (found,) = plan["machines"]
    assert (found["name"], found["of"], found["uuid"]) == ("web plan", "web", None)
    assert "is defined, with a new UUID and new MAC addresses" in found["steps"]
    started = {"--start": "is started when its disks are there", "--instant": "is started at once, off a view"}
    assert started.get("".join(how), "stays off") in found["steps"]
    assert any("serial port" in change for change in found["changes"])
    name = "web-vda.raw"
    kinds = {disk["name"]: (disk["path"], disk["format"]) for disk in plan["plan"]["disks"]}
    assert kinds[name] == (f"{place}/{name}", "qcow2" if "--instant" in how else "raw")
    assert "web" in scene.run(*words, "web", code=76)
    assert not os.path.exists(place) and scene.names().isdisjoint({"web plan"})


# --- anew -------------------------------------------------------------------------------------------


def test_anew_it_is_another_machine_that_runs_beside_the_first(scene: Scene, web: Guest) -> None:
    place = os.path.join(scene.folder, "vms", "copy")
    done = scene.run("restore", scene.first, "--to", place, "--as", "web copy", "--start")
    assert done["machine"]["started"] and {disk["target"] for disk in done["disks"]} == {
        f"{place}/web-vda.raw",
        f"{place}/web-vdb.qcow2",
    }
    assert scene.ask("web copy", "cat /mnt/vda/says /mnt/vdb/says") == (0, "firstfirst")
    old, new = scene.xml("web", inactive=True), scene.xml("web copy", inactive=True)
    for mark in ("<uuid>.*</uuid>", "<mac address='.*'/>"):
        first, second = re.search(mark, old), re.search(mark, new)
        assert first and second and first.group() != second.group()
    assert scene.lab.folder + "/web-vd" not in new
    assert "type='qcow2'" in new and "type='raw'" in new
    scene.forget("web copy")
    assert "web" in scene.run("restore", scene.first, "--to", f"{place}2", "--as", "web", code=76)
    assert not os.path.exists(f"{place}2")


def test_one_disk_only_and_another_onto_a_block_device(scene: Scene, web: Guest) -> None:
    place, image = os.path.join(scene.folder, "vms", "one"), os.path.join(scene.folder, "lun")
    with open(image, "xb") as file:
        file.write(b"\xff" * (48 * MIB))
    device = tool("losetup", "--find", "--show", image).strip()
    try:
        onto = ("--onto", f"web-vdb.qcow2={device}")
        with open(device, "rb+"):
            assert scene.run("restore", scene.first, "--to", place, "--as", "web lun", *onto, code=17)
        assert not os.path.exists(place) and "web lun" not in scene.names()
        scene.run("restore", scene.first, "--to", place, "--as", "web lun", *onto)
        found = scene.xml("web lun", inactive=True)
        assert f"<source dev='{device}'/>" in found and "qcow2" not in found
        assert os.listdir(place) == ["web-vda.raw"]
        tool("sync", device)
        assert says(image) == b"first"
        with open(image, "rb") as file:
            whole = file.read()
        assert b"\xff" * 65536 not in whole  # what was zero in the restore point is zero here too
        tool("truncate", "-s", "-4096", image)
        tool("losetup", "-c", device)
        small = scene.run("restore", scene.first, "--to", f"{place}2", "--as", "web lun 2", *onto, code=55)
        assert "4096" in small
    finally:
        scene.forget("web lun")
        tool("losetup", "-d", device)
    scene.run("restore", scene.first, "--to", f"{place}3", "--as", "web one", "--disk", "web-vda.raw")
    assert scene.xml("web one", inactive=True).count("<disk ") == 1
    scene.forget("web one")


def test_what_is_missing_here_is_said_before_anything_is_written(scene: Scene, guests: GuestLab) -> None:
    card = "<interface type='network'><source network='nowhere'/></interface>"
    disk = LabDisk(dev="vda", path=guests.file("lonely.raw", 8 * MIB, fs=False))
    with guests.guest("lonely", [disk], start=False, devices=card):
        point = scene.run("backup", "vm:lonely")["restore_point"]
        place = os.path.join(scene.folder, "vms", "lonely")
        for how in ((), ("--instant",)):
            said = scene.run("restore", point, "--to", place, "--as", "lonely 2", *how, code=76)
            assert "nowhere" in said and not os.path.exists(place) and "lonely 2" not in scene.names()
    scene.run("restore", point, "--to", place, "--as", "other", "--vm", "nobody", code=100)


@pytest.mark.parametrize(
    "words",
    [
        ("--in-place", "--as", "new"),
        ("--in-place", "--instant"),
        ("--in-place", "--force-stop"),
        ("--to", "/nowhere", "--stop"),
        ("--to", "/nowhere", "--start"),
        ("--to", "/nowhere", "--instant", "--as", "new", "--disk", "web-vda.raw"),
        ("--to", "/nowhere/new", "--instant"),
        ("--to", "/nowhere", "--as", "new", "--onto", "web-vda.raw"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_refused(scene: Scene, web: Guest, words: tuple[str, ...]) -> None:
    assert scene.run("restore", scene.first, *words, code=2)
    assert scene.names() >= {"web"} and "new" not in scene.names()


# --- pure -------------------------------------------------------------------------------------------

DOMAIN = """<domain type='kvm'><name>a</name><uuid>u</uuid><on_reboot>restart</on_reboot><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native'/><source file='/a'/>
<backingStore type='file'><format type='raw'/><source file='/b'/></backingStore><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><source file='/c'/><target dev='vdb'/></disk>
<interface type='bridge'><mac address='m'/><source bridge='br0'/><target dev='vnet0'/><model type='virtio'/></interface>
<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<graphics type='spice'/><video><model type='qxl' ram='65536'/></video><filesystem type='mount'/>
</devices></domain>"""


def test_a_trial_reaches_nothing_of_the_host() -> None:
    found = isolate(DOMAIN)
    for gone in ("bridge", "spice", "qxl", "vnet0", "filesystem", "restart"):
        assert gone not in found
    assert found.count('<link state="down"') == 1 and 'type="user"' in found
    assert "guest_agent" in found and 'address="m"' in found
    assert has_screen(found) and not has_screen(DOMAIN.replace("qxl", "none"))


def test_shown_disks_are_read_from_their_export_and_the_others_stay() -> None:
    found = show_disks(DOMAIN, {"vda": Export("/s", "web & co")})
    assert "/a" not in found and "/b" not in found and "/c" in found
    assert 'protocol="nbd" name="web &amp; co"' in found and 'socket="/s"' in found
    assert 'type="raw" error_policy="stop" rerror_policy="stop"' in found and "native" not in found


def test_stacked_disks_stand_alone_in_the_end() -> None:
    stacked = stack_on(DOMAIN, {"vda": Export("/s", "x")}, {"vda": "/new"})
    assert stacked.index('file="/new"') < stacked.index('protocol="nbd"') and 'type="qcow2"' in stacked
    alone = stand_alone(stacked, DOMAIN, ["vda"])
    assert "nbd" not in alone and "policy" not in alone and 'file="/new"' in alone and 'file="/c"' in alone
    before = DOMAIN.replace("cache='none'", "cache='none' error_policy='report'")
    assert 'error_policy="report"' in stand_alone(stacked, before, ["vda"])


def test_a_tag_comes_back_as_it_was_and_goes_without_a_trace() -> None:
    owner = Owner(host="h", boot="b", pid=1, started=2, hostname="n")
    tag = MachineTag(role=INSTANT, run="r", point="p", repository="q", owner=owner, disks={"vda": "a & <b>"})
    tagged = write_tag(DOMAIN, tag)
    assert read_tag(tagged) == tag
    assert read_tag(write_tag(tagged, None)) is None and "urn:" not in write_tag(tagged, None)
    assert read_tag(DOMAIN) is None and read_tag("no xml") is None


def test_signs_of_life() -> None:
    assert (parse_sign("agent"), parse_sign("console:login: ")) == (Sign(), Sign("login: "))
    for wrong in ("", "smoke", "console:", "Agent"):
        with pytest.raises(ValueError):
            parse_sign(wrong)
