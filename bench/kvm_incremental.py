"""What an incremental backup of a running guest costs: bytes fetched against dirty bytes, and bytes stored.

    python bench/kvm_incremental.py [--runs 3]     needs root and what tests/kvm needs; virtnbdbackup where installed

A guest with a qcow2 disk of 256 MiB (1/4 zero, 3/8 random, 3/8 text). A full backup, then 40 scattered 4 KiB writes of
random bytes by the guest, then an incremental one; graincopy and virtnbdbackup (compressed) each with a guest of their
own and the same writes. Prints a table in Markdown for docs/kvm-figures.md. "Dirty" is what the bitmap counts, as QEMU
says just before; "fetched" is without the audit, which re-reads grains on purpose and stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "kvm"))

from lab import MIB, make_image, tree_size
from restore_scene import Scene
from vm_lab import Guest, GuestLab, LabDisk, tool

SIZE = 256 * MIB
WRITES = 40


@dataclass(frozen=True)
class Cost:
    """One full and one incremental backup. Times in seconds, the rest in bytes."""

    full_s: float
    full_stored: int
    incremental_s: float
    incremental_stored: int
    dirty: int | None = None
    fetched: int | None = None
    audited: int | None = None


@contextmanager
def machine(lab: GuestLab, name: str, folder: str) -> Iterator[Guest]:
    """A running guest with the test image as its disk."""
    raw, path = os.path.join(folder, f"{name}.raw"), os.path.join(folder, f"{name}.qcow2")
    make_image(raw, SIZE)
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    os.unlink(raw)
    with lab.guest(name, [LabDisk(dev="vda", path=path, format="qcow2")], options={"agent": "no"}) as guest:
        yield guest
    os.unlink(path)


def scatter(guest: Guest, seed: int) -> None:
    """Writes of 4 KiB at distinct places, each in a 64 KiB of its own."""
    dice = random.Random(seed)
    places = " ".join(str(block * 16 + dice.randrange(16)) for block in dice.sample(range(SIZE // 65536), WRITES))
    code, said = guest.run(
        f"for at in {places}; do dd if=/dev/urandom of=/dev/vda bs=4096 count=1 seek=$at conv=notrunc; done; sync"
    )
    if code:
        raise RuntimeError(said)


def dirty_bytes(guest: Guest) -> int:
    """What the bitmap of the last backup counts now."""
    import libvirt_qemu

    nodes = json.loads(libvirt_qemu.qemuMonitorCommand(guest.domain(), '{"execute":"query-named-block-nodes"}', 0))
    bitmaps = [bitmap for node in nodes["return"] for bitmap in node.get("dirty-bitmaps", ())]
    return sum(one["count"] for one in bitmaps if one["name"].startswith("graincopy-") and one["recording"])


def graincopy(lab: GuestLab, folder: str, seed: int) -> Cost:
    """Both backups, by whole commands; stored is what the repository grew by, everything in it included."""
    scene = Scene(lab, os.path.join(folder, "graincopy"))
    with machine(lab, "own", folder) as guest:
        full_s, _ = timed(lambda: scene.run("backup", "vm:own"))
        full = tree_size(scene.repo)
        scatter(guest, seed)
        dirty = dirty_bytes(guest)
        incremental_s, point = timed(lambda: scene.run("backup", "vm:own"))
    (disk,) = point["disks"]
    assert disk["change_map"] == "bitmap"
    stored = tree_size(scene.repo) - full
    return Cost(full_s, full, incremental_s, stored, dirty, disk["read_bytes"], disk["audit_bytes"])


def virtnbdbackup(lab: GuestLab, folder: str, seed: int) -> Cost:
    """The same by virtnbdbackup, compressed (lz4), its socket and scratch file in ``folder``."""
    to = os.path.join(folder, "virtnbdbackup")

    def run(level: str) -> None:
        (libvirtd, *_) = lab.processes("libvirtd")  # it takes only the usual address: that of the lab's namespace
        command = ["nsenter", "--mount", "--target", str(libvirtd), "virtnbdbackup", "-n", "-z"]
        command += ["-U", "qemu:///system", "-d", "peer", "-l", level, "-o", to]
        command += ["-S", folder, "-f", os.path.join(folder, "peer.nbd")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)

    with machine(lab, "peer", folder) as guest:
        full_s, _ = timed(lambda: run("full"))
        full = stored_in(to)
        scatter(guest, seed)
        incremental_s, _ = timed(lambda: run("inc"))
    return Cost(full_s, full, incremental_s, stored_in(to) - full)


def stored_in(folder: str) -> int:
    """Bytes of a backup, without the copies of the lab's kernel and initramfs: no usual machine has them outside."""
    boot = [name for name in os.listdir(folder) if name.startswith(("vmlinuz", "initrd"))]
    return tree_size(folder) - sum(os.path.getsize(os.path.join(folder, name)) for name in boot)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)"""
    begun = time.monotonic()
    result = work()
    return time.monotonic() - begun, result


def row(who: str, costs: list[Cost]) -> str:
    """One line of the table: medians."""

    def middle(figure: str, unit: float, digits: int) -> str:
        values = [getattr(cost, figure) for cost in costs]
        return "-" if None in values else f"{statistics.median(values) / unit:.{digits}f} {'s' if unit == 1 else 'MB'}"

    return (
        f"| {who} | {len(costs)} | {middle('full_s', 1, 1)} | {middle('full_stored', 1e6, 1)} |"
        f" {middle('incremental_s', 1, 1)} | {middle('dirty', 1e6, 2)} | {middle('fetched', 1e6, 2)} |"
        f" {middle('audited', 1e6, 2)} | **{middle('incremental_stored', 1e6, 2)}** |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    wanted = parser.parse_args()
    print("| | runs | full | stored | incremental | dirty | fetched | audited | stored |")
    print("|---|---|---|---|---|---|---|---|---|")
    peers = [("graincopy", graincopy)]
    if shutil.which("virtnbdbackup"):
        peers.append(("virtnbdbackup -z", virtnbdbackup))
    with GuestLab() as lab:
        for who, work in peers:
            costs = []
            for seed in range(wanted.runs):
                with tempfile.TemporaryDirectory(prefix="bench-kvm-", dir="/var/tmp") as folder:
                    os.makedirs(os.path.join(folder, "graincopy"))
                    costs.append(work(lab, folder, seed))
            print(row(who, costs), flush=True)


if __name__ == "__main__":
    main()
