"""Targets of disks of a running QEMU (stages 4 to 7): copy-before-write, in the way of the guest's own writes.

    anchor → copy-before-write ─(what is about to be overwritten)→ scratch file
                    │     └─ snapshot-access → NBD export: the disk as it was
                    raw → the disk

The filter waits beside the disk until the instant, which is one ``blockdev-reopen`` of all anchors: every disk of the
QEMU at once. The new bitmap begins before it and the older ones are copied after it, so that what falls in between is
dirty in both. A scratch file that is full costs the snapshot and not the guest (``on-cbw-error``).
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from graincopy.core.extent import Extents
from graincopy.hypervisor.nbd import ALLOCATION, DIRTY, ZERO, NbdClient
from graincopy.hypervisor.qmp import Commands
from graincopy.volumes.qemu_bitmaps import GRAIN, begin, freeze, frozen_of, is_copy_for, remove
from graincopy.volumes.qemu_exports import export, exports, start_server, stop_server, unexport
from graincopy.volumes.qemu_graph import OURS, Graph, LiveDisk, NoPlace
from graincopy.volumes.qemu_notes import Note, key_of

_CBW_SECONDS = 45  # a copy that takes longer costs the snapshot: the guest waits for it that long at most


def look(monitor: Commands) -> Graph:
    """The block graph as it is now. Raises QmpRefused, OSError."""
    return Graph(
        monitor.run("query-named-block-nodes", {"flat": True}),
        monitor.run("x-debug-query-block-graph"),
        monitor.run("query-block"),
    )


# --- stage 4 ----------------------------------------------------------------------------------------


def ensure_anchor(monitor: Commands, disk: LiveDisk) -> str:
    """The node whose child is exchanged at the instant; where there is none, one is put between device and disk."""
    if disk.anchor is not None:
        return disk.anchor
    name = f"{key_of(disk.path)}-a"
    if name not in look(monitor):
        monitor.run("blockdev-add", {"driver": "raw", "node-name": name, "file": disk.disk, "discard": "unmap"})
    monitor.run("qom-set", {"path": disk.device, "property": "drive", "value": name})
    return name


def hang_filter(monitor: Commands, note: Note) -> None:
    """Everything but the instant. May be repeated."""
    graph = look(monitor)
    below = graph.child(note.anchor) or note.disk
    key = note.key
    nodes: list[dict[str, Any]] = [
        {"driver": "file", "node-name": f"{key}-c", "filename": note.scratch, "discard": "unmap"},
        {"driver": "raw", "node-name": f"{key}-r", "file": below, "discard": "unmap"},
        {
            "driver": "copy-before-write",
            "node-name": f"{key}-b",
            "file": f"{key}-r",
            "target": f"{key}-c",
            "on-cbw-error": "break-snapshot",
            "cbw-timeout": _CBW_SECONDS,
            "discard": "unmap",
        },
    ]
    for node in nodes:
        if node["node-name"] not in graph:
            monitor.run("blockdev-add", node)


def make_scratch(path: str, size: int) -> None:
    """A sparse file of ``size`` bytes for nobody else; one that is there stays."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


# --- stage 5 ----------------------------------------------------------------------------------------


def take(monitor: Commands, notes: Sequence[Note]) -> None:
    """The instant of all ``notes``, which are of this QEMU. May be repeated: what was taken stays as it is."""
    graph = look(monitor)
    todo = [note for note in notes if f"{note.key}-s" not in graph]
    if not todo:
        return
    begin(monitor, [(disk, note.bitmap) for note in todo if note.bitmap and (disk := graph.find(note.path))])
    tops = {note.anchor: graph.child(note.anchor) for note in todo}
    waiting = [note for note in todo if tops[note.anchor] != f"{note.key}-b"]
    moved = [(f"{note.key}-r", tops[note.anchor] or note.disk) for note in waiting]
    stale = [(node, below) for node, below in moved if graph.child(node) != below]
    if stale:  # another target came or went since the filter was made
        reopen(monitor, graph, stale)
    reopen(monitor, graph, [(note.anchor, f"{note.key}-b") for note in waiting])
    for note in todo:
        monitor.run(
            "blockdev-add", {"driver": "snapshot-access", "node-name": f"{note.key}-s", "file": f"{note.key}-b"}
        )
    graph = look(monitor)
    freeze(monitor, [(disk, note.target.tag.run) for note in todo if (disk := graph.find(note.path))])


def reopen(monitor: Commands, graph: Graph, moves: Sequence[tuple[str, str]]) -> None:
    """Give each raw node another child, all at one instant. What is not said again would fall back to its default."""
    if moves:
        options = [{**graph.raw_options(node), "node-name": node, "file": below} for node, below in moves]
        monitor.run("blockdev-reopen", {"options": options})


# --- stage 7 ----------------------------------------------------------------------------------------


def show(monitor: Commands, note: Note, socket: str, *, own_server: bool) -> None:
    """Export the snapshot and the frozen bitmaps. Raises LookupError when QEMU has no such snapshot (any more)."""
    graph = look(monitor)
    if f"{note.key}-s" not in graph:
        raise LookupError(note.key)
    if now_of(note) in exports(monitor):
        return
    if own_server:
        start_server(monitor, socket)
    disk = graph.find(note.path)
    assert disk is not None  # the filter hangs there
    frozen = [one.name for one in disk.bitmaps if is_copy_for(one.name, note.target.tag.run)]
    if note.key not in exports(monitor):
        export(monitor, note.key, f"{note.key}-s", disk.disk, frozen)
    export(monitor, now_of(note), f"{note.key}-r", disk.disk, ())


def now_of(note: Note) -> str:
    """The export that shows the disk as it is now."""
    return f"{note.key}-n"


def zeros_then(monitor: Commands, note: Note, socket: str) -> Extents:
    """What read as zeros at the instant: it does now, and nobody has written there since. Raises OSError.

    The snapshot itself is not asked. QEMU before 8.0 (commit "hbitmap: fix hbitmap_status() return value for first
    dirty bit case") answers any request that begins in a copied grain and ends in another one from S as it is now. So
    reads must not reach over a grain's end, which is cheap; asking for the states of one grain at a time is not.
    """
    now = NbdClient(socket, now_of(note), [ALLOCATION])
    try:
        zeros = now.extents(ALLOCATION, ZERO)
    finally:
        now.close()
    return zeros - _written_since(monitor, note, socket)  # asked afterwards: who writes in between is in it


def _written_since(monitor: Commands, note: Note, socket: str) -> Extents:
    """What the target's own bitmap knows now, through a copy: one that is exported cannot be copied by others."""
    assert note.bitmap is not None
    name, shown = frozen_of(note.target.tag.run, note.target.tag.run), f"{note.key}-z"
    disk = look(monitor).find(note.path)
    assert disk is not None  # the filter hangs there
    unexport(monitor, shown)
    here = {"node": disk.disk, "name": name}
    if disk.bitmap(name) is not None:  # from a reader that died
        monitor.run("block-dirty-bitmap-remove", here)
    monitor.run("block-dirty-bitmap-add", {**here, "granularity": GRAIN, "disabled": True})
    monitor.run("block-dirty-bitmap-merge", {"node": disk.disk, "target": name, "bitmaps": [note.bitmap]})
    export(monitor, shown, f"{note.key}-s", disk.disk, [name])
    try:
        client = NbdClient(socket, shown, [f"qemu:dirty-bitmap:{name}"])
        try:
            return client.extents(f"qemu:dirty-bitmap:{name}", DIRTY)
        finally:
            client.close()
    finally:
        unexport(monitor, shown)
        monitor.run("block-dirty-bitmap-remove", here)


# --- stage 9 ----------------------------------------------------------------------------------------


def release(monitor: Commands, note: Note, *, keep_bitmap: bool, own_server: bool) -> None:
    """Take the filter out from under the guest, and everything that was made for it. May be repeated."""
    key = note.key
    for shown in (key, now_of(note), f"{key}-z"):
        unexport(monitor, shown)
    stop_server(monitor, own_server)
    graph = look(monitor)
    _delete(monitor, graph, f"{key}-s")
    below = graph.child(f"{key}-r") if f"{key}-r" in graph else None
    if f"{key}-b" in graph and below is not None:
        above = [name for name, _ in graph.parents(f"{key}-b") if name and name != f"{key}-s"]
        reopen(monitor, graph, [(name, below) for name in above])
    for part in ("b", "c", "r"):
        _delete(monitor, graph, f"{key}-{part}")
    _remove_bitmaps(monitor, note, keep_bitmap)
    _drop_anchor(monitor, note)


def _delete(monitor: Commands, graph: Graph, node: str) -> None:
    if node in graph:
        monitor.run("blockdev-del", {"node-name": node})


def _remove_bitmaps(monitor: Commands, note: Note, keep_bitmap: bool) -> None:
    try:
        disk = look(monitor).find(note.path)
    except NoPlace:
        disk = None
    if disk is not None:
        gone = [one.name for one in disk.bitmaps if is_copy_for(one.name, note.target.tag.run)]
        if note.bitmap is not None and not keep_bitmap and disk.bitmap(note.bitmap) is not None:
            gone.append(note.bitmap)
        remove(monitor, disk.disk, gone)


def _drop_anchor(monitor: Commands, note: Note) -> None:
    """Take away an anchor of ours that holds no filter any more; a guest that went has taken it along."""
    graph = look(monitor)
    if not (note.anchor.startswith(OURS) and note.anchor in graph) or graph.child(note.anchor) != note.disk:
        return
    if any(name.startswith(OURS) and name != note.anchor for name, _ in graph.parents(note.disk)):
        return
    device = graph.device_of(note.anchor)
    if device is not None:
        monitor.run("qom-set", {"path": device, "property": "drive", "value": note.disk})
    monitor.run("blockdev-del", {"node-name": note.anchor})
