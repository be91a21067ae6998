"""Stage R, below a restore under a new name: a domain's XML rewritten for the copy. Pure: text in, text out.

The copy must be able to run beside the original, so whatever identifies one is new and whatever only one can have on a
host is dropped: https://libvirt.org/formatdomain.html.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping

import msgspec

from graincopy.core.clock import Chance
from graincopy.hypervisor.domain_xml import parse_xml


class NewPlace(msgspec.Struct, frozen=True):
    """Where a restored disk lies: a file or (``block``) a device, in ``format``, with nothing below it."""

    path: str
    format: str = "raw"
    block: bool = False


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """What the copy is to be: ``disks`` by target dev; ``mac`` gives a new address for an old one."""

    name: str
    uuid: str
    disks: Mapping[str, NewPlace]
    mac: Callable[[str], str]
    nvram: str | None = None  # None: libvirt makes new firmware variables from the template
    networks: bool = True  # False: every network link is cut


class Copied(msgspec.Struct, frozen=True):
    """The XML of the copy, and what is not as it was, one clause each."""

    xml: str
    changes: tuple[str, ...] = msgspec.field(default=())


def new_mac(old: str, chance: Chance) -> str:
    """An address with the vendor part of ``old`` (QEMU's where there is none) and a part by chance."""
    vendor = old.split(":")[:3] if old.count(":") == 5 else ["52", "54", "00"]
    return ":".join([*vendor, *(f"{byte:02x}" for byte in chance.token(3))])


def new_uuid(chance: Chance) -> str:
    """A random UUID (RFC 9562, version 4)."""
    raw = bytearray(chance.token(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def copy_domain(text: str, copy: Copy) -> Copied:
    """The domain XML ``text`` (inactive) for ``copy``. Raises ValueError."""
    root = parse_xml(text)
    changes: list[str] = []
    _identify(root, copy)
    devices = root.find("devices")
    if devices is not None:
        _place_disks(devices, copy, changes)
        _place_interfaces(devices, copy, changes)
        _drop_host_things(devices, changes)
    _place_nvram(root, copy)
    return Copied(ET.tostring(root, encoding="unicode"), tuple(changes))


def _identify(root: ET.Element, copy: Copy) -> None:
    root.attrib.pop("id", None)
    _child(root, "name").text = copy.name
    _child(root, "uuid").text = copy.uuid
    for entry in root.findall("sysinfo/system/entry[@name='uuid']"):
        entry.text = copy.uuid  # libvirt refuses another one than the domain's
    generation = root.find("genid")
    if generation is not None:
        generation.text = None  # libvirt makes a new one: the guest must know that it is a copy
    for label in root.findall("seclabel[@type='dynamic']"):
        root.remove(label)


def _place_disks(devices: ET.Element, copy: Copy, changes: list[str]) -> None:
    for disk in devices.findall("disk"):
        target = disk.find("target")
        dev = "" if target is None else target.get("dev", "")
        if dev in copy.disks:
            _place_disk(disk, copy.disks[dev])
        elif disk.get("device") in ("cdrom", "floppy"):
            _remove(disk, "source", "backingStore")
            disk.set("type", "file")
            changes.append(f"drive {dev} is empty")
        else:
            devices.remove(disk)
            changes.append(f"disk {dev} was not restored and is left out")


def _place_disk(disk: ET.Element, place: NewPlace) -> None:
    old = disk.find("source")
    kept = [] if old is None else [one for one in old if one.tag == "encryption"]
    _remove(disk, "source", "backingStore", "mirror", "transient")
    disk.set("type", "block" if place.block else "file")
    source = ET.Element("source", {"dev" if place.block else "file": place.path})
    source.extend(kept)
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", {"name": "qemu"})
        disk.insert(0, driver)
    driver.set("type", place.format)
    disk.insert(list(disk).index(driver) + 1, source)


def _place_interfaces(devices: ET.Element, copy: Copy, changes: list[str]) -> None:
    for interface in devices.findall("interface"):
        mac = _child(interface, "mac")
        mac.set("address", copy.mac(mac.get("address", "")))
        _remove(interface, "target")  # the host's end
        if not copy.networks:
            _child(interface, "link").set("state", "down")
    if not copy.networks and devices.find("interface") is not None:
        changes.append("its network links are cut")


def _drop_host_things(devices: ET.Element, changes: list[str]) -> None:
    """Passed-through devices, sockets, console files, fixed ports: the original holds them."""
    for hostdev in devices.findall("hostdev"):
        devices.remove(hostdev)
        changes.append(f"a {hostdev.get('type', 'host')} device of the host is left out")
    for channel in devices.findall("channel[@type='unix']"):
        _remove(channel, "source")
    for tag in ("serial", "console", "parallel"):
        for port in devices.findall(tag):
            if port.get("type") != "pty":
                changes.append(f"{tag} port goes to a terminal of its own instead of a {port.get('type')}")
            port.set("type", "pty")
            port.attrib.pop("tty", None)
            _remove(port, "source", "log", "protocol")
    for graphics in devices.findall("graphics"):
        for name in ("port", "tlsPort", "websocket", "socket"):
            graphics.attrib.pop(name, None)
        graphics.set("autoport", "yes")
        for listen in graphics.findall("listen[@type='socket']"):
            graphics.remove(listen)
    for state in devices.findall("tpm/backend/source"):
        for backend in devices.findall("tpm/backend"):
            if state in list(backend):
                backend.remove(state)


def _place_nvram(root: ET.Element, copy: Copy) -> None:
    nvram = root.find("os/nvram")
    if nvram is None:
        return
    _remove(nvram, "source")
    nvram.attrib.pop("type", None)
    nvram.text = copy.nvram


def _child(element: ET.Element, tag: str) -> ET.Element:
    found = element.find(tag)
    return ET.SubElement(element, tag) if found is None else found


def _remove(element: ET.Element, *tags: str) -> None:
    for tag in tags:
        for one in element.findall(tag):
            element.remove(one)
