"""Below stages R and V: whose a domain is. What graincopy starts carries a tag in its metadata, as targets do.

A tag outlives the process that wrote it: whoever comes later can tell what the domain is for, take the work up again,
or take the domain away. https://libvirt.org/formatdomain.html#general-metadata
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import msgspec

from graincopy.hypervisor.domain_xml import parse_xml
from graincopy.hypervisor.link import Link, binding
from graincopy.model.snapshot import Owner

NAMESPACE = "urn:graincopy:machine:1"
TRIAL, INSTANT = "trial", "instant"


class MachineTag(msgspec.Struct, frozen=True, kw_only=True):
    """What a domain of ours is for. ``folder`` holds what was made for it and goes with it."""

    role: str  # TRIAL or INSTANT
    run: str
    point: str
    repository: str
    owner: Owner
    folder: str = ""
    restore: str = ""  # INSTANT: the restore record that pins the point
    disks: dict[str, str] = {}  # INSTANT: target dev → NAME of the disk


class OwnedMachine(msgspec.Struct, frozen=True, kw_only=True):
    """A domain that carries a tag."""

    uuid: str
    name: str
    tag: MachineTag


def write_tag(text: str, tag: MachineTag | None) -> str:
    """The domain XML ``text`` with ``tag`` in its metadata, or with none. Raises ValueError."""
    root = parse_xml(text)
    metadata = root.find("metadata")
    if metadata is None:
        metadata = ET.Element("metadata")
        name = root.find("name")
        root.insert(0 if name is None else list(root).index(name) + 1, metadata)
    for old in metadata.findall(f"{{{NAMESPACE}}}machine"):
        metadata.remove(old)
    if tag is not None:
        # Declared here and not, as ElementTree would, at the root: libvirt keeps what is declared there for ever.
        element = ET.SubElement(metadata, "machine", {"xmlns": NAMESPACE})
        element.text = msgspec.json.encode(tag).decode()
    return ET.tostring(root, encoding="unicode")


def read_tag(text: str) -> MachineTag | None:
    """The tag in the domain XML ``text``; None without one, or with one that cannot be read: then it is not ours."""
    try:
        found = parse_xml(text).findtext(f"metadata/{{{NAMESPACE}}}machine")
        return msgspec.json.decode(found, type=MachineTag) if found else None
    except (ValueError, msgspec.MsgspecError):
        return None


def list_owned(link: Link) -> tuple[OwnedMachine, ...]:
    """Every domain that carries a tag of ours. Raises as Link.call."""

    def find(connection: Any) -> tuple[OwnedMachine, ...]:
        found = []
        for domain in connection.listAllDomains(0):
            tag = read_tag(domain.XMLDesc(0))
            if tag is not None:
                found.append(OwnedMachine(uuid=domain.UUIDString(), name=domain.name(), tag=tag))
        return tuple(found)

    return link.call(find)


def drop_tag(link: Link, uuid: str) -> None:
    """Take the tag off a domain, as it is defined and as it runs. May be repeated."""
    libvirt = binding()

    def act(domain: Any) -> None:
        live = libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else 0
        flags = live | (libvirt.VIR_DOMAIN_AFFECT_CONFIG if domain.isPersistent() else 0)
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, None, NAMESPACE, flags)

    link.domain(uuid, act)
