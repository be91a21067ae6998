"""What a guest feels of a backup to a slow medium: write latency with and without one, in pairs.

    python bench/kvm_latency.py [--pairs 5] [--rate 2.0] [--seconds 8]     needs root and what tests/kvm needs, gcc

A guest with a qcow2 disk writes 4 KiB at a time, each write durable (O_DIRECT | O_DSYNC), at places by chance: over
16 MiB, so that hardly any write is the first one to its grain, and over the whole disk, where nearly every one is and
waits until 64 KiB were copied to the scratch file. Each pair is the same seconds of that without a backup and during a
first backup onto a medium that takes RATE MB/s (media.wrappers.Throttled); which of the two is first changes. Prints
a table in Markdown for docs/kvm-figures.md: medians, and the median of the ratios of the pairs.

The medium is slow and elsewhere: what it takes is kept in memory (--medium), so that its packs are not written to the
guest's own disk in bursts of 16 MiB. --parts adds lines with T in the guest's way and nobody who reads it, to tell what
copy-before-write costs from what the backup beside it costs: until the first packs are full the medium holds nobody up,
and CPUs are short. --nice N and --workers N have it take less of them. --scratch DIR has T elsewhere, --disk DIR the
guest's disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests", "kvm"))

from restore_scene import Scene
from vm_lab import PATIENCE, Guest, GuestLab, LabDisk, make_disk, tool, wait

MIB = 1 << 20
SIZE = 128 * MIB
HOT = 16  # MiB
NAME = "busy"

WRITER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}
static int order(const void *a, const void *b) { double x = *(double *)a, y = *(double *)b; return (x > y) - (x < y); }
int main(int argc, char **argv)
{
    if (argc != 4) return 2;
    static char block[4096] __attribute__((aligned(4096)));
    static double took[1000000];
    int fd = open(argv[1], O_RDWR | O_DIRECT | O_DSYNC);
    if (fd < 0) { perror("open"); return 1; }
    unsigned long blocks = strtoul(argv[2], 0, 10) * 256, count = 0;
    double end = now() + atof(argv[3]) * 1e6;
    srand((unsigned)end);
    while (now() < end && count < 1000000) {
        memset(block, rand(), sizeof block);
        double begun = now();
        if (pwrite(fd, block, 4096, (off_t)(rand() % blocks) * 4096) != 4096) { perror("pwrite"); return 1; }
        took[count++] = now() - begun;
        usleep(1000);
    }
    qsort(took, count, sizeof *took, order);
    printf("%lu %.0f %.0f %.0f\n", count, took[count / 2], took[count * 99 / 100], took[count - 1]);
    return 0;
}
"""


@dataclass(frozen=True)
class Felt:
    """Latency of the guest's writes, microseconds."""

    writes: int
    median: float
    p99: float
    longest: float


def throttled(rate: float, arguments: list[str]) -> int:
    """graincopy with its medium behind a speed limit of ``rate`` bytes per second; its exit code."""
    from graincopy.app.host import SystemClock
    from graincopy.app.settings import Settings
    from graincopy.cli.main import run
    from graincopy.media.base import Medium
    from graincopy.media.wrappers import Throttled

    plain: Callable[..., Medium] = Settings.medium
    Settings.medium = lambda self, url, *, create=False: Throttled(  # type: ignore[method-assign]
        plain(self, url, create=create), SystemClock(), rate
    )
    return run(arguments)


def stand_back(nice: int) -> None:
    """Let others run first, in this session and beside it (sched(7), "The autogroup feature")."""
    os.nice(nice)
    with suppress(OSError), open("/proc/self/autogroup", "w") as file:
        file.write(str(nice))


class Bench:
    """A guest that has the writer, and backups of it."""

    def __init__(self, lab: GuestLab, guest: Guest, wanted: argparse.Namespace) -> None:
        self.lab, self.guest, self.wanted = lab, guest, wanted
        self.grown: list[int] = []

    def refresh(self) -> None:
        """Noise again where earlier lines wrote: what compresses well would be backed up too soon."""
        code, said = self.guest.run(f"dd if=/dev/urandom of=/dev/vdb bs=1M count=40 seek={HOT} conv=fsync")
        if code:
            raise RuntimeError(said)

    def write(self, span: int) -> Felt:
        code, said = self.guest.run(f"/run/latency /dev/vdb {span} {self.wanted.seconds}")
        if code:
            raise RuntimeError(said)
        writes, *times = said.split()
        return Felt(int(writes), *map(float, times))

    def write_during(self, backup: Callable[[Scene], AbstractContextManager[None]], span: int) -> Felt:
        """The same while ``backup`` is about."""
        with ExitStack() as held:
            folder, medium, scratch = (
                held.enter_context(tempfile.TemporaryDirectory(prefix="bench-latency-", dir=parent))
                for parent in ("/var/tmp", self.wanted.medium, self.wanted.scratch)
            )
            more = f'[qemu]\nscratch = "{scratch}"\n[backup]\nworkers = {self.wanted.workers}\n'
            held.enter_context(backup(Scene(self.lab, folder, medium=os.path.join(medium, "repo"), more=more)))
            before = taken_up(scratch)
            felt = self.write(span)
            self.grown.append(taken_up(scratch) - before)
        return felt

    @contextmanager
    def unread(self, scene: Scene) -> Iterator[None]:
        """T is there, and the backup does not get on."""
        with scene.stopped("settled", "backup", f"vm:{NAME}", "--no-checkpoint"):
            yield
        scene.run("targets", "--reap")

    @contextmanager
    def slow(self, scene: Scene) -> Iterator[None]:
        """A first backup that is being copied, and ends after the block."""
        line = [sys.executable, os.path.abspath(__file__), "--slow", str(self.wanted.rate * 1e6)]
        line += ["--nice", str(self.wanted.nice)]
        words = ["--config", scene.config, "backup", f"vm:{NAME}", "--no-checkpoint", "--json"]
        line += ["--", *words]
        with subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            wait(lambda: process.poll() is not None or has_target(self.guest), "the backup does not get on")
            if process.poll() is None:
                yield
            going = process.poll() is None
            _, said = process.communicate(timeout=10 * PATIENCE)
        if process.returncode or not going:
            raise RuntimeError(f"the backup ended with {process.returncode}, too soon: {not going}: {said.decode()}")


def has_target(guest: Guest) -> bool:
    """Whether the instant was: the guest's QEMU has a snapshot node of graincopy's."""
    import libvirt_qemu

    nodes = json.loads(libvirt_qemu.qemuMonitorCommand(guest.domain(), '{"execute":"query-named-block-nodes"}', 0))
    return any(node["drv"] == "snapshot-access" for node in nodes["return"])


def taken_up(folder: str) -> int:
    """Bytes that the files in ``folder`` take up."""
    return sum(os.stat(os.path.join(folder, name)).st_blocks * 512 for name in os.listdir(folder))


def row(bench: Bench, what: str, span: int, backup: Callable[[Scene], AbstractContextManager[None]]) -> str:
    """One line of the table."""
    bench.refresh()
    pairs: list[tuple[Felt, Felt]] = []
    bench.grown.clear()
    for number in range(bench.wanted.pairs):
        if number % 2:
            busy = bench.write_during(backup, span)
            pairs.append((bench.write(span), busy))
        else:
            pairs.append((bench.write(span), bench.write_during(backup, span)))
    calm, busy = zip(*pairs, strict=True)
    ratios = sorted(during.p99 / without.p99 for without, during in pairs)
    figures = " | ".join(
        f"{middle(calm, name):.0f} → {middle(busy, name):.0f} µs" for name in ("median", "p99", "longest")
    )
    ratio = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} - {ratios[-1]:.2f})"
    return f"| {what} | {len(pairs)} | {figures} | {ratio} | {statistics.median(bench.grown) / MIB:.1f} MiB |"


def middle(runs: Sequence[Felt], name: str) -> float:
    """The median of one figure."""
    return statistics.median(getattr(one, name) for one in runs)


@contextmanager
def machine(lab: GuestLab, parent: str = "/var/tmp") -> Iterator[Guest]:
    """A guest with the writer in /run, and 40 MiB of noise on its second disk, which lies in ``parent``."""
    with tempfile.TemporaryDirectory(prefix="bench-latency-", dir=parent) as folder:
        paths = [os.path.join(folder, name) for name in ("tools.raw", "busy.qcow2")]
        make_disk(paths[0], 16 * MIB)
        with open(os.path.join(folder, "latency.c"), "w") as file:
            file.write(WRITER)
        tool("gcc", "-O2", "-static", "-o", f"{folder}/latency", f"{folder}/latency.c")
        tool("debugfs", "-w", "-R", f"write {folder}/latency latency", paths[0])
        make_disk(paths[1], SIZE, format="qcow2", fs=False)
        disks = [LabDisk(dev="vda", path=paths[0], extra="<readonly/><shareable/>")]
        disks.append(LabDisk(dev="vdb", path=paths[1], format="qcow2"))
        with lab.guest(NAME, disks, options={"agent": "no"}) as guest:
            for command in (
                "mkdir -p /mnt/tools && mount -o ro,noload /dev/vda /mnt/tools && cp /mnt/tools/latency /run/",
                "chmod +x /run/latency && umount /mnt/tools",
                f"dd if=/dev/zero of=/dev/vdb bs=1M count={HOT} conv=fsync",
            ):
                code, said = guest.run(command)
                if code:
                    raise RuntimeError(said)
            yield guest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=2.0, help="MB/s that the medium takes (default 2)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of writing in each run (default 8)")
    parser.add_argument("--medium", default="/dev/shm", help="folder for what the slow medium takes")
    parser.add_argument("--scratch", default="/var/tmp", help="folder for T")
    parser.add_argument("--disk", default="/var/tmp", help="folder for the guest's disk")
    parser.add_argument("--nice", type=int, default=0, help="of the backup, as nice(1)")
    parser.add_argument("--workers", type=int, default=3, help="of the backup")
    parser.add_argument("--parts", action="store_true", help="also with a backup that does not read")
    parser.add_argument("--slow", type=float, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.slow:
        stand_back(wanted.nice)
        return throttled(wanted.slow, wanted.command)
    print("| writes over | pairs | median | p99 | longest | p99, median of the ratios | T grew by |")
    print("|---|---|---|---|---|---|---|")
    with GuestLab() as lab, machine(lab, wanted.disk) as guest:
        bench = Bench(lab, guest, wanted)
        bench.write(SIZE // MIB)  # so that the guest's own clusters are there in all runs alike
        for what, span in ((f"{HOT} MiB", HOT), (f"the whole disk, {SIZE // MIB} MiB", SIZE // MIB)):
            print(row(bench, what, span, bench.slow), flush=True)
            if wanted.parts:
                print(row(bench, f"{what}, T not read", span, bench.unread), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
