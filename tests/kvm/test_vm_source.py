"""What belongs to a VM, asked of a real libvirtd; and its definition brought back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vm_lab import Guest, GuestLab, LabDisk, make_disk, needs_guests, tool

from graincopy.app.host import SystemClock
from graincopy.core.errors import (
    DefineRefused,
    DomainUnknown,
    HypervisorDown,
    PathMissing,
    PathUnreadable,
    WorkloadWrong,
)
from graincopy.hypervisor.domain_xml import parse_domain
from graincopy.hypervisor.link import Link
from graincopy.model.workload import Representation, Workload
from graincopy.workloads.combined import CombinedSource
from graincopy.workloads.files import stat_metadata
from graincopy.workloads.libvirt import LibvirtSource
from graincopy.workloads.libvirt_facts import Facts, machines
from graincopy.workloads.libvirt_files import Chosen, Exclusions, files_of

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
_UUID = "0ee1e1ff-7a3e-4b9f-9c1e-3a33f4a6e002"


@pytest.fixture
def source(guests: GuestLab) -> Iterator[LibvirtSource]:
    with Link(guests.uri, SystemClock()) as link:
        yield make_source(link, guests)


def make_source(link: Link, guests: GuestLab, **more: Any) -> LibvirtSource:
    return LibvirtSource(link, SystemClock(), swtpm=os.path.join(guests.folder, "lib/swtpm"), **more)


@pytest.fixture
def folder(guests: GuestLab, request: pytest.FixtureRequest) -> str:
    path = os.path.join(guests.folder, "disks", str(abs(hash(request.node.nodeid))))
    os.makedirs(path)
    return path


def disk(folder: str, name: str, dev: str, *, format: str = "raw", **more: Any) -> LabDisk:
    path = os.path.join(folder, name)
    if not os.path.lexists(path):
        make_disk(path, 4 * MIB, format=format, fs=False)
    return LabDisk(dev=dev, path=path, format=format, **more)


def defined(guests: GuestLab, name: str, disks: Sequence[LabDisk], **facts: Any) -> Any:
    return guests.guest(name, disks, start=False, **facts)


def said(workload: Workload) -> str:
    return " | ".join(workload.notes)


def test_every_file_that_a_vm_needs_and_none_that_it_does_not(
    guests: GuestLab, source: LibvirtSource, folder: str
) -> None:
    iso = disk(folder, "install.iso", "sda", device="cdrom", extra="<readonly/>")
    common = disk(folder, "common.raw", "vdc", extra="<shareable/><readonly/>")
    nvram = os.path.join(folder, "full_VARS.fd")
    make_disk(nvram, 128 << 10, fs=False)
    disks = [disk(folder, "root.qcow2", "vda", format="qcow2"), disk(folder, "data.raw", "vdb"), common, iso]
    extra = f"<loader readonly='yes' type='pflash'>{nvram}</loader><nvram>{nvram}</nvram>"
    with defined(guests, "full", disks, os_extra=extra) as guest:
        uuid = guest.domain().UUIDString()
        workload = source.describe(["full"])
        assert [(file.name, file.format, file.representation) for file in workload.files] == [
            ("root.qcow2", "qcow2", Representation.GUEST),
            ("data.raw", "raw", Representation.FILE),
            ("full_VARS.fd", "raw", Representation.FILE),
        ]
        assert all(os.path.isabs(file.path) for file in workload.files)
        assert "disk vdc is left out: read-only and shared" in said(workload)
        assert "disk sda is left out: a CD-ROM" in said(workload)
        stored = workload.definitions[f"libvirt/{uuid}/inactive.xml"].decode()
        assert parse_domain(stored).name == "full"
        assert workload.kind == "vm" and workload.name == "full"
        assert source.describe([uuid]) == workload, "by UUID it is the same"
        assert "full" in source.list()
        with Link(guests.uri, SystemClock()) as link:
            without = make_source(link, guests, exclude_now=["nvram"]).describe(["full"])
        assert [file.name for file in without.files] == ["root.qcow2", "data.raw"]
        assert "firmware variables are left out: as asked" in said(without)


def test_ids_stay_when_the_vm_and_its_files_are_renamed(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    uuid = "0ee1e1ff-7a3e-4b9f-9c1e-3a33f4a6e001"
    with defined(guests, "before", [disk(folder, "a.raw", "vda"), disk(folder, "b.raw", "vdb")], uuid=uuid):
        first = source.describe(["before"])
    os.rename(first.files[0].path, os.path.join(folder, "moved.raw"))
    with defined(guests, "after", [disk(folder, "moved.raw", "vda"), disk(folder, "b.raw", "vdb")], uuid=uuid):
        second = source.describe(["after"])
    assert first.id == second.id
    assert [file.disk for file in first.files] == [file.disk for file in second.files]
    assert len({file.disk for file in first.files}) == 2


def test_disks_can_be_left_out(guests: GuestLab, folder: str) -> None:
    disks = [disk(folder, f"{letter}.raw", f"vd{letter}") for letter in "abc"]
    with defined(guests, "less", disks), Link(guests.uri, SystemClock()) as link:

        def names(**more: Any) -> list[str]:
            return [file.name for file in make_source(link, guests, **more).describe(["less"]).files]

        assert names(exclude=["vdb"]) == ["a.raw", "c.raw"]
        assert names(exclude=["less:vdb", "c.raw"]) == ["a.raw"]
        assert names(exclude=["other:vda", "vdx"]) == ["a.raw", "b.raw", "c.raw"]
        assert names(exclude_now=[os.path.join(folder, "a.raw")]) == ["b.raw", "c.raw"]
        with pytest.raises(WorkloadWrong, match=r"no disk vdx to leave out; there are: less:vda"):
            names(exclude_now=["vdx"])
        with pytest.raises(WorkloadWrong, match="no disk is left"):
            names(exclude=["vda", "vdb", "vdc"])
        assert "disk vdb is left out: as asked" in said(make_source(link, guests, exclude=["vdb"]).describe(["less"]))


def test_a_disk_of_one_member_of_a_set_can_be_left_out(guests: GuestLab, folder: str) -> None:
    one, two = [disk(folder, "a.raw", "vda"), disk(folder, "b.raw", "vdb")], [disk(folder, "c.raw", "vda")]
    with defined(guests, "wide", one), defined(guests, "slim", two), Link(guests.uri, SystemClock()) as link:
        for text in ("vdb", "wide:vdb"):
            whole = CombinedSource({"vm": make_source(link, guests, exclude_now=[text])})
            assert len(whole.describe(["vm:wide", "vm:slim"]).files) == 2
        with pytest.raises(WorkloadWrong, match="no disk vdc"):
            CombinedSource({"vm": make_source(link, guests, exclude_now=["vdc"])}).describe(["vm:wide", "vm:slim"])


def test_an_overlay_is_stored_as_the_guest_sees_it(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    base = os.path.join(folder, "base.qcow2")
    top = os.path.join(folder, "top.qcow2")
    make_disk(base, 4 * MIB, format="qcow2", fs=False)
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    chain = f"<backingStore type='file'><format type='qcow2'/><source file='{base}'/><backingStore/></backingStore>"
    with defined(guests, "thin", [LabDisk(dev="vda", path=top, format="qcow2", extra=chain)]):
        workload = source.describe(["thin"])
    assert [(file.path, file.representation) for file in workload.files] == [(top, Representation.GUEST)]
    assert f"lies on {base}" in said(workload)


def test_formats_are_never_probed(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    """A raw disk whose guest wrote a qcow2 header onto it is a raw disk."""
    image = os.path.join(folder, "disguised")
    make_disk(image, 4 * MIB, format="qcow2", fs=False)
    with defined(guests, "sly", [LabDisk(dev="vda", path=image, format="raw")]):
        (file,) = source.describe(["sly"]).files
    assert (file.format, file.representation) == ("raw", Representation.FILE)


def test_an_encrypted_disk_is_backed_up_as_it_is_and_said(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    secret = "<secret ephemeral='no' private='no'><usage type='volume'><volume>gc-luks</volume></usage></secret>"
    stored = guests.connection().secretDefineXML(secret, 0)
    image = disk(folder, "luks.raw", "vda")
    source_xml = (
        f"<source file='{image.path}'><encryption format='luks'>"
        f"<secret type='passphrase' uuid='{stored.UUIDString()}'/></encryption></source>"
    )
    try:
        with defined(guests, "safe", [LabDisk(dev="vda", source=source_xml)]):
            workload = source.describe(["safe"])
    finally:
        stored.undefine()
    assert workload.files[0].representation is Representation.FILE
    assert "disk vda is encrypted (luks) and stored as it is" in said(workload)


@pytest.mark.parametrize("protocol", ["iscsi", "nbd"])
def test_a_network_disk_without_a_driver_is_refused_with_the_way_out(
    guests: GuestLab, folder: str, protocol: str
) -> None:
    name = "iqn.2026-01.org.example:x/1" if protocol == "iscsi" else "x"
    remote = f"<source protocol='{protocol}' name='{name}'><host name='127.0.0.1' port='9'/></source>"
    disks = [disk(folder, "near.raw", "vda"), LabDisk(dev="vdb", kind="network", source=remote)]
    with defined(guests, "far", disks), Link(guests.uri, SystemClock()) as link:
        with pytest.raises(WorkloadWrong, match=rf"network disk \({protocol}\).*--exclude vdb"):
            make_source(link, guests).describe(["far"])
        assert len(make_source(link, guests, exclude=["vdb"]).describe(["far"]).files) == 1


def test_an_rbd_disk_is_named_for_the_rbd_driver(guests: GuestLab, source: LibvirtSource) -> None:
    remote = "<source protocol='rbd' name='pool/image'><host name='127.0.0.1' port='9'/></source>"
    with defined(guests, "ceph", [LabDisk(dev="vda", kind="network", source=remote)]):
        (file,) = source.describe(["ceph"]).files
    assert (file.path, file.representation) == ("rbd:pool/image", Representation.FILE)


def test_a_volume_of_a_pool_is_found_and_its_pool_is_stored(
    guests: GuestLab, source: LibvirtSource, folder: str
) -> None:
    pool_xml = f"<pool type='dir'><name>fast</name><target><path>{folder}</path></target></pool>"
    made = disk(folder, "volume.raw", "vda")
    pool = guests.connection().storagePoolDefineXML(pool_xml, 0)
    pool.create(0)
    try:
        volume = LabDisk(dev="vda", kind="volume", source="<source pool='fast' volume='volume.raw'/>")
        with defined(guests, "pooled", [volume]):
            workload = source.describe(["pooled"])
            assert source.missing(workload) == ()
    finally:
        pool.destroy()
        pool.undefine()
    assert [file.path for file in workload.files] == [made.path]
    assert b"<name>fast</name>" in workload.definitions["libvirt/pool/fast.xml"]
    assert source.missing(workload) == ("pooled needs pool fast",)


def test_networks_are_stored_and_missed(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    network = guests.connection().networkDefineXML("<network><name>lan</name><bridge name='gclan0'/></network>")
    link = "".join(f"<interface type='network'><source network='{name}'/></interface>" for name in ("lan", "nowhere"))
    try:
        with defined(guests, "linked", [disk(folder, "a.raw", "vda")], devices=link):
            workload = source.describe(["linked"])
    finally:
        network.undefine()
    assert b"gclan0" in workload.definitions["libvirt/network/lan.xml"]
    assert "network nowhere is not defined here" in said(workload)
    assert source.missing(workload) == ("linked needs network lan", "linked needs network nowhere")


def test_tpm_state_is_part_of_a_vm(tmp_path: Path) -> None:
    """Files alone: libvirt defines no TPM where swtpm is not installed."""
    state = tmp_path / "swtpm" / _UUID / "tpm2"
    state.mkdir(parents=True)
    for path in (tmp_path / "a.raw", state / "tpm2-00.permall", state / ".lock"):
        path.write_bytes(b"x")
    text = (
        f"<domain><name>trusted</name><uuid>{_UUID}</uuid><devices><disk><source file='{tmp_path}/a.raw'/>"
        "<target dev='vda'/></disk><tpm><backend type='{0}' version='2.0'/></tpm></devices></domain>"
    )

    def chosen(backend: str, exclusions: Exclusions | None = None) -> Chosen:
        domain = parse_domain(text.replace("{0}", backend))
        facts = Facts(name="trusted", uuid=_UUID, running=False, persistent=True, live=domain, inactive=domain)
        left_out = exclusions or Exclusions((), (), ["trusted"])
        return files_of([facts], left_out, _no_volume, stat_metadata, str(tmp_path / "swtpm"))

    assert [file.name for file in chosen("emulator").files] == ["a.raw", "tpm2-00.permall"]
    assert [file.name for file in chosen("passthrough").files] == ["a.raw"]
    without = Exclusions(["trusted:tpm"], (), ["trusted"])
    assert [file.name for file in chosen("emulator", without).files] == ["a.raw"]
    assert "its TPM is the host's own" in chosen("passthrough").notes[0]
    (state / "tpm2-00.permall").unlink()
    assert "its TPM has no state yet" in chosen("emulator").notes[0]


def _no_volume(pool: str, volume: str) -> str:
    raise AssertionError(f"{pool}/{volume} was asked for")


def test_metadata_of_snapshots_is_stored(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    with defined(guests, "history", [disk(folder, "a.qcow2", "vda", format="qcow2")]) as guest:
        guest.domain().snapshotCreateXML("<domainsnapshot><name>monday</name></domainsnapshot>", 0)
        definitions = source.describe(["history"]).definitions
    assert any(name.endswith("/snapshot/monday.xml") for name in definitions)


@pytest.mark.parametrize("name", ["web 1", "a&b<c>", "söhne", "-x", "vm:web", "x'\"y", "n" * 60, "%s {0}"])
def test_names_with_odd_characters(guests: GuestLab, source: LibvirtSource, folder: str, name: str) -> None:
    with defined(guests, name, [disk(folder, f"{name[:8]}.raw", "vda")]):
        workload = source.describe([name])
        assert workload.name == name
        assert name in source.list()
        quiesced = source.quiesce(workload, 20.0)
        assert source.thaw(quiesced), "it is off: nothing has to be held"


def test_names_of_disks_are_distinct(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    for sub in ("ds1", "ds2"):
        os.mkdir(os.path.join(folder, sub))
    disks = [disk(folder, f"{sub}/disk.raw", dev) for sub, dev in (("ds1", "vda"), ("ds2", "vdb"))]
    with defined(guests, "twins", disks):
        assert [file.name for file in source.describe(["twins"]).files] == ["ds1_disk.raw", "ds2_disk.raw"]


def test_several_vms_are_one_workload_and_a_shared_disk_is_taken_once(
    guests: GuestLab, source: LibvirtSource, folder: str
) -> None:
    shared = disk(folder, "shared.raw", "vdb", extra="<shareable/>")
    with (
        defined(guests, "node1", [disk(folder, "n1.raw", "vda"), shared]),
        defined(guests, "node2", [disk(folder, "n2.raw", "vda"), shared]),
    ):
        workload = source.describe(["node2", "node1"])
        assert workload == source.describe(["node1", "node2"])
    assert sorted(file.name for file in workload.files) == ["n1.raw", "n2.raw", "shared.raw"]
    assert "belongs to another VM as well" in said(workload)
    assert "is shared: other VMs may write" in said(workload)


def test_a_transient_vm_is_backed_up_and_said(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    guest = Guest(guests, "fleeting", [disk(folder, "a.raw", "vda")], options={"agent": "no"})
    os.makedirs(guest.folder)
    guests.connection().createXML(guest.xml(), 0)
    try:
        workload = source.describe(["fleeting"])
        uuid = guest.domain().UUIDString()
        assert "fleeting is transient" in said(workload)
        assert f"libvirt/{uuid}/live.xml" in workload.definitions
    finally:
        guest.destroy()
    with pytest.raises(DomainUnknown, match="fleeting"):
        source.describe(["fleeting"])
    source.define(workload)
    assert guest.domain().isPersistent()
    guest.destroy()


# --- bad input ----------------------------------------------------------------------------------------


def test_what_is_not_there(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    with pytest.raises(DomainUnknown, match="has no domain nobody"):
        source.describe(["nobody"])
    with pytest.raises(WorkloadWrong, match="names no virtual machine"):
        source.describe([])
    gone, bent = os.path.join(folder, "gone.raw"), folder
    with defined(guests, "hollow", [LabDisk(dev="vda", path=gone)]), pytest.raises(PathMissing, match=r"gone\.raw"):
        source.describe(["hollow"])
    odd = pytest.raises(PathUnreadable, match="neither a file nor a block device")
    with defined(guests, "bent", [LabDisk(dev="vda", path=bent)]), odd:
        source.describe(["bent"])


def test_libvirtd_down_and_back(guests: GuestLab, folder: str) -> None:
    quick = Link(guests.uri, SystemClock(), patience=0.5)
    with defined(guests, "patient", [disk(folder, "a.raw", "vda")]), quick as link:
        source = make_source(link, guests)
        before = source.describe(["patient"])
        guests.kill_daemon(stay_down=True)
        try:
            with pytest.raises(HypervisorDown, match="cannot be reached"):
                source.describe(["patient"])
        finally:
            guests.start_daemon()
        assert source.describe(["patient"]).files == before.files
        guests.kill_daemon()
        assert source.describe(["patient"]).files == before.files, "over a new connection, unasked"


def test_an_address_that_nobody_serves() -> None:
    pytest.importorskip("libvirt", reason="needs libvirt's Python binding: scripts/test-lab.sh kvm")
    nowhere = Link("qemu+unix:///system?socket=/nowhere", SystemClock(), patience=0.1)
    with nowhere as link, pytest.raises(HypervisorDown):
        LibvirtSource(link, SystemClock()).list()


# --- back ---------------------------------------------------------------------------------------------


def test_a_vm_is_defined_again_as_it_was(guests: GuestLab, source: LibvirtSource, folder: str) -> None:
    with defined(guests, "phoenix", [disk(folder, "a.raw", "vda")]) as guest:
        workload = source.describe(["phoenix"])
        uuid = guest.domain().UUIDString()
        guest.domain().undefine()
        source.define(workload)
        assert guest.domain().UUIDString() == uuid
        again = source.describe(["phoenix"])
        assert (again.id, again.files) == (workload.id, workload.files)
        assert machines(again) == machines(workload)
        source.define(workload)  # again changes nothing


def test_a_definition_that_cannot_be_is_refused_in_one_sentence(
    guests: GuestLab, source: LibvirtSource, folder: str
) -> None:
    with defined(guests, "taken", [disk(folder, "a.raw", "vda")]) as guest:
        text = guest.domain().XMLDesc(2).replace(guest.domain().UUIDString(), "0ee1e1ff-7a3e-4b9f-9c1e-3a33f4a6e003")
        with pytest.raises(DefineRefused, match="taken cannot be defined"):
            source.define_xml(text)
    with pytest.raises(DefineRefused, match="not XML"):
        source.define_xml("<domain>")
