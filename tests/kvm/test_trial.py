"""``verify --boot``: a restore point is started from a throw-away copy, and nothing of it stays."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from restore_scene import Scene
from vm_lab import Guest, GuestLab, LabDisk, needs_guests, wait

from graincopy.app.host import this_process
from graincopy.hypervisor.console import png_from_ppm
from graincopy.hypervisor.owned import TRIAL, MachineTag, write_tag

pytestmark = [pytest.mark.root, needs_guests]
MIB = 1 << 20
_DEVICES = (
    "<interface type='user'><mac address='52:54:00:aa:bb:cc'/><model type='virtio'/></interface>"
    "<video><model type='vga'/></video><graphics type='vnc' autoport='yes' listen='127.0.0.1'/>"
)


@pytest.fixture(scope="module")
def scene(guests: GuestLab, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(guests, str(tmp_path_factory.mktemp("trial")))


@pytest.fixture(scope="module")
def web(guests: GuestLab, scene: Scene) -> Iterator[Guest]:
    """A machine with a raw disk and a qcow2 disk, backed up while it is off."""
    disks = [
        LabDisk(dev="vda", path=guests.file("trial-a.raw", 64 * MIB)),
        LabDisk(dev="vdb", path=guests.file("trial-b.qcow2", 64 * MIB, format="qcow2"), format="qcow2"),
    ]
    with guests.guest("trial web", disks, start=False, options={"fs": "vda,vdb"}, devices=_DEVICES) as guest:
        scene.run("backup", "vm:trial web")
        yield guest


def nothing_left(scene: Scene) -> None:
    assert not [name for name in scene.names() if "-trial-" in name]
    assert not os.path.exists(scene.runtime)
    assert scene.lab.processes("qemu-system") == []


def test_a_machine_that_lives_is_recorded_with_its_picture_and_nothing_stays(scene: Scene, web: Guest) -> None:
    before = [Path(disk.path).read_bytes() for disk in web.disks]
    found = scene.run("verify", "latest", "--boot", "--timeout", "90")
    assert (found["alive"], found["sign"], found["machine"]) == (True, "agent", "trial web")
    assert base64.b64decode(found["picture"]).startswith(b"\x89PNG\r\n\x1a\n")
    assert [Path(disk.path).read_bytes() for disk in web.disks] == before
    nothing_left(scene)
    (trial,) = scene.run("show", "latest")["trials"]
    assert trial["trial"] == found["trial"] and trial["alive"] and trial["picture_bytes"] > 100
    assert scene.run("check", "--data")["findings"] == []


def test_a_sign_that_never_comes_is_a_failed_trial(scene: Scene, web: Guest) -> None:
    found = scene.run("verify", "latest", "--boot", "--until", "console:never said", "--timeout", "1", code=103)
    assert not found["alive"] and "never said" in found["reason"]
    nothing_left(scene)
    assert [trial["alive"] for trial in scene.run("show", "latest")["trials"]][-1] is False


def test_what_was_asked_wrongly_is_refused_before_anything_runs(scene: Scene, web: Guest) -> None:
    assert "console:TEXT" in scene.run("verify", "latest", "--boot", "--until", "smoke", code=2)
    assert "--boot" in scene.run("verify", "latest", code=2)
    assert "trial web" in scene.run("verify", "latest", "--boot", "--vm", "other", code=100)


def test_every_machine_of_a_set_is_tried(guests: GuestLab, tmp_path: Path) -> None:
    scene = Scene(guests, str(tmp_path))
    disks = [[LabDisk(dev="vda", path=guests.file(f"{name}.raw", 16 * MIB, fs=False))] for name in ("one", "two")]
    with (
        guests.guest("one", disks[0], start=False, options={"agent": "no"}),
        guests.guest("two", disks[1], start=False, agent_channel=False),
    ):
        scene.run("backup", "vm:one", "vm:two")
        assert "two has no guest agent" in scene.run("verify", "latest", "--boot", code=2)
        words = ("verify", "latest", "--boot", "--timeout", "90", "--until")
        found = scene.run(*words, "console:GUEST-READY")
        assert found["alive"] and sorted(one["machine"] for one in found["trials"]) == ["one", "two"]
        assert "--vm" in scene.run(*words, "console:GUEST-READY", "--picture", str(tmp_path / "p"), code=2)
        found = scene.run(*words, "console:never said", "--timeout", "1", "--vm", "two", code=103)
        assert found["machine"] == "two" and not found["alive"]
        assert sorted(one["machine"] for one in scene.run("show", "latest")["trials"]) == ["one", "two", "two"]
        assert "--vm" in scene.run("restore", "latest", "--to", str(tmp_path / "x"), "--as", "x", "--instant", code=2)
    assert not [name for name in scene.names() if "-trial-" in name]
    assert not os.path.exists(scene.runtime)


def test_killed_in_the_middle_nothing_is_left_running(scene: Scene, web: Guest) -> None:
    def trial() -> Any:
        return next((name for name in scene.names() if "-trial-" in name), None)

    with scene.running("verify", "latest", "--boot", "--until", "console:never said") as process:
        wait(lambda: trial() is not None and scene.domain_state(trial()) == 1, scene.said)
        process.send_signal(signal.SIGKILL)
        process.wait()
    scene.wait_names("-trial-")  # libvirt notices that the connection is gone
    found = scene.run("verify", "latest", "--boot", "--until", "console:GUEST-READY", "--timeout", "90")
    assert found["alive"] and "GUEST-READY" in found["console"]
    nothing_left(scene)


def test_killed_together_with_libvirtd_the_rest_is_reaped(scene: Scene, web: Guest) -> None:
    with scene.running("verify", "latest", "--boot", "--until", "console:never said") as process:
        wait(lambda: "-trial-" in " ".join(scene.names()), scene.said)
        scene.lab.kill_daemon(stay_down=True)
        process.kill()
        process.wait()
    scene.lab.start_daemon()
    assert len(os.listdir(scene.runtime)) == 1
    # Whether libvirtd takes such a machine down when it is back is its own business; here is one that it kept.
    us = this_process()
    dead, living = replace(us, started=us.started + 1), us
    for name, owner in (("a-trial-1", dead), ("b-trial-2", living)):
        tag = MachineTag(role=TRIAL, run="r", point="p", repository="q", owner=owner)
        xml = f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><os><type>hvm</type></os></domain>"
        scene.lab.connection().createXML(write_tag(xml, tag), 0)
    try:
        assert scene.run("targets", "--reap")["failures"] == []
        assert scene.names() == {"trial web", "b-trial-2"}
    finally:
        scene.forget("b-trial-2")
    nothing_left(scene)


def test_the_history_goes_with_its_point(scene: Scene, web: Guest) -> None:
    point = scene.run("show", "latest")["restore_point"]
    scene.run("backup", "vm:trial web")
    assert os.listdir(os.path.join(scene.repo, "history", point))
    scene.run("expire", "--point", point)
    assert not os.path.exists(os.path.join(scene.repo, "history", point)) or not os.listdir(
        os.path.join(scene.repo, "history", point)
    )


def test_a_pixmap_becomes_a_png_that_says_the_same() -> None:
    from zlib import decompress

    pixels = bytes(range(18))
    png = png_from_ppm(b"P6\n# a remark\n3 2\n255\n" + pixels)
    assert png[16:24] == bytes([0, 0, 0, 3, 0, 0, 0, 2])
    at = png.index(b"IDAT") + 4
    assert decompress(png[at : png.index(b"IEND") - 8]) == b"\0" + pixels[:9] + b"\0" + pixels[9:]
    for broken in (b"", b"P6\n3 2\n255\n", b"P5\n1 1\n255\n\0", b"P6\n-1 2\n255\n" + pixels):
        with pytest.raises(ValueError):
            png_from_ppm(broken)
