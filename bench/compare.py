"""graincopy beside restic, borg and cp on the same 1 GiB image in the same run: a table, and JSON.

Needs root, restic, borgbackup, xfsprogs and e2fsprogs. Takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from lab import (
    GIB,
    MIB,
    Measured,
    empty,
    machine,
    measure,
    median,
    mounted,
    repeat,
    run,
    scatter,
    scratch,
    tree_size,
)

GRAINCOPY = [os.path.join(os.path.dirname(sys.executable), "graincopy")]
ENV = {"GRAINCOPY_PASSPHRASE": "bench", "RESTIC_PASSWORD": "bench", "BORG_PASSPHRASE": "bench"}
BORG_ENV = {"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes", "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}


# cold first: the repositories of the last one are what the other rows go on with
FULL = {"full backup, image not in the page cache": True, "full backup, image in the page cache": False}


class Bench:
    """The places, and the rows of the table."""

    def __init__(self, folder: str, datastore: str, times: int) -> None:
        self.folder, self.times = folder, times
        self.image = os.path.join(datastore, "disk.raw")
        self.storage = (self.image, os.path.join(folder, "datastore.img"))  # the file, and what its file system lies in
        self.repo = os.path.join(folder, "graincopy-repo")
        self.restic = os.path.join(folder, "restic-repo")
        self.borg = os.path.join(folder, "borg-repo")
        self.rows: list[dict[str, object]] = []
        os.environ.update(ENV, **BORG_ENV, GRAINCOPY_REPO=self.repo, XDG_CACHE_HOME=os.path.join(folder, "cache"))
        os.environ["BORG_BASE_DIR"] = os.path.join(folder, "borg-base")

    def row(self, what: str, who: str, runs: list[Measured], **more: object) -> Measured:
        """Add a line to the table."""
        middle = median(runs)
        figures = {"wall_s": round(middle.wall, 3), "cpu_s": round(middle.cpu, 3), "peak_mib": middle.memory // MIB}
        self.rows.append({"what": what, "who": who, "runs": len(runs), **figures, **more})
        extra = ", ".join(f"{name} {value}" for name, value in more.items())
        times = f"wall {middle.wall:6.2f} s  cpu {middle.cpu:6.2f} s  peak {middle.memory // MIB:4} MiB"
        print(f"{what:30} {who:10} {times}  {extra}", flush=True)
        return middle

    # --- the contestants --------------------------------------------------------------------------

    def graincopy(self, *words: str, cold: Sequence[str] = ()) -> Measured:
        """One graincopy command, measured."""
        return measure([*GRAINCOPY, *words], cold=cold)

    def report(self, *words: str) -> dict[str, object]:
        """One graincopy command and its JSON."""
        return json.loads(run(*GRAINCOPY, *words, "--json"))  # type: ignore[no-any-return]

    def new_graincopy(self, _number: int = 0) -> None:
        """An empty repository, nothing left on the storage."""
        if os.path.exists(self.repo):
            empty(os.path.join(os.path.dirname(self.image), ".graincopy"))
        empty(self.repo)
        run(*GRAINCOPY, "init")

    def new_restic(self, _number: int = 0) -> None:
        """An empty restic repository, version 2."""
        empty(self.restic)
        run("restic", "-q", "-r", self.restic, "init", "--repository-version", "2")

    def new_borg(self, _number: int = 0) -> None:
        """An empty borg repository."""
        empty(self.borg)
        run("borg", "init", "-e", "repokey-blake2", self.borg)

    def restic_backup(self, *, cold: Sequence[str] = ()) -> Measured:
        """One restic backup of the image."""
        return measure(["restic", "--no-cache", "-q", "-r", self.restic, "backup", self.image], cold=cold)

    def borg_backup(self, *, cold: Sequence[str] = ()) -> Measured:
        """One borg backup of the image."""
        chunker = ["--chunker-params", "fixed,4194304", "-C", "zstd,1", "--sparse", "--files-cache", "disabled"]
        return measure(["borg", "create", *chunker, f"{self.borg}::{{utcnow:%H%M%S%f}}", self.image], cold=cold)

    def borg_restore(self, where: str) -> Measured:
        """Extract the last archive."""
        name = run("borg", "list", "--last", "1", "--short", self.borg).strip()
        os.makedirs(where, exist_ok=True)
        os.chdir(where)
        return measure(["borg", "extract", "--sparse", f"{self.borg}::{name}"])


def full_backup(bench: Bench, what: str, *, cold: bool) -> None:
    """Everything for the first time; ``cold``: the image has to come from the disk, as in most nights it has."""
    out = os.path.join(bench.folder, "cp.raw")
    evicted = bench.storage if cold else ()
    cp = ["cp", "--sparse=always", "--reflink=never", bench.image, out]
    bench.row(what, "cp", repeat(bench.times, lambda _: empty(out), lambda: measure(cp, cold=evicted)))
    durable = ["sh", "-c", 'cp --sparse=always --reflink=never "$0" "$1" && sync "$1"', bench.image, out]
    bench.row(what, "cp + fsync", repeat(bench.times, lambda _: empty(out), lambda: measure(durable, cold=evicted)))
    empty(out)
    runs = repeat(bench.times, bench.new_graincopy, lambda: bench.graincopy("backup", bench.image, cold=evicted))
    bench.row(what, "graincopy", runs, stored_mib=round(tree_size(bench.repo) / MIB, 1))
    runs = repeat(bench.times, bench.new_restic, lambda: bench.restic_backup(cold=evicted))
    bench.row(what, "restic", runs, stored_mib=round(tree_size(bench.restic) / MIB, 1))
    runs = repeat(bench.times, bench.new_borg, lambda: bench.borg_backup(cold=evicted))
    bench.row(what, "borg", runs, stored_mib=round(tree_size(bench.borg) / MIB, 1))


def incremental(bench: Bench) -> None:
    """40 scattered writes of 4 KiB, then each backs up once more; and back again."""
    peers: list[tuple[str, str, Callable[[], Measured]]] = [
        ("graincopy", bench.repo, lambda: bench.graincopy("backup", bench.image)),
        ("restic", bench.restic, bench.restic_backup),
        ("borg", bench.borg, bench.borg_backup),
    ]
    grown: dict[str, list[int]] = {}
    runs: dict[str, list[Measured]] = {}
    for number in range(bench.times):
        scatter(bench.image, 40, 100 + number)
        for who, repository, backup in peers:
            before = tree_size(repository)
            runs.setdefault(who, []).append(backup())
            grown.setdefault(who, []).append(tree_size(repository) - before)
    for who, measured in runs.items():
        bench.row("40 scattered 4 KiB writes", who, measured, stored_kb=statistics.median(grown[who]) // 1000)
    scatter(bench.image, 40, 99)
    disk = bench.report("backup", bench.image)["disks"][0]  # type: ignore[index]
    print(f"    dirty {disk['dirty_bytes']}, read {disk['read_bytes']}, audit {disk['audit_bytes']} bytes")
    bench.rows.append({"what": "bytes of one incremental", "who": "graincopy", **disk})


def locked(bench: Bench) -> None:
    """The same without snapshots: everything is read, only what differs is stored."""
    copy = os.path.join(bench.folder, "plain.raw")
    run("cp", "--sparse=always", "--reflink=never", bench.image, copy)
    run(*GRAINCOPY, "backup", copy)
    grown: list[int] = []

    def prepare(number: int) -> None:
        scatter(copy, 40, 200 + number)
        grown.append(-tree_size(bench.repo))

    def backup() -> Measured:
        measured = bench.graincopy("backup", copy)
        grown[-1] += tree_size(bench.repo)
        return measured

    runs = repeat(bench.times, prepare, backup)
    bench.row("the same, locked", "graincopy", runs, stored_kb=statistics.median(grown) // 1000)
    empty(copy)


def nothing_changed(bench: Bench) -> None:
    """A backup of what did not change, on 1 GiB and on 1 TiB with 10 GiB allocated."""
    runs = repeat(bench.times, lambda _: None, lambda: bench.graincopy("backup", bench.image))
    bench.row("nothing changed, 1 GiB", "graincopy", runs)
    report = bench.report("backup", bench.image)
    assert report["disks"][0]["read_bytes"] == 0  # type: ignore[index]
    big = os.path.join(os.path.dirname(bench.image), "big.raw")
    with open(big, "wb") as file:
        file.truncate(1 << 40)
        piece = os.urandom(MIB)
        for number in range(160):
            file.seek(number * ((1 << 40) // 160) // MIB * MIB)
            for _ in range(64):
                file.write(piece)
    run(*GRAINCOPY, "backup", big)
    runs = repeat(bench.times, lambda _: None, lambda: bench.graincopy("backup", big))
    bench.row("nothing changed, 1 TiB", "graincopy", runs)
    empty(big)


def restores(bench: Bench) -> None:
    """Back in place after 40 writes, and whole to a new file."""

    def disturb(number: int) -> None:
        """A fresh restore point, then 40 writes to take back."""
        run(*GRAINCOPY, "backup", bench.image)
        scatter(bench.image, 40, 300 + number)

    bench.report("backup", bench.image)
    runs = repeat(bench.times, disturb, lambda: bench.graincopy("restore", "latest", "--in-place"))
    point = str(bench.report("backup", bench.image)["restore_point"])
    scatter(bench.image, 40, 399)
    report = bench.report("restore", point, "--in-place")["disks"][0]  # type: ignore[index]
    grains = -(-report["written_bytes"] // 65536)
    bench.row("restore of 40 writes", "graincopy", runs, written_grains=grains)
    out = os.path.join(bench.folder, "out")
    run(*GRAINCOPY, "restore", point, "--to", out)
    run("cmp", bench.image, os.path.join(out, os.path.basename(bench.image)))
    restic = ["restic", "--no-cache", "-q", "-r", bench.restic, "restore", "latest", "--target", out]
    contestants: list[tuple[str, Callable[[], Measured]]] = [
        ("graincopy", lambda: bench.graincopy("restore", point, "--to", out)),
        ("restic", lambda: measure(restic)),
        ("borg", lambda: bench.borg_restore(out)),
    ]
    turns: dict[str, list[Measured]] = {}
    for _ in range(bench.times):  # in turn: the machine is not the same from one minute to the next
        for who, command in contestants:
            turns.setdefault(who, []).extend(repeat(1, lambda _: empty(out), command))
            os.chdir("/")
    for who, measured in turns.items():
        bench.row("restore to a new file", who, measured)
    empty(out)


def floor(bench: Bench) -> None:
    """What nobody can go below: the image in memory through the libraries alone, one thread for each processor."""
    for what in ("zstd", "zstd, BLAKE3, AES-GCM"):
        walls = [libraries_alone(bench.image, what.split(", "), os.cpu_count() or 1) for _ in range(bench.times)]
        print(f"{what} alone, in memory: {statistics.median(walls):.2f} s")
        bench.rows.append({"what": "floor", "who": what, "wall_s": round(statistics.median(walls), 3)})


def libraries_alone(path: str, steps: Sequence[str], threads: int) -> float:
    """Seconds that ``threads`` threads need to put every grain that is not zero through ``steps``."""
    import zstandard
    from blake3 import blake3
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    with open(path, "rb") as file:
        content = memoryview(file.read())
    grains = [content[at : at + 65536] for at in range(0, len(content), 65536) if any(content[at : at + 64])]

    def work(part: list[memoryview]) -> None:
        zstd, cipher = zstandard.ZstdCompressor(level=1), AESGCM(bytes(32))
        for grain in part:
            if "BLAKE3" in steps:
                blake3(grain).digest()
            packed = zstd.compress(grain)
            if "AES-GCM" in steps:
                cipher.encrypt(bytes(12), packed if len(packed) < len(grain) else grain, None)

    workers = [threading.Thread(target=work, args=(grains[first::threads],)) for first in range(threads)]
    begun = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begun


def freeze_window(bench: Bench) -> None:
    """Two LUNs under writers' datastores, frozen and cloned together."""
    with ExitStack() as held:
        disks = []
        for number in (1, 2):
            lun = os.path.join(os.path.dirname(bench.image), f"lun{number}.img")
            point = held.enter_context(mounted(bench.folder, f"ds{number}", "ext4" if number == 1 else "xfs", GIB, lun))
            disks.append(os.path.join(point, "disk.raw"))
            with open(disks[-1], "wb") as file:
                file.write(os.urandom(64 * MIB))
        freezes, extents = [], []
        for number in range(max(5, bench.times)):
            for disk in disks:
                scatter(disk, 200, 400 + number)
            report = bench.report("backup", *disks)
            freezes.append(report["freeze_ms"])
        volumes = json.loads(run(*GRAINCOPY, "volumes", *disks, "--json"))
        extents = [volume["source"]["extents"] for volume in volumes]
    print(f"freeze window, 2 LUNs of {extents} extents: {sorted(freezes)} ms, median {statistics.median(freezes)} ms")
    bench.rows.append(
        {
            "what": "freeze window of 2 LUNs",
            "who": "graincopy",
            "freeze_ms": statistics.median(freezes),
            "extents": extents,
        }
    )


def start_up(bench: Bench) -> None:
    """How soon it answers."""
    bench.row("--help", "graincopy", repeat(5, lambda _: None, lambda: bench.graincopy("--help")))
    bench.row(
        "points (opens the repository)", "graincopy", repeat(5, lambda _: None, lambda: bench.graincopy("points"))
    )


def ratios(rows: list[dict[str, object]]) -> None:
    """The figures that were promised, as ratios of medians in this run."""
    table = {(row["what"], row["who"]): row for row in rows}

    def ratio(what: str, figure: str, peer: str, limit: float, mine: str = "") -> None:
        own, other = table[mine or what, "graincopy"][figure], table[what, peer][figure]
        value = float(own) / float(other)  # type: ignore[arg-type]
        verdict = "ok" if value <= limit else "MISSED"
        print(f"  {mine or what}: {figure} {value:.2f} × {peer} (wanted ≤ {limit}) {verdict}")
        rows.append({"what": mine or what, "figure": figure, "peer": peer, "ratio": round(value, 3), "wanted": limit})

    scattered, back = "40 scattered 4 KiB writes", "restore to a new file"
    for full in FULL:
        ratio(full, "wall_s", "restic", 0.4)
        ratio(full, "wall_s", "borg", 0.5)
        ratio(full, "wall_s", "cp", 1.6)
        ratio(full, "cpu_s", "restic", 0.35)
        ratio(full, "stored_mib", "restic", 1.05)
    ratio(scattered, "wall_s", "restic", 0.2)
    ratio(back, "wall_s", "restic", 0.5)
    ratio(back, "wall_s", "restic", 0.15, "restore of 40 writes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="measured runs of each (default 3)")
    parser.add_argument("--results", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "results"))
    wanted = parser.parse_args()
    print(machine())
    with scratch() as folder, mounted(folder, "datastore", "xfs", 40 * GIB) as datastore:
        bench = Bench(folder, datastore, wanted.runs)
        run(sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "lab.py"), bench.image)
        for what, cold in FULL.items():
            full_backup(bench, what, cold=cold)
        for part in (incremental, locked, nothing_changed, restores, freeze_window, start_up, floor):
            part(bench)
        print("Ratios of medians:")
        ratios(bench.rows)
    os.makedirs(wanted.results, exist_ok=True)
    with open(os.path.join(wanted.results, "compare.json"), "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    main()
