"""Storage for the quickstart: datastores with disk files that carry real file systems and the machine's own documents.

``LunLab`` needs root: three LUN image files on one XFS, bound to loop devices, a datastore on each. ``FolderLab`` needs
nothing: plain folders. Leaving either takes down whatever was put up, in reverse order, also after a failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

MIB = 1 << 20
CONTENT_BYTES = 24 * MIB  # of documents on each disk
CONTENT_FILES = 4000
LARGEST = 2 * MIB
CONTENT_FROM = ("/usr/share/doc", "/usr/lib/python3", "/usr/lib/python3.11", "/usr/share", "/usr/lib")
TIMEOUT = 300.0  # seconds; nothing here takes a tenth of it
MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=1", "-J", "size=4"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"),
}
FSCK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n")}
TABLE_BYTES = 2 * MIB
PAGE_BYTES = 8 << 10


class Failed(Exception):
    """The story cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk file that carries a file system. ``path`` is relative to the scratch folder."""

    path: str
    fs: str
    size: int  # bytes


def run(
    *command: str, cwd: str | None = None, env: dict[str, str] | None = None, feed: str = "", ok: tuple[int, ...] = (0,)
) -> str:
    """Run a command to its end and answer its output. A signal to us ends it gently first. Raises Failed."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            out, errors = process.communicate(os.fsencode(feed), timeout=TIMEOUT)
        except BaseException:
            _end(process)
            raise
    if process.returncode not in ok:
        said = os.fsdecode(errors.strip() or out.strip()[-2000:])
        raise Failed(f"{' '.join(command)} ended with {process.returncode}: {said}")
    return os.fsdecode(out)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()


class Lab:
    """What the story needs of storage: disks with content, ordinary writes to one of them, a look at its health."""

    place: ClassVar[str]
    disks: tuple[Disk, ...]
    neighbour: Disk

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        try:
            self.make()
        except BaseException:
            self.undo.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.undo.close()

    def at(self, path: str) -> str:
        """Absolute."""
        return os.path.join(self.folder, path)

    def make(self) -> None:
        """Put the storage up."""
        raise NotImplementedError

    def describe(self) -> list[tuple[str, ...]]:
        """Rows for people: datastore, what it lies on, its disks."""
        raise NotImplementedError

    def write(self, disk: Disk, seed: int) -> str:
        """What a working day does to ``disk``; answers it in words."""
        raise NotImplementedError

    def sha256(self, disk: Disk) -> str:
        """Of the whole disk file."""
        with open(self.at(disk.path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check(self, disk: Disk) -> str:
        """fsck of the file system on ``disk``, changing nothing. Raises Failed when it is not clean."""
        command = FSCK[disk.fs]
        run(*command, self.at(disk.path))
        return " ".join(command)

    def content(self, disks: tuple[Disk, ...]) -> Iterator[tuple[Disk, str]]:
        """Each disk with a folder of documents that are to go onto it; the folder is gone afterwards."""
        documents = find_documents()
        for disk in disks:
            stage = self.at("stage")
            copy_some(documents, stage)
            try:
                yield disk, stage
            finally:
                shutil.rmtree(stage)


def find_documents() -> Iterator[str]:
    """Ordinary, readable, not too large files of this machine, in a fixed order."""
    for top in CONTENT_FROM:
        for folder, folders, names in os.walk(top):
            folders.sort()
            for path in (os.path.join(folder, name) for name in sorted(names)):
                if is_document(path):
                    yield path


def is_document(path: str) -> bool:
    """An ordinary file that can be read and is not too large."""
    ordinary = os.path.isfile(path) and not os.path.islink(path) and os.access(path, os.R_OK)
    return ordinary and os.path.getsize(path) <= LARGEST


def copy_some(documents: Iterator[str], stage: str) -> None:
    """``CONTENT_BYTES`` of them (or as many files as a small file system takes), under their own names."""
    copied = count = 0
    os.makedirs(stage)
    for path in documents:
        os.makedirs(os.path.dirname(stage + path), exist_ok=True)
        shutil.copyfile(path, stage + path)
        copied, count = copied + os.path.getsize(stage + path), count + 1
        if copied >= CONTENT_BYTES or count >= CONTENT_FILES:
            return


def sparse(path: str, size: int) -> None:
    """A new file of ``size`` bytes that takes no space."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.truncate(size)


class FolderLab(Lab):
    """Plain folders with disk files; their file systems are written by mkfs and debugfs, so nothing is mounted."""

    place = "plain folders (without root there are no LUNs, and nothing can be frozen)"
    disks = (
        Disk("ds1/web.raw", "ext4", 64 * MIB),
        Disk("ds1/mail.raw", "ext4", 64 * MIB),
        Disk("ds2/db.raw", "ext4", 64 * MIB),
        Disk("ds3/db-wal.raw", "ext4", 64 * MIB),
    )
    neighbour = Disk("ds1/neighbour.raw", "ext4", 64 * MIB)

    def make(self) -> None:
        for disk, stage in self.content((*self.disks, self.neighbour)):
            sparse(self.at(disk.path), disk.size)
            run(*MKFS[disk.fs], "-d", stage, self.at(disk.path))

    def describe(self) -> list[tuple[str, ...]]:
        rows: dict[str, list[str]] = {}
        for disk in (*self.disks, self.neighbour):
            rows.setdefault(os.path.dirname(disk.path), []).append(os.path.basename(disk.path))
        return [(place, "a folder", " ".join(names)) for place, names in rows.items()]

    def write(self, disk: Disk, seed: int) -> str:
        chance = random.Random(seed)
        pieces = [self.at(f"piece{number}") for number in range(8)]
        for piece in pieces:
            with open(piece, "wb") as file:
                file.write(chance.randbytes(32 << 10))
        commands = "".join(f"write {os.path.basename(piece)} day-{seed}-{n}.log\n" for n, piece in enumerate(pieces))
        with open(self.at("commands"), "w", encoding="ascii") as file:
            file.write(commands)
        run("debugfs", "-w", "-f", "commands", disk.path, cwd=self.folder)
        for path in (*pieces, self.at("commands")):
            os.unlink(path)
        return f"{disk.path}: 8 new files of 32 KiB"


@dataclass(frozen=True, slots=True)
class Datastore:
    """A LUN image and the file system on it."""

    name: str
    image: str
    fs: str
    size: int  # bytes
    partitioned: bool = False


class LunLab(Lab):
    """Three LUN image files on one XFS, as an array would hold them, each with a datastore full of disk files."""

    place = "three LUNs: image files on XFS behind loop devices"
    datastores = (
        Datastore("ds1", "lun1.img", "ext4", 768 * MIB),
        Datastore("ds2", "lun2.img", "xfs", 1024 * MIB),
        Datastore("ds3", "lun3.img", "ext4", 512 * MIB, partitioned=True),
    )
    disks = (
        Disk("ds1/web.raw", "ext4", 96 * MIB),
        Disk("ds1/mail.raw", "ext4", 96 * MIB),
        Disk("ds2/db.raw", "xfs", 320 * MIB),
        Disk("ds3/db-wal.raw", "ext4", 96 * MIB),
    )
    neighbour = Disk("ds1/neighbour.raw", "ext4", 96 * MIB)

    def make(self) -> None:
        sparse(self.at("storage.img"), 6144 * MIB)
        self._put_up("storage.img", "xfs", "storage")
        for one in self.datastores:
            image = f"storage/{one.image}"
            sparse(self.at(image), one.size)
            self._put_up(image, one.fs, one.name, one.partitioned)
        for disk, stage in self.content((*self.disks, self.neighbour)):
            sparse(self.at(disk.path), disk.size)
            run(*MKFS[disk.fs], self.at(disk.path))
            with self._mounted(disk) as inside:
                shutil.copytree(stage, inside, dirs_exist_ok=True)
                with open(os.path.join(inside, "table.dat"), "wb") as file:
                    file.write(random.Random(disk.path).randbytes(TABLE_BYTES))

    def describe(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for one in self.datastores:
            names = [os.path.basename(d.path) for d in (*self.disks, self.neighbour) if d.path.startswith(one.name)]
            where = f"{one.fs} {'in a partition of' if one.partitioned else 'on'} {one.image}"
            rows.append((one.name, where, " ".join(names)))
        return rows

    def write(self, disk: Disk, seed: int) -> str:
        chance = random.Random(seed)
        with self._mounted(disk) as inside:
            for number in range(4):
                with open(os.path.join(inside, f"day-{seed}-{number}.log"), "wb") as file:
                    file.write(chance.randbytes(64 << 10))
            with open(os.path.join(inside, "table.dat"), "r+b") as file:
                for page in chance.sample(range(TABLE_BYTES // PAGE_BYTES), 12):
                    file.seek(page * PAGE_BYTES)
                    file.write(chance.randbytes(PAGE_BYTES))
            old = [entry.path for entry in os.scandir(fan_out(inside)) if entry.is_dir()][:3]
            for folder in old:
                shutil.rmtree(folder)
        return f"{disk.path}: 4 new files of 64 KiB, 12 pages of a table rewritten; {len(old)} old folders removed"

    def _put_up(self, image: str, fs: str, name: str, partitioned: bool = False) -> None:
        """Bind ``image``, make a file system on it, mount it at ``name``."""
        device = self._bind(image, partitioned)
        run(*MKFS[fs], device)
        os.mkdir(self.at(name))
        run("mount", device, self.at(name))
        self.undo.callback(unmount, self.at(name))

    def _bind(self, image: str, partitioned: bool) -> str:
        if not partitioned:
            return self._loop(image)
        run("sfdisk", "--quiet", "--label", "gpt", self.at(image), feed="start=2048\n")
        device = self._loop(image, "--partscan")
        if not appears(f"{device}p1", 2.0):  # a kernel that reads no partition tables
            size = os.path.getsize(self.at(image))
            run("addpart", device, "1", str(MIB // 512), str((size - 2 * MIB) // 512))
            appears(f"{device}p1", 5.0)
        self.undo.callback(run, "delpart", device, "1", ok=(0, 1))
        return f"{device}p1"

    def _loop(self, image: str, *options: str) -> str:
        device = run("losetup", "--find", "--show", *options, self.at(image)).strip()
        self.undo.callback(run, "losetup", "--detach", device)
        if not appears(device, 5.0):
            raise Failed(f"{device} did not appear")
        return device

    @contextlib.contextmanager
    def _mounted(self, disk: Disk) -> Iterator[str]:
        """The file system on ``disk``, mounted for writing as its virtual machine would have it."""
        inside = self.at("inside")
        with contextlib.ExitStack() as undo:
            device = run("losetup", "--find", "--show", self.at(disk.path)).strip()
            undo.callback(run, "losetup", "--detach", device)
            appears(device, 5.0)
            os.mkdir(inside)
            undo.callback(os.rmdir, inside)
            run("mount", device, inside)
            undo.callback(unmount, inside)
            yield inside


def fan_out(folder: str) -> str:
    """Down from ``folder`` to the first one with more than one entry: where the documents fan out."""
    while len(entries := [one for one in os.listdir(folder) if one not in ("lost+found", "table.dat")]) == 1:
        folder = os.path.join(folder, entries[0])
    return folder


def appears(path: str, patience: float) -> bool:
    """Whether ``path`` is there within ``patience`` seconds: device nodes may come a moment after the device."""
    end = time.monotonic() + patience
    while not os.path.exists(path):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def unmount(point: str) -> None:
    """Unmount, patiently. Raises Failed when it was left frozen (it is thawed then), or stays busy."""
    frozen = subprocess.run(["fsfreeze", "--unfreeze", point], capture_output=True, timeout=TIMEOUT, check=False)
    for _ in range(50):
        if subprocess.run(["umount", point], capture_output=True, timeout=TIMEOUT, check=False).returncode == 0:
            break
        time.sleep(0.1)
    else:
        run("umount", "--lazy", point)
        raise Failed(f"{point} was busy")
    if frozen.returncode == 0:
        raise Failed(f"{point} had been left frozen")
