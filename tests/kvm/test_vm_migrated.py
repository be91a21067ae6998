"""A guest that migrates to another host in the middle of its backup: nothing wrong is published, nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import vm_lab
from restore_scene import Scene
from vm_lab import PATIENCE, Guest, GuestLab, LabDisk, make_disk, needs_guests, tool, wait

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
IN_USE = 17
NAME = "nomad"
# VIR_MIGRATE_LIVE, _PERSIST_DEST, _UNDEFINE_SOURCE, _UNSAFE: the disks are on this very host, in its page cache
FLAGS = 1 | 8 | 16 | 512


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[GuestLab]:
    """Another libvirtd, which takes itself for one on another host."""
    name = 'host_uuid = "5e1b7a52-09f3-4f3e-9f0c-0d8d1c1f9a77"\n'
    monkeypatch.setattr(vm_lab, "_LIBVIRTD", vm_lab._LIBVIRTD + name)
    with GuestLab() as lab:
        yield lab


def test_a_guest_that_migrates_in_the_middle(guests: GuestLab, elsewhere: GuestLab, tmp_path: Path) -> None:
    import libvirt

    scene = Scene(guests, str(tmp_path))
    path = str(tmp_path / "nomad.qcow2")
    make_disk(path, 64 * MIB, format="qcow2", fs=False)
    with guests.guest(NAME, [LabDisk(dev="vda", path=path, format="qcow2")], options={"agent": "no"}) as guest:
        write(guest, 8, 8)
        scene.run("backup", f"vm:{NAME}")
        write(guest, 20, 1)
        with scene.stopped(
            "settled", "backup", f"vm:{NAME}"
        ) as process:  # QEMU does not let go of a disk with a snapshot: it stays
            with pytest.raises(libvirt.libvirtError):
                migrate(guest, elsewhere)
            write(guest, 22, 1)
            must_end(process, 0)
        with scene.stopped("opened", "backup", f"vm:{NAME}") as process:  # nothing of ours is there yet
            migrate(guest, elsewhere)
            must_end(process, IN_USE)  # seen first, because the other host is this one
        assert len(scene.run("points")) == 2
        must_go_on(scene, elsewhere, guest, tmp_path / "out")


def must_end(process: subprocess.Popen[bytes], code: int) -> None:
    """Wake it: it ends with ``code`` and at most one sentence and a way out."""
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, len(said.strip().splitlines()) <= 3) == (code, True), said.decode()


def migrate(guest: Guest, to: GuestLab) -> None:
    """It runs over there, its channels in the folder of that lab, and libvirt here knows it no more."""
    here, there = guest.folder, Guest(to, NAME, []).folder
    os.makedirs(there, exist_ok=True)
    live = guest.domain().XMLDesc(1 | 8).replace(here, there)  # VIR_DOMAIN_XML_SECURE, _MIGRATABLE
    kept = guest.domain().XMLDesc(1 | 2 | 8).replace(here, there)  # and _INACTIVE
    where = {"migrate_uri": "tcp:127.0.0.1:49417", "destination_xml": live, "persistent_xml": kept}
    guest.domain().migrate3(to.connection(), where, FLAGS)
    assert NAME not in {one.name() for one in guest.lab.connection().listAllDomains()}
    wait(lambda: to.connection().lookupByName(NAME).state()[0] == 1, "it does not run over there")


def must_go_on(scene: Scene, here: GuestLab, guest: Guest, out: Path) -> None:
    """Where the guest is now its backups go on, as of the same machine, and are right."""
    try:
        write(Guest(here, NAME, []), 30, 1)
        with open(scene.config) as file:
            text = file.read()
        with open(scene.config, "w") as file:
            file.write(text.replace(scene.lab.uri, here.uri))
        point = scene.run("backup", f"vm:{NAME}", "--audit", "all")
        assert point["disks"][0]["audit_mismatches"] == 0 and len(scene.run("points")) == 3
        here.connection().lookupByName(NAME).destroy()
        scene.run("restore", "latest", "--to", str(out))
        tool("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", guest.disks[0].path, str(out / "nomad.qcow2"))
        scene.run("targets", "--reap")
        assert [one["role"] for one in scene.run("targets")["targets"]] == ["checkpoint"]
    finally:
        Guest(here, NAME, []).destroy()


def write(guest: Guest, at: int, mebibytes: int) -> None:
    code, said = guest.run(f"dd if=/dev/urandom of=/dev/vda bs=1M count={mebibytes} seek={at} conv=fsync")
    assert code == 0, said
