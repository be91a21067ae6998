"""Huge LUNs whose images lie on XFS: T of them, backups from them, and the freeze window over three. Root.

    provision   seconds to make, start and delete T of 64, 128 and 256 TiB, and what T takes right after
    backup      seconds and memory of a backup of 10 files with 1 GiB dirty, on a datastore of 256 GiB and on one of
                256 TiB: both incremental, in pairs, turn about
    window      milliseconds that three datastores with LUNs of --extents extents were frozen

``--on flashcopy``: on the array of our own, over SSH; it shows the driver and the kernel's clones, not an array.
``--on reflink``: the same LUN images on loop devices, cloned by the reflink driver. Figures are medians of --times
runs, printed as JSON; memory is the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lab import GIB, MIB, machine, measure, mounted, run, scratch

from graincopy.core.ids import PointId, RepositoryId, VolumeId
from graincopy.model.snapshot import Owner, Role, TargetTag
from graincopy.testing.array import Array
from graincopy.testing.array_plane import LoopPlane, WallClock
from graincopy.testing.array_ssh import HOST, SshFront
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.fiemap import count_extents
from graincopy.volumes.flashcopy import names
from graincopy.volumes.flashcopy.assembly import ArraySettings, flashcopy_driver
from graincopy.volumes.flashcopy.connection import Login
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.reflink import ReflinkDriver

TIB = 1 << 40
FILES = 10


class Storage(Protocol):
    """Where LUNs are made, and who makes targets of them."""

    def driver(self) -> VolumeDriver: ...

    def make(self, name: str, size: int) -> str:
        """A new LUN; its device."""

    def image(self, name: str) -> str:
        """The file that holds the LUN's bytes."""

    def volume(self, name: str) -> VolumeId: ...

    def config(self) -> str:
        """The part of the configuration that is needed to find it."""


class OnArray:
    """LUNs of an array behind SSH."""

    def __init__(self, folder: str, outer: str, held: contextlib.ExitStack) -> None:
        self._state = f"{folder}/state"
        self._plane = LoopPlane(f"{outer}/luns", f"{folder}/by-id")
        held.callback(self._plane.close)
        self._array = Array(self._plane, WallClock())
        self._at = held.enter_context(SshFront(self._array, f"{folder}/ssh")).endpoint

    def driver(self) -> VolumeDriver:
        at = self._at
        login = Login(
            name="lab", host="127.0.0.1", user=at.user, port=at.port, key_file=at.key_file, known_hosts=at.known_hosts
        )
        return flashcopy_driver([ArraySettings(login, HOST, devices=self._plane.by_id)], self._state, WallClock())

    def make(self, name: str, size: int) -> str:
        self._array.make(name, size, HOST)
        return self._plane.device(self._array.vdisks[name].number)

    def image(self, name: str) -> str:
        return self._plane.image(self._array.vdisks[name].number)

    def volume(self, name: str) -> VolumeId:
        return names.volume_id("lab", self._array.vdisks[name].uid.lower())

    def config(self) -> str:
        return self._at.config("lab", self._plane.by_id)


class OnFiles:
    """LUN images on loop devices."""

    def __init__(self, outer: str, held: contextlib.ExitStack) -> None:
        self._outer, self._held, self._places = outer, held, MemoryPlaces()

    def driver(self) -> VolumeDriver:
        return ReflinkDriver(self._places)

    def make(self, name: str, size: int) -> str:
        with open(self.image(name), "xb") as file:
            file.truncate(size)
        device = run("losetup", "--find", "--show", self.image(name)).strip()
        self._held.callback(run, "losetup", "--detach", device)
        return device

    def image(self, name: str) -> str:
        return f"{self._outer}/{name}.img"

    def volume(self, name: str) -> VolumeId:
        return VolumeId(f"reflink:{self.image(name)}")

    def config(self) -> str:
        return ""


class Centre:
    """Datastores on LUNs, and graincopy beside them."""

    def __init__(self, folder: str, storage: Storage, held: contextlib.ExitStack) -> None:
        self.folder, self.storage, self._held = folder, storage, held
        self._config = f"{folder}/config.toml"
        with open(self._config, "w", encoding="utf-8") as file:
            file.write(f'{storage.config()}\n[paths]\nstate = "{folder}/state"\ncache = "{folder}/cache"\n')

    def datastore(self, name: str, size: int) -> str:
        """A new LUN with XFS, mounted; where."""
        device, point = self.storage.make(name, size), f"{self.folder}/{name}"
        run("mkfs.xfs", "-q", "-f", "-K", "-l", "size=64m", device)
        os.mkdir(point)
        run("mount", device, point)
        self._held.callback(run, "umount", point)
        return point

    def command(self, repo: str, *words: str) -> tuple[str, ...]:
        """graincopy as a process."""
        return (sys.executable, "-m", "graincopy", "--config", self._config, "--repo", f"{self.folder}/{repo}", *words)

    def graincopy(self, repo: str, *words: str) -> dict[str, object]:
        """Its answer."""
        return json.loads(run(*self.command(repo, *words, "--json")))  # type: ignore[no-any-return]


@contextmanager
def centre_on(what: str) -> Iterator[Centre]:
    """A data centre of its own; nothing is left of it."""
    with scratch() as folder, mounted(folder, "outer", "xfs", 64 * GIB) as outer:
        with contextlib.ExitStack() as held:
            storage: Storage = OnArray(folder, outer, held) if what == "flashcopy" else OnFiles(outer, held)
            yield Centre(folder, storage, held)
        for _ in range(300):  # the kernel lets loop devices, and then their images, go late
            if not subprocess.run(["mount", "-o", "remount,ro", outer], capture_output=True, check=False).returncode:
                break
            time.sleep(0.1)


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


def extents_of(path: str) -> int:
    """How many extents the file has."""
    with open(path, "rb") as file:
        return count_extents(file.fileno())


# --- provision --------------------------------------------------------------------------------------


def provision(centre: Centre, times: int, extents: int) -> dict[str, object]:
    """T of LUNs of this size: seconds to make and take it, to delete it, and bytes that it takes."""
    found: dict[str, object] = {}
    for size in (64, 128, 256):
        name = f"huge{size}"
        centre.storage.make(name, size * TIB)
        fragment(centre.storage.image(name), extents, size * TIB)
        figures = [_provisioned(centre.storage, name, turn) for turn in range(times)]
        found[f"{size}TiB"] = {
            "extents": extents_of(centre.storage.image(name)),
            "make_s": round(statistics.median(made for made, _, _ in figures), 3),
            "delete_s": round(statistics.median(gone for _, gone, _ in figures), 3),
            "allocated": max(used for _, _, used in figures),
        }
    return found


def _provisioned(storage: Storage, name: str, turn: int) -> tuple[float, float, int]:
    """Seconds to make T, to delete it, and what it took."""
    driver, volume = storage.driver(), storage.volume(name)
    begun = time.monotonic()
    (target,) = driver.create_targets([volume], _tag(f"{int(begun)}{turn}"))
    made = time.monotonic() - begun
    used = next(one.allocated for one in driver.list_targets([volume]) if one.id == target.id)
    begun = time.monotonic()
    driver.delete(target)
    return made, time.monotonic() - begun, used


def _tag(run_id: str) -> TargetTag:
    return TargetTag(
        run=PointId(run_id.zfill(32)),
        role=Role.TARGET,
        owner=Owner(host="bench", boot="", pid=0, started=0),
        repository=RepositoryId("0" * 32),
        disks=(),
        created=time.time(),
    )


# --- backup -----------------------------------------------------------------------------------------


def backup(centre: Centre, times: int, file_mib: int, dirty_mib: int) -> dict[str, object]:
    """Ten files, of which ``dirty_mib`` are rewritten before each run, on a small and on a huge datastore."""
    sizes = {"256GiB": 256 * GIB, "256TiB": 256 * TIB}
    paths = {name: _disks(centre.datastore(f"ds{name}", size), file_mib) for name, size in sizes.items()}
    for name in sizes:
        centre.graincopy(name, "init", "--no-encryption")
        centre.graincopy(name, "backup", *paths[name])
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in sizes}
    for turn in range(times):
        for name in sorted(sizes, reverse=turn % 2 == 1):
            for path in paths[name]:
                _rewrite(path, -(-dirty_mib // FILES))
            done = measure(centre.command(name, "backup", *paths[name]))
            runs[name].append((done.wall, done.memory))
    medians = {name: statistics.median(wall for wall, _ in figures) for name, figures in runs.items()}
    last = {name: centre.graincopy(name, "show", "latest") for name in sizes}
    return {
        "backup_s": {name: round(wall, 2) for name, wall in medians.items()},
        "ratio": round(medians["256TiB"] / medians["256GiB"], 3),
        "all": {name: [round(wall, 2) for wall, _ in figures] for name, figures in runs.items()},
        "memory_mib": {name: max(memory for _, memory in figures) // MIB for name, figures in runs.items()},
        "bill": {name: _bill(document) for name, document in last.items()},
    }


def _disks(point: str, file_mib: int) -> list[str]:
    paths = [f"{point}/disk{number}.raw" for number in range(FILES)]
    for path in paths:
        _rewrite(path, file_mib)
    return paths


def _rewrite(path: str, mib: int) -> None:
    """The beginning of the file, new and random; in pieces, because a child's memory counts from its parent's."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for at in range(mib):
            os.pwrite(fd, os.urandom(MIB), at * MIB)
        os.fsync(fd)
    finally:
        os.close(fd)


def _bill(point: dict[str, object]) -> dict[str, object]:
    """What the last run says of its disks."""
    disks: Sequence[dict[str, object]] = point["disks"]  # type: ignore[assignment]
    sums = {what: sum(int(str(disk[what])) for disk in disks) for what in ("dirty_bytes", "read_bytes")}
    return {"change_map": disks[0]["change_map"], **sums}


# --- window -----------------------------------------------------------------------------------------


def window(centre: Centre, times: int, extents: int) -> dict[str, object]:
    """Three datastores, one file each."""
    paths = []
    for at in range(3):
        point = centre.datastore(f"window{at}", 2 * GIB)
        fragment(f"{point}/disk.raw", extents, 512 * MIB)
        paths.append(f"{point}/disk.raw")
    centre.graincopy("window", "init", "--no-encryption")
    figures = [float(str(centre.graincopy("window", "backup", *paths)["freeze_ms"])) for _ in range(times)]
    counts = [extents_of(centre.storage.image(f"window{at}")) for at in range(3)]
    return {"extents": counts, "freeze_ms": statistics.median(figures), "all": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", default=["provision", "window", "backup"])
    parser.add_argument("--on", choices=("flashcopy", "reflink"), default="flashcopy")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--extents", type=int, default=10_000, help="of each LUN image (provision, window)")
    parser.add_argument("--file", type=int, default=256, metavar="MIB", help="size of each of the ten files (backup)")
    parser.add_argument("--dirty", type=int, default=1024, metavar="MIB", help="what is rewritten of all ten (backup)")
    asked = parser.parse_args()
    found: dict[str, object] = {"machine": machine(), "on": asked.on}
    with centre_on(asked.on) as centre:
        if "provision" in asked.what:
            found["provision"] = provision(centre, asked.times, asked.extents)
        if "window" in asked.what:
            found["window"] = window(centre, asked.times, asked.extents)
        if "backup" in asked.what:
            found["backup"] = backup(centre, asked.times, asked.file, asked.dirty)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
