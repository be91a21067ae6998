"""The first file out of a backed-up disk: graincopy extract beside restic mount and borg mount, in the same run.

Needs root, restic, borgbackup (with its FUSE), fuse3 and e2fsprogs. A disk with ext4 in it is backed up by all three.
Timed is what a user waits for: from the start of the first command until the bytes of one file are there. With restic
and borg that is mount, find the image in the mount, and debugfs to read the file in it. All three keep their caches.
Also: bytes fetched for 1 MiB out of a large disk, and a directory with many names (time, and memory of both processes).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import large_index
from lab import GIB, MIB, empty, machine, mounted, run, scratch

GRAINCOPY = shlex.split(os.environ.get("GRAINCOPY", "")) or [os.path.join(os.path.dirname(sys.executable), "graincopy")]
ENV = {"GRAINCOPY_PASSPHRASE": "bench", "RESTIC_PASSWORD": "bench", "BORG_PASSPHRASE": "bench"}
PATIENCE = 300.0  # seconds until a mount must show something
WANTED = "folder/wanted"  # 1 MiB


class Bench:
    """One disk, in three repositories."""

    def __init__(self, folder: str, size: int, names: int) -> None:
        self.folder, self.image, self.point = folder, f"{folder}/disk.raw", f"{folder}/point"
        self.restic, self.borg = f"{folder}/restic", f"{folder}/borg"
        self.generated = f"{folder}/passphrase"
        os.mkdir(self.point)
        os.environ.update(ENV, GRAINCOPY_REPO=f"{folder}/repo", XDG_CACHE_HOME=f"{folder}/cache")
        os.environ.update(BORG_BASE_DIR=f"{folder}/borg-base", BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes")
        self._make_disk(size, names)
        self.rows: list[dict[str, object]] = []

    def _make_disk(self, size: int, names: int) -> None:
        """ext4: the wanted file, data all over a quarter of the disk, a directory of many names."""
        inodes = ("-N", str(max(size >> 14, 2 * names)))
        with mounted(self.folder, "inside", "ext4", size, self.image, inodes) as tree:
            os.mkdir(f"{tree}/folder")
            self.content = os.urandom(MIB)
            with open(f"{tree}/{WANTED}", "wb") as file:
                file.write(self.content)
            for many in (names // 10, names):
                fill(f"{tree}/many-{many}", many, self.content)
            for number in range(size // 4 // (64 * MIB)):
                with open(f"{tree}/data{number}", "wb") as file:
                    file.write(os.urandom(64 * MIB))

    def back_up(self, peers: bool) -> None:
        """By all three."""
        run(*GRAINCOPY, "init")
        run(*GRAINCOPY, "backup", self.image)
        run(*GRAINCOPY, "key", "generate", "--new-passphrase-file", self.generated)
        run(*GRAINCOPY, "key", "add", "--new-passphrase-file", self.generated)
        if peers:
            run("restic", "-q", "-r", self.restic, "init", "--repository-version", "2")
            run("restic", "-q", "-r", self.restic, "backup", self.image)
            run("borg", "init", "-e", "repokey-blake2", self.borg)
            run("borg", "create", "--chunker-params", "fixed,4194304", "-C", "zstd,1", f"{self.borg}::one", self.image)

    def fill_with_others(self, gib: int) -> None:
        """As if ``gib`` GiB of other disks lay in the repositories: in each as many pieces as that would be.

        restic's and borg's are small files, each a blob (of 1 MiB on average) or a chunk (of 4 MiB); graincopy's are
        lines of the index.
        """
        large_index.grow(f"{self.folder}/repo", gib * (GIB // (64 * 1024)))
        for tool, size in (("restic", MIB), ("borg", 4 * MIB)):
            many = f"{self.folder}/others"
            for number in range(gib * GIB // size):
                if number % 10_000 == 0:
                    os.makedirs(f"{many}/{number}")
                with open(f"{many}/{number - number % 10_000}/{number}", "wb") as file:
                    file.write(number.to_bytes(8, "big"))
            if tool == "restic":
                run("restic", "-q", "-r", self.restic, "backup", many)
                run("restic", "-q", "-r", self.restic, "backup", self.image)  # the latest again
            else:
                run("borg", "create", f"{self.borg}::others", many)
            shutil.rmtree(many)

    def row(self, what: str, who: str, **figures: object) -> None:
        """Add a line to the table."""
        self.rows.append({"what": what, "who": who, **figures})
        print(f"{what:34} {who:10} " + "  ".join(f"{name} {value}" for name, value in figures.items()), flush=True)

    # --- the first file ---------------------------------------------------------------------------

    def by_extract(self, environ: Mapping[str, str] = os.environ) -> None:
        """graincopy extract … --to -"""
        command = [*GRAINCOPY, "extract", "latest", f"disk.raw:/{WANTED}", "--to", "-"]
        assert subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environ).stdout == self.content

    def by_generated(self) -> None:
        """The same, opened by a generated passphrase: nothing is stretched."""
        environ = {key: value for key, value in os.environ.items() if key != "GRAINCOPY_PASSPHRASE"}
        self.by_extract({**environ, "GRAINCOPY_PASSPHRASE_FILE": self.generated})

    def by_graincopy_mount(self) -> None:
        """graincopy mount, then debugfs."""
        self._through_mount([*GRAINCOPY, "mount", "latest", self.point], f"{self.point}/disk.raw")

    def by_restic(self) -> None:
        """restic mount, then debugfs."""
        shown = f"{self.point}/snapshots/latest{self.image}"
        self._through_mount(["restic", "-q", "-r", self.restic, "mount", self.point], shown)

    def by_borg(self) -> None:
        """borg mount, then debugfs."""
        self._through_mount(["borg", "mount", "-f", f"{self.borg}::one", self.point], f"{self.point}{self.image}")

    def _through_mount(self, command: list[str], image: str) -> None:
        with served(command, self.point):
            until = time.monotonic() + PATIENCE
            while not os.path.exists(image):
                if time.monotonic() > until:
                    sys.exit(f"{image} does not appear")
                time.sleep(0.01)
            dumped = f"{self.folder}/dumped"
            run("debugfs", "-R", f"dump /{WANTED} {dumped}", image)
            assert read(dumped) == self.content
            os.unlink(dumped)

    def first_file(self, times: int, peers: bool, beside: str = "") -> None:
        """Seconds from the first command to the file, the end of the mount not counted."""
        ways: dict[str, Callable[[], None]] = {
            "extract": self.by_extract,
            "extract, generated passphrase": self.by_generated,
            "mount": self.by_graincopy_mount,
        }
        if peers:
            ways |= {"restic": self.by_restic, "borg": self.by_borg}
        taken: dict[str, list[float]] = {who: [] for who in ways}
        for _ in range(times):  # in turn: what disturbs the machine disturbs all
            for who, way in ways.items():
                taken[who].append(self._timed(way))
        medians = {who: statistics.median(seconds) for who, seconds in taken.items()}
        for who, median in medians.items():
            self.row(f"first file{beside}", who, wall_s=round(median, 3), runs=times)
        for peer in ("restic", "borg") if peers else ():
            self._factor(peer, "extract", medians, beside)
            self._factor(peer, "extract, generated passphrase", medians, beside)

    def _factor(self, peer: str, who: str, medians: Mapping[str, float], beside: str) -> None:
        factor = medians[peer] / medians[who]
        print(f"  {who}: {factor:.1f} × sooner than {peer} mount (wanted ≥ 5) {'ok' if factor >= 5 else 'MISSED'}")
        what = f"first file{beside}"
        self.rows.append({"what": what, "who": who, "peer": peer, "factor": round(factor, 2), "wanted": 5})

    @staticmethod
    def _timed(way: Callable[[], None]) -> float:
        os.sync()
        begun = time.monotonic()
        way()
        return time.monotonic() - begun

    # --- the rest ---------------------------------------------------------------------------------

    def fetched(self) -> None:
        """Bytes from the medium for 1 MiB."""
        out = f"{self.folder}/out"
        told = json.loads(
            run(*GRAINCOPY, "extract", "latest", f"disk.raw:/{WANTED}", "--to", out, "--medium-only", "--json")
        )
        fetched = told["view"]["fetched_bytes"] / MIB
        self.row("fetched for a file of 1 MiB", "extract", mib=round(fetched, 2), wanted="≤ 8")
        empty(out)

    def many_names(self, names: int) -> None:
        """A listing of a large directory as text and as JSON, one name in it, and one file out of it."""
        for many in (names // 10, names):
            place = f"disk.raw:/many-{many}"
            one = f"{place}/{named(many // 2, many)}"
            self._names("listing", many, "files", "latest", place, least=many)
            self._names("listing, JSON", many, "files", "latest", place, "--json", least=1)
            self._names("one name", many, "files", "latest", one, least=1)
            out = f"{self.folder}/out"
            self._names("one file", many, "extract", "latest", one, "--to", out, "--medium-only", least=1)
            assert read(f"{out}/{named(many // 2, many)}") == self.content
            empty(out)

    def _names(self, what: str, many: int, *words: str, least: int) -> None:
        begun, before = time.monotonic(), os.times()
        command = subprocess.Popen([*GRAINCOPY, *words], stdout=subprocess.PIPE)
        peaks: dict[int, int] = {}
        over = threading.Event()
        watcher = threading.Thread(target=watch, args=(command.pid, peaks, over))
        watcher.start()
        assert command.stdout is not None
        lines = sum(1 for _ in command.stdout)
        command.stdout.close()
        wall, status = time.monotonic() - begun, command.wait()
        over.set()
        watcher.join()
        assert status == 0 and lines >= least
        used = os.times()
        cpu = used.children_user + used.children_system - before.children_user - before.children_system
        reader = max((peak for pid, peak in peaks.items() if pid != command.pid), default=0)
        figures = {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "mib": peaks.get(command.pid, 0) >> 20}
        self.row(f"{what}, of {many} names", words[0], **figures, reader_mib=reader >> 20)


def named(number: int, many: int) -> str:
    """Names in an order that is not the one of the inodes; no two alike."""
    return f"name-{number * 7919 % many:07}"


def fill(folder: str, many: int, content: bytes) -> None:
    """``many`` empty files, and one that is not."""
    os.mkdir(folder)
    inside = os.open(folder, os.O_RDONLY)
    for number in range(many):
        os.close(os.open(named(number, many), os.O_WRONLY | os.O_CREAT, dir_fd=inside))
    os.close(inside)
    with open(f"{folder}/{named(many // 2, many)}", "wb") as file:
        file.write(content)


def watch(pid: int, peaks: dict[int, int], over: threading.Event) -> None:
    """The peak resident bytes of a process and of its children, by pid, until it is ``over``."""
    while not over.wait(0.02):
        for one in (pid, *children(pid)):
            with contextlib.suppress(OSError), open(f"/proc/{one}/status", encoding="ascii") as file:
                high = next((line for line in file if line.startswith("VmHWM:")), "VmHWM: 0")
                peaks[one] = int(high.split()[1]) << 10 or peaks.get(one, 0)  # it begins anew with exec


def children(pid: int) -> list[int]:
    """Of all threads of a process."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, read(f"/proc/{pid}/task/{thread}/children").split())
    return found


def read(path: str) -> bytes:
    """A whole file."""
    with open(path, "rb") as file:
        return file.read()


@contextlib.contextmanager
def served(command: list[str], point: str) -> Iterator[None]:
    """A mount in the foreground; taken down at the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(["fusermount3", "-u", "-z", point], capture_output=True, check=False)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=8, help="size of the disk, a quarter of it filled (default 8)")
    parser.add_argument(
        "--names", type=int, default=100_000, help="names in the larger of two directories (default 100000)"
    )
    parser.add_argument("--runs", type=int, default=3, help="measured runs of each (default 3)")
    parser.add_argument("--others", type=int, default=0, help="GiB of other disks in the repositories (default 0)")
    parser.add_argument("--no-peers", action="store_true", help="leave restic and borg out")
    parser.add_argument("--results", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "results"))
    wanted = parser.parse_args()
    peers = not wanted.no_peers and all(shutil.which(tool) for tool in ("restic", "borg"))
    print(machine())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with scratch() as folder:
        bench = Bench(folder, wanted.gib * GIB, wanted.names)
        bench.back_up(peers)
        bench.first_file(wanted.runs, peers)
        if wanted.others and peers:
            bench.fill_with_others(wanted.others)
            bench.first_file(wanted.runs, peers, f", beside {wanted.others} GiB")
        bench.fetched()
        bench.many_names(wanted.names)
    os.makedirs(wanted.results, exist_ok=True)
    with open(os.path.join(wanted.results, "views_files.json"), "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    main()
