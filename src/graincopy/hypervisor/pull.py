"""Below stage R, the instant recovery: what a running guest reads from a view is pulled to where it writes already.

Its disk is a qcow2 file at the final place, on top of our read-only export. What the guest writes lies there at once;
QEMU's block-stream job copies the rest from below, and then lets the export go. Two ways to ask for it: libvirt, and
the plain machine protocol. https://www.qemu.org/docs/master/interop/live-block-operations.html#live-block-streaming
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from graincopy.core.errors import GraincopyError, OutputUnfit, ToolMissing
from graincopy.hypervisor.daemon import INSTALL
from graincopy.hypervisor.domain_xml import parse_domain
from graincopy.hypervisor.link import Link, binding
from graincopy.hypervisor.qmp import Monitor, QmpRefused
from graincopy.hypervisor.shown_disks import Export

_PATIENCE = 120.0  # seconds for qemu-img


class Pull(msgspec.Struct, frozen=True):
    """How far one disk is: ``done`` of ``total``, in QEMU's own measure; ``ended``: nothing is below it any more."""

    done: int
    total: int
    running: bool
    ended: bool


class Puller(Protocol):
    """Whoever can pull the disks of one machine, each by the name that it has there."""

    def begin(self, disk: str) -> None:
        """Let the job run, if it does not. Raises GraincopyError, OSError or QmpRefused when that is refused."""

    def look(self, disk: str) -> Pull:
        """How far it is."""

    def revive(self) -> bool:
        """Let a machine go on that stands still because a disk could not be read; whether it did."""


class LibvirtPuller:
    """Disks by target dev, of the domain ``uuid``."""

    def __init__(self, link: Link, uuid: str) -> None:
        self._link, self._uuid = link, uuid

    def begin(self, disk: str) -> None:
        def act(domain: Any) -> None:
            if not domain.blockJobInfo(disk, 0):
                domain.blockPull(disk, 0, 0)

        self._link.domain(self._uuid, act, again=False)

    def look(self, disk: str) -> Pull:
        def ask(domain: Any) -> tuple[dict[str, int], str]:
            return domain.blockJobInfo(disk, 0), domain.XMLDesc(0)

        job, text = self._link.domain(self._uuid, ask)
        chain = next((one.chain for one in parse_domain(text).disks if one.dev == disk), ())
        if job:
            return Pull(job["cur"], job["end"], running=True, ended=False)
        return Pull(0, 0, running=False, ended=not chain)

    def revive(self) -> bool:
        libvirt = binding()

        def act(domain: Any) -> bool:
            stands = list(domain.state()[:2]) == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
            if stands:
                domain.resume()
            return stands

        return self._link.domain(self._uuid, act)


class QmpPuller:
    """Disks by the node name of their qcow2, of the QEMU behind ``monitor``; for those without libvirt."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def begin(self, disk: str) -> None:
        if not self._job(disk):
            self._monitor.run("block-stream", {"job-id": _job_id(disk), "device": disk})

    def look(self, disk: str) -> Pull:
        job = self._job(disk)
        if job:
            return Pull(job["offset"], job["len"], running=True, ended=False)
        nodes = self._monitor.run("query-named-block-nodes", {"flat": True})
        node: Mapping[str, Any] = next((one for one in nodes if one["node-name"] == disk), {})
        return Pull(0, 0, running=False, ended=bool(node) and not node.get("backing_file"))

    def revive(self) -> bool:
        stands = self._monitor.run("query-status")["status"] == "io-error"
        if stands:
            self._monitor.run("cont")
        return bool(stands)

    def _job(self, disk: str) -> Mapping[str, Any]:
        jobs = self._monitor.run("query-block-jobs")
        return next((job for job in jobs if job["device"] == _job_id(disk)), {})


def _job_id(disk: str) -> str:
    return f"gc-pull-{disk}"


def overlay_options(node: str, path: str, export: Export) -> tuple[dict[str, Any], ...]:
    """``blockdev-add``, in this order, of the overlay at ``path`` as ``node`` on top of ``export``, without libvirt.

    A crash of graincopy makes reads errors; these stop the machine where its device says ``rerror=stop``, as it should,
    and :meth:`QmpPuller.revive` lets it go on. See ``shown_disks`` for why there is no ``reconnect-delay``.
    """
    below = f"{node}-below"
    nbd = {
        "driver": "nbd",
        "server": {"type": "unix", "path": export.socket},
        "export": export.name,
        "read-only": True,
        "node-name": below if export.format == "raw" else f"{below}-nbd",
    }
    shown: list[dict[str, Any]] = [nbd]
    if export.format != "raw":
        shown.append({"driver": export.format, "node-name": below, "file": nbd["node-name"], "read-only": True})
    file = {"driver": "file", "filename": path, "discard": "unmap"}
    return (*shown, {"driver": "qcow2", "node-name": node, "file": file, "backing": below, "discard": "unmap"})


def make_overlay(path: str, size: int, export: Export) -> None:
    """A new qcow2 of ``size`` bytes at ``path``, nothing in it, on top of ``export``; durable, except for its name.

    Raises OutputUnfit, ToolMissing.
    """
    uri = f"nbd+unix:///{quote(export.name, safe='')}?socket={quote(export.socket, safe='/')}"
    command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", export.format, "-b", uri, path, str(size)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise ToolMissing(tool="qemu-img", install=INSTALL) from error
    if done.returncode:
        raise OutputUnfit(path=path, reason=os.fsdecode(done.stderr).strip().removeprefix("qemu-img: ").rstrip("."))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o600)
        os.fsync(fd)
    finally:
        os.close(fd)


REFUSALS = (GraincopyError, OSError, QmpRefused)
