"""Where a disk hangs in the block graph of a QEMU, and where our filters go (stage 3). Pure: it looks, and decides.

    device or export → … → anchor → [ours, newest first: copy-before-write → raw → …] → disk → … → file

*disk* shows what the guest sees and carries the bitmaps. *anchor* is a raw node above it whose child can be exchanged
(``blockdev-reopen``), for any number of disks at one instant. A raw disk has one as a rule: its format node, and then
its protocol node is the disk. A qcow2 disk that hangs directly below a device gets an anchor by ``qom-set``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

OURS = "gc-"
_PROTOCOLS = ("file", "host_device")
_FORMATS = ("qcow2",)


class NoPlace(Exception):
    """The disk is there, and cannot be snapshotted where it hangs. The text is one clause, ``remedy`` another."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


class Bitmap(msgspec.Struct, frozen=True):
    """A dirty bitmap of the disk."""

    name: str
    sound: bool  # it records, and knows everything since it began
    why: str = ""  # it is not sound
    busy: bool = False  # in use by an export or a job: it cannot be copied


class LiveDisk(msgspec.Struct, frozen=True):
    """One disk of a running QEMU."""

    path: str
    format: str
    disk: str  # node
    anchor: str | None  # node; None: there is none yet
    top: str  # node just below the anchor: the disk itself, or the newest of our filters
    device: str | None  # QOM path, where an anchor has to be made
    root: str  # the uppermost node: what the guest's device, or an export, uses
    size: int  # bytes; of a raw file, rounded up to sectors
    backing: str | None
    persistent: bool  # bitmaps survive this QEMU
    bitmaps: tuple[Bitmap, ...]

    def bitmap(self, name: str) -> Bitmap | None:
        """The bitmap of this name."""
        return next((one for one in self.bitmaps if one.name == name), None)


class Graph:
    """Nodes and edges as ``query-named-block-nodes``, ``x-debug-query-block-graph`` and ``query-block`` tell them."""

    def __init__(
        self, nodes: Sequence[Mapping[str, Any]], graph: Mapping[str, Any], devices: Sequence[Mapping[str, Any]]
    ) -> None:
        self._nodes = {str(node["node-name"]): node for node in nodes}
        self._name = {node["id"]: str(node["name"]) for node in graph["nodes"]}
        self._is_node = {node["id"] for node in graph["nodes"] if node["type"] == "block-driver"}
        self._edges = graph["edges"]
        self._devices = devices

    def __contains__(self, node: str) -> bool:
        return node in self._nodes

    def driver(self, node: str) -> str:
        """Name of the block driver of ``node``."""
        return str(self._nodes[node]["drv"])

    def raw_options(self, node: str) -> dict[str, Any]:
        """What has to be said again when the raw ``node`` is reopened.

        QEMU does not tell whether it passes discards on. It is told to: the nodes below have their own say.
        """
        info = self._nodes[node]
        cache = info.get("cache", {})
        return {
            "driver": "raw",
            "read-only": bool(info.get("ro", False)),
            "cache": {"direct": bool(cache.get("direct")), "no-flush": bool(cache.get("no-flush"))},
            "detect-zeroes": info.get("detect_zeroes", "off"),
            "discard": "unmap",
        }

    def child(self, node: str, role: str = "file") -> str | None:
        """The node that ``node`` has in ``role``."""
        for edge in self._edges:
            if self._name[edge["parent"]] == node and edge["parent"] in self._is_node and edge["name"] == role:
                return self._name[edge["child"]]
        return None

    def parents(self, node: str) -> tuple[tuple[str, str], ...]:
        """(node, role) of every node above ``node``; what is no node (a device, an export, a job) has the name ""."""
        return tuple(
            (self._name[edge["parent"]] if edge["parent"] in self._is_node else "", edge["name"])
            for edge in self._edges
            if self._name[edge["child"]] == node and edge["child"] in self._is_node
        )

    def find(self, path: str) -> LiveDisk | None:
        """The disk whose file is at the real ``path``; None when this QEMU has no such file. Raises NoPlace."""
        protocols = self.protocols(path)
        if not protocols:
            return None
        if len(protocols) > 1:
            raise NoPlace(f"QEMU has it open {len(protocols)} times")
        chain = self._chain(protocols[0])
        return self._place(path, chain)

    def protocols(self, path: str) -> tuple[str, ...]:
        """The nodes that read and write the file at the real ``path``: more than one where it is open several times."""
        return tuple(name for name in self._nodes if self._leads_to(name, path))

    def bitmaps(self, node: str) -> tuple[Bitmap, ...]:
        """The named dirty bitmaps of ``node``."""
        return tuple(bitmap_from(one) for one in self._nodes[node].get("dirty-bitmaps", ()) if "name" in one)

    def _leads_to(self, node: str, path: str) -> bool:
        if self.driver(node) not in _PROTOCOLS or node.startswith(OURS):
            return False
        name = _filename(str(self._nodes[node].get("file", "")))
        return name.startswith("/") and os.path.realpath(name) == path

    def _chain(self, protocol: str) -> list[tuple[str, str]]:
        """From the protocol node upwards: (node, node below it), ours left out."""
        chain = [(protocol, "")]
        at, below = protocol, protocol
        while True:
            above = [one for one in self.parents(at) if one[0] and self.driver(one[0]) != "snapshot-access"]
            above = [one for one in above if not self._is_idle(one[0])]
            if not above:
                return chain
            if any(role == "backing" for _, role in above):
                raise NoPlace("it is the backing file of another disk", "back up the disk above it")
            if len(above) > 1:
                raise NoPlace("several nodes of QEMU use it at once (a block job?)", "wait for the job to end")
            below, at = at, above[0][0]
            if not self._is_filter_of_ours(at):
                chain.append((at, below))

    def _is_filter_of_ours(self, node: str) -> bool:
        return node.startswith(OURS) and not node.endswith("-a")

    def _is_idle(self, node: str) -> bool:
        """One of our filters that was prepared, and hangs beside the disk until the instant."""
        if not self._is_filter_of_ours(node):
            return False
        above = [name for name, _ in self.parents(node) if not name or self.driver(name) != "snapshot-access"]
        return all(name and self._is_idle(name) for name in above)

    def _place(self, path: str, chain: list[tuple[str, str]]) -> LiveDisk:
        protocol = chain[0][0]
        inner = chain[1][0] if len(chain) > 1 else None
        kind = self.driver(inner) if inner is not None else "raw"
        if inner is not None and kind in _FORMATS:
            return self._hang(path, kind, inner, chain[2:], chain[-1][0])
        if inner is None or kind == "raw":
            return self._hang(path, "raw", protocol, chain[1:], chain[-1][0])
        raise NoPlace(f"QEMU has it open as {kind}, which is not snapshotted inside QEMU")

    def _hang(self, path: str, kind: str, disk: str, above: list[tuple[str, str]], root: str) -> LiveDisk:
        info = self._nodes[disk]
        image = info.get("image", {})
        anchor = above[0] if above and self._is_plain_raw(above[0][0], disk) else None
        device = None
        if anchor is None:
            if above:
                raise NoPlace(
                    f"the node {above[0][0]} ({self.driver(above[0][0])}) hangs directly over it",
                    f"put a raw node between {above[0][0]} and the disk",
                )
            device = self._device_under(disk)
        compat = image.get("format-specific", {}).get("data", {}).get("compat")
        return LiveDisk(
            path=path,
            format=kind,
            disk=disk,
            anchor=anchor[0] if anchor else None,
            top=anchor[1] if anchor else disk,
            device=device,
            root=root,
            size=int(image["virtual-size"]),
            backing=image.get("backing-filename"),
            persistent=kind == "qcow2" and compat != "0.10",
            bitmaps=self.bitmaps(disk),
        )

    def _is_plain_raw(self, node: str, disk: str) -> bool:
        """Raw without offset and size: it shows the whole of what is below, so that it can be told to again."""
        name = str(self._nodes[node].get("file", ""))
        whole = self._nodes[node]["image"]["virtual-size"] == self._nodes[disk]["image"]["virtual-size"]
        return self.driver(node) == "raw" and whole and '"offset"' not in name and '"size"' not in name

    def device_of(self, node: str) -> str | None:
        """QOM path of the one device that ``node`` is the root of."""
        found = [one for one in self._devices if one.get("inserted", {}).get("node-name") == node and one.get("qdev")]
        return str(found[0]["qdev"]) if len(found) == 1 else None

    def _device_under(self, disk: str) -> str:
        found = self.device_of(disk)
        if found is not None:
            return found
        raise NoPlace(
            "it is exported directly, and QEMU cannot put a filter there",
            "export a raw node over it: --blockdev raw,node-name=top,file=DISK",
        )


def _filename(name: str) -> str:
    """The path of a protocol node, which QEMU writes as JSON where it has options that matter."""
    if not name.startswith("json:"):
        return name
    try:
        return str(json.loads(name.removeprefix("json:")).get("filename", ""))
    except ValueError:
        return ""


def bitmap_from(found: Mapping[str, Any]) -> Bitmap:
    """One entry of ``dirty-bitmaps``."""
    name = str(found["name"])
    if found.get("inconsistent"):
        return Bitmap(name, False, "its bitmap is inconsistent: QEMU did not end in order")
    if not found.get("recording", False):
        return Bitmap(name, False, "its bitmap was stopped")
    return Bitmap(name, True, busy=bool(found.get("busy")))
