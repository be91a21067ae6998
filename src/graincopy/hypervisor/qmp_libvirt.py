"""Below stages 4 to 7: the monitor of a QEMU that libvirt manages, through libvirt.

libvirt's own pull-mode backups are not used: with QEMU before 10 their copy-before-write has no way to give up the
snapshot instead of the guest's write when the scratch file is full (docs/decisions/0007). libvirt marks a domain whose
monitor was used as tainted; nothing else comes of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import ParseError

from graincopy.core.clock import Clock
from graincopy.core.errors import DomainUnknown, GraincopyError, HypervisorDown, ToolMissing
from graincopy.hypervisor.domain_xml import parse_xml
from graincopy.hypervisor.link import Link, binding
from graincopy.hypervisor.qmp import PATIENCE, Commands, QmpRefused

_PAUSE = 0.01  # seconds between two looks for what libvirt hears of and we do not


class LibvirtMonitor(Commands):
    """The monitor of the active domain ``uuid``; a connection of its own is not made."""

    def __init__(self, link: Link, uuid: str, clock: Clock) -> None:
        """Raises ConnectionRefusedError when it is not active, HypervisorDown when nobody can tell."""
        self._link, self._uuid, self._clock = link, uuid, clock
        try:
            active = link.call(lambda connection: connection.lookupByUUIDString(uuid).isActive(), domain=uuid)
        except DomainUnknown:
            active = False
        if not active:
            raise ConnectionRefusedError(f"the domain {uuid} is not active")

    def run(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What ``command`` returns. Raises QmpRefused; GraincopyError when libvirt could not ask."""
        text = json.dumps({"execute": command, **({"arguments": dict(arguments)} if arguments else {})})
        answer = json.loads(
            self._link.call(lambda connection: self._ask(connection, text), domain=self._uuid, again=False)
        )
        if "error" in answer:
            error = answer["error"]
            raise QmpRefused(command, str(error.get("desc", error)).rstrip("."), str(error.get("class", "")))
        return answer.get("return")

    def _ask(self, connection: Any, text: str) -> str:
        import libvirt_qemu

        return str(libvirt_qemu.qemuMonitorCommand(connection.lookupByUUIDString(self._uuid), text, 0))

    def wait(self, event: str, about: str) -> None:
        """Until the export ``about`` is gone: libvirt keeps the events to itself. Raises TimeoutError."""
        until = self._clock.monotonic() + PATIENCE
        while any(one["id"] == about for one in self.run("query-block-exports")):
            if self._clock.monotonic() > until:
                raise TimeoutError(f"{about} is still exported")
            self._clock.sleep(_PAUSE)

    def close(self) -> None:
        """The connection to libvirt is others' too, and stays."""


class Domains:
    """The active domains of one libvirt."""

    def __init__(self, link: Link, clock: Clock) -> None:
        self._link, self._clock = link, clock

    def with_disk(self, path: str) -> tuple[str, ...]:
        """UUIDs of the active domains that name the real ``path`` as a disk; none where there is no libvirt."""
        try:
            texts = self._link.call(_texts)
        except (HypervisorDown, ToolMissing):
            return ()
        return tuple(uuid for uuid, text in texts if _names(text, path))

    def monitor(self, uuid: str) -> LibvirtMonitor:
        """Raises ConnectionRefusedError when that domain is not active."""
        return LibvirtMonitor(self._link, uuid, self._clock)


def _texts(connection: Any) -> list[tuple[str, str]]:
    libvirt = binding()
    found = []
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        try:
            found.append((domain.UUIDString(), domain.XMLDesc()))
        except libvirt.libvirtError:
            continue  # it ended just now
    return found


def _names(text: str, path: str) -> bool:
    try:
        root = parse_xml(text)
    except (ParseError, GraincopyError, ValueError):
        return False
    sources = (disk.find("source") for disk in root.iterfind("devices/disk"))
    named = (source.get("file") or source.get("dev") for source in sources if source is not None)
    return any(name and os.path.realpath(name) == path for name in named)
