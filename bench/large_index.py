"""What a large repository costs a command that needs little of it: one file out of a small disk, wall and memory.

The index is made to list millions of pieces more than there are (16 million grains of 64 KiB are a full TiB). Measured
are the first command, which has to read the index from the medium, and those after it, which have it from the cache of
this host. ``GRAINCOPY=…/graincopy`` measures another graincopy. ``views_files.py --others`` does it beside peers.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys

import numpy as np
from lab import GIB, MIB, Measured, machine, measure, median, mounted, run, scratch

from graincopy.app import host
from graincopy.media.directory import DirectoryMedium
from graincopy.repository import segments
from graincopy.repository.format_segment import Rows
from graincopy.repository.records import PackRef, PieceKind
from graincopy.repository.repository import Repository

GRAINCOPY = shlex.split(os.environ.get("GRAINCOPY", "")) or [os.path.join(os.path.dirname(sys.executable), "graincopy")]
PER_PACK = 400  # pieces


def grow(path: str, count: int) -> None:
    """Add ``count`` pieces to the index of the repository at ``path``: in segments as collect writes them."""
    medium, chance = DirectoryMedium(path), host.SystemChance()
    repository = Repository.open(medium, passphrase=b"bench", clock=host.SystemClock(), chance=chance)
    dice, owner = np.random.default_rng(1), chance.token(16).hex()
    for number, start in enumerate(range(0, count, segments.SEGMENT_ROWS)):
        size = min(segments.SEGMENT_ROWS, count - start)
        packs = tuple(PackRef(chance.token(16).hex(), PieceKind.CHUNK, 16 * MIB) for _ in range(-(-size // PER_PACK)))
        at = np.arange(size, dtype=np.uint32)
        ids = dice.integers(0, 256, (size, 32), dtype=np.uint8)
        rows = Rows(packs, ids, at // PER_PACK, at % PER_PACK * 40_000, np.full(size, 40_000, np.uint32))
        segments.put_segment(medium, repository.codec, chance, segments.segment_name(owner, number), rows)


class Bench:
    """One disk with a file in it, in a repository that grows."""

    def __init__(self, folder: str, runs: int) -> None:
        self.folder, self.runs, self.rows = folder, runs, list[dict[str, object]]()
        self.image = f"{folder}/disk.raw"
        os.environ.update(GRAINCOPY_REPO=f"{folder}/repo", GRAINCOPY_PASSPHRASE="bench")
        os.environ.update(XDG_CACHE_HOME=f"{folder}/cache")
        with mounted(folder, "inside", "ext4", GIB, self.image) as tree, open(f"{tree}/wanted", "wb") as file:
            file.write(os.urandom(MIB))

    def row(self, what: str, who: str, found: Measured) -> None:
        """Add a line to the table."""
        memory = found.memory // MIB
        self.rows.append({"what": what, "who": who, "wall_s": round(found.wall, 3), "cpu_s": round(found.cpu, 3)})
        self.rows[-1]["peak_mib"] = memory
        print(f"{what:34} {who:10} wall {found.wall:7.2f} s  cpu {found.cpu:7.2f} s  {memory:6} MiB", flush=True)

    def graincopy(self, millions: int) -> None:
        """The first command after the index grew, and those after it; then a backup of nothing."""
        extract = [*GRAINCOPY, "extract", "latest", "disk.raw:/wanted", "--to", "-"]
        what = f"{millions} million pieces"
        self.row(f"{what}: first extract", "graincopy", measure(extract))
        self.row(f"{what}: extract", "graincopy", median([measure(extract) for _ in range(self.runs)]))
        again = [*GRAINCOPY, "backup", self.image]
        self.row(f"{what}: backup, same", "graincopy", median([measure(again) for _ in range(self.runs)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 16], help="pieces in the index (default 1 16)")
    parser.add_argument("--runs", type=int, default=3, help="measured runs of each (default 3)")
    parser.add_argument("--results", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "results"))
    wanted = parser.parse_args()
    print(machine())
    with scratch() as folder:
        bench, before = Bench(folder, wanted.runs), 0
        run(*GRAINCOPY, "init")
        run(*GRAINCOPY, "backup", bench.image)
        bench.graincopy(0)
        for millions in wanted.millions:
            grow(f"{folder}/repo", (millions - before) << 20)
            before = millions
            bench.graincopy(millions)
    os.makedirs(wanted.results, exist_ok=True)
    with open(os.path.join(wanted.results, "large_index.json"), "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    main()
