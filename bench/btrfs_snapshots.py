"""Why the btrfs driver does as it does: snapshot beside FICLONE, extent comparison beside `btrfs send --no-data`.

Prints two tables in Markdown; they are kept in docs/decisions/0008-btrfs-subvolumes.md. Needs root and btrfs-progs.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable

from lab import GIB, machine, mounted, run, scratch

from graincopy.volumes import btrfs_ioctl, ioctl
from graincopy.volumes.fiemap import count_extents, read_placement

ROUNDS = 5
BLOCK = 4096


def timed(action: Callable[[], object]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def fragmented(path: str, extents: int) -> None:
    """An image of about ``extents`` extents: every other block is written."""
    with open(path, "wb") as file:
        for number in range(extents):
            os.pwrite(file.fileno(), os.urandom(8) * (BLOCK // 8), number * 2 * BLOCK)
        os.fsync(file.fileno())


def instants(folder: str) -> None:
    """How long a target of one image, and of three, takes."""
    print("| extents of each image | FICLONE of one, ms | of three, ms | snapshot of the subvolume with three, ms |")
    print("|---|---|---|---|")
    for extents in (100, 9_500, 100_000):
        home = os.path.join(folder, f"e{extents}")
        run("btrfs", "subvolume", "create", home)
        images = [os.path.join(home, f"lun{n}") for n in range(3)]
        for image in images:
            fragmented(image, extents)
        alone, clones, snapshots = [], [], []
        for number in range(ROUNDS):
            os.sync()
            clones.append(timed(lambda: [clone(image, f"{image}.{number}") for image in images]))  # noqa: B023
            alone.append(timed(lambda: clone(images[0], f"{images[0]}.alone{number}")))  # noqa: B023
            os.sync()
            snapshots.append(timed(lambda: snapshot(home, folder, f"e{extents}.{number}")))  # noqa: B023
        with open(images[0], "rb") as file:
            found = count_extents(file.fileno())
        medians = (statistics.median(row) for row in (alone, clones, snapshots))
        print(f"| {found} | " + " | ".join(f"{one:.1f}" for one in medians) + " |")


def clone(source: str, target: str) -> None:
    """FICLONE."""
    with open(source, "rb") as one, open(target, "wb") as other:
        ioctl.clone(one.fileno(), other.fileno())


def snapshot(source: str, folder: str, name: str) -> None:
    """One read-only snapshot."""
    fds = [os.open(path, os.O_RDONLY) for path in (source, folder)]
    btrfs_ioctl.snapshot(*fds, name)
    for fd in fds:
        os.close(fd)


def maps(folder: str) -> None:
    """What it takes to tell what changed in one image, alone in its subvolume and beside busy neighbours."""
    print("| extents | blocks changed | busy neighbours | extents compared, ms | send --no-data, ms | stream, KiB |")
    print("|---|---|---|---|---|---|")
    for neighbours in (0, 4):
        home = os.path.join(folder, f"n{neighbours}")
        run("btrfs", "subvolume", "create", home)
        images = [os.path.join(home, f"disk{n}") for n in range(1 + neighbours)]
        for image in images:
            fragmented(image, 50_000)
        base, now = os.path.join(folder, f"base{neighbours}"), os.path.join(folder, f"now{neighbours}")
        snapshot(home, folder, os.path.basename(base))
        for image in images:
            rewrite(image, 1_000 if image == images[0] else 20_000)
        snapshot(home, folder, os.path.basename(now))
        pair = [os.path.join(one, "disk0") for one in (base, now)]
        compared = statistics.median(timed(lambda: compare(pair)) for _ in range(ROUNDS))  # noqa: B023
        sizes: list[int] = []
        sent = statistics.median(timed(lambda: sizes.append(send(base, now))) for _ in range(ROUNDS))  # noqa: B023
        print(f"| 50000 | 1000 | {neighbours} | {compared:.0f} | {sent:.0f} | {sizes[0] / 1024:.0f} |")


def rewrite(path: str, blocks: int) -> None:
    """Write some blocks that are there anew."""
    with open(path, "r+b") as file:
        for number in random.Random(1).sample(range(50_000), blocks):
            os.pwrite(file.fileno(), os.urandom(8) * (BLOCK // 8), number * 2 * BLOCK)
        os.fsync(file.fileno())


def compare(paths: list[str]) -> int:
    """As the driver does it: the base twice, the newer one once. Bytes that differ."""
    found = []
    for path in (paths[0], paths[1], paths[0]):
        with open(path, "rb") as file:
            found.append(read_placement(file.fileno(), os.fstat(file.fileno()).st_size))
    return found[1].differs(found[2]).total


def send(base: str, now: str) -> int:
    """Bytes of the stream."""
    done = subprocess.run(["btrfs", "send", "--no-data", "-q", "-p", base, now], capture_output=True, check=True)
    return len(done.stdout)


def main() -> None:
    """Both tables."""
    print(machine(), "\n")
    for table in (instants, maps):
        with scratch() as folder, mounted(folder, "btrfs", "btrfs", 20 * GIB) as point:
            table(point)
        print()


if __name__ == "__main__":
    main()
