"""Back to point 3 of 10: a chain of external qcow2 snapshots, the conventional way, beside graincopy in place.

    python bench/kvm_chain.py [--runs 3]     needs root, xfsprogs, qemu-utils and what tests/kvm needs

A qcow2 disk of 256 MiB (1/4 zero, 3/8 random, 3/8 text) on XFS, its machine off. Ten times: 200 scattered 4 KiB writes
and 4 MiB in one piece. Conventionally each of them goes to an overlay of its own; with graincopy each is followed by a
backup. Then the disk goes back to what it was after the third. Every result is compared with what it must be. Prints a
table in Markdown for docs/kvm-figures.md: bytes that the processes wrote (wchar of proc(5), children included), time of
the whole command, space taken up on the datastore and on the medium afterwards, and which points are still there.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "kvm"))

from lab import GIB, MIB, make_image, mounted, tree_size
from restore_scene import Scene
from vm_lab import GuestLab, LabDisk, tool

from graincopy.core.extent import Extents
from graincopy.volumes.fiemap import read_placement

SIZE = 256 * MIB
STEPS, BACK = 10, 3


@dataclass(frozen=True)
class Cost:
    """One way back. Time in seconds, the rest in bytes."""

    seconds: float
    written: int
    datastore: int
    medium: int = 0


def counted(command: list[str], folder: str) -> tuple[float, int]:
    """Run a command to its end: seconds, and the bytes that it and its children wrote."""
    begun = time.monotonic()
    with (
        open(os.path.join(folder, "said"), "w+") as said,
        subprocess.Popen(command, cwd=folder, stdout=said, stderr=said) as process,
    ):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.monotonic() - begun
        with open(f"/proc/{process.pid}/io") as file:
            facts = dict(line.split(": ") for line in file.read().splitlines())
        if process.wait():
            said.seek(0)
            raise RuntimeError(f"{command}: {said.read()}")
    return seconds, int(facts["wchar"])


def change(path: str, step: int, folder: str) -> None:
    """What the machine writes between two points."""
    dice = random.Random(step)
    noise = os.path.join(folder, "noise")
    with open(noise, "wb") as file:
        file.write(dice.randbytes(4096))
    lines = [f"write -s {noise} {block * 4096} 4096" for block in dice.sample(range(SIZE // 4096), 200)]
    lines.append(f"write -s {noise} {dice.randrange(SIZE // MIB - 4) * MIB} {4 * MIB}")
    script = "\n".join(lines) + "\n"
    subprocess.run(["qemu-io", "-f", "qcow2", path], input=script, text=True, check=True, stdout=subprocess.DEVNULL)


def used(folder: str) -> int:
    """Bytes of the datastore that the files below ``folder`` take up: what they share counts once."""
    taken = Extents.empty()
    for at, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(at, name), "rb") as file:
                placement = read_placement(file.fileno(), os.fstat(file.fileno()).st_size)
            taken |= placement.to_volume(placement.allocated())
    return taken.total


def same(image: str, wanted: str) -> None:
    tool("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", image, wanted)


# --- the conventional ways ------------------------------------------------------------------------------


def make_chain(store: str, base: str, folder: str) -> None:
    """base.qcow2 ← s1 ← ... ← s10, and what point 3 is."""
    os.makedirs(os.path.join(store, "chain"))
    tool("cp", "--reflink=never", base, f"{store}/chain/base.qcow2")
    below = "base.qcow2"
    for step in range(1, STEPS + 1):
        above = f"s{step}.qcow2"
        tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, f"{store}/chain/{above}")
        change(f"{store}/chain/{above}", step, folder)
        below = above
    tool("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", f"{store}/chain/s{BACK}.qcow2", f"{folder}/wanted.qcow2")


CONVENTIONAL = {
    "`qemu-img convert` of s3 to a new disk": (
        ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", f"s{BACK}.qcow2", "back.qcow2"],
        "back.qcow2",
        "all, in the chain",
    ),
    "`qemu-img rebase` of s3 onto the base": (
        ["qemu-img", "rebase", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", f"s{BACK}.qcow2"],
        f"s{BACK}.qcow2",
        "3 - 10; the disk is the middle of a chain: one more overlay, or 4 - 10 are lost",
    ),
    "`qemu-img commit` of s3 into the base": (
        ["qemu-img", "commit", "-q", "-f", "qcow2", "-b", "base.qcow2", f"s{BACK}.qcow2"],
        "base.qcow2",
        "3 only: every other file is void",
    ),
    "a new overlay on s3, nothing merged": (
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", f"s{BACK}.qcow2", "back.qcow2"],
        "back.qcow2",
        "all, on the datastore; reads go through 5 files, and every merge is still to be paid",
    ),
}


def conventional(store: str, folder: str, what: str) -> Cost:
    """One way, on a clone of the chain. Nothing is deleted afterwards."""
    place = os.path.join(store, "way")
    tool("cp", "-r", "--reflink=always", f"{store}/chain", place)
    command, image, _ = CONVENTIONAL[what]
    seconds, written = counted(command, place)
    same(os.path.join(place, image), f"{folder}/wanted.qcow2")
    space = used(place)
    tool("rm", "-r", place)
    return Cost(seconds, written, space)


# --- graincopy ----------------------------------------------------------------------------------------


def graincopy(lab: GuestLab, store: str, base: str, folder: str) -> Cost:
    """In place; afterwards the next backup, which must be right and incremental."""
    place = os.path.join(store, "own")
    os.makedirs(place)
    disk = f"{place}/disk.qcow2"
    tool("cp", "--reflink=never", base, disk)
    os.makedirs(f"{folder}/graincopy")
    scene = Scene(lab, f"{folder}/graincopy")
    with lab.guest("own", [LabDisk(dev="vda", path=disk, format="qcow2")], start=False):
        scene.run("backup", "vm:own")
        for step in range(1, STEPS + 1):
            change(disk, step, folder)
            scene.run("backup", "vm:own")
        seconds, written = counted(scene.command("restore", f"latest~{STEPS - BACK}", "--in-place", "--json"), folder)
        cost = Cost(seconds, written, used(place), tree_size(scene.repo))
        same(disk, f"{folder}/wanted.qcow2")
        points = scene.run("points")
        assert len(points) == STEPS + 1, points
        after = scene.run("backup", "vm:own")
        (record,) = after["disks"]
        print(f"<!-- the backup after it: {record['change_map']}, {record['stored_bytes']} bytes stored -->")
    tool("rm", "-r", place)
    return cost


# --- the table ----------------------------------------------------------------------------------------


def row(what: str, costs: list[Cost], points: str) -> str:
    """One line: medians."""

    def middle(figure: str) -> float:
        return statistics.median(getattr(cost, figure) for cost in costs)

    sizes = " | ".join(f"{middle(figure) / 1e6:.1f} MB" for figure in ("written", "datastore", "medium"))
    return f"| {what} | {len(costs)} | {middle('seconds'):.2f} s | {sizes} | {points} |"


def measure(lab: GuestLab, runs: int, folder: str, store: str) -> None:
    make_image(f"{folder}/image.raw", SIZE)
    base = f"{store}/image.qcow2"
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", f"{folder}/image.raw", base)
    make_chain(store, base, folder)
    print("| way back to point 3 | runs | time | written | on the datastore | on the medium | points left |")
    print("|---|---|---|---|---|---|---|")
    for what, (_, _, points) in CONVENTIONAL.items():
        print(row(what, [conventional(store, folder, what) for _ in range(runs)], points), flush=True)
    costs = []
    for number in range(runs):
        own = os.path.join(folder, str(number))
        os.makedirs(own)
        os.link(f"{folder}/wanted.qcow2", f"{own}/wanted.qcow2")
        costs.append(graincopy(lab, store, base, own))
    print(row("`graincopy restore --in-place`", costs, "all, on the medium, and the undo"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    wanted = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="bench-chain-", dir="/var/tmp") as folder,
        mounted(folder, "datastore", "xfs", 8 * GIB) as store,
        GuestLab() as lab,
    ):
        measure(lab, wanted.runs, folder, store)


if __name__ == "__main__":
    main()
