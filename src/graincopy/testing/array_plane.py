"""Data planes of our own array: LUNs as image files on reflink XFS, shown to this host as loop devices; or nothing.

A clone is FICLONE. What makes the clones of a group one instant is a gate that every writer of a *raw* LUN of the lab
passes (:attr:`LoopPlane.gate`), as a real array holds I/O; file systems on LUNs are held by the freeze window.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

from graincopy.volumes import ioctl, loop
from graincopy.volumes.reflink_clone import allocated_of, warm

_BLKROSET = 0x125D  # linux/fs.h


class WallClock:
    """The machine's clocks, for an array that really runs."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds from some start."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        time.sleep(seconds)


class NoPlane:
    """No bytes at all: for tests of what is said and done, without root. Remembers what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def create(self, number: int, size: int) -> None:
        self.calls.append(f"create {number} {size}")

    def resize(self, number: int, size: int) -> None:
        self.calls.append(f"resize {number} {size}")

    def remove(self, number: int) -> None:
        self.calls.append(f"remove {number}")

    def clone(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.calls.append(f"clone {list(pairs)}")

    def prepare(self, source: int, target: int) -> None:
        self.calls.append(f"prepare {source} {target}")

    def publish(self, number: int, uid: str) -> None:
        self.calls.append(f"publish {number}")

    def withdraw(self, number: int, uid: str) -> None:
        self.calls.append(f"withdraw {number}")

    def used(self, number: int) -> int:
        return 0

    def flush(self, number: int) -> None:
        self.calls.append(f"flush {number}")


class LoopPlane:
    """Image files in ``folder`` (on XFS with reflink), loop devices, and links to these in ``by_id``. Needs root."""

    def __init__(self, folder: str, by_id: str) -> None:
        self.folder, self.by_id = folder, by_id
        self.gate = Lock()
        self._shown: dict[int, tuple[str, int]] = {}  # device and a descriptor that keeps it bound
        os.makedirs(folder, exist_ok=True)
        os.makedirs(by_id, exist_ok=True)

    def image(self, number: int) -> str:
        """The file that holds the vdisk's bytes."""
        return os.path.join(self.folder, f"vdisk{number}.img")

    def create(self, number: int, size: int) -> None:
        with open(self.image(number), "xb") as file:
            file.truncate(size)

    def resize(self, number: int, size: int) -> None:
        os.truncate(self.image(number), size)

    def remove(self, number: int) -> None:
        os.unlink(self.image(number))

    def clone(self, pairs: Sequence[tuple[int, int]]) -> None:
        with self.gate, contextlib.ExitStack() as held:
            opened = [
                (held.enter_context(_open(self.image(a))), held.enter_context(_open(self.image(b)))) for a, b in pairs
            ]
            with ThreadPoolExecutor(len(opened)) as pool:
                for done in [pool.submit(ioctl.clone, source, target) for source, target in opened]:
                    done.result()

    def prepare(self, source: int, target: int) -> None:
        self.flush(source)
        with _open(self.image(source)) as source_fd, _open(self.image(target)) as target_fd:
            size = os.fstat(source_fd).st_size
            os.ftruncate(target_fd, 0)
            os.ftruncate(target_fd, size)
            warm(source_fd, target_fd)

    def publish(self, number: int, uid: str) -> None:
        with loop.attach_writable(self.image(number)) as device:
            _make_writable(device.fd)
            self._shown[number] = device.path, os.open(device.path, os.O_RDONLY | os.O_CLOEXEC)
        os.symlink(self._shown[number][0], self._link(uid))

    def withdraw(self, number: int, uid: str) -> None:
        os.unlink(self._link(uid))
        self._let_go(self._shown.pop(number)[1])

    def device(self, number: int) -> str:
        """Path of the loop device that shows the vdisk."""
        return self._shown[number][0]

    def used(self, number: int) -> int:
        return allocated_of(self.image(number))

    def flush(self, number: int) -> None:
        if number in self._shown:
            os.fsync(self._shown[number][1])
        with _open(self.image(number)) as fd:
            os.fsync(fd)

    def close(self) -> None:
        """Let every device go; may be repeated."""
        while self._shown:
            self._let_go(self._shown.popitem()[1][1])

    def _let_go(self, fd: int) -> None:
        """A disk that goes takes its read-only flag with it; a loop device would keep it for whoever has it next."""
        _make_writable(fd)
        os.close(fd)

    def _link(self, uid: str) -> str:
        return os.path.join(self.by_id, f"wwn-0x{uid.lower()}")


def _make_writable(device: int) -> None:
    fcntl.ioctl(device, _BLKROSET, struct.pack("i", 0))


@contextmanager
def _open(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
