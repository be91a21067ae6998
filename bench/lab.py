"""What the benchmarks share: a reflink file system on loop, the test image, and measuring a process from outside."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30
STRETCH = 8 * MIB
_NOT_AS_INSTALLED = {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}  # with the first, every start compiles everything


@dataclass(frozen=True)
class Measured:
    """One finished process. Times in seconds, memory in bytes."""

    wall: float
    cpu: float
    memory: int


def measure(command: Sequence[str], env: dict[str, str] | None = None, *, cold: Sequence[str] = ()) -> Measured:
    """Run ``command`` after a sync and account for it with wait4(2); the files ``cold`` are not in the page cache."""
    os.sync()
    for path in cold:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    usual = {name: value for name, value in os.environ.items() if name not in _NOT_AS_INSTALLED}
    begun = time.monotonic()
    process = subprocess.Popen(command, env={**usual, **(env or {})}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def median(runs: Sequence[Measured]) -> Measured:
    """The median of each figure; for memory the largest."""
    return Measured(
        statistics.median(run.wall for run in runs),
        statistics.median(run.cpu for run in runs),
        max(run.memory for run in runs),
    )


def run(*command: str, **options: object) -> str:
    """A helper command that has to succeed; its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload,no-any-return]


@contextmanager
def scratch() -> Iterator[str]:
    """A directory that is gone afterwards."""
    folder = tempfile.mkdtemp(prefix="graincopy-bench-", dir=os.environ.get("TMPDIR", "/var/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mounted(
    folder: str, name: str, kind: str, size: int, image: str | None = None, options: Sequence[str] = ()
) -> Iterator[str]:
    """A new file system of ``kind`` in an image file (in ``folder`` when none is named), mounted by loop.

    ``options`` go to mkfs.
    """
    image = image or os.path.join(folder, f"{name}.img")
    point = os.path.join(folder, name)
    os.makedirs(point)
    with open(image, "wb") as file:
        file.truncate(size)
    run(f"mkfs.{kind}", "-q", *(["-F"] if kind == "ext4" else ["-f"]), *options, image)
    run("mount", "-o", "loop", image, point)
    try:
        yield point
    finally:
        run("umount", point)


def make_image(path: str, size: int = GIB) -> None:
    """1/4 zero, 3/8 random, 3/8 text-like, in stretches of 8 MiB; always the same bytes."""
    import numpy as np

    dice = np.random.default_rng(7)
    words = [bytes(dice.integers(97, 123, dice.integers(2, 10)).astype(np.uint8)) for _ in range(4000)]
    with open(path, "wb") as file:
        for stretch in range(size // STRETCH):
            kind = "zrtzrtrt"[stretch % 8]
            if kind == "z":
                file.seek(STRETCH, os.SEEK_CUR)
            elif kind == "r":
                file.write(dice.bytes(STRETCH))
            else:
                file.write(b" ".join(words[n] for n in dice.zipf(1.3, STRETCH // 3) % 4000)[:STRETCH].ljust(STRETCH))
        file.truncate(size)
        os.fsync(file.fileno())


def scatter(path: str, count: int, seed: int) -> None:
    """``count`` writes of 4 KiB at distinct places, as a running guest would do them."""
    dice = random.Random(seed)
    fd = os.open(path, os.O_WRONLY)
    try:
        for block in dice.sample(range(os.fstat(fd).st_size // 65536), count):
            os.pwrite(fd, dice.randbytes(4096), block * 65536 + dice.randrange(16) * 4096)
        os.fsync(fd)
    finally:
        os.close(fd)


def tree_size(path: str) -> int:
    """Bytes of all files below ``path``."""
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


def empty(path: str) -> None:
    """Remove what is at ``path``, whatever it is."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def repeat(times: int, prepare: Callable[[int], None], command: Callable[[], Measured]) -> list[Measured]:
    """``times`` measured runs, each after its own preparation, which is not measured."""
    runs = []
    for number in range(times):
        prepare(number)
        runs.append(command())
    return runs


def machine() -> str:
    """What this ran on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernel = os.uname()
    with open("/proc/cpuinfo", encoding="ascii") as info:
        cpu = next((line.partition(":")[2].strip() for line in info if "model name" in line), "?")
    release = kernel.release.partition("-")[0]
    return (
        f"{os.cpu_count()} × {cpu}, {memory / GIB:.0f} GiB, {kernel.sysname} {release}, Python {sys.version.split()[0]}"
    )


if __name__ == "__main__":  # in a process of its own: a child's peak memory is never below its parent's
    make_image(sys.argv[1])
