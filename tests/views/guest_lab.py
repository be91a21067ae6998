"""Guest disks made by the tools that guests use, a plain file as a disk of a view, and trees to compare with."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))

import lab

from graincopy.views.source import Span

MIB = lab.MIB
root_test = lab.root_test


def needs(tool: str) -> Any:
    """Skip where ``tool`` is not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return pytest.mark.skipif(shutil.which(tool, path=path) is None, reason=f"needs {tool}")


class FileDisk:
    """A ViewDisk over a plain file. ``broken``: byte ranges that cannot be read. ``read_bytes`` counts."""

    def __init__(self, path: str, name: str | None = None) -> None:
        self.name = name or os.path.basename(path)
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size
        self.broken: list[tuple[int, int]] = []
        self.read_bytes = 0

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """pread(2)."""
        if any(start < offset + len(buffer) and offset < stop for start, stop in self.broken):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.read_bytes += len(buffer)
        data = os.pread(self.fd, len(buffer), offset)
        buffer[:] = data.ljust(len(buffer), b"\0")

    def extents(self, offset: int, length: int) -> list[Span]:
        """SEEK_DATA and SEEK_HOLE."""
        spans, at, stop = [], offset, min(offset + length, self.size)
        while at < stop:
            try:
                data = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:
                data = stop
            if data > at:
                spans.append(Span(at, min(data, stop), True, False))
            else:
                spans.append(Span(at, min(os.lseek(self.fd, at, os.SEEK_HOLE), stop), False, False))
            at = spans[-1].stop
        return spans

    def close(self) -> None:
        """Let the file go."""
        os.close(self.fd)


@contextlib.contextmanager
def file_disk(path: str, name: str | None = None) -> Iterator[FileDisk]:
    """A FileDisk that is closed."""
    disk = FileDisk(path, name)
    try:
        yield disk
    finally:
        disk.close()


def sparse(path: str, size: int) -> str:
    """A new file of zeros."""
    with open(path, "xb") as file:
        file.truncate(size)
    return path


def make_tree(folder: str) -> str:
    """A tree with everything that is awkward, and that every Unix file system can hold."""
    os.makedirs(os.path.join(folder, "etc/deep/er"))
    _write(folder, "etc/hosts", b"127.0.0.1 localhost\n")
    _write(folder, "etc/deep/er/random", os.urandom(3 * MIB + 17))
    _write(folder, "etc/empty", b"")
    _write(folder, "new\nline", b"n")
    _write(folder, os.fsdecode(b"bad\xff\xfename"), b"b")
    _write(folder, "setuid", b"#!/bin/sh\n")
    os.chmod(os.path.join(folder, "setuid"), 0o4755)
    os.chmod(os.path.join(folder, "etc/deep"), 0o2750)
    os.symlink("hosts", os.path.join(folder, "etc/link"))
    os.symlink("/etc/../../../../etc/hosts", os.path.join(folder, "up"))
    os.symlink("e" * 200, os.path.join(folder, "long"))
    os.symlink("etc", os.path.join(folder, "folder"))
    os.mkfifo(os.path.join(folder, "pipe"))
    os.link(os.path.join(folder, "etc/hosts"), os.path.join(folder, "zhard"))
    with open(os.path.join(folder, "sparse"), "wb") as file:
        file.truncate(40 * MIB)
        file.seek(20 * MIB)
        file.write(b"in the middle")
    for name in ("etc/hosts", "sparse", "etc"):
        os.utime(os.path.join(folder, name), ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
    return folder


def _write(folder: str, name: str, data: bytes) -> None:
    with open(os.path.join(folder, name), "wb") as file:
        file.write(data)


def describe(folder: str, *, times: bool = True) -> dict[bytes, tuple[Any, ...]]:
    """Everything below ``folder``: kind, mode, size, owner, content or target, mtime in seconds."""
    found: dict[bytes, tuple[Any, ...]] = {}
    top = os.fsencode(folder)
    for here, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = os.path.join(here, name)
            facts = os.lstat(path)
            kind = stat.S_IFMT(facts.st_mode)
            content = b""
            if stat.S_ISREG(kind):
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(kind):
                content = os.readlink(path)
            mode = 0 if stat.S_ISLNK(kind) else stat.S_IMODE(facts.st_mode)
            size = facts.st_size if stat.S_ISREG(kind) else 0
            mtime = facts.st_mtime_ns // 10**9 if times and not stat.S_ISLNK(kind) else 0
            found[os.path.relpath(path, top)] = (kind, mode, size, facts.st_uid, facts.st_gid, content, mtime)
    return found


def without_privileges(tree: dict[bytes, tuple[Any, ...]]) -> dict[bytes, tuple[Any, ...]]:
    """``tree`` as it is extracted without --setuid."""
    strip = ~(stat.S_ISUID | stat.S_ISGID)
    return {path: (kind, mode & strip, *rest) for path, (kind, mode, *rest) in tree.items()}


# --- file systems -----------------------------------------------------------------------------------


def make_ext4(image: str, tree: str, size: int = 96 * MIB, *options: str) -> str:
    """mkfs.ext4 -d."""
    lab.run("mkfs.ext4", "-q", "-F", "-d", tree, *options, sparse(image, size))
    return image


def make_btrfs(image: str, tree: str, size: int = 192 * MIB) -> str:
    """mkfs.btrfs --rootdir."""
    lab.run("mkfs.btrfs", "-q", "--rootdir", tree, sparse(image, size))
    return image


def make_xfs(image: str, tree: str, work: str, size: int = 320 * MIB) -> str:
    """mkfs.xfs, mounted and filled."""
    lab.run("mkfs.xfs", "-q", sparse(image, size))
    with mounted(image, work) as point:
        lab.run("cp", "-a", f"{tree}/.", point)
    return image


def make_ntfs(image: str, tree: str, work: str, size: int = 64 * MIB) -> str:
    """mkntfs, mounted by ntfs-3g and filled with what Windows can hold."""
    lab.run("mkntfs", "-q", "-F", "-f", sparse(image, size))
    with ntfs(image, work) as point:
        lab.run("cp", "-r", "--preserve=timestamps", f"{tree}/.", point)
    return image


@contextlib.contextmanager
def mounted(image: str, work: str, *options: str) -> Iterator[str]:
    """``image`` loop-mounted for writing below ``work``."""
    point = os.path.join(work, "mounted-here")
    os.makedirs(point, exist_ok=True)
    lab.run("mount", "-o", ",".join(("loop", *options)), image, point)
    try:
        yield point
    finally:
        lab.unmount(point)


@contextlib.contextmanager
def ntfs(image: str, work: str) -> Iterator[str]:
    """``image`` mounted by ntfs-3g."""
    point = os.path.join(work, "ntfs-here")
    os.makedirs(point, exist_ok=True)
    lab.run("ntfs-3g", "-o", "compression", image, point)
    try:
        yield point
    finally:
        lab.unmount(point)


def partition(image: str, label: str, script: str, parts: dict[int, str], size: int = 256 * MIB) -> dict[int, Any]:
    """A disk partitioned by sfdisk, with image files copied into partitions; sfdisk's own account of it."""
    sparse(image, size)
    subprocess.run(
        ["sfdisk", "--quiet", "--label", label, image],
        input=script.encode(),
        check=True,
        capture_output=True,
        timeout=lab.TIMEOUT,
    )
    told = account(image)
    for number, part in parts.items():
        seek = f"seek={told[number]['start'] * 512}"
        lab.run("dd", f"if={part}", f"of={image}", seek, "oflag=seek_bytes", "conv=notrunc,sparse", "bs=1M")
    return told


def account(image: str) -> dict[int, Any]:
    """Partitions by number, as sfdisk tells them: start and size in sectors."""
    import json

    table = json.loads(lab.run("sfdisk", "--json", image))["partitiontable"]
    return {int(one["node"].removeprefix(image)): one for one in table["partitions"]}


def memory_of(pid: int) -> int:
    """Peak resident bytes of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}
