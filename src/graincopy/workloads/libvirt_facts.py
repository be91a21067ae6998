"""What libvirt says about one VM (stage 2): its XML, running and at rest, and the XML of what it needs.

Asked in one go, with the VM's secrets (a VNC password belongs to the definition), and kept as the definitions of a
restore point under names that no other VM has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from graincopy.hypervisor.domain_xml import Domain, parse_domain
from graincopy.hypervisor.link import binding
from graincopy.model.workload import Workload

_ROOM = "libvirt"  # every definition begins with it


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """One VM. ``live`` is what runs, or would: of a VM that is off it is ``inactive``."""

    name: str
    uuid: str
    running: bool
    persistent: bool
    live: Domain
    inactive: Domain
    texts: Mapping[str, str] = msgspec.field(default_factory=dict)  # of the VM itself
    needs: Mapping[str, str] = msgspec.field(default_factory=dict)  # of networks and pools
    notes: tuple[str, ...] = ()


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One VM in a list. ``agent``: connected, absent (no channel, or nobody on it), or unknown of a VM that is off."""

    name: str
    uuid: str
    running: bool
    persistent: bool
    agent: str
    disks: tuple[str, ...]  # target devs, CD-ROMs and floppies not among them


def machine_list(domains: Iterable[Any]) -> tuple[Machine, ...]:
    """``domains`` (virDomains) by name; one that went away meanwhile is not in it."""
    libvirt = binding()
    found = []
    for domain in domains:
        try:
            found.append(_machine(domain))
        except libvirt.libvirtError as failure:
            if failure.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
    return tuple(sorted(found, key=lambda one: one.name))


def _machine(domain: Any) -> Machine:
    says, running = parse_domain(domain.XMLDesc(0)), bool(domain.isActive())
    return Machine(
        name=says.name,
        uuid=says.uuid,
        running=running,
        persistent=bool(domain.isPersistent()),
        agent=("connected" if says.agent_connected else "absent") if running else "unknown",
        disks=tuple(disk.dev for disk in says.disks if disk.device not in ("cdrom", "floppy")),
    )


def look(domain: Any) -> Facts:
    """Everything about ``domain`` (a virDomain). Raises ValueError when its XML is odd; libvirtError."""
    libvirt = binding()
    secret = libvirt.VIR_DOMAIN_XML_SECURE
    running = bool(domain.isActive())
    texts = {"inactive.xml": domain.XMLDesc(secret | libvirt.VIR_DOMAIN_XML_INACTIVE)}
    if running:
        texts["live.xml"] = domain.XMLDesc(secret)
    for snapshot in domain.listAllSnapshots(0):
        texts[f"snapshot/{snapshot.getName()}.xml"] = snapshot.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
    for checkpoint in domain.listAllCheckpoints(0):
        texts[f"checkpoint/{checkpoint.getName()}.xml"] = checkpoint.getXMLDesc(
            libvirt.VIR_DOMAIN_CHECKPOINT_XML_SECURE
        )
    inactive = parse_domain(texts["inactive.xml"])
    live = parse_domain(texts["live.xml"]) if running else inactive
    needs, notes = _needs(domain.connect(), live)
    if not running and domain.hasManagedSaveImage(0):
        notes += ("its memory is saved (virsh managedsave) and not in the backup: its disks are as after a power cut",)
    return Facts(
        name=domain.name(),
        uuid=domain.UUIDString(),
        running=running,
        persistent=bool(domain.isPersistent()),
        live=live,
        inactive=inactive,
        texts=texts,
        needs=needs,
        notes=notes,
    )


def _needs(connection: Any, domain: Domain) -> tuple[dict[str, str], tuple[str, ...]]:
    """XML of the networks and pools that ``domain`` names, and a note for each that is not there."""
    found: dict[str, str] = {}
    notes = []
    for name in domain.networks:
        text = _xml_of(lambda name=name: connection.networkLookupByName(name), inactive=1)
        found |= {f"network/{name}.xml": text} if text else {}
        notes += [] if text else [f"its network {name} is not defined here; its definition is not stored"]
    for name in domain.pools:
        text = _xml_of(lambda name=name: connection.storagePoolLookupByName(name), inactive=1)
        found |= {f"pool/{name}.xml": text} if text else {}
        notes += [] if text else [f"its storage pool {name} is not defined here; its definition is not stored"]
    return found, tuple(notes)


def _xml_of(find: Any, inactive: int) -> str:
    """The XML of what ``find`` answers, as it is defined; as it is when it is only transient; "" when not there."""
    libvirt = binding()
    absent = (libvirt.VIR_ERR_NO_NETWORK, libvirt.VIR_ERR_NO_STORAGE_POOL)
    try:
        thing = find()
    except libvirt.libvirtError as failure:
        if failure.get_error_code() in absent:
            return ""
        raise
    return str(thing.XMLDesc(inactive if thing.isPersistent() else 0))


def volume_path(connection: Any, pool: str, volume: str) -> str:
    """Where a volume of a storage pool lies, as libvirt says."""
    return str(connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())


def definition_name(uuid: str, what: str) -> str:
    """Name of a definition of the VM ``uuid``."""
    return f"{_ROOM}/{uuid}/{what}"


def definitions(facts: Facts) -> dict[str, bytes]:
    """What a restore point keeps of the VM besides its files."""
    own = {definition_name(facts.uuid, what): text.encode() for what, text in facts.texts.items()}
    return own | {f"{_ROOM}/{what}": text.encode() for what, text in facts.needs.items()}


def uuids(names: Iterable[str]) -> tuple[str, ...]:
    """UUIDs of the VMs whose definitions are among ``names``, in order."""
    parts = [name.split("/") for name in names]
    return tuple(sorted(part[1] for part in parts if part[0] == _ROOM and part[2:] == ["inactive.xml"]))


def machines(workload: Workload) -> dict[str, Domain]:
    """The VMs in ``workload`` as they were defined when it was described, by UUID, in order. Raises ValueError."""
    return {
        uuid: parse_domain(workload.definitions[definition_name(uuid, "inactive.xml")].decode())
        for uuid in uuids(workload.definitions)
    }
