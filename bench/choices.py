"""What the defaults were chosen by: grain size (on a real image) and fan-out of the grain map (in memory).

Prints two tables in Markdown; they are kept in docs/decisions/0005-grain-size-and-fan-out.md.
"""

from __future__ import annotations

import json
import os
import sys
import time

import numpy as np
from lab import GIB, MIB, empty, machine, measure, mounted, run, scatter, scratch, tree_size

from graincopy.app.host import SystemChance, SystemClock, this_process
from graincopy.media.memory import MemoryMedium
from graincopy.model.restore_point import MapRoot
from graincopy.repository.entries import Entries
from graincopy.repository.repository import Repository

GRAINCOPY = os.path.join(os.path.dirname(sys.executable), "graincopy")
CASES = ((GIB, 0, 40), (128 * GIB, 0, 20_971), (256 << 40, 0, 200_000))  # disk size, seed, scattered grains


def grain_sizes() -> None:
    """Full backup, then 40 scattered writes of 4 KiB, for each grain size."""
    print("| grain | full, s | stored, MiB | 40 writes: stored, kB | wall, s | nothing changed, s |")
    print("|---|---|---|---|---|---|")
    with scratch() as folder, mounted(folder, "datastore", "xfs", 20 * GIB) as datastore:
        image, repo = os.path.join(datastore, "disk.raw"), os.path.join(folder, "repo")
        os.environ.update(GRAINCOPY_REPO=repo, GRAINCOPY_PASSPHRASE="bench")
        run(sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "lab.py"), image)
        for number, grain in enumerate(("64K", "128K", "256K", "512K", "1M", "4M")):
            empty(repo)
            run(GRAINCOPY, "init", "--grain-size", grain)
            full = measure([GRAINCOPY, "backup", image])
            stored = tree_size(repo)
            scatter(image, 40, number)
            more = measure([GRAINCOPY, "backup", image])
            grown = tree_size(repo) - stored
            idle = measure([GRAINCOPY, "backup", image])
            times = f"{more.wall:.2f} | {idle.wall:.2f}"
            print(f"| {grain} | {full.wall:.2f} | {stored / MIB:.1f} | {grown // 1000} | {times} |", flush=True)


def fan_outs() -> None:
    """Index written by scattered changes, and the time it takes, for each fan-out at 64 KiB grains."""
    print("| fan-out | disk | grains changed | index written, kB | s | diff, s |")
    print("|---|---|---|---|---|---|")
    for fan_out in (16, 32, 64, 128, 256):
        for size, seed, count in CASES:
            written, seconds, diff = scattered_update(fan_out, size, seed, count)
            disk = f"{size // GIB} GiB" if size < 1 << 40 else f"{size >> 40} TiB"
            print(f"| {fan_out} | {disk} | {count} | {written // 1000} | {seconds:.2f} | {diff:.2f} |")


def scattered_update(fan_out: int, size: int, seed: int, count: int) -> tuple[int, float, float]:
    """Bytes of map written, seconds for the update and for the diff, on a map that is full where it can be."""
    dice = np.random.default_rng(seed)
    repository = Repository.create(
        MemoryMedium(),
        passphrase=None,
        fan_out=fan_out,
        clock=SystemClock(),
        chance=SystemChance(),
        owner=this_process(),
    )
    session = repository.session(repository.open_run("bench", None))
    grains = size // repository.grain_size
    root = MapRoot()
    if size <= 128 * GIB:
        root = session.update_map(root, grains, random_entries(dice, np.arange(grains)))
        session.finish()
    before, begun = session.metadata_bytes, time.perf_counter()
    changed = np.unique(dice.integers(0, grains, count))
    newer = session.update_map(root, grains, random_entries(dice, changed))
    session.finish()
    seconds, begun = time.perf_counter() - begun, time.perf_counter()
    differing = repository.map.diff(root, newer)
    assert differing.total == len(changed)
    return session.metadata_bytes - before, seconds, time.perf_counter() - begun


def random_entries(dice: np.random.Generator, grains: np.ndarray) -> Entries:  # type: ignore[type-arg]
    """``grains`` with ids like those of chunks."""
    return Entries.chunks(grains.astype(np.int64), dice.integers(0, 256, (len(grains), 32), dtype=np.uint8))


if __name__ == "__main__":
    print(json.dumps({"machine": machine()}))
    fan_outs()
    grain_sizes()
