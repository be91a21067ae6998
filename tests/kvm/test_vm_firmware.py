"""A running UEFI machine whose firmware variables lie where nothing can be snapshotted, as Debian has it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from restore_scene import Scene
from vm_lab import PATIENCE, GuestLab, LabDisk, make_disk, needs_guests

from graincopy.app.host import SystemClock
from graincopy.hypervisor.link import Link
from graincopy.model.volume import Claim
from graincopy.testing.memory_lab import MemoryLab
from graincopy.volumes.copied import CopiedDriver
from graincopy.workloads.libvirt import LibvirtSource

CODE, VARS = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
MIB = 1 << 20

pytestmark = [
    pytest.mark.root,
    needs_guests,
    pytest.mark.skipif(not os.path.exists(CODE), reason="needs ovmf"),
]


def test_firmware_variables_of_a_running_machine(guests: GuestLab, tmp_path: Path) -> None:
    scene = Scene(guests, str(tmp_path))
    nvram = os.path.join(guests.folder, "uefi_VARS.fd")
    shutil.copyfile(VARS, nvram)
    disk = os.path.join(guests.folder, "uefi.qcow2")
    make_disk(disk, 32 * MIB, format="qcow2", fs=False)
    firmware = f"<loader readonly='yes' type='pflash'>{CODE}</loader><nvram>{nvram}</nvram>"
    disks = [LabDisk(dev="vda", path=disk, format="qcow2")]
    with guests.guest("uefi", disks, options={"agent": "no"}, os_extra=firmware) as guest:
        for change_map in ("first backup", "compared: the driver keeps no change map"):
            point = scene.run("backup", "vm:uefi")
            found = {one["driver"]: one for one in point["disks"]}
            assert set(found) == {"qemu", "copied"}
            assert (found["copied"]["path"], found["copied"]["change_map"]) == (nvram, change_map)
        assert found["copied"]["stored_bytes"] == 0
        assert guest.domain().info()[0] == 1, "it runs"
        now = Path(nvram).read_bytes()
        out = scene.run("restore", "latest", "--to", str(tmp_path / "out"))
        back = {one["name"]: one["target"] for one in out["disks"]}
        assert Path(back["uefi_VARS.fd"]).read_bytes() == now
        guest.domain().destroy()
        Path(nvram).write_bytes(bytes(len(now)))
        scene.run("restore", "latest", "--in-place")
        assert Path(nvram).read_bytes() == now


@pytest.mark.skipif(shutil.which("swtpm_setup") is None, reason="needs swtpm")
def test_the_state_of_a_running_tpm(guests: GuestLab) -> None:
    disk = os.path.join(guests.folder, "trusted.qcow2")
    make_disk(disk, 32 * MIB, format="qcow2", fs=False)
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    disks = [LabDisk(dev="vda", path=disk, format="qcow2")]
    with guests.guest("trusted", disks, options={"agent": "no"}, devices=tpm) as guest:
        with Link(guests.uri, SystemClock()) as link:
            source = LibvirtSource(link, SystemClock(), swtpm=f"{guests.folder}/lib/swtpm")  # where the host sees it
            workload = source.describe(["trusted"])
        states = [file for file in workload.files if file.state]
        assert states and all("/tpm2/" in file.path for file in states), workload.notes
        driver = CopiedDriver()
        storage = MemoryLab()
        for file in states:
            claim = driver.resolve(file.path)
            assert isinstance(claim, Claim)
            (target,) = driver.create_targets([claim.volume], storage.tag())
            with driver.open(target, claim) as image:
                content = bytearray(image.size)
                image.readinto(0, memoryview(content))
            assert content == Path(file.path).read_bytes() != b""
            driver.delete(target)
        assert guest.domain().info()[0] == 1, "it runs"


@pytest.mark.skipif(shutil.which("swtpm_setup") is None, reason="needs swtpm")
def test_a_trial_has_a_copy_of_the_state_of_the_tpm(guests: GuestLab, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the TPM keeps is there before the guest's first instruction; nothing of it stays, killed or not."""
    scene = Scene(guests, str(tmp_path_factory.mktemp("tpm")), inside=True)
    disk = os.path.join(guests.folder, "sealed.qcow2")
    make_disk(disk, 32 * MIB, format="qcow2", fs=False)
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    home = Path(guests.folder, "lib/swtpm")
    disks = [LabDisk(dev="vda", path=disk, format="qcow2")]
    with guests.guest("sealed", disks, options={"agent": "no"}, devices=tpm) as guest:
        uuid = guest.domain().UUIDString()
        (kept,) = (home / uuid / "tpm2").glob("*.permall")
        scene.run("backup", "vm:sealed")
        content, others = kept.read_bytes(), set(os.listdir(home))
        trial = ("verify", "latest", "--boot", "--until", "console:GUEST-READY", "--timeout", "90")
        with scene.stopped("started", *trial) as process:
            (new,) = set(os.listdir(home)) - others
            copy = home / new / "tpm2" / kept.name
            assert copy.read_bytes() == content and copy.stat().st_uid == kept.stat().st_uid
            process.send_signal(signal.SIGCONT)
            assert process.wait(PATIENCE) == 0
        assert set(os.listdir(home)) == others
        scene.killed("started", *trial)
        scene.wait_names("-trial-")
        scene.run("targets", "--reap")
        assert set(os.listdir(home)) == others and kept.exists()
        assert not os.path.exists(scene.runtime)
        assert scene.run(*trial)["alive"]
