"""A file system on a Ceph image where the kernel has no client: rbd-fuse shows the image, a loop device carries it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from types import TracebackType

from graincopy.testing.rbd_images import FAST, create_image
from graincopy.volumes.rbd_cluster import Cluster, RbdSettings

TIMEOUT = 60  # seconds; nothing here takes ten


def run(*command: str) -> str:
    """A tool, run to its end. Raises RuntimeError with what it complained of."""
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {os.fsdecode(done.stderr or done.stdout)}")
    return os.fsdecode(done.stdout)


class Datastore:
    """``fs_type`` on the image ``name`` of pool ``rbd``, mounted at ``point``; ``shown`` is the folder of rbd-fuse."""

    def __init__(self, conf: str, home: str, name: str, fs_type: str, size: int = 512 << 20) -> None:
        self.conf, self.name, self.fs_type = conf, name, fs_type
        self.shown, self.point = os.path.join(home, "images"), os.path.join(home, "datastore")
        self._cluster = Cluster(RbdSettings(), conf)
        self._undo = contextlib.ExitStack()
        self._size = size

    @property
    def settings(self) -> RbdSettings:
        """What the driver has to be told."""
        return RbdSettings(fuse={self.shown: "rbd"})

    def __enter__(self) -> Datastore:
        with self._undo:
            with self._cluster.pool("rbd") as pool:
                create_image(pool, self.name, self._size, FAST, 20)
            self._undo.callback(self._patiently, self._remove_image)
            for folder in (self.shown, self.point):
                os.makedirs(folder)
            run("rbd-fuse", "-c", self.conf, "-p", "rbd", self.shown)
            self._undo.callback(self._patiently, lambda: run("fusermount3", "-u", self.shown))
            image = os.path.join(self.shown, self.name)
            self._await(image)
            device = run("losetup", "--find", "--show", image).strip()
            self._undo.callback(run, "losetup", "--detach", device)
            run(f"mkfs.{self.fs_type}", "-q", device)
            run("mount", device, self.point)
            self._undo.callback(self._unmount)
            self._undo = self._undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._undo.close()

    def _await(self, path: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not os.path.exists(path) and time.monotonic() < end:
            time.sleep(0.05)

    def _unmount(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", self.point], capture_output=True, timeout=TIMEOUT, check=False)
        run("umount", self.point)

    def _remove_image(self) -> None:
        with self._cluster.pool("rbd") as pool:
            with pool.image(self.name, writable=True) as image:
                for snap in image.snaps():
                    image.snap_remove(snap.name)
            pool.remove(self.name)

    def _patiently(self, undo: Callable[[], object]) -> None:
        """The kernel lets a loop device go in its own time, and so does rbd-fuse an image."""
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                undo()
                return
            except (OSError, RuntimeError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
