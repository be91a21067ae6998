"""How soon a machine is back: off a view against off the raw file, and at once against restored first.

    python bench/recovery.py [--runs 3] [--size 1024] [--json]

Needs root, libvirtd and QEMU: it uses the guest lab of tests/kvm. Two tables:

* boot: seconds from the start of a small Linux guest to its console line, its agent and the content of a file on its
  disk, off ``serve-nbd --writable`` and off the raw file. Runs are paired and their order alternates; wanted is a
  median ratio of at most 1.3.
* back: seconds from the command to the first answer of the guest, ``restore --instant`` against ``restore --to``,
  define and start; disks of ``--size`` MiB, half of them filled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "kvm"))

from restore_scene import Scene
from vm_lab import Guest, GuestLab, LabDisk, tool, wait

MIB = 1 << 20
WANTED = 1.3


@dataclass(frozen=True)
class Boot:
    """Seconds after the start, or after the command."""

    console: float
    agent: float
    file: float


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--runs", type=int, default=3, help="pairs of runs (default: %(default)s)")
    words.add_argument("--size", type=int, default=1024, help="MiB of the disk (default: %(default)s)")
    words.add_argument("--json", action="store_true", help="figures of every run")
    asked = words.parse_args()
    with GuestLab() as lab, tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        scene = Scene(lab, folder)
        raw = filled(lab, asked.size)
        with lab.guest("web", [LabDisk(dev="vda", path=raw)], start=False, options={"fs": "vda"}) as guest:
            scene.run("backup", "vm:web")
            boots = paired(asked.runs, lambda: off_the_file(guest), lambda: off_a_view(scene, lab))
            backs = paired(asked.runs, lambda: full(scene, folder), lambda: at_once(scene, folder))
    report(asked, boots, backs)


def filled(lab: GuestLab, size: int) -> str:
    """A raw disk of ``size`` MiB with a file of half of that."""
    raw = lab.file("web.raw", size * MIB)
    with open(f"{raw}.big", "wb") as file:
        for _ in range(size // 2):
            file.write(os.urandom(MIB))
    tool("debugfs", "-w", "-R", f"write {raw}.big big", raw)
    return raw


def paired(runs: int, first: Callable[[], Any], second: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """Results of both, ``runs`` times, each beginning as often as the other."""
    found = []
    for run in range(runs):
        if run % 2:
            later = second()
            found.append((first(), later))
        else:
            earlier = first()
            found.append((earlier, second()))
    return found


# --- boot -------------------------------------------------------------------------------------------


def off_the_file(guest: Guest) -> Boot:
    """With a throw-away layer, as the view has one."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{guest.disks[0].path}.layer")
    layer = f"{guest.disks[0].path}.layer"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", guest.disks[0].path, layer)
    return booted(guest.lab, LabDisk(dev="vda", path=layer, format="qcow2"))


def off_a_view(scene: Scene, lab: GuestLab) -> Boot:
    socket = os.path.join(scene.folder, "nbd")
    with scene.running("serve-nbd", "latest", "--disk", "web.raw", "--writable", "--socket", socket) as server:
        wait(lambda: '"uri"' in scene.said(), scene.said)
        source = f"<source protocol='nbd' name='web.raw'><host transport='unix' socket='{socket}'/></source>"
        try:
            return booted(lab, LabDisk(dev="vda", kind="network", source=source))
        finally:
            server.terminate()
            server.wait()


def booted(lab: GuestLab, disk: LabDisk) -> Boot:
    with lab.guest("boot", [disk], start=False, options={"fs": "vda"}) as guest:
        began = time.monotonic()
        guest.start()
        console = time.monotonic() - began
        guest.wait_agent()
        agent = time.monotonic() - began
        assert guest.run("dd if=/mnt/vda/big of=/dev/null bs=1M count=64")[0] == 0
        return Boot(console, agent, time.monotonic() - began)


# --- back -------------------------------------------------------------------------------------------


def full(scene: Scene, folder: str) -> float:
    """Everything restored, then started."""
    with place(scene, folder) as (name, directory):
        began = time.monotonic()
        scene.run("restore", "latest", "--to", directory, "--as", name, "--start")
        assert scene.ask(name, "true")[0] == 0
        return time.monotonic() - began


def at_once(scene: Scene, folder: str) -> tuple[float, float]:
    """Until it answers, and until its disks are all there."""
    with place(scene, folder) as (name, directory):
        began = time.monotonic()
        with scene.running("restore", "latest", "--instant", "--to", directory, "--as", name) as process:
            wait(lambda: process.poll() is not None or " runs; " in scene.said(), scene.said)
            assert scene.ask(name, "true")[0] == 0
            answered = time.monotonic() - began
            if process.wait() != 0:
                raise subprocess.SubprocessError(scene.said())
            return answered, time.monotonic() - began


@contextlib.contextmanager
def place(scene: Scene, folder: str) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        try:
            yield "back", os.path.join(directory, "disks")
        finally:
            scene.forget("back")


# --- report -----------------------------------------------------------------------------------------


def report(
    asked: argparse.Namespace, boots: list[tuple[Boot, Boot]], backs: list[tuple[float, tuple[float, float]]]
) -> None:
    if asked.json:
        runs = [{"file": asdict(one), "view": asdict(two)} for one, two in boots]
        print(json.dumps({"boot": runs, "back": [{"full": one, "at_once": two} for one, two in backs]}))
        return
    print(f"boot, medians of {len(boots)} pairs, seconds     raw file      view     ratio (wanted: {WANTED})")
    for what in ("console", "agent", "file"):
        pairs = [(getattr(one, what), getattr(two, what)) for one, two in boots]
        ratio = statistics.median(two / one for one, two in pairs)
        one, two = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"  to the {what:37} {one:8.2f} {two:9.2f} {ratio:9.2f}")
    print(f"back, disk of {asked.size} MiB, seconds")
    print(f"  restored, defined, started, answers           {statistics.median(one for one, _ in backs):8.2f}")
    print(f"  at once: answers                              {statistics.median(two[0] for _, two in backs):8.2f}")
    print(f"  at once: disks all there                      {statistics.median(two[1] for _, two in backs):8.2f}")


if __name__ == "__main__":
    main()
