"""Running guests, backed up again and again: is every restore point one instant, and how long do guests stand still?

    python bench/kvm_instants.py [POINTS]      20 by default; needs root and what tests/kvm needs

A guest writes numbered, checksummed records to two disks on two XFS volumes in turn while POINTS backups run; every
point is restored and looked at. Once straight onto the disks without an agent, once in ext4 with one; then both kinds
of guest as a set, each with one disk that is snapshotted inside QEMU and one that is cloned, and somebody who writes to
one guest and the other in turn. Prints a table in Markdown for docs/kvm-figures.md.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "kvm"))

from restore_scene import Scene
from test_set_instants import must_be_one_instant, take_points
from test_vm_backup import SLOTS, Command, store, writing
from vm_lab import GuestLab, file_in_image, needs_replay, one_instant, read_records


def run(lab: GuestLab, stores: tuple[str, str], points: int, *, agent: bool) -> str:
    """One row: what was seen over ``points`` backups of one guest."""
    folder = Path(tempfile.mkdtemp(prefix="bench-kvm-"))
    name = "agent" if agent else "plain"
    try:
        graincopy = Command(folder, lab.uri)
        with writing(lab, stores, name, fs=agent):
            taken = [graincopy.run("backup", f"vm:{name}") for _ in range(points)]
        good = replays = 0
        for back in range(points):
            to = folder / f"out{back}"
            graincopy.run("restore", f"latest~{back}", "--to", str(to))
            images = [str(to / f"{name}-{dev}.raw") for dev in ("vda", "vdb")]
            first, second = (
                read_records(file_in_image(image, "/records") if agent else Path(image).read_bytes()[: SLOTS * 4096])
                for image in images
            )
            good += one_instant(first, second, SLOTS)
            replays += agent and any(needs_replay(image) for image in images)
            shutil.rmtree(to)
        freezes = sorted(point["freeze_ms"] for point in taken)
        levels = ", ".join(sorted({point["consistency"] for point in taken}))
        middle, most = statistics.median(freezes), freezes[-1]
        replayed = str(replays) if agent else "-"
        return f"| {levels} | {points} | {good} | {replayed} | {middle:.0f} ms | {most:.0f} ms |"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_set(lab: GuestLab, points: int) -> str:
    """One row: the same for a set of two guests. A point that is not one instant in every way does not count."""
    with tempfile.TemporaryDirectory(prefix="bench-kvm-") as folder:
        scene = Scene(lab, folder)
        freezes = sorted(take_points(scene, points))
        good, last = 0, (0, 0)
        for back in reversed(range(points)):
            try:
                last = must_be_one_instant(scene, back, *last)
            except AssertionError as failure:
                print(f"<!-- latest~{back}: {failure} -->")
            else:
                good += 1
        middle, most = statistics.median(freezes), freezes[-1]
        return f"| set: crash and file-system | {points} | {good} | {points - good} | {middle:.0f} ms | {most:.0f} ms |"


def main(arguments: list[str]) -> None:
    """All rows."""
    points = int(arguments[0]) if arguments else 20
    with GuestLab() as lab, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(store(os.path.join(lab.folder, name))) for name in ("ds1", "ds2"))
        print("| consistency | points | one instant | need a replay | guest stood still, median | longest |")
        print("|---|---|---|---|---|---|")
        for agent in (False, True):
            print(run(lab, (first, second), points, agent=agent), flush=True)
        print(run_set(lab, points), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
