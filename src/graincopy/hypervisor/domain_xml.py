"""Stage 2, below the ``vm`` workload: what a domain's XML says, as frozen values. Pure: text in, values out.

The format is https://libvirt.org/formatdomain.html. Nothing is probed and nothing is guessed: a format that the XML
does not state is libvirt's default, ``raw``. Document types are refused, so no entity can be declared.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from xml.parsers import expat

import msgspec

AGENT_CHANNEL = "org.qemu.guest_agent.0"
_PLACE = {"file": "file", "block": "dev", "dir": "dir", "vhostuser": "path"}  # kind of source → attribute of its path


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where one layer of a disk lies. ``kind`` is libvirt's type of source; "" is an empty drive."""

    kind: str
    format: str = "raw"
    path: str = ""  # of a file, block device or directory
    pool: str = ""  # of a volume in a storage pool
    volume: str = ""
    protocol: str = ""  # of a network disk
    name: str = ""
    encryption: str = ""  # "luks", when libvirt holds the secret


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """One ``<disk>``. ``chain`` are the layers below ``source``, nearest first, as far as libvirt states them."""

    dev: str  # target dev, as vda: unique in the domain and stable
    device: str  # disk, cdrom, floppy, lun
    source: Source
    chain: tuple[Source, ...] = ()
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    serial: str = ""


class Nvram(msgspec.Struct, frozen=True, kw_only=True):
    """Firmware variables. ``source`` is None while libvirt has not chosen a place yet."""

    source: Source | None
    template: str = ""


class Tpm(msgspec.Struct, frozen=True, kw_only=True):
    """A TPM. ``state`` is the directory that the XML states; "" is libvirt's own."""

    backend: str  # emulator, passthrough, external
    version: str = "2.0"
    state: str = ""


class Domain(msgspec.Struct, frozen=True, kw_only=True):
    """What graincopy wants to know of a virtual machine."""

    name: str
    uuid: str
    disks: tuple[Disk, ...] = ()
    nvram: Nvram | None = None
    tpms: tuple[Tpm, ...] = ()
    networks: tuple[str, ...] = ()
    macs: tuple[str, ...] = ()
    agent: bool = False  # it has a channel for a guest agent
    agent_connected: bool = False  # and the agent in the guest has opened it

    @property
    def pools(self) -> tuple[str, ...]:
        """Storage pools that its disks name, each once."""
        layers = [layer for disk in self.disks for layer in (disk.source, *disk.chain)]
        return tuple({layer.pool: None for layer in layers if layer.pool})


def parse_xml(text: str) -> ET.Element:
    """The root element. Raises ValueError when it is no XML, or declares a document type."""
    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler = _refuse_doctype
    try:
        guard.Parse(text.encode(), True)
        return ET.fromstring(text)
    except (expat.ExpatError, ET.ParseError) as failure:
        raise ValueError(f"it is not XML: {failure}") from failure


def _refuse_doctype(*_: object) -> None:
    raise ValueError("it declares a document type")


def parse_domain(text: str) -> Domain:
    """What the domain XML ``text`` says. Raises ValueError."""
    root = parse_xml(text)
    if root.tag != "domain":
        raise ValueError(f"it describes a {root.tag}, not a domain")
    name, uuid = root.findtext("name"), root.findtext("uuid")
    if not name:
        raise ValueError("it names no domain")
    interfaces = root.findall("devices/interface")
    networks = [found.get("network", "") for one in interfaces for found in one.findall("source")]
    macs = [found.get("address", "") for one in interfaces for found in one.findall("mac")]
    channels = [one for one in root.findall("devices/channel/target") if one.get("name") == AGENT_CHANNEL]
    return Domain(
        name=name,
        uuid=(uuid or "").strip(),
        disks=tuple(_disk(one) for one in root.findall("devices/disk")),
        nvram=_nvram(root),
        tpms=tuple(_tpm(one) for one in root.findall("devices/tpm/backend")),
        networks=tuple({name: None for name in networks if name}),
        macs=tuple(mac for mac in macs if mac),
        agent=bool(channels),
        agent_connected=any(one.get("state") == "connected" for one in channels),
    )


def _disk(element: ET.Element) -> Disk:
    target = element.find("target")
    if target is None or not target.get("dev"):
        raise ValueError("a disk of it has no target")
    driver = element.find("driver")
    stated = "raw" if driver is None else driver.get("type", "raw")
    return Disk(
        dev=target.get("dev", ""),
        device=element.get("device", "disk"),
        source=_source(element, element.get("type", "file"), stated),
        chain=_chain(element),
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        serial=element.findtext("serial", ""),
    )


def _chain(element: ET.Element) -> tuple[Source, ...]:
    """The layers below, down to the empty ``<backingStore/>`` that ends a chain which libvirt has looked at."""
    layers = []
    below = element.find("backingStore")
    while below is not None and below.get("type"):
        stated = below.find("format")
        layers.append(_source(below, below.get("type", "file"), "raw" if stated is None else stated.get("type", "raw")))
        below = below.find("backingStore")
    return tuple(layers)


def _source(element: ET.Element, kind: str, stated: str) -> Source:
    source = element.find("source")
    if source is None:
        return Source(kind="", format=stated)
    encryption = source.find("encryption")
    if encryption is None:
        encryption = element.find("encryption")  # the place of older libvirt
    return Source(
        kind=kind,
        format=stated,
        path=source.get(_PLACE[kind], "") if kind in _PLACE else "",
        pool=source.get("pool", "") if kind == "volume" else "",
        volume=source.get("volume", "") if kind == "volume" else "",
        protocol=source.get("protocol", "") if kind == "network" else "",
        name=source.get("name", "") if kind == "network" else "",
        encryption="" if encryption is None else encryption.get("format", "default"),
    )


def _nvram(root: ET.Element) -> Nvram | None:
    element = root.find("os/nvram")
    if element is None:
        return None
    stated, template = element.get("format", "raw"), element.get("template", "")
    if element.get("type"):
        return Nvram(source=_source(element, element.get("type", ""), stated), template=template)
    path = (element.text or "").strip()
    return Nvram(source=Source(kind="file", format=stated, path=path) if path else None, template=template)


def _tpm(backend: ET.Element) -> Tpm:
    source = backend.find("source")
    stated = source.get("path", "") if source is not None and source.get("type") in ("dir", "file") else ""
    return Tpm(backend=backend.get("type", ""), version=backend.get("version", "2.0"), state=stated)
