"""``graincopy backup set:NAME`` of running guests, over and over: one instant across machines, drivers and volumes.

Two guests, each with a qcow2 disk, which is snapshotted inside its QEMU, and a raw one on an XFS, which is cloned. In
each of them a writer goes from one disk to the other and back; somebody else goes from one guest to the other.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from restore_scene import Scene
from test_vm_backup import store
from vm_lab import (
    Guest,
    GuestLab,
    LabDisk,
    file_in_image,
    make_disk,
    needs_guests,
    needs_replay,
    one_instant,
    read_records,
    tool,
    wait,
)

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
SLOTS = 512
POINTS = 5
TURN = 16 * MIB  # where on the plain guest's first disk the turns are counted


@dataclass
class Turns:
    """Writes 1, 2, ... to one guest and then to the other, each durable before the next."""

    plain: Guest
    agent: Guest
    stop: threading.Event = field(default_factory=threading.Event)
    failed: list[str] = field(default_factory=list)
    number: int = 0

    def run(self) -> None:
        while not self.stop.is_set():
            self._write(self.plain, self.number + 1, f"of=/dev/vda seek={TURN // 512}")
            self._write(self.agent, self.number + 1, "of=/mnt/vdb/turn")
            self.number += 1

    def wait_for_more(self) -> None:
        """Until another turn is done."""
        before = self.number
        wait(lambda: self.number > before or self.failed, "the turns do not go on")

    def _write(self, guest: Guest, number: int, where: str) -> None:
        """One sector in one write."""
        code, said = guest.run(f"printf %512d {number} | dd iflag=fullblock bs=512 count=1 conv=notrunc,fsync {where}")
        if code:
            self.failed.append(said)
            self.stop.set()


@contextlib.contextmanager
def writing(guests: GuestLab, cloned: str, name: str, *, fs: bool) -> Iterator[Guest]:
    """A guest whose writer goes from a qcow2 disk to a raw one on ``cloned``, or with ``fs`` the other way round."""
    disks = []
    for dev, kind, folder in (("vda", "qcow2", guests.folder), ("vdb", "raw", cloned)):
        path = os.path.join(folder, f"{name}-{dev}.{kind}")
        make_disk(path, 32 * MIB, format=kind, fs=fs)
        disks.append(LabDisk(dev=dev, path=path, format=kind))
    files = ("/mnt/vdb/records", "/mnt/vda/records") if fs else ("/dev/vda", "/dev/vdb")
    options = {"writer": ",".join(files), "slots": str(SLOTS), "pause": "500", "agent": "yes" if fs else "no"}
    if fs:
        options["fs"] = "vda,vdb"
    with guests.guest(name, disks, options=options) as guest:
        if fs:
            guest.wait_agent()
        wait(lambda: guest.run("pidof guest_writer")[0] == 0, "the writer does not start")
        yield guest


def test_every_point_of_a_set_is_one_instant(guests: GuestLab, tmp_path: Path) -> None:
    scene = Scene(guests, str(tmp_path))
    freezes = take_points(scene, POINTS)
    assert all(freeze > 0 for freeze in freezes)
    last = (0, 0)
    for back in reversed(range(POINTS)):
        last = must_be_one_instant(scene, back, *last)


def take_points(scene: Scene, points: int) -> list[float]:
    """Back up the set while everybody writes; how long the guests stood still each time."""
    with open(scene.config, "a") as file:
        file.write('[set.shop]\nmembers = ["vm:till", "vm:ledger"]\n[freeze]\ndeadline = 20\n')
    with (
        store(os.path.join(scene.lab.folder, "tills")) as cloned,
        writing(scene.lab, cloned, "till", fs=False) as till,
        writing(scene.lab, cloned, "ledger", fs=True) as ledger,
    ):
        freezes = []
        with going_round(till, ledger) as turns:
            for number in range(points):
                turns.wait_for_more()
                freezes.append(back_up(scene, first=not number))
        assert ledger.status() == (True, True) and till.domain().info()[0] == 1
    return freezes


@contextlib.contextmanager
def going_round(plain: Guest, agent: Guest) -> Iterator[Turns]:
    """Turns are taken by a thread while the block runs."""
    turns = Turns(plain, agent)
    thread = threading.Thread(target=turns.run)
    thread.start()
    try:
        yield turns
    finally:
        turns.stop.set()
        thread.join(120)
    assert not turns.failed and not thread.is_alive()


def back_up(scene: Scene, *, first: bool) -> float:
    """One more point; for how many milliseconds the guests stood still."""
    point = scene.run("backup", "set:shop")
    assert {disk["driver"] for disk in point["disks"]} == {"qemu", "reflink"}
    assert scene.run("show", "latest")["instant"] == "one"
    if not first:
        assert {disk["change_map"] for disk in point["disks"]} == {"bitmap", "extents"}, point["disks"]
    assert len(point["disks"]) == 4
    return float(point["freeze_ms"])


def must_be_one_instant(scene: Scene, back: int, last: int, number: int) -> tuple[int, int]:
    """Look at the point that many before the latest; the last record and turn in it, later than those given."""
    to = os.path.join(scene.folder, f"out{back}")
    scene.run("restore", f"latest~{back}", "--to", to)
    images = {name: as_raw(os.path.join(to, name)) for name in os.listdir(to)}
    till = [next(path for name, path in images.items() if f"till-{dev}" in name) for dev in ("vda", "vdb")]
    ledger = [next(path for name, path in images.items() if f"ledger-{dev}" in name) for dev in ("vdb", "vda")]
    plain = [read_records(read_at(path, 0, SLOTS * 4096)) for path in till]
    assert one_instant(plain[0], plain[1], SLOTS), [(one.last, one.torn) for one in plain]
    assert not any(needs_replay(path) for path in ledger), "the agent has frozen it"
    for path in ledger:
        tool("e2fsck", "-fn", path)
    calm = [read_records(file_in_image(path, "/records")) for path in ledger]
    assert one_instant(calm[0], calm[1], SLOTS), [(one.last, one.torn) for one in calm]
    here, there = int(read_at(till[0], TURN, 512)), int(file_in_image(ledger[0], "/turn"))
    assert here - there in (0, 1), (here, there)
    assert here > number and plain[0].last > last, "everybody wrote on"
    for path in {*images.values(), *(os.path.join(to, name) for name in images)}:
        os.unlink(path)
    return plain[0].last, here


def as_raw(path: str) -> str:
    if not path.endswith(".qcow2"):
        return path
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, f"{path}.raw")
    return f"{path}.raw"


def read_at(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
