"""The parts of the qemu driver that decide or parse: the block graph, the qcow2 header, what a monitor answers."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lab
import pytest

from graincopy.hypervisor.daemon import StorageDaemon
from graincopy.hypervisor.nbd import NbdClient
from graincopy.hypervisor.qmp import Commands, Monitor, QmpRefused
from graincopy.volumes.qemu_graph import Graph, NoPlace
from graincopy.volumes.qemu_header import HeaderUnfit, read_header
from graincopy.volumes.qemu_host import has_open, writers_of
from graincopy.volumes.qemu_notes import Note, Notes
from graincopy.volumes.qemu_running import QemuPlaces, Running

PATH = "/disks/a.qcow2"


def node(name: str, driver: str, path: str = PATH, **more: Any) -> dict[str, Any]:
    return {"node-name": name, "drv": driver, "file": path, "image": {"virtual-size": 1 << 20}, **more}


def graph(
    nodes: list[dict[str, Any]], edges: list[tuple[str, str, str]], devices: dict[str, str] | None = None
) -> Graph:
    """``edges`` are (parent, role, child); a parent that is no node is a device."""
    names = [one["node-name"] for one in nodes]
    others = [parent for parent, _, _ in edges if parent not in names]
    ids = {name: number for number, name in enumerate([*names, *others])}
    shown = [
        {
            "id": number,
            "name": name if name in names else "",
            "type": "block-driver" if name in names else "block-backend",
        }
        for name, number in ids.items()
    ]
    lines = [{"parent": ids[parent], "name": role, "child": ids[child]} for parent, role, child in edges]
    hung = [{"qdev": device, "inserted": {"node-name": name}} for name, device in (devices or {}).items()]
    return Graph(nodes, {"nodes": shown, "edges": lines}, hung)


FILE, QCOW2, RAW = node("p", "file"), node("q", "qcow2"), node("t", "raw")


def test_a_raw_node_above_is_the_anchor() -> None:
    found = graph([FILE, QCOW2, RAW], [("q", "file", "p"), ("t", "file", "q"), ("dev", "root", "t")]).find(PATH)
    assert found is not None
    assert (found.format, found.disk, found.anchor, found.top, found.device) == ("qcow2", "q", "t", "q", None)


def test_below_a_device_an_anchor_has_to_be_made() -> None:
    found = graph([FILE, QCOW2], [("q", "file", "p"), ("dev", "root", "q")], {"q": "/machine/disk0"}).find(PATH)
    assert found is not None and (found.anchor, found.device) == (None, "/machine/disk0")


def test_of_a_raw_disk_the_format_node_is_the_anchor() -> None:
    found = graph([FILE, RAW], [("t", "file", "p"), ("dev", "root", "t")]).find(PATH)
    assert found is not None and (found.format, found.disk, found.anchor) == ("raw", "p", "t")


def test_filters_of_ours_are_seen_through() -> None:
    nodes = [FILE, RAW, node("gc-1-b", "copy-before-write"), node("gc-1-r", "raw"), node("gc-1-s", "snapshot-access")]
    nodes += [node("gc-2-b", "copy-before-write"), node("gc-2-r", "raw")]
    edges = [("t", "file", "gc-1-b"), ("gc-1-b", "file", "gc-1-r"), ("gc-1-r", "file", "p"), ("dev", "root", "t")]
    edges += [("gc-1-s", "file", "gc-1-b"), ("gc-2-b", "file", "gc-2-r"), ("gc-2-r", "file", "gc-1-b")]  # 2 is prepared
    found = graph(nodes, edges).find(PATH)
    assert found is not None and (found.disk, found.anchor, found.top) == ("p", "t", "gc-1-b")


def test_what_cannot_be_snapshotted_says_why() -> None:
    top = node("o", "qcow2", "/disks/overlay.qcow2")
    cases = {
        "backing file of another": graph([FILE, QCOW2, top], [("q", "file", "p"), ("o", "backing", "q")]),
        "exported directly": graph([FILE, QCOW2], [("q", "file", "p"), ("export", "root", "q")]),
        "hangs directly over it": graph([FILE, QCOW2, node("x", "throttle")], [("q", "file", "p"), ("x", "file", "q")]),
        "several nodes": graph(
            [FILE, QCOW2, RAW, node("u", "raw")], [("q", "file", "p"), ("t", "file", "q"), ("u", "file", "q")]
        ),
        "open as luks": graph([FILE, node("l", "luks")], [("l", "file", "p"), ("dev", "root", "l")]),
        "2 times": graph([FILE, node("p2", "file")], []),
    }
    for reason, case in cases.items():
        with pytest.raises(NoPlace, match=reason):
            case.find(PATH)
    assert graph([FILE], []).find("/disks/other") is None


def test_bitmaps_that_cannot_be_trusted() -> None:
    bitmaps = [
        {"name": "good", "recording": True},
        {"name": "stopped", "recording": False},
        {"name": "torn", "recording": False, "inconsistent": True},
        {"recording": False},  # QEMU's own have no name
    ]
    nodes = [FILE, node("q", "qcow2", **{"dirty-bitmaps": bitmaps}), RAW]
    found = graph(nodes, [("q", "file", "p"), ("t", "file", "q")]).find(PATH)
    assert found is not None
    assert {one.name: (one.sound, one.why) for one in found.bitmaps} == {
        "good": (True, ""),
        "stopped": (False, "its bitmap was stopped"),
        "torn": (False, "its bitmap is inconsistent: QEMU did not end in order"),
    }


def header(**facts: int) -> bytes:
    head = struct.pack(">IIQIIQI", 0x514649FB, facts.get("version", 3), 0, 0, 16, 1 << 20, facts.get("crypt", 0))
    head = head.ljust(72, b"\0") + struct.pack(">QQQII", facts.get("features", 0), 0, 0, 4, 104)
    return head.ljust(4096, b"\0")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"QFI\xfb", "too short"),
        (bytes(4096), "not qcow2"),
        (header(version=9), "not qcow2"),
        (header(crypt=1), "old way"),
        (header(crypt=2), "encrypted"),
        (header(features=4), "another file"),
        (header(features=2), "corrupt"),
    ],
)
def test_headers_that_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(HeaderUnfit, match=reason):
        read_header(file.fileno())


def test_a_header(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(header())
    with path.open("rb") as file:
        assert (read_header(file.fileno()).size, read_header(file.fileno()).backing) == (1 << 20, None)


def answering(*lines: dict[str, Any]) -> tuple[socket.socket, threading.Thread]:
    """The far end of a monitor that greets, and then says ``lines`` whatever it is asked."""
    ours, theirs = socket.socketpair()

    def speak() -> None:
        with theirs, theirs.makefile("rwb") as file:
            greeting = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2}}}}
            file.write(json.dumps(greeting).encode() + b"\n")
            file.flush()
            for line in ({"return": {}}, *lines):
                if not {"event", "QMP"} & set(line):
                    file.readline()
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()

    thread = threading.Thread(target=speak)
    thread.start()
    return ours, thread


def test_a_monitor_that_greets_twice_is_not_answered_by_that() -> None:
    """A QEMU that is just starting does; and what another command was answered late is not for this one."""
    greeting = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2}}}}
    channel, thread = answering(greeting, {"return": "late", "id": 1}, {"return": [1], "id": 2})
    with Monitor(channel, 10.0) as monitor:
        channel.sendall(b"\n")  # the far end reads a line before each of its own
        assert monitor.run("query-something") == [1]
    thread.join()


def test_a_monitor_passes_over_events_and_remembers_them() -> None:
    event = {"event": "BLOCK_EXPORT_DELETED", "data": {"id": "x"}}
    channel, thread = answering(event, {"return": [1]}, {"error": {"class": "GenericError", "desc": "No such node."}})
    with Monitor(channel, 10.0) as monitor:
        assert monitor.version == (7, 2)
        assert monitor.run("query-something") == [1]
        monitor.wait("BLOCK_EXPORT_DELETED", "x")
        with pytest.raises(QmpRefused, match="No such node"):
            monitor.run("blockdev-del")
        with pytest.raises(ConnectionError):
            monitor.run("quit")
    thread.join()


def test_what_is_no_monitor_is_not_taken_for_one() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b"220 smtp\n")
    theirs.close()
    with pytest.raises(ConnectionError):
        Monitor(ours, 10.0)


class Told(Commands):
    """A QEMU that says what it was told to say."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def run(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        return self.answers[command]

    def wait(self, event: str, about: str) -> None:
        raise TimeoutError

    def close(self) -> None:
        """Nothing is held."""


class OneQemu(Running):
    """It is the only one there is."""

    def __init__(self, qemu: Commands) -> None:
        super().__init__(QemuPlaces("", ("only",)))
        self.qemu = qemu

    def reach(self, monitor: str) -> Commands:
        return self.qemu


@pytest.mark.parametrize(("kind", "taken"), [("scsi-hd", True), ("scsi-block", False), ("scsi-generic", False)])
def test_a_device_whose_guest_writes_past_the_block_layer_is_refused(tmp_path: Path, kind: str, taken: bool) -> None:
    """SG_IO sets no bit, and no filter sees it."""
    path = str(tmp_path / "lun")
    nodes = [node("p", "host_device", path), node("t", "raw", path)]
    shown = [{"id": number, "name": name, "type": "block-driver"} for number, name in enumerate("pt")]
    qemu = Told(
        {
            "query-named-block-nodes": nodes,
            "x-debug-query-block-graph": {"nodes": shown, "edges": [{"parent": 1, "name": "file", "child": 0}]},
            "query-block": [{"qdev": "scsi0-0-0-0", "inserted": {"node-name": "t"}}],
            "qom-get": kind,
        }
    )
    with open(path, "wb"):
        if taken:
            found = OneQemu(qemu).find(path)
            assert found is not None and found.disk.disk == "p"
        else:
            with pytest.raises(NoPlace, match="past QEMU's block layer"):
                OneQemu(qemu).find(path)


@lab.root_test
def test_a_device_that_was_opened_by_another_node_is_in_use(tmp_path: Path) -> None:
    """libvirt gives each of its QEMUs a /dev of its own."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    device, own = lab.bind(str(image)), str(tmp_path / "own")
    try:
        os.mknod(own, stat.S_IFBLK | 0o600, os.stat(device).st_rdev)
        assert writers_of(device) == ()
        with open(own, "r+b"):
            assert [one.pid for one in writers_of(device)] == [os.getpid()]
            assert has_open(os.getpid(), device)
        assert not has_open(os.getpid(), device)
    finally:
        lab.unbind(device)


def test_notes_survive_and_damaged_ones_are_not_passed_over(tmp_path: Path) -> None:
    notes = Notes(str(tmp_path / "notes"), Note)
    assert notes.all() == () and notes.find("t") is None
    os.mkdir(tmp_path / "notes")
    (tmp_path / "notes" / "gc-1.note").write_bytes(b"{")
    with pytest.raises(OSError, match="damaged"):
        notes.all()


def test_the_daemon_ends_with_us_and_cleans_up(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with StorageDaemon() as daemon:
        daemon.add({"driver": "file", "node-name": "n", "filename": str(image)})
        daemon.export("n", "n", writable=True)
        client = NbdClient(daemon.nbd, "n")
        client.write(0, memoryview(b"abc"))
        client.flush()
        client.close()
        folder = os.path.dirname(daemon.nbd)
        assert os.stat(folder).st_mode & 0o777 == 0o700 and os.stat(daemon.nbd).st_mode & 0o777 == 0o600
        with pytest.raises(FileNotFoundError):
            NbdClient(daemon.nbd, "other")
        with pytest.raises(LookupError):
            NbdClient(daemon.nbd, "n", ["qemu:dirty-bitmap:none"])
    assert not os.path.exists(folder) and image.read_bytes()[:3] == b"abc"
    assert daemon.close()
