"""What a domain's XML says, and its rewriting for a copy: pure, without libvirt."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from graincopy.core.clock import Chance
from graincopy.hypervisor.domain_copy import Copied, Copy, NewPlace, copy_domain, new_mac, new_uuid
from graincopy.hypervisor.domain_xml import Source, parse_domain, parse_xml

UUID = "22a626df-d388-4223-bac5-3121f07ba1ee"
DOMAIN = f"""
<domain type='kvm' id='7'>
  <name>shop &amp; söns</name><uuid>{UUID}</uuid><genid>43dc0cf8-809b-4adb-9bea-a9abb5f3d90e</genid>
  <sysinfo type='smbios'><system><entry name='uuid'>{UUID}</entry></system></sysinfo>
  <os><type arch='x86_64'>hvm</type><loader type='pflash'>/fw/CODE.fd</loader>
    <nvram template='/fw/VARS.fd' format='raw'>/nvram/shop_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/ds/top of.qcow2' index='1'/>
      <backingStore type='file' index='2'><format type='qcow2'/><source file='/ds/mid.qcow2'/>
        <backingStore type='block'><format type='raw'/><source dev='/dev/vg/base'/><backingStore/></backingStore>
      </backingStore><target dev='vda' bus='virtio'/><serial>A1</serial></disk>
    <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/data'>
      <encryption format='luks'><secret type='passphrase' uuid='{UUID}'/></encryption></source>
      <target dev='vdb' bus='virtio'/><shareable/></disk>
    <disk type='volume' device='disk'><driver name='qemu' type='raw'/><source pool='fast' volume='v1'/>
      <target dev='vdc' bus='virtio'/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='pool/image'><host name='m1'/></source>
      <target dev='vdd' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/a.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:aa:bb:cc'/><source network='lan' bridge='br0'/>
      <target dev='vnet3'/></interface>
    <interface type='network'><mac address='00:16:3e:00:00:01'/><source network='lan'/></interface>
    <interface type='bridge'><mac address='52:54:00:aa:bb:dd'/><source bridge='br9'/></interface>
    <serial type='file'><source path='/log/console'/><target port='0'/></serial>
    <channel type='unix'><source mode='bind' path='/run/x'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <graphics type='vnc' port='5901' autoport='no' passwd='secret'/>
    <hostdev mode='subsystem' type='pci'><source><address domain='0' bus='1' slot='0' function='0'/></source></hostdev>
  </devices>
</domain>
"""


class Counting(Chance):
    """Chance that is none."""

    def token(self, size: int) -> bytes:
        return bytes(range(1, size + 1))

    def below(self, limit: int) -> int:
        return 0


def test_what_a_domain_says() -> None:
    found = parse_domain(DOMAIN)
    assert (found.name, found.uuid) == ("shop & söns", UUID)
    assert [disk.dev for disk in found.disks] == ["vda", "vdb", "vdc", "vdd", "sda", "sdb"]
    vda, vdb, vdc, vdd, sda, sdb = found.disks
    assert vda.source == Source(kind="file", format="qcow2", path="/ds/top of.qcow2")
    assert vda.chain == (
        Source(kind="file", format="qcow2", path="/ds/mid.qcow2"),
        Source(kind="block", format="raw", path="/dev/vg/base"),
    )
    assert vda.serial == "A1"
    assert vdb.source == Source(kind="block", format="raw", path="/dev/vg/data", encryption="luks")
    assert vdb.shareable and not vdb.readonly and vdb.chain == ()
    assert vdc.source == Source(kind="volume", format="raw", pool="fast", volume="v1")
    assert vdd.source == Source(kind="network", format="raw", protocol="rbd", name="pool/image")
    assert sda.device == "cdrom" and sda.readonly
    assert sdb.source.kind == ""
    assert found.nvram is not None and found.nvram.source == Source(kind="file", path="/nvram/shop_VARS.fd")
    assert found.nvram.template == "/fw/VARS.fd"
    assert [tpm.backend for tpm in found.tpms] == ["emulator"]
    assert found.networks == ("lan",)
    assert found.pools == ("fast",)
    assert found.macs == ("52:54:00:aa:bb:cc", "00:16:3e:00:00:01", "52:54:00:aa:bb:dd")
    assert found.agent and found.agent_connected


def test_nothing_is_assumed_that_the_xml_does_not_say() -> None:
    bare = "<domain><name>x</name><devices><disk><target dev='hda'/></disk></devices></domain>"
    (disk,) = parse_domain(bare).disks
    assert (disk.device, disk.source, disk.chain) == ("disk", Source(kind="", format="raw"), ())
    assert not parse_domain(bare).agent and parse_domain(bare).nvram is None


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("", "not XML"),
        ("<domain>", "not XML"),
        ("<network><name>n</name></network>", "a network, not a domain"),
        ("<domain><uuid>1</uuid></domain>", "names no domain"),
        ("<domain><name>x</name><devices><disk/></devices></domain>", "no target"),
        ("<!DOCTYPE domain [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>", "document type"),
    ],
)
def test_odd_xml_is_refused(text: str, trouble: str) -> None:
    with pytest.raises(ValueError, match=trouble):
        parse_domain(text)


def test_new_style_nvram_is_understood() -> None:
    text = "<domain><name>x</name><os><nvram type='file' format='qcow2'><source file='/n'/></nvram></os></domain>"
    nvram = parse_domain(text).nvram
    assert nvram is not None and nvram.source == Source(kind="file", format="qcow2", path="/n")


# --- the copy -----------------------------------------------------------------------------------------


def copied(**changes: object) -> Copied:
    facts: dict[str, object] = {
        "name": "shop <2>",
        "uuid": new_uuid(Counting()),
        "disks": {"vda": NewPlace("/new/a.qcow2", "qcow2"), "vdb": NewPlace("/dev/vg/new", block=True)},
        "mac": lambda old: new_mac(old, Counting()),
        "nvram": "/nvram/two.fd",
    }
    return copy_domain(DOMAIN, Copy(**(facts | changes)))  # type: ignore[arg-type]


def test_a_copy_shares_nothing_that_identifies_the_original() -> None:
    found = copied()
    assert UUID not in re.sub(r"<secret[^>]*>", "", found.xml)
    again = parse_domain(found.xml)
    assert again.name == "shop <2>"
    assert not set(again.macs) & set(parse_domain(DOMAIN).macs)
    assert [mac[:8] for mac in again.macs] == ["52:54:00", "00:16:3e", "52:54:00"]
    root = parse_xml(found.xml)
    assert root.get("id") is None
    assert root.findtext("genid") == ""
    assert root.findtext("sysinfo/system/entry") == root.findtext("uuid") == again.uuid
    for gone in ("vnet3", "/run/x", "/log/console", "5901", "hostdev", "/nvram/shop_VARS.fd"):
        assert gone not in found.xml


def test_a_copy_has_the_restored_disks_with_nothing_below_them() -> None:
    again = parse_domain(copied().xml)
    assert [disk.dev for disk in again.disks] == ["vda", "vdb", "sda", "sdb"]
    assert again.disks[0].source == Source(kind="file", format="qcow2", path="/new/a.qcow2")
    assert again.disks[0].chain == () and again.disks[0].serial == "A1"
    assert again.disks[1].source == Source(kind="block", format="raw", path="/dev/vg/new", encryption="luks")
    assert again.disks[2].source.kind == "", "its medium belongs to the host"
    assert again.nvram is not None and again.nvram.source == Source(kind="file", path="/nvram/two.fd")
    assert again.nvram.template == "/fw/VARS.fd"


def test_what_a_copy_lacks_is_said() -> None:
    said = " | ".join(copied().changes)
    assert "vdc was not restored" in said and "vdd was not restored" in said
    assert "pci device of the host" in said
    assert "drive sda is empty" in said
    assert "serial port" in said


def test_a_trial_has_its_links_cut() -> None:
    root = parse_xml(copied(networks=False).xml)
    assert [one.get("state") for one in root.findall("devices/interface/link")] == ["down"] * 3
    assert "its network links are cut" in copied(networks=False).changes
    assert parse_xml(copied().xml).find("devices/interface/link") is None


def test_the_original_text_is_the_same_domain_after_a_round_trip() -> None:
    assert parse_domain(ET.tostring(parse_xml(DOMAIN), encoding="unicode")) == parse_domain(DOMAIN)


def test_new_identities_have_the_form_that_libvirt_wants() -> None:
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", new_uuid(Counting()))
    assert new_mac("", Counting()) == "52:54:00:01:02:03"
    assert int(new_mac("52:54:00:aa:bb:cc", Counting())[:2], 16) % 2 == 0, "not a multicast address"
