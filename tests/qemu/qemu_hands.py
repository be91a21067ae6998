"""The workflow over a real qemu-storage-daemon: repository in memory, disks in a lab."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from graincopy.core.ids import DiskId, WorkloadId, digest_id
from graincopy.core.units import KIB
from graincopy.media.memory import MemoryMedium, MemoryStore
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.snapshot import Owner
from graincopy.model.workload import Representation, Workload, WorkloadFile
from graincopy.repository.repository import Repository
from graincopy.testing.qemu_lab import QemuLab
from graincopy.transfer.progress import silent
from graincopy.views.image import StoredImage
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.locked import LockedDriver
from graincopy.volumes.qemu import QemuDriver
from graincopy.workflow.backup import BackupOutcome, BackupWish, backup
from graincopy.workflow.context import Context, Limits
from graincopy.workflow.reap import reap
from graincopy.workflow.restore import RestoreOutcome, restore_in_place
from graincopy.workflow.undo import find_restore, undo
from graincopy.workloads.memory import MemorySource

GRAIN = 64 * KIB
OWNER = Owner(host="here", boot="boot", pid=1, started=1, hostname="here")


class Clock:
    """Moves only when it is told to."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class Chance:
    """The same for the same seed."""

    def __init__(self, seed: str) -> None:
        self._seed, self._count = seed, 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._seed}:{self._count}".encode()).digest(size)

    def below(self, limit: int) -> int:
        return int.from_bytes(self.token(8), "big") % limit


class CutOff(Exception):
    """The run ends here."""


class QemuHands:
    """One repository, and the drivers as the wiring makes them: reflink or locked below qemu."""

    def __init__(self, lab: QemuLab, below: Sequence[VolumeDriver] | None = None) -> None:
        self.lab = lab
        self.below = list(below) if below is not None else [LockedDriver()]
        self.clock = Clock()
        self.store = MemoryStore()
        self.cut: str | None = None
        self.dead = False
        made = Chance("made")
        Repository.create(
            MemoryMedium(self.store), passphrase=None, grain_size=GRAIN, clock=self.clock, chance=made, owner=OWNER
        )

    def context(self) -> Context:
        """As a new process would have it."""
        self.clock.time += 1
        chance = Chance(f"{self.clock.time}")
        repository = Repository.open(
            MemoryMedium(self.store), passphrase=None, clock=self.clock, chance=chance, owner=OWNER
        )
        drivers = [*self.below, QemuDriver(self.lab.places, self.below)]
        return Context(
            repository=repository,
            drivers={driver.name: driver for driver in drivers},
            clock=self.clock,
            chance=chance,
            owner=OWNER,
            alive=lambda owner: not self.dead,
            precious={},
            limits=Limits(workers=4, audit="3"),
            progress=silent,
            step=self._step,
        )

    def _step(self, name: str) -> None:
        if name == self.cut:
            self.cut = None
            raise CutOff(name)

    def workload(self, paths: Sequence[str]) -> Workload:
        """The disks at ``paths`` as a machine would have them."""
        files = tuple(
            WorkloadFile(
                path=path,
                name=path.rpartition("/")[2],
                disk=DiskId(digest_id("path", [path])),
                format=self.lab.kind,
                representation=Representation.GUEST,
            )
            for path in paths
        )
        return Workload(id=WorkloadId(digest_id("name", ["machine"])), name="machine", kind="vm", files=files)

    def backup(self, *paths: str, **wishes: Any) -> BackupOutcome:
        workload = self.workload(paths)
        return backup(self.context(), MemorySource([workload]), workload, BackupWish(**wishes))

    def restore(self, point: RestorePoint) -> RestoreOutcome:
        return restore_in_place(self.context(), point, point.disks, compare=False)

    def undo(self, restore: str) -> None:
        context = self.context()
        undo(context, find_restore(context.repository, restore), force=False)

    def reap(self) -> None:
        reap(self.context())

    def content(self, disk: DiskRecord) -> bytes:
        """All bytes of a stored disk."""
        buffer = bytearray(disk.size)
        StoredImage(self.context().repository, disk.root, disk.size).readinto(0, memoryview(buffer))
        return bytes(buffer)
