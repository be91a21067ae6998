"""Running guests, backed up again and again: is every restore point one instant, and how long do guests stand still?

    python bench/kvm_instants.py [POINTS]      20 by default; needs root and what tests/kvm needs

A guest writes numbered, checksummed records to two disks on two XFS volumes in turn while POINTS backups run; every
point is restored and looked at. Once straight onto the disks without an agent, once in ext4 with one. Prints a table
in Markdown for docs/kvm.md.
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


def main(arguments: list[str]) -> None:
    """Both rows."""
    points = int(arguments[0]) if arguments else 20
    with GuestLab() as lab, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(store(os.path.join(lab.folder, name))) for name in ("ds1", "ds2"))
        print("| consistency | points | one instant | need a replay | guest stood still, median | longest |")
        print("|---|---|---|---|---|---|")
        for agent in (False, True):
            print(run(lab, (first, second), points, agent=agent), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
