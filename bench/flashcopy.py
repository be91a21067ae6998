"""T of huge LUNs, and the freeze window over three: on the array of our own, whose LUNs are image files on XFS. Root.

    provision   seconds to make, start and delete T of 64, 128 and 256 TiB, and what T takes right after
    backup      seconds of a backup of 10 files with 1 GiB dirty, on a datastore of 256 GiB and on one of 256 TiB
    window      milliseconds that three datastores with LUNs of --extents extents were frozen

Figures are medians of --times runs, printed as JSON. They show the driver and the kernel's clones, not an array.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

from lab import GIB, MIB, mounted, run, scratch

from graincopy.core.ids import PointId, RepositoryId
from graincopy.model.snapshot import Owner, Role, TargetTag
from graincopy.testing.array import Array
from graincopy.testing.array_plane import LoopPlane, WallClock
from graincopy.testing.array_ssh import HOST, SshFront
from graincopy.volumes.flashcopy import names
from graincopy.volumes.flashcopy.assembly import ArraySettings, flashcopy_driver
from graincopy.volumes.flashcopy.connection import Login
from graincopy.volumes.flashcopy.driver import FlashCopyDriver

TIB = 1 << 40


class Centre:
    """An array with its LUNs, a driver on it, and datastores."""

    def __init__(self, folder: str, outer: str) -> None:
        self.folder = folder
        self.plane = LoopPlane(f"{outer}/luns", f"{folder}/by-id")
        self.array = Array(self.plane, WallClock())
        self.front = SshFront(self.array, f"{folder}/ssh")
        self.mounts: list[str] = []
        self.runs = 0

    def __enter__(self) -> Centre:
        self.front.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        for point in self.mounts:
            run("umount", point)
        self.plane.close()
        self.front.__exit__(*exc)
        for _ in range(100):  # the kernel lets loop devices go late
            if f"{self.plane.folder}/" not in run("losetup", "--list", "--noheadings"):
                break
            time.sleep(0.1)

    def driver(self) -> FlashCopyDriver:
        at = self.front.endpoint
        login = Login(
            name="lab", host="127.0.0.1", port=at.port, user=at.user, key_file=at.key_file, known_hosts=at.known_hosts
        )
        settings = ArraySettings(login, HOST, devices=self.plane.by_id)
        return flashcopy_driver([settings], f"{self.folder}/state", WallClock())

    def lun(self, name: str, size: int) -> str:
        """A new LUN; its device."""
        self.array.make(name, size, HOST)
        return self.plane.device(self.array.vdisks[name].number)

    def datastore(self, name: str, size: int) -> str:
        """A new LUN with XFS, mounted."""
        device, point = self.lun(name, size), f"{self.folder}/{name}"
        run("mkfs.xfs", "-q", "-f", "-K", "-l", "size=64m", device)
        os.mkdir(point)
        run("mount", device, point)
        self.mounts.append(point)
        return point

    def image(self, name: str) -> str:
        return self.plane.image(self.array.vdisks[name].number)

    def tag(self) -> TargetTag:
        self.runs += 1
        return TargetTag(
            run=PointId(f"{self.runs:032x}"),
            role=Role.TARGET,
            owner=Owner(host="bench", boot="", pid=0, started=0),
            repository=RepositoryId("0" * 32),
            disks=(),
            created=time.time(),
        )

    def config(self) -> str:
        path = f"{self.folder}/config.toml"
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.front.endpoint.config("lab", self.plane.by_id))
            file.write(f'[paths]\nstate = "{self.folder}/state"\ncache = "{self.folder}/cache"\n')
        return path


def fragment(path: str, extents: int, size: int) -> None:
    """Every second 4 KiB block of the beginning written: that many extents."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.ftruncate(fd, size)
        for at in range(extents):
            os.pwrite(fd, b"x" * 4096, at * 8192)
        os.fsync(fd)
    finally:
        os.close(fd)


def timed(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def provision(centre: Centre, times: int, extents: int) -> dict[str, object]:
    """T of LUNs of this size: seconds to make and take it, to delete it, and bytes that it takes."""
    found: dict[str, object] = {}
    for size in (64, 128, 256):
        name = f"huge{size}"
        centre.lun(name, size * TIB)
        fragment(centre.image(name), extents, size * TIB)
        volume = names.volume_id("lab", centre.array.vdisks[name].uid.lower())
        made, gone, used = [], [], 0
        for _ in range(times):
            driver, tag = centre.driver(), centre.tag()
            begun = time.monotonic()
            (target,) = driver.create_targets([volume], tag)
            made.append(time.monotonic() - begun)
            used = max(used, driver.list_targets()[0].allocated)
            gone.append(timed(lambda driver=driver, target=target: driver.delete(target)))  # type: ignore[misc]
        found[f"{size}TiB"] = {
            "make_s": round(statistics.median(made), 3),
            "delete_s": round(statistics.median(gone), 3),
            "allocated": used,
        }
    return found


def graincopy(centre: Centre, repo: str, *words: str) -> dict[str, object]:
    command = (sys.executable, "-m", "graincopy", "--config", centre.config(), "--repo", repo, *words, "--json")
    return json.loads(run(*command))  # type: ignore[no-any-return]


def backup(centre: Centre, times: int) -> dict[str, object]:
    """Ten files of 256 MiB of which 1 GiB is dirty, on a small and on a huge datastore."""
    found: dict[str, object] = {}
    for name, size in (("256GiB", 256 * GIB), ("256TiB", 256 * TIB)):
        point, repo = centre.datastore(f"ds{name}", size), f"{centre.folder}/repo{name}"
        paths = [f"{point}/disk{at}.raw" for at in range(10)]
        for path in paths:
            with open(path, "xb") as file:
                file.write(os.urandom(256 * MIB))
        graincopy(centre, repo, "init", "--no-encryption")
        graincopy(centre, repo, "backup", *paths)
        seconds = []
        for _ in range(times):
            for path in paths:
                with open(path, "r+b") as file:
                    file.write(os.urandom(103 * MIB))
            os.sync()
            seconds.append(timed(lambda repo=repo, paths=paths: graincopy(centre, repo, "backup", *paths)))  # type: ignore[misc]
        found[name] = {"backup_s": round(statistics.median(seconds), 2)}
    return found


def window(centre: Centre, times: int, extents: int) -> dict[str, object]:
    """Three datastores, one file each."""
    repo, paths = f"{centre.folder}/repo-window", []
    for at in range(3):
        point = centre.datastore(f"window{at}", 2 * GIB)
        fragment(f"{point}/disk.raw", extents, 512 * MIB)
        paths.append(f"{point}/disk.raw")
    graincopy(centre, repo, "init", "--no-encryption")
    figures = [graincopy(centre, repo, "backup", *paths)["freeze_ms"] for _ in range(times)]
    return {"extents": extents, "freeze_ms": statistics.median(figures), "all": figures}  # type: ignore[type-var]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", default=["provision", "window", "backup"])
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--extents", type=int, default=10_000)
    options = parser.parse_args()
    found: dict[str, object] = {}
    with scratch() as folder, mounted(folder, "outer", "xfs", 64 * GIB) as outer, Centre(folder, outer) as centre:
        if "provision" in options.what:
            found["provision"] = provision(centre, options.times, options.extents)
        if "window" in options.what:
            found["window"] = window(centre, options.times, options.extents)
        if "backup" in options.what:
            found["backup"] = backup(centre, options.times)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
