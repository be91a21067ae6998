"""A machine on the small data centre: a real qemu-storage-daemon that has disks on its LUNs open. Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import lab
import story
from datacenter import DataCentre
from story import MIB, Cli, noise

from graincopy.hypervisor.nbd import NbdClient
from graincopy.testing.array_ssh import HOST
from graincopy.testing.qemu_machine import Machine

RAW_SIZE = 8 * MIB


class Site:
    """``paths`` are the disks that the machine has open: two files on the first datastore, and a LUN as it is."""

    def __init__(self, centre: DataCentre) -> None:
        self.centre = centre
        self._undo = contextlib.ExitStack()
        try:
            self._set_up()
        except BaseException:
            self._undo.close()
            raise

    def _set_up(self) -> None:
        centre = self.centre
        self.folder = self._undo.enter_context(tempfile.TemporaryDirectory(prefix="graincopy-site-"))
        self.files = [centre.path(0, "a.raw"), centre.path(0, "b.raw")]
        self.other = centre.path(0, "other.raw")  # nobody has it open
        for number, path in enumerate([*self.files, self.other]):
            story.make_disk(path, 6 * MIB + number * 512, (0, noise(number, 3 * MIB)))
        centre.array.make("raw", RAW_SIZE, HOST)
        self._undo.callback(centre.array.drop, "raw")
        self.lun = centre.plane.device(centre.array.vdisks["raw"].number)
        story.write(self.lun, (0, noise(9, RAW_SIZE)))
        self.paths = [*self.files, self.lun]
        self.machine = Machine(self.folder)
        self._undo.callback(lambda: self.machine.stop())
        self.plug()

    def plug(self) -> None:
        """Every disk, into a machine that was just switched on."""
        for path in self.paths:
            self.machine.plug(path, "raw")

    def reboot(self, *, kill: bool = False) -> None:
        """Off and on again: another QEMU."""
        self.machine.stop(kill=kill)
        self.machine.start()
        self.plug()

    def close(self) -> None:
        self._undo.close()

    def config(self, **more: object) -> str:
        """Of the array and of the machine."""
        where = {"monitors": [self.machine.qmp], "nbd": [f"{self.machine.qmp}={self.machine.nbd}"], **more}
        lines = [f"{name} = {json.dumps(value)}" for name, value in where.items()]
        return "\n".join([self.centre.config(), "[qemu]", *lines])

    def write(self, path: str, offset: int, data: bytes) -> None:
        """The guest writes."""
        self.machine.guest(path).write(offset, memoryview(data))

    def client(self, path: str) -> NbdClient:
        """Another connection of the guest."""
        return NbdClient(self.machine.nbd, self.machine.node(path))

    def grow(self, path: str, size: int) -> None:
        """The machine is given a longer disk, and writes to the end of it."""
        self.machine.resize(path, size)
        self.write(path, size // 512 * 512 - 70_000 // 512 * 512, noise(size, 4096))

    def bitmaps(self) -> set[str]:
        """Names of all dirty bitmaps in the machine, with their nodes."""
        with self.machine.monitor() as monitor:
            nodes: list[dict[str, Any]] = monitor.run("query-named-block-nodes", {"flat": True})
        return {
            f"{node['node-name']} {one['name']}"
            for node in nodes
            for one in node.get("dirty-bitmaps", ())
            if "name" in one
        }

    def exports(self) -> int:
        """How many things the machine exports besides its disks."""
        with self.machine.monitor() as monitor:
            return len(monitor.run("query-block-exports")) - len(self.paths)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Somebody else has the monitor: it answers nobody."""
        with self.machine.monitor():
            yield


class Busy:
    """Guests that write at random, all the time, until the block ends."""

    def __init__(self, site: Site, seed: int) -> None:
        self._site, self._stop = site, threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(path, Random(seed * 10 + number)))
            for number, path in enumerate(site.paths)
        ]
        self.failures: list[BaseException] = []

    def _write(self, path: str, chance: Random) -> None:
        client = self._site.client(path)
        try:
            while not self._stop.is_set():
                self._one(client, chance)
                self._stop.wait(chance.random() * 0.02)
        except OSError as error:
            self.failures.append(error)
        finally:
            client.close()

    def _one(self, client: NbdClient, chance: Random) -> None:
        length = chance.choice((512, 4096, 65536, 150_000 // 512 * 512))
        offset = chance.randrange((client.size - length) // 512) * 512
        if chance.random() < 0.3:
            client.zero(offset, length)
        else:
            client.write(offset, memoryview(chance.randbytes(length)))

    def __enter__(self) -> Busy:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Oracle:
    """What the targets of a run hold, copied below the array, where no driver of ours looks."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._copies: dict[str, str] = {}

    def take(self) -> None:
        """Copies of all targets that the array has now."""
        array, plane = self._site.centre.array, self._site.centre.plane
        for mapping in array.maps.values():
            copy = plane.image(array.vdisks[mapping.target].number) + ".oracle"
            lab.run("cp", "--reflink=always", plane.image(array.vdisks[mapping.target].number), copy)
            self._copies[mapping.source] = copy

    def contents(self) -> dict[str, bytes]:
        """Path → bytes at the instant; the copies are gone then."""
        found = {self._site.lun: story.read(self._copies["raw"])}
        with tempfile.TemporaryDirectory(dir=self._site.folder) as point:
            lab.run("mount", "-o", "ro,norecovery,nouuid,loop", self._copies["ds0"], point)
            try:
                for path in [*self._site.files, self._site.other]:
                    found[path] = story.read(os.path.join(point, os.path.basename(path)))
            finally:
                lab.unmount(point)
        for copy in self._copies.values():
            os.unlink(copy)
        self._copies.clear()
        return found


def restored(cli: Cli, point: str) -> dict[str, bytes]:
    """Path → bytes of every disk of ``point``, restored to a folder that is gone again."""
    disks = {disk["name"]: disk["path"] for disk in cli.ok("show", point)["disks"]}
    out = cli.ok("restore", point, "--to", f"{cli.folder}/out")
    found = {}
    for disk in out["disks"]:
        found[disks[disk["name"]]] = story.read(disk["target"])
        os.unlink(disk["target"])
    return found
