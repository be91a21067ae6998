"""Below stages R and V: the XML of a domain that runs off a live view. Pure: text in, text out.

Disks are shown to it over NBD, at a unix socket, and are never copied first. Formats are those of
https://libvirt.org/formatdomain.html. A read that fails stops the virtual CPUs (``rerror_policy``) and is asked again
when they go on: nothing is lost. NBD's own ``reconnect`` is left alone: libvirt 9.0 does not pass it on to QEMU, and
requests that wait inside QEMU would hold up everything there that drains a disk.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping

import msgspec

from graincopy.hypervisor.domain_xml import parse_xml

_SPICE = ("channel[@type='spicevmc']", "redirdev[@type='spicevmc']", "smartcard[@type='spicevmc']", "audio")
_HOST = ("filesystem", "shmem", "redirdev[@type='tcp']", "vsock", "memory", "graphics", "crypto")


class Export(msgspec.Struct, frozen=True):
    """An NBD export of ours: what ``format`` its bytes have is stated, never probed."""

    socket: str
    name: str
    format: str = "raw"


def show_disks(text: str, exports: Mapping[str, Export]) -> str:
    """``text`` with the disks at these target devs read from, and written to, an export each. Raises ValueError."""
    root = parse_xml(text)
    for disk in root.findall("devices/disk"):
        export = exports.get(_dev(disk))
        if export is not None:
            disk.set("type", "network")
            driver = _replace_source(disk, export.format, [_source(export)])
            for name in ("cache", "io", "copy_on_read"):
                driver.attrib.pop(name, None)  # said of the file that it was
    return ET.tostring(root, encoding="unicode")


def stack_on(text: str, exports: Mapping[str, Export], paths: Mapping[str, str]) -> str:
    """``text`` with the disks at these target devs as qcow2 files at ``paths``, on top of an export each.

    Raises ValueError.
    """
    root = parse_xml(text)
    for disk in root.findall("devices/disk"):
        export = exports.get(_dev(disk))
        if export is not None:
            disk.set("type", "file")
            below = ET.Element("backingStore", {"type": "network"})
            ET.SubElement(below, "format", {"type": export.format})
            below.append(_source(export))
            ET.SubElement(below, "backingStore")
            _replace_source(disk, "qcow2", [ET.Element("source", {"file": paths[_dev(disk)]}), below])
    return ET.tostring(root, encoding="unicode")


def stand_alone(text: str, before: str, devs: Collection[str]) -> str:
    """``text`` with nothing below these disks, and their policies on errors as in ``before``. Raises ValueError."""
    root = parse_xml(text)
    old = {_dev(disk): disk.find("driver") for disk in parse_xml(before).findall("devices/disk")}
    for disk in root.findall("devices/disk"):
        driver = disk.find("driver")
        if _dev(disk) not in devs or driver is None:
            continue
        for below in disk.findall("backingStore"):
            disk.remove(below)
        ET.SubElement(disk, "backingStore")
        was = old.get(_dev(disk))
        for name in ("error_policy", "rerror_policy"):
            driver.attrib.pop(name, None)
            if was is not None and was.get(name):
                driver.set(name, was.get(name, ""))
    return ET.tostring(root, encoding="unicode")


def isolate(text: str) -> str:
    """``text`` for a trial: its networks unplugged, nothing of the host reachable, nobody listened to, ends for good.

    Every network card stays, without a link, behind QEMU's own user-mode network. Raises ValueError.
    """
    root = parse_xml(text)
    devices = root.find("devices")
    if devices is not None:
        for interface in devices.findall("interface"):
            _unplug(interface)
        for tag in (*_SPICE, *_HOST):
            for element in devices.findall(tag):
                devices.remove(element)
        for model in devices.findall("video/model[@type='qxl']"):
            model.attrib.clear()
            model.set("type", "vga")
        for channel in devices.findall("channel"):
            if channel.get("type") != "unix":
                devices.remove(channel)
    for event in ("on_poweroff", "on_reboot", "on_crash"):
        found = root.find(event)
        (ET.SubElement(root, event) if found is None else found).text = "destroy"
    return ET.tostring(root, encoding="unicode")


def with_console(text: str) -> str:
    """``text`` with a serial port, where it has none. Raises ValueError."""
    root = parse_xml(text)
    devices = root.find("devices")
    if devices is not None and devices.find("serial") is None and devices.find("console") is None:
        ET.SubElement(devices, "serial", {"type": "pty"})
    return ET.tostring(root, encoding="unicode")


def has_screen(text: str) -> bool:
    """Whether the domain has a display that can be looked at. Raises ValueError."""
    models = parse_xml(text).findall("devices/video/model")
    return any(model.get("type") != "none" for model in models)


def _unplug(interface: ET.Element) -> None:
    kept = [one for one in interface if one.tag in ("mac", "model", "address", "rom", "boot", "alias")]
    if interface.get("type") == "hostdev":
        kept = [one for one in kept if one.tag == "mac"]  # its address belongs to a device of another kind
    interface.clear()
    interface.set("type", "user")
    interface.extend(kept)
    ET.SubElement(interface, "link", {"state": "down"})


def _source(export: Export) -> ET.Element:
    source = ET.Element("source", {"protocol": "nbd", "name": export.name})
    ET.SubElement(source, "host", {"transport": "unix", "socket": export.socket})
    return source


def _replace_source(disk: ET.Element, kind: str, elements: list[ET.Element]) -> ET.Element:
    """``elements`` instead of what the disk lay on; its driver element.

    An encrypted disk keeps its secret: the export's bytes are its.
    """
    old = disk.find("source")
    kept = [] if old is None else old.findall("encryption")
    for tag in ("source", "backingStore", "mirror", "transient"):
        for one in disk.findall(tag):
            disk.remove(one)
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", {"name": "qemu"})
        disk.insert(0, driver)
    driver.set("type", kind)
    driver.set("error_policy", "stop")
    driver.set("rerror_policy", "stop")
    holder = elements[-1] if elements[-1].tag == "source" else elements[-1].find("source")
    if holder is not None:
        holder.extend(kept)
    at = list(disk).index(driver) + 1
    for offset, element in enumerate(elements):
        disk.insert(at + offset, element)
    return driver


def _dev(disk: ET.Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")
