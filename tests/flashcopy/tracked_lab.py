"""The labs of files and LUNs, with a real QEMU that has every disk open: it plays the guest that writes."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from msgspec.structs import replace

from graincopy.core.errors import Unsupported
from graincopy.model.change_map import ChangeMap
from graincopy.model.snapshot import Target, TargetTag
from graincopy.model.volume import Claim, VolumeCapabilities
from graincopy.testing.array_lab import ArrayFilesLab
from graincopy.testing.file_lab import FileLab
from graincopy.testing.qemu_machine import Machine
from graincopy.volumes.base import FileSink, VolumeDriver
from graincopy.volumes.qemu_running import QemuPlaces
from graincopy.volumes.qemu_tracker import QemuTracker
from graincopy.volumes.reflink import ReflinkDriver
from graincopy.volumes.tracked import TrackedDriver

_GUESTS = {
    "buffered",
    "punch",
    "two_volumes",
    "one_instant",
    "remove",
    "hold",
}  # what a guest can do, and we to its file


class BlindReflink(ReflinkDriver):
    """The reflink driver as an array would be: it tells nothing of changes, and keeps nothing."""

    def capabilities(self) -> VolumeCapabilities:
        return replace(super().capabilities(), change_map=False, checkpoints=False)

    def changed(self, base: Target, now: Target) -> ChangeMap:
        raise Unsupported(driver=self.name, power="tell what changed between two targets")

    def retag(self, target: Target, tag: TargetTag) -> Target:
        raise Unsupported(driver=self.name, power="keep checkpoints")


class _Guests(FileLab):
    """Disks in a running machine. ``tells``: the driver declares for all files what it can do for tracked ones."""

    tells = True

    def open_machine(self) -> None:
        """Before the first disk is made."""
        self._place = tempfile.mkdtemp(prefix="graincopy-lab-")  # short enough for a socket
        self.machine = Machine(self._place)
        self._claims: dict[object, object] = {}
        self._held = False

    def close_machine(self) -> None:
        self.machine.stop()
        shutil.rmtree(self._place, ignore_errors=True)

    def wrapped(self, inner: VolumeDriver) -> VolumeDriver:
        """A fresh driver object, which has heard of what others resolved: in a backup it is one object."""
        places = QemuPlaces(
            os.path.join(self._place, "qemu"), (self.machine.qmp,), {self.machine.qmp: self.machine.nbd}
        )
        driver = _LabDriver(self, inner, QemuTracker(places), os.path.join(self._place, "notes"))
        vars(driver)["_claims"] = self._claims
        return driver

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
                self.machine.plug(path, "raw")

    def footprint(self) -> frozenset[str]:
        ours = {name for name in self.machine.nodes() if name.startswith(("bitmap", "gc-"))}
        return super().footprint() | ours | frozenset(os.listdir(os.path.join(self._place, "notes")))

    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        claim = super().make(size, volume, compressed)
        self.machine.plug(claim.path, "raw")
        return self._claim(claim.path)

    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        if data:
            self.machine.guest(claim.path).write(offset, memoryview(data))

    def punch(self, claim: Claim, offset: int, length: int) -> None:
        self.machine.guest(claim.path).zero(offset, length)

    def remove(self, claim: Claim) -> None:
        if self.machine.has(claim.path):
            self.machine.unplug(claim.path)
        super().remove(claim)

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def reset(self) -> None:
        self.reset_targets()
        for path in self._disks:
            if self.machine.has(path):
                self.machine.unplug(path)
        super().reset()


class TrackedReflinkLab(_Guests):
    """Files on LUN images, which are cloned: any number of targets at once, so that every law can be tried."""

    fixed_size = True

    def __init__(self, directories: list[str], make_driver: Callable[[], VolumeDriver], clock: object) -> None:
        self.open_machine()
        os.mkdir(os.path.join(self._place, "notes"))
        more = dict.fromkeys(_powers() - _GUESTS, "a guest cannot")
        super().__init__(
            directories,
            lambda: self.wrapped(make_driver()),
            clock,  # type: ignore[arg-type]
            name="tracked-reflink",
            lacking=more,
        )

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.close_machine)
            super().close()


class TrackedArrayLab(_Guests, ArrayFilesLab):
    """Files on LUNs of our array: one target at a time, so that two instants cannot be looked at side by side."""

    fixed_size = True
    tells = False

    def __init__(self, centre: object, inner: str) -> None:
        self.open_machine()
        os.mkdir(os.path.join(self._place, "notes"))
        ArrayFilesLab.__init__(
            self,
            centre.array,  # type: ignore[attr-defined]
            centre.datastores,  # type: ignore[attr-defined]
            lambda: self.wrapped(centre.driver()),  # type: ignore[attr-defined]
            centre.clock,  # type: ignore[attr-defined]
            f"tracked-{inner}",
        )
        self.powers &= _GUESTS

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.close_machine)
            super().close()


def _powers() -> set[str]:
    from graincopy.testing.lab import OPERATIONS

    return {"buffered", "mmap", "direct", "compress", *OPERATIONS}


class _LabDriver(TrackedDriver):
    """Every disk of the lab is tracked. For a restore its machine is switched off."""

    def __init__(self, lab: _Guests, inner: VolumeDriver, tracker: QemuTracker, folder: str) -> None:
        super().__init__(inner, tracker, folder)
        self._lab = lab

    def capabilities(self) -> VolumeCapabilities:
        tells = self._lab.tells
        return replace(super().capabilities(), change_map=tells, checkpoints=tells)

    def changed(self, base: Target, now: Target) -> ChangeMap:
        return super().changed(base, now) if self._lab.tells else self.inner.changed(base, now)

    def retag(self, target: Target, tag: TargetTag) -> Target:
        return super().retag(target, tag) if self._lab.tells else self.inner.retag(target, tag)

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        return self._restore(claim)

    @contextmanager
    def _restore(self, claim: Claim) -> Iterator[FileSink]:
        with self._lab.switched_off(claim.path), super().open_for_restore(claim) as sink:
            yield sink
