"""Live views: first read, opening among many restore points, the split between S and a slow medium, memory.

Needs root and xfsprogs. Takes about three minutes, one of them reading through a throttle of 10 MB/s. Every figure is
taken in a process of its own: the part behind ``--child`` is what it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from lab import GIB, MIB, empty, machine, mounted, run, scatter, scratch

GRAINCOPY = [os.path.join(os.path.dirname(sys.executable), "graincopy")]
RATE = 10e6  # bytes per second
READERS = 8


# --- the measured processes -----------------------------------------------------------------------


def child(what: str, repo: str, arguments: list[str]) -> dict[str, object]:
    """What one measured process does; it answers in JSON."""
    from graincopy.app.settings import read_settings
    from graincopy.app.viewing_core import opened_view
    from graincopy.app.wiring import wire

    hybrid = "medium" not in arguments
    wiring = wire(read_settings(None, repo))
    if "throttled" in arguments:
        wiring = throttled(wiring)
    values = {"point": arguments[0], "medium_only": not hybrid, "trust_map": "trust" in arguments}
    with opened_view(wiring, values) as view:
        if what == "first":
            view.disks[0].readinto(0, memoryview(bytearray(4096)))
            return {"now": time.time()}
        view.wait_settled(60)
        return {"whole": whole, "readers": readers, "growth": growth}[what](view)


def throttled(wiring):  # type: ignore[no-untyped-def]
    """``wiring`` whose medium lets RATE through."""
    from graincopy.app.host import SystemClock
    from graincopy.media.wrappers import Throttled

    class Slow(type(wiring)):  # type: ignore[misc]
        def medium(self, url: str, *, create: bool = False):  # type: ignore[no-untyped-def]
            return Throttled(super().medium(url, create=create), SystemClock(), RATE)

    return Slow(**{name: getattr(wiring, name) for name in wiring.__struct_fields__})


def whole(view) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Read all of the disk in order, 1 MiB at a time."""
    disk, buffer = view.disks[0], memoryview(bytearray(MIB))
    fetched, begun = view.fetched_bytes, time.monotonic()
    for offset in range(0, disk.size, MIB):
        disk.readinto(offset, buffer)
    seconds = time.monotonic() - begun
    report = view.report()[0]
    split = {"local": report.local_bytes, "medium": report.medium_bytes, "zero": report.zero_bytes}
    return {"seconds": seconds, "fetched": view.fetched_bytes - fetched, **split, "near": report.near}


def readers(view) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Eight threads read 1 MiB each at random places, 2 GiB in all."""

    def work(number: int) -> None:
        dice, buffer = random.Random(number), memoryview(bytearray(MIB))
        for _ in range(2 * GIB // MIB // READERS):
            view.disks[0].readinto(dice.randrange(view.disks[0].size // MIB) * MIB, buffer)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(READERS)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"mb_per_s": round(2 * GIB / (time.monotonic() - begun) / 1e6), "peak_mib": peak_mib()}


def growth(view) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """A million reads of 4 KiB at random places in 80 MiB, more than is remembered; memory after each tenth of them."""
    dice, buffer = random.Random(1), memoryview(bytearray(4096))
    seen, begun = [], time.monotonic()
    for _ in range(10):
        for _ in range(100_000):
            view.disks[0].readinto(dice.randrange(80 * MIB // 4096) * 4096, buffer)
        seen.append(resident_mib())
    return {"reads_per_s": round(1e6 / (time.monotonic() - begun)), "first_mib": seen[0], "last_mib": seen[-1]}


def peak_mib() -> int:
    """The most memory that this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def resident_mib() -> int:
    """The memory that this process has now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // MIB


# --- the bench ------------------------------------------------------------------------------------


class Bench:
    """The places, and the rows of the table."""

    def __init__(self, folder: str, datastore: str, times: int) -> None:
        self.folder, self.datastore, self.times = folder, datastore, times
        self.repo = os.path.join(folder, "repo")
        self.rows: list[dict[str, object]] = []
        os.environ.update(
            GRAINCOPY_PASSPHRASE="bench", GRAINCOPY_REPO=self.repo, XDG_CACHE_HOME=os.path.join(folder, "cache")
        )
        run(*GRAINCOPY, "init")

    def backup(self, path: str) -> str:
        """A restore point of ``path``; its id."""
        return str(json.loads(run(*GRAINCOPY, "backup", path, "--json"))["restore_point"])

    def child(self, what: str, *arguments: str) -> dict[str, object]:
        """One measured process."""
        done = subprocess.run(
            [sys.executable, os.path.abspath(__file__), "--child", what, self.repo, *arguments],
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    def row(self, what: str, **figures: object) -> None:
        """Add a line to the table."""
        self.rows.append({"what": what, **figures})
        print(f"{what:44} {', '.join(f'{name} {value}' for name, value in figures.items())}", flush=True)

    def first_read(self, point: str, *how: str) -> float:
        """Seconds from the start of the process to its first read, the median of several."""
        seen = []
        for _ in range(max(3, self.times)):
            begun = time.time()
            seen.append(float(self.child("first", point, *how)["now"]) - begun)  # type: ignore[arg-type]
        return round(statistics.median(seen), 3)


def opening(bench: Bench) -> None:
    """The first read of a 1 TiB image, with one restore point and with hundreds."""
    big = os.path.join(bench.datastore, "big.raw")
    with open(big, "wb") as file:
        file.truncate(1 << 40)
        piece = os.urandom(MIB)
        for number in range(1024):
            file.seek(number << 30)
            file.write(piece)
    point = bench.backup(big)
    bench.row(
        "first read of 1 TiB, one restore point", hybrid_s=bench.first_read(point), latest_s=bench.first_read("latest")
    )
    points = os.path.join(bench.repo, "points")
    multiply(bench, point, 300)
    bench.row(
        f"first read of 1 TiB, {len(os.listdir(points))} restore points",
        hybrid_s=bench.first_read(point),
        latest_s=bench.first_read("latest"),
    )
    empty(big)


def multiply(bench: Bench, point: str, count: int) -> None:
    """``count`` more restore points like ``point``."""
    from graincopy.app.settings import read_settings
    from graincopy.app.wiring import wire

    repository = wire(read_settings(None, bench.repo)).repository()
    original = repository.find_point(point)
    for number in range(count):
        made = repository.open_run("backup", original.workload)
        values = {name: getattr(original, name) for name in original.__struct_fields__}
        repository.publish(type(original)(**(values | {"id": made.id, "sequence": original.sequence - number - 1})))


def split(bench: Bench) -> None:
    """A 1 GiB image of which 1 % has changed, its medium throttled: the medium alone, and with S."""
    image = os.path.join(bench.datastore, "disk.raw")
    run(sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "lab.py"), image)
    point = bench.backup(image)
    scatter(image, 160, 5)  # of 16384 grains
    slow = bench.child("whole", point, "throttled", "medium")
    fast = bench.child("whole", point, "throttled")
    trusting = bench.child("whole", point, "throttled", "trust")
    for name, one in (("medium alone", slow), ("hybrid", fast), ("hybrid, map trusted", trusting)):
        figures = {"seconds": round(one["seconds"], 2), "fetched_mib": round(one["fetched"] / MIB, 1)}  # type: ignore[operator,call-overload]
        bench.row(f"1 GiB through 10 MB/s, {name}", **figures)
    share = fast["fetched"] / slow["fetched"]  # type: ignore[operator]
    bench.row("share of the hybrid", fetched=round(share, 4), seconds=round(fast["seconds"] / slow["seconds"], 4))  # type: ignore[operator]
    for name, how in (("medium", ("medium",)), ("hybrid", ()), ("hybrid, map trusted", ("trust",))):
        one = bench.child("whole", point, *how)
        bench.row(f"1 GiB unthrottled, {name}", mb_per_s=round(GIB / one["seconds"] / 1e6))  # type: ignore[operator]
    for how in ("medium", "hybrid"):
        bench.row(f"8 readers of 1 MiB, {how}", **bench.child("readers", point, how))
        bench.row(f"a million reads of 4 KiB, {how}", **bench.child("growth", point, how))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="measured runs of each (default 3)")
    parser.add_argument("--results", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "results"))
    wanted = parser.parse_args()
    print(machine())
    with scratch() as folder, mounted(folder, "datastore", "xfs", 40 * GIB) as datastore:
        bench = Bench(folder, datastore, wanted.runs)
        parts: tuple[Callable[[Bench], None], ...] = (opening, split)
        for part in parts:
            part(bench)
    os.makedirs(wanted.results, exist_ok=True)
    with open(os.path.join(wanted.results, "views_hybrid.json"), "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        json.dump(child(sys.argv[2], sys.argv[3], sys.argv[4:]), sys.stdout)
    else:
        main()
