"""Backups of running guests while somebody else works on them: one clear sentence, the guest untouched, nothing lost.

What the source itself refuses (unknown domain, network disks, agents that hang or lie ...) is in test_vm_source and
test_vm_quiesce; here whole commands run against a machine whose name is odd, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from restore_scene import Scene
from vm_lab import PATIENCE, Guest, GuestLab, LabDisk, make_disk, needs_guests, tool, wait

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
NAME = "sh&p <1> söhne's"
BUSY, NOT_THERE = 72, 71


@pytest.fixture(scope="module")
def scene(guests: GuestLab, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(guests, str(tmp_path_factory.mktemp("bad")))


@pytest.fixture
def shop(guests: GuestLab, tmp_path: Path) -> Iterator[Guest]:
    """A running guest with a qcow2 disk that has 8 MiB of noise in it."""
    path = str(tmp_path / "a disk.qcow2")
    make_disk(path, 64 * MIB, format="qcow2", fs=False)
    with guests.guest(NAME, [LabDisk(dev="vda", path=path, format="qcow2")], options={"agent": "no"}) as guest:
        write(guest, 8 * MIB, 8)
        yield guest


def write(guest: Guest, at: int, mebibytes: int) -> None:
    """Noise, durably."""
    code, said = guest.run(f"dd if=/dev/urandom of=/dev/vda bs=1M count={mebibytes} seek={at // MIB} conv=fsync")
    assert code == 0, said


def must_refuse(scene: Scene, shop: Guest, code: int, words: str) -> None:
    """A backup fails with one sentence (and perhaps what to do), publishes nothing, and the guest goes on."""
    before = scene.run("points")
    said = scene.run("backup", f"vm:{NAME}", code=code)
    assert words in said and len(said.strip().splitlines()) <= 3, said
    assert scene.run("points") == before
    assert shop.domain().state()[0] == 1
    write(shop, 0, 1)


def must_restore(scene: Scene, shop: Guest, image: str, folder: Path) -> None:
    """The newest point is what the guest, which is killed here, had on its disk."""
    with contextlib.suppress(Exception):
        shop.domain().destroy()
    scene.run("restore", "latest", "--to", str(folder))
    (restored,) = os.listdir(folder)
    tool("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", image, str(folder / restored))


# --- somebody else's job --------------------------------------------------------------------------------


def test_a_machine_under_another_job(scene: Scene, shop: Guest, tmp_path: Path) -> None:
    where = f"<disk type='file'><source file='{tmp_path}/copy'/><driver type='qcow2'/></disk>"
    shop.domain().blockCopy("vda", where, {}, 4)  # VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
    must_refuse(scene, shop, BUSY, "a block job runs on its disk vda")
    assert shop.domain().blockJobInfo("vda"), "theirs goes on"
    shop.domain().blockJobAbort("vda", 0)
    scratch = f"<disk name='vda' type='file'><scratch file='{tmp_path}/scratch'/></disk>"
    server = f"<server transport='unix' socket='{tmp_path}/theirs'/>"
    shop.domain().backupBegin(f"<domainbackup mode='pull'>{server}<disks>{scratch}</disks></domainbackup>", None)
    must_refuse(scene, shop, BUSY, "a job runs on it")
    assert shop.domain().jobInfo()[0] != 0, "theirs goes on"
    shop.domain().abortJob()
    wait(lambda: shop.domain().jobInfo()[0] == 0, "their job does not end")
    scene.run("backup", f"vm:{NAME}")
    must_restore(scene, shop, shop.disks[0].path, tmp_path / "out")


# --- chains of somebody else ------------------------------------------------------------------------------


def test_an_external_snapshot_that_is_made_and_merged(scene: Scene, shop: Guest, tmp_path: Path) -> None:
    """Writes go to an overlay for a while, then into the disk again: none of them is called clean."""
    base, overlay = shop.disks[0].path, str(tmp_path / "overlay.qcow2")
    scene.run("backup", f"vm:{NAME}")
    shop.domain().snapshotCreateXML(
        "<domainsnapshot><name>theirs</name><disks><disk name='vda' snapshot='external'>"
        f"<source file='{overlay}'/></disk></disks></domainsnapshot>",
        16 | 4,  # VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY, _NO_METADATA
    )
    write(shop, 4 * MIB, 1)
    above = scene.run("backup", f"vm:{NAME}")
    assert above["disks"][0]["path"] == overlay
    write(shop, 5 * MIB, 1)
    shop.domain().blockCommit("vda", None, None, 0, 4)  # VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
    wait(lambda: shop.domain().blockJobInfo("vda").get("cur") == shop.domain().blockJobInfo("vda").get("end"), "stuck")
    wait(lambda: pivoted(shop), "the merge does not end")
    write(shop, 6 * MIB, 1)
    again = scene.run("backup", f"vm:{NAME}", "--audit", "all")
    assert again["disks"][0]["path"] == base
    assert again["disks"][0]["audit_mismatches"] == 0
    must_restore(scene, shop, base, tmp_path / "out")


def pivoted(shop: Guest) -> bool:
    import libvirt

    try:
        shop.domain().blockJobAbort("vda", 2)  # VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
    except libvirt.libvirtError as error:
        assert "not ready" in str(error), error
        return False
    return True


# --- guests that go -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "code"), [("opened", NOT_THERE), ("settled", 26), ("copied", 0)])
def test_a_guest_that_goes_in_the_middle(scene: Scene, shop: Guest, tmp_path: Path, step: str, code: int) -> None:
    """It is gone from this host, as after a migration: nothing is published that was not read, and then all is well."""
    scene.run("backup", f"vm:{NAME}")
    write(shop, 20 * MIB, 1)
    before = len(scene.run("points"))
    xml = shop.domain().XMLDesc(2)  # VIR_DOMAIN_XML_INACTIVE
    with scene.stopped(step, "backup", f"vm:{NAME}") as process:
        shop.destroy()
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, len(said.strip().splitlines()) <= 3) == (code, True), said.decode()
    assert len(scene.run("points")) - before == (code == 0)
    shop.lab.connection().defineXML(xml)
    scene.run("backup", f"vm:{NAME}")
    assert [one["role"] for one in scene.run("targets")["targets"] if str(tmp_path) in one["volume"]] == ["checkpoint"]
    must_restore(scene, shop, shop.disks[0].path, tmp_path / "out")
