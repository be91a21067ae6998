"""The lab over a real qemu-storage-daemon: it plays the machine, its NBD export is the guest that writes.

``running`` disks hang in the daemon all the time, and targets are made inside it. Disks at rest are put into it only to
be written; whenever a driver is asked for, their machine is off. Either way a restore finds it off.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from msgspec.structs import replace

from graincopy.core.errors import GraincopyError, VolumeUnsupported
from graincopy.hypervisor.nbd import NbdClient
from graincopy.hypervisor.qmp import QmpRefused
from graincopy.model.volume import Claim, Refusal, VolumeCapabilities
from graincopy.testing.lab import VolumeLab
from graincopy.testing.qemu_machine import PATIENCE, Machine
from graincopy.volumes import qemu_rest
from graincopy.volumes.base import FileSink, VolumeDriver
from graincopy.volumes.qemu import QemuDriver
from graincopy.volumes.qemu_running import QemuPlaces


class QemuLab(VolumeLab):
    """Disks of ``kind`` (raw or qcow2) in ``directory``; ``below`` hold the files of machines that are off."""

    fixed_size = True

    def __init__(self, directory: str, kind: str, below: Sequence[VolumeDriver] = (), *, running: bool = True) -> None:
        super().__init__()
        self.name = f"qemu-{kind}" + ("" if running else "-off")
        self.size_unit = 512 if kind == "qcow2" else 1
        self.kind, self._below, self.running = kind, tuple(below), running
        self.home = os.path.realpath(tempfile.mkdtemp(prefix="graincopy-validate-", dir=directory))
        self._sockets = tempfile.mkdtemp(prefix="graincopy-lab-")  # short enough for a socket
        self.machine = Machine(self._sockets)
        monitors = (self.machine.qmp,)
        state = os.path.join(self.home, "state")
        self.places = QemuPlaces(state, monitors, {self.machine.qmp: self.machine.nbd}, patience=PATIENCE)
        self._disks: list[str] = []
        self._serial = itertools.count()
        self._held = False
        self.powers = frozenset(
            {"buffered", "punch", "two_volumes", "resize_volume", "recreate_volume", "remove"}
            | ({"one_instant", "hold"} if running else set())
        )

    def why_not(self, power: str) -> str:
        reasons = {"append": "a disk has the size that its machine gave it", "one_instant": "machines that are off"}
        return reasons.get(power, super().why_not(power))

    # --- the driver -------------------------------------------------------------------------------

    def driver(self) -> VolumeDriver:
        return _LabDriver(self)

    def _off(self, path: str) -> None:
        if self.machine.has(path):
            self.machine.unplug(path)

    @contextmanager
    def _guest(self, path: str) -> Iterator[NbdClient]:
        """What writes the disk: a machine that is off is switched on for it, and off again."""
        was_on = self.machine.has(path)
        if not was_on:
            self.machine.plug(path, self.kind)
        try:
            yield self.machine.guest(path)
        finally:
            if not was_on:
                self.machine.unplug(path)

    @contextmanager
    def switched_off(self, path: str) -> Iterator[None]:
        """The machine without the disk, unless somebody holds it."""
        was_on = self.machine.has(path) and not self._held
        if was_on:
            self.machine.unplug(path)
        try:
            yield
        finally:
            if was_on and os.path.exists(path):
                self.machine.plug(path, self.kind)

    def footprint(self) -> frozenset[str]:
        found = {os.path.join(folder, name) for folder, _, names in os.walk(self.home) for name in names}
        inside = self.machine.nodes() - self.machine_nodes()
        return frozenset(found.difference(self._disks)) | inside | frozenset(self._bitmaps_at_rest())

    def machine_nodes(self) -> frozenset[str]:
        """Nodes and exports of the disks themselves."""
        names = [self.machine._nodes[path] for path in self._disks if self.machine.has(path)]
        return frozenset(f"{name}{part}" for name in names for part in ("", "p", "t"))

    def _bitmaps_at_rest(self) -> set[str]:
        off = [path for path in self._disks if self.kind == "qcow2" and not self.machine.has(path)]
        return {f"{path}: {name}" for path in off if os.path.exists(path) for name in bitmaps_of(path)}

    # --- disks ------------------------------------------------------------------------------------

    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        path = os.path.join(self.home, f"disk{next(self._serial)}.{self.kind}")
        self._disks.append(path)
        self._create(path, size)
        return self._claim(path)

    def _create(self, path: str, size: int) -> None:
        with open(path, "xb") as file:
            if self.kind == "raw":
                file.truncate(size)
        if self.kind == "qcow2":
            qemu_rest.create(path, size)
        if self.running:
            self.machine.plug(path, self.kind)

    def _claim(self, path: str) -> Claim:
        claim = self.driver().resolve(path)
        if isinstance(claim, Refusal):
            raise VolumeUnsupported(path=path, reason=claim.reason)
        return claim

    def read(self, claim: Claim) -> bytes:
        with self._guest(claim.path) as guest:
            data = bytearray(guest.size)
            guest.readinto(0, memoryview(data))
        size = os.stat(claim.path).st_size if self.kind == "raw" else len(data)
        return bytes(data[:size])

    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        if data:
            with self._guest(claim.path) as guest:
                guest.write(offset, memoryview(data))

    def punch(self, claim: Claim, offset: int, length: int) -> None:
        with self._guest(claim.path) as guest:
            guest.zero(offset, length)

    def remove(self, claim: Claim) -> None:
        self._off(claim.path)
        os.unlink(claim.path)

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @contextmanager
    def reboot(self, *, kill: bool = False) -> Iterator[None]:
        """The machine is switched off and on, and finds its disks again."""
        plugged = [path for path in self._disks if self.machine.has(path)]
        self.machine.stop(kill=kill)
        yield
        self.machine.start()
        for path in plugged:
            self.machine.plug(path, self.kind)

    def resize_volume(self, claim: Claim, size: int) -> None:
        with self.reboot():
            shrink = ["--shrink"] if size < os.stat(claim.path).st_size or self.kind == "qcow2" else []
            command = ["qemu-img", "resize", "-q", *shrink, "-f", self.kind, claim.path, str(size)]
            subprocess.run(command, check=True, timeout=PATIENCE)

    def recreate_volume(self, claim: Claim) -> None:
        size = os.stat(claim.path).st_size if self.kind == "raw" else qemu_rest.header_of(claim.path).size
        with self.reboot():
            os.rename(claim.path, f"{claim.path}.old")  # its inode is not given away again at once
            was, self.running = self.running, False
            self._create(claim.path, size)
            self.running = was
        os.unlink(f"{claim.path}.old")

    def reset(self) -> None:
        super().reset()
        while self._disks:
            path = self._disks.pop()
            self._off(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def close(self) -> None:
        """Remove everything that was ever made here."""
        try:
            with contextlib.suppress(GraincopyError, OSError, QmpRefused):
                for target in self.driver().list_targets():
                    self.driver().delete(target)
                self.reset()
        finally:
            self.machine.stop()
            shutil.rmtree(self.home, ignore_errors=True)
            shutil.rmtree(self._sockets, ignore_errors=True)


class _LabDriver(QemuDriver):
    """A guest's view of every disk; for a restore its machine is switched off."""

    def __init__(self, lab: QemuLab) -> None:
        super().__init__(lab.places, lab._below)
        self._lab = lab

    def capabilities(self) -> VolumeCapabilities:
        """Machines that are off have no common instant: their claims are of no group."""
        return replace(super().capabilities(), group_instant=self._lab.running)

    def resolve(self, path: str) -> Claim | Refusal:
        return self.resolve_guest(path, self._lab.kind)

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        return self._restore(claim)

    @contextmanager
    def _restore(self, claim: Claim) -> Iterator[FileSink]:
        with ExitStack() as stack:
            stack.enter_context(self._lab.switched_off(claim.path))
            yield stack.enter_context(super().open_for_restore(claim))


def bitmaps_of(path: str) -> tuple[str, ...]:
    """Names of the bitmaps in the qcow2 at ``path``, which nobody has open."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with qemu_rest.shown("lab", path, fd) as (daemon, _):
            return tuple(one.name for one in qemu_rest.bitmaps_in(daemon))
    finally:
        os.close(fd)
