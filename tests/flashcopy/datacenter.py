"""A small data centre for tests: an array behind SSH, its LUNs on this host, datastores on them. Needs root."""

from __future__ import annotations

import contextlib
import os
from types import TracebackType

import lab
from array_world import ARRAY

from graincopy.testing.array import Array
from graincopy.testing.array_plane import LoopPlane, WallClock
from graincopy.testing.array_ssh import HOST, SshFront
from graincopy.volumes.flashcopy.assembly import ArraySettings, flashcopy_driver
from graincopy.volumes.flashcopy.connection import Login
from graincopy.volumes.flashcopy.driver import FlashCopyDriver

MIB = lab.MIB


class DataCentre:
    """``luns`` are (inner file system, MiB); ``datastores[n]`` is where number n is mounted."""

    def __init__(self, folder: str, *luns: tuple[str, int]) -> None:
        self.folder, self._luns = folder, luns
        self._undo = contextlib.ExitStack()
        self.clock = WallClock()
        self.datastores: list[str] = []
        self.devices: list[str] = []
        self.uids: list[str] = []

    def __enter__(self) -> DataCentre:
        try:
            self._set_up()
        except BaseException:
            self._undo.close()
            raise
        return self

    def _set_up(self) -> None:
        outer = self._undo.enter_context(lab.ReflinkFs(self.folder, "xfs", 4096 * MIB))
        self.plane = LoopPlane(os.path.join(outer.path, "luns"), os.path.join(self.folder, "by-id"))
        self._undo.callback(self.plane.close)
        self.array = Array(self.plane, self.clock)
        self.front = self._undo.enter_context(SshFront(self.array, os.path.join(self.folder, "ssh")))
        for number, (inner, size) in enumerate(self._luns):
            self.add(f"ds{number}", inner, size)

    def add(self, name: str, inner: str, size: int) -> str:
        """Another LUN with a file system on it, mounted; where."""
        uid = self.array.make(name, size * MIB, HOST).lower()
        device = self.plane.device(self.array.vdisks[name].number)
        lab.make_fs(inner, device, *(("-b", "4096") if inner == "ext4" else ()))
        point = os.path.join(self.folder, name)
        os.mkdir(point)
        lab.run("mount", device, point)
        self._undo.callback(lab.unmount, point)
        self.datastores.append(point)
        self.devices.append(device)
        self.uids.append(uid)
        return point

    def login(self, **more: object) -> Login:
        """How a client logs in, by key unless something else is said."""
        endpoint = self.front.endpoint
        usual: dict[str, object] = {
            "name": ARRAY,
            "host": "127.0.0.1",
            "port": endpoint.port,
            "user": endpoint.user,
            "key_file": endpoint.key_file,
            "known_hosts": endpoint.known_hosts,
        }
        return Login(**{**usual, **more})  # type: ignore[arg-type]

    def driver(self, state: str | None = None) -> FlashCopyDriver:
        """A fresh driver object over SSH."""
        settings = ArraySettings(self.login(), HOST, devices=self.plane.by_id)
        return flashcopy_driver([settings], state or os.path.join(self.folder, "state"), self.clock)

    def config(self, **more: object) -> str:
        """The section of the configuration that finds the array."""
        return self.front.endpoint.config(ARRAY, self.plane.by_id, **more)

    def path(self, datastore: int, name: str) -> str:
        """Where a disk lies."""
        return os.path.join(self.datastores[datastore], name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._undo.close()
