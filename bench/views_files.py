"""The first file out of a backed-up disk: graincopy extract beside restic mount and borg mount, in the same run.

Needs root, restic, borgbackup (with its FUSE), fuse3 and e2fsprogs. A disk with ext4 in it is backed up by all three.
Timed is what a user waits for: from the start of the first command until the bytes of one file are there. With restic
and borg that is mount, find the image in the mount, and debugfs to read the file in it; nothing is cached before.
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
import time
from collections.abc import Callable, Iterator

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
        os.mkdir(self.point)
        os.environ.update(ENV, GRAINCOPY_REPO=f"{folder}/repo", XDG_CACHE_HOME=f"{folder}/cache")
        os.environ.update(BORG_BASE_DIR=f"{folder}/borg-base", BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes")
        self._make_disk(size, names)
        self.rows: list[dict[str, object]] = []

    def _make_disk(self, size: int, names: int) -> None:
        """ext4: the wanted file, data all over a quarter of the disk, a directory of many names."""
        with mounted(self.folder, "inside", "ext4", size, self.image) as tree:
            os.mkdir(f"{tree}/folder")
            os.mkdir(f"{tree}/many")
            self.content = os.urandom(MIB)
            with open(f"{tree}/{WANTED}", "wb") as file:
                file.write(self.content)
            for number in range(names):
                os.close(os.open(f"{tree}/many/name-{number:07}", os.O_WRONLY | os.O_CREAT))
            for number in range(size // 4 // (64 * MIB)):
                with open(f"{tree}/data{number}", "wb") as file:
                    file.write(os.urandom(64 * MIB))

    def back_up(self, peers: bool) -> None:
        """By all three."""
        run(*GRAINCOPY, "init")
        run(*GRAINCOPY, "backup", self.image)
        if peers:
            run("restic", "-q", "-r", self.restic, "init", "--repository-version", "2")
            run("restic", "-q", "-r", self.restic, "backup", self.image)
            run("borg", "init", "-e", "repokey-blake2", self.borg)
            run("borg", "create", "--chunker-params", "fixed,4194304", "-C", "zstd,1", f"{self.borg}::one", self.image)

    def row(self, what: str, who: str, **figures: object) -> None:
        """Add a line to the table."""
        self.rows.append({"what": what, "who": who, **figures})
        print(f"{what:34} {who:10} " + "  ".join(f"{name} {value}" for name, value in figures.items()), flush=True)

    # --- the first file ---------------------------------------------------------------------------

    def by_extract(self) -> None:
        """graincopy extract … --to -"""
        command = [*GRAINCOPY, "extract", "latest", f"disk.raw:/{WANTED}", "--to", "-"]
        assert subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout == self.content

    def by_graincopy_mount(self) -> None:
        """graincopy mount, then debugfs."""
        self._through_mount([*GRAINCOPY, "mount", "latest", self.point], f"{self.point}/disk.raw")

    def by_restic(self) -> None:
        """restic mount, then debugfs."""
        shown = f"{self.point}/snapshots/latest{self.image}"
        self._through_mount(["restic", "--no-cache", "-q", "-r", self.restic, "mount", self.point], shown)

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

    def first_file(self, times: int, peers: bool) -> None:
        """Seconds from the first command to the file, the end of the mount not counted."""
        ways: list[tuple[str, Callable[[], None]]] = [("extract", self.by_extract), ("mount", self.by_graincopy_mount)]
        if peers:
            ways += [("restic", self.by_restic), ("borg", self.by_borg)]
        medians = {}
        for who, way in ways:
            medians[who] = statistics.median(self._timed(way) for _ in range(times))
            self.row("first file", who, wall_s=round(medians[who], 3), runs=times)
        for peer in ("restic", "borg") if peers else ():
            factor = medians[peer] / medians["extract"]
            print(
                f"  extract is {factor:.1f} × sooner than {peer} mount (wanted ≥ 5) {'ok' if factor >= 5 else 'MISSED'}"
            )
            self.rows.append({"what": "first file", "peer": peer, "factor": round(factor, 2), "wanted": 5})

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
        """A listing."""
        begun = time.monotonic()
        listed = subprocess.Popen([*GRAINCOPY, "files", "latest", "disk.raw:/many"], stdout=subprocess.PIPE)
        assert listed.stdout is not None
        lines = sum(1 for _ in listed.stdout)
        listed.stdout.close()
        _, status, usage = os.wait4(listed.pid, 0)
        listed.returncode = os.waitstatus_to_exitcode(status)
        assert lines >= names and listed.returncode == 0
        wall = round(time.monotonic() - begun, 2)
        self.row(f"listing {names} names", "files", wall_s=wall, peak_mib=usage.ru_maxrss // 1024)


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
    parser.add_argument("--names", type=int, default=100_000, help="names in one directory (default 100000)")
    parser.add_argument("--runs", type=int, default=3, help="measured runs of each (default 3)")
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
        bench.fetched()
        bench.many_names(wanted.names)
    os.makedirs(wanted.results, exist_ok=True)
    with open(os.path.join(wanted.results, "views_files.json"), "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    main()
