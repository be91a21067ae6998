"""``subsystem:libvirt`` on a libvirtd that runs: everything it knew is there again after its folders were lost."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from restore_scene import Scene
from vm_lab import GuestLab, LabDisk, make_disk, needs_guests, tool

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
_NETWORK = "<network><name>{0}</name><bridge name='gc{0}0'/></network>"
_POOL = "<pool type='dir'><name>fast</name><target><path>{0}</path></target></pool>"
_SECRET = "<secret ephemeral='no' private='no'><usage type='volume'><volume>gc-sub</volume></usage></secret>"
_FILTER = "<filter name='no-spoof' chain='root'><rule action='drop' direction='out'/></filter>"
# What a pool's folder is found to be when the pool is started
_SEEN = re.compile(r" *<(capacity|allocation|available) [^\n]*\n| *<permissions>.*</permissions>\n", re.DOTALL)
_LISTS = ("list --all", "net-list --all", "pool-list --all", "secret-list", "nwfilter-list")


def known(lab: GuestLab) -> dict[str, object]:
    """What virsh lists, and every definition."""
    connection = lab.connection()
    found: dict[str, object] = {words: tool("virsh", "-c", lab.uri, *words.split()) for words in _LISTS}
    for domain in connection.listAllDomains():
        found[f"domain {domain.name()}"] = domain.XMLDesc(2)
        found[f"snapshots of {domain.name()}"] = sorted(one.getXMLDesc() for one in domain.listAllSnapshots())
    for kind, every in (("network", connection.listAllNetworks()), ("pool", connection.listAllStoragePools())):
        found |= {f"{kind} {one.name()}": (_SEEN.sub("", one.XMLDesc(1)), one.autostart()) for one in every}
    found |= {f"secret {one.UUIDString()}": one.value() for one in connection.listAllSecrets()}
    return found


@pytest.fixture
def own_guests() -> Iterator[GuestLab]:
    """A libvirtd of this test's own: what it knows is going to be wiped."""
    with GuestLab() as lab:
        yield lab


def test_everything_that_libvirt_knew_is_there_again(own_guests: GuestLab, tmp_path: Path) -> None:
    lab = own_guests
    scene = Scene(lab, str(tmp_path), inside=True)
    image = os.path.join(lab.folder, "known.qcow2")
    make_disk(image, 16 * MIB, format="qcow2", fs=False)
    with lab.guest("known", [LabDisk(dev="vda", path=image, format="qcow2")], start=False) as guest:
        guest.domain().snapshotCreateXML("<domainsnapshot><name>monday</name></domainsnapshot>", 0)
        guest.domain().setAutostart(1)
        guest.domain().setAutostart(0)
        for name in ("lan", "dmz"):
            lab.connection().networkDefineXML(_NETWORK.format(name))
        pool = lab.connection().storagePoolDefineXML(_POOL.format(tmp_path), 0)
        pool.create(0)
        pool.setAutostart(1)
        lab.connection().secretDefineXML(_SECRET, 0).setValue(b"sesame", 0)
        lab.connection().nwfilterDefineXML(_FILTER)
        lab.kill_daemon()  # what it knows from its files, and in their words
        before = known(lab)

        point = scene.run("backup", "subsystem:libvirt")
        assert len(point["disks"]) >= 6 and point["missing"] == {}

        lab.kill_daemon(stay_down=True)
        for part in ("etc", "lib/qemu/snapshot", "run"):
            folder = os.path.join(lab.folder, part)
            for entry in os.listdir(folder):
                path = os.path.join(folder, entry)
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        scene.run("restore", "latest", "--in-place")
        lab.start_daemon()
        assert known(lab) == before
