"""Small real storage for tests: file systems that can reflink, and LUN images on them that carry other file systems.

Plain classes, used by several suites. Every one is a context manager whose exit always runs to the end: it unmounts,
unbinds and reports nothing but its own trouble. Everything lies below the directory that the caller gives.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pytest

MIB = 1 << 20
PARTITION_START = 1 * MIB  # bytes; where gdisk puts the first one
TIMEOUT = 60  # seconds; nothing here takes one

needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"), reason="needs root and loop devices"
)


def root_test(function: Any) -> Any:
    """Decorate a test that needs root: marked (so that it is counted) and skipped elsewhere."""
    return pytest.mark.root(needs_root(function))


def run(*command: str, check: bool = True, timeout: float = TIMEOUT) -> str:
    """Run a tool to its end and return what it printed. Raises RuntimeError with what it complained of."""
    done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {os.fsdecode(done.stderr or done.stdout)}")
    return os.fsdecode(done.stdout)


class _Storage:
    """Something that is taken down in reverse order of how it was put up, whatever fails in between."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()

    def close(self) -> None:
        """May be repeated."""
        self._undo.close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def bind(image: str, *options: str) -> str:
    """losetup → the device's path. On some hosts the node is not there at once."""
    device = run("losetup", "--find", "--show", *options, image).strip()
    for _ in range(50):
        if os.path.exists(device):
            break
        time.sleep(0.05)
    return device


def unbind(device: str) -> None:
    """Unbind a loop device; the kernel may take a moment to let it go."""
    run("losetup", "--detach", device, check=False)


def unmount(point: str) -> None:
    """Thaw (in case a test left it frozen) and unmount."""
    if not os.path.ismount(point):
        return
    run("fsfreeze", "--unfreeze", point, check=False)
    for _ in range(20):
        if subprocess.run(["umount", point], capture_output=True, timeout=TIMEOUT, check=False).returncode == 0:
            return
        time.sleep(0.1)
    run("umount", "--lazy", point, check=False)


def make_fs(fs_type: str, device: str, *options: str) -> None:
    """mkfs, quick and quiet. XFS gets reflink and a small log."""
    quick = {
        "ext4": ("-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=1", "-J", "size=4"),
        "xfs": ("-q", "-f", "-m", "reflink=1"),
        "btrfs": ("-q", "-f", "-m", "single"),
    }
    run(f"mkfs.{fs_type}", *quick[fs_type], *options, device)


class ReflinkFs(_Storage):
    """A file system of its own on a sparse image: ``path`` is where it is mounted, ``image`` the image."""

    def __init__(
        self, folder: Any, fs_type: str = "xfs", size: int = 1024 * MIB, name: str = "outer", options: str = ""
    ) -> None:
        super().__init__()
        self.fs_type = fs_type
        self.size = size
        self.image = os.path.join(os.fspath(folder), f"{name}.img")
        self.path = os.path.join(os.fspath(folder), name)
        self._options = options

    def __enter__(self) -> ReflinkFs:
        try:
            sparse(self.image, self.size)
            self._undo.callback(_remove, self.image)
            self.device = bind(self.image)
            self._undo.callback(unbind, self.device)
            make_fs(self.fs_type, self.device)
            os.makedirs(self.path, exist_ok=True)
            run("mount", *(("-o", self._options) if self._options else ()), self.device, self.path)
            self._undo.callback(unmount, self.path)
        except BaseException:
            self.close()
            raise
        return self


class Lun(_Storage):
    """A LUN image in ``folder`` (on some ReflinkFs) that carries ``inner``, mounted at ``path``.

    ``partitioned``: False, or True for a real partition device (``losetup -P`` and, where the kernel parses no tables,
    ``addpart``), or "offset" for a table on the image with the loop device bound at the partition's offset.
    ``offset`` is where the file system begins in the image, in bytes.
    """

    def __init__(
        self,
        folder: Any,
        name: str = "lun0",
        size: int = 256 * MIB,
        inner: str = "ext4",
        partitioned: bool | str = False,
        mount_at: Any = None,
    ) -> None:
        super().__init__()
        self.inner, self.size, self.partitioned = inner, size, partitioned
        self.image = os.path.join(os.fspath(folder), f"{name}.img")
        self.path = os.fspath(mount_at) if mount_at is not None else os.path.join(os.fspath(folder), f"{name}.mnt")
        self.offset = PARTITION_START if partitioned else 0

    def __enter__(self) -> Lun:
        try:
            sparse(self.image, self.size)
            self._undo.callback(_remove, self.image)
            self.device = self._bind()
            make_fs(self.inner, self.device)
            os.makedirs(self.path, exist_ok=True)
            self.mount()
            self._undo.callback(self.unmount)
        except BaseException:
            self.close()
            raise
        return self

    def _bind(self) -> str:
        if not self.partitioned:
            return self._bind_whole()
        run("sgdisk", "--clear", "--new=1:2048:0", self.image)
        if self.partitioned == "offset":
            return self._bind_whole("--offset", str(PARTITION_START))
        disk = self._bind_whole("--partscan")
        part = f"{disk}p1"
        if not os.path.exists(part):
            run("addpart", disk, "1", str(PARTITION_START // 512), str((self.size - 2 * PARTITION_START) // 512))
        self._undo.callback(run, "delpart", disk, "1", check=False)
        return part

    def _bind_whole(self, *options: str) -> str:
        device = bind(self.image, *options)
        self._undo.callback(unbind, device)
        self.disk = device
        return device

    def mount(self) -> None:
        """Mount it (again, after :meth:`unmount`)."""
        run("mount", self.device, self.path)

    def unmount(self) -> None:
        """Unmount it; the device stays bound."""
        unmount(self.path)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The inner file system is frozen inside the ``with``, and thawed whatever happens there."""
        run("fsfreeze", "--freeze", self.path)
        try:
            yield
        finally:
            run("fsfreeze", "--unfreeze", self.path)


def sparse(path: str, size: int) -> None:
    """A new sparse file of ``size`` bytes."""
    with open(path, "xb") as file:
        file.truncate(size)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def reflink(source: str, target: str) -> None:
    """Clone a file with coreutils, so that tests do not depend on what they test."""
    run("cp", "--reflink=always", source, target)


def write_at(path: str, *pieces: tuple[int, bytes], sync: bool = True) -> None:
    """Write ``(offset, bytes)`` pieces into an existing or new file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for offset, data in pieces:
            os.pwrite(fd, data, offset)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


class Traces:
    """What the host shows of loop devices and mounts below ``folder``; ``gone`` compares with the start, patiently.

    Below one folder, because others may work on the same host.
    """

    def __init__(self, folder: Any = "") -> None:
        self.folder = os.fspath(folder)
        self.before = self.now()

    def now(self) -> tuple[str, str]:
        """Bound loop devices and the mount table."""
        with open("/proc/self/mounts", "rb") as file:
            mounts = os.fsdecode(file.read())
        loops = run("losetup", "--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE")
        return self._ours(loops), self._ours(mounts)

    def _ours(self, text: str) -> str:
        return "\n".join(line for line in text.split("\n") if self.folder in line)

    def gone(self, patience: float = 5.0) -> bool:
        """True when the host shows what it did at the start, at the latest after ``patience`` seconds."""
        end = time.monotonic() + patience
        while self.now() != self.before:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True
