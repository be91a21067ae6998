"""Somebody who has images on Ceph, writes to them, and knows what must be in them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from graincopy.testing.rbd_images import FAST, create_image
from graincopy.volumes.rbd_cluster import Cluster, RbdSettings
from graincopy.volumes.rbd_open_image import Image

MIB = 1 << 20
TIMEOUT = 120  # seconds; nothing here takes ten


class Guest:
    """Images in the pool ``rbd``, one client that opens them for as long as each call takes."""

    def __init__(self, conf: str) -> None:
        self.conf = conf
        self.cluster = Cluster(RbdSettings(), conf)
        self._images: list[str] = []

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for group in self.groups():
            self.rbd("group", "rm", group, check=False)
        for name in reversed(self._images):
            for snap in self.snaps(name):
                self.rbd("snap", "rm", f"{name}@{snap}", check=False)
            self.rbd("rm", name, check=False)
        self.command("rados", "-p", "rbd", "rm", "graincopy.targets", check=False)

    # --- images -------------------------------------------------------------------------------------

    def make(self, name: str, size: int, features: int = FAST, order: int = 20) -> str:
        """An image of zeros; its name as graincopy has it."""
        with self.cluster.pool("rbd") as pool:
            create_image(pool, name, size, features, order)
        return self.own(name)

    def own(self, name: str) -> str:
        """Remove the image ``name`` at the end; its name as graincopy has it."""
        self._images.append(name)
        return f"rbd:rbd/{name}"

    @contextlib.contextmanager
    def empty(self, name: str, size: int, order: int) -> Iterator[str]:
        """An image that nothing is written to, removed by its parts: ``rbd rm`` looks at every object it could have."""
        with self.cluster.pool("rbd") as pool:
            create_image(pool, name, size, FAST, order)
            with pool.image(name) as image:
                image_id = image.id()
        try:
            yield f"rbd:rbd/{name}"
        finally:
            for part in (f"rbd_object_map.{image_id}", f"rbd_header.{image_id}", f"rbd_id.{name}"):
                self.command("rados", "-p", "rbd", "rm", part)
            for key in (f"name_{name}", f"id_{image_id}"):
                self.command("rados", "-p", "rbd", "rmomapkey", "rbd_directory", key)

    @contextlib.contextmanager
    def open(self, name: str) -> Any:
        """The image, opened for writing."""
        with self.cluster.pool("rbd") as pool, pool.image(name, writable=True) as image:
            yield image

    def write(self, name: str, *pieces: tuple[int, bytes]) -> None:
        """``(offset, bytes)`` pieces."""
        with self.open(name) as image:
            for offset, data in pieces:
                image.write(offset, memoryview(data))
            image.flush()

    def discard(self, name: str, offset: int, length: int) -> None:
        """Trim."""
        with self.open(name) as image:
            image.discard(offset, length)

    def read(self, name: str, snap: str = "") -> bytes:
        """All of the image."""
        with self.cluster.pool("rbd") as pool, pool.image(name, snap=snap) as image:
            return read_all(image)

    def await_alone(self, name: str) -> None:
        """Until the cluster has given up clients that died with the image open."""
        end = time.monotonic() + TIMEOUT
        while True:
            with self.open(name) as image:
                if not image.others():
                    return
            assert time.monotonic() < end
            time.sleep(0.5)

    # --- the cluster --------------------------------------------------------------------------------

    def user(self, name: str, folder: str) -> str:
        """The keyring of a user who may what docs/drivers/rbd.md asks for, made in ``folder``."""
        path = os.path.join(folder, f"{name}.keyring")
        rights = ("mon", "profile rbd", "osd", "profile rbd pool=rbd")
        self.command("ceph", "auth", "get-or-create", f"client.{name}", *rights, "-o", path)
        return path

    def given_up(self) -> frozenset[str]:
        """Clients on the blocklist."""
        return frozenset(json.loads(self.command("ceph", "osd", "dump", "--format", "json"))["blocklist"])

    # --- what is there ------------------------------------------------------------------------------

    def snaps(self, name: str) -> list[str]:
        """``rbd snap ls --all``: those of groups too."""
        said = self.rbd("snap", "ls", "--all", name, "--format", "json", check=False)
        return [one["name"] for one in json.loads(said or "[]")]

    def groups(self) -> list[str]:
        """``rbd group ls``."""
        return self.rbd("group", "ls", check=False).split()

    def traces(self) -> list[str]:
        """Snapshots of graincopy on the images, groups and records of it in the pool."""
        records = self.command("rados", "-p", "rbd", "listomapkeys", "graincopy.targets", check=False).split()
        snaps = {f"{name}@{snap}" for name in self._images for snap in self.snaps(name)}
        return sorted(snaps | {*records} | {*self.groups()})

    def rbd(self, *words: str, check: bool = True) -> str:
        """The tool that everybody has."""
        return self.command("rbd", *words, check=check)

    def command(self, *words: str, check: bool = True) -> str:
        """A tool of Ceph, run to its end."""
        done = subprocess.run(
            [words[0], "--conf", self.conf, *words[1:]], capture_output=True, timeout=TIMEOUT, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{words}: {os.fsdecode(done.stderr)}")
        return os.fsdecode(done.stdout) if not done.returncode else ""


def read_all(image: Image) -> bytes:
    """Every byte."""
    data = bytearray(image.size)
    image.read(0, memoryview(data))
    return bytes(data)
