"""What the tests of views share: a repository, volumes (in memory or real), backups, and what views must show."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from graincopy.core.ids import DiskId, WorkloadId
from graincopy.media.base import Medium
from graincopy.media.memory import MemoryMedium
from graincopy.media.wrappers import Wrapped
from graincopy.model.restore_point import RestorePoint
from graincopy.model.snapshot import Owner
from graincopy.model.workload import Workload, WorkloadFile
from graincopy.repository.repository import Repository
from graincopy.testing.faults import SteppedClock
from graincopy.transfer.progress import silent
from graincopy.views.source import ViewDisk
from graincopy.volumes.base import VolumeDriver
from graincopy.workflow.backup import BackupWish, backup
from graincopy.workflow.context import Context, Limits
from graincopy.workflow.view import View, ViewWish, open_view
from graincopy.workloads.memory import MemorySource

GRAIN = 4096
OWNER = Owner(host="host", boot="boot", pid=1, started=1, hostname="here")


class FixedChance:
    """The same bytes every time."""

    def __init__(self, seed: str = "views") -> None:
        self._seed, self._count, self._lock = seed, 0, threading.Lock()

    def token(self, size: int) -> bytes:
        with self._lock:
            self._count += 1
            return hashlib.shake_256(f"{self._seed} {self._count}".encode()).digest(size)

    def below(self, limit: int) -> int:
        return int.from_bytes(self.token(8), "big") % limit


class Counted(Wrapped):
    """Counts ranged reads of packs and their bytes."""

    def __init__(self, inner: Medium) -> None:
        super().__init__(inner)
        self.gets: list[tuple[str, int, int]] = []

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = self.inner.get(name, offset, length)
        if name.startswith(("data/", "node/")):
            self.gets.append((name, offset, len(data)))
        return data

    @property
    def bytes(self) -> int:
        """Read from packs so far."""
        return sum(size for _, _, size in self.gets)


class World:
    """A repository on ``medium``, and volumes that ``make_driver`` drives."""

    def __init__(
        self, drivers: Sequence[VolumeDriver], medium: Medium | None = None, grain: int = GRAIN, clock: object = None
    ) -> None:
        self.medium = Counted(MemoryMedium() if medium is None else medium)
        self.clock = clock or SteppedClock()
        self.chance = FixedChance()
        self.drivers = {driver.name: driver for driver in drivers}
        self.dead: set[Owner] = set()
        self.steps: list[str] = []
        Repository.create(
            self.medium, passphrase=None, grain_size=grain, fan_out=8, clock=self.clock, chance=self.chance
        )

    def open(self, medium: Medium | None = None, owner: Owner = OWNER) -> Repository:
        """As another process would: nothing is known but the medium."""
        return Repository.open(
            medium or self.medium, passphrase=None, clock=self.clock, chance=self.chance, owner=owner
        )

    def context(self, repository: Repository | None = None, owner: Owner = OWNER, **more: object) -> Context:
        terms = {"audit": "0", "freeze_deadline_s": 10.0} | more
        return Context(
            repository=repository or self.open(owner=owner),
            drivers=self.drivers,
            clock=self.clock,
            chance=self.chance,
            owner=owner,
            alive=lambda one: one not in self.dead,
            precious={},
            limits=Limits(**terms),
            progress=silent,
            step=self.steps.append,
        )

    def backup(self, *paths: str, keep_checkpoint: bool = True, name: str = "w") -> RestorePoint:
        """A restore point of ``paths``."""
        files = tuple(
            WorkloadFile(path=path, name=os.path.basename(path), disk=DiskId(os.path.basename(path))) for path in paths
        )
        workload = Workload(id=WorkloadId(name), name=name, kind="files", files=files)
        wish = BackupWish(keep_checkpoint=keep_checkpoint)
        return backup(self.context(), MemorySource(), workload, wish).point

    @contextmanager
    def view(
        self,
        point: RestorePoint,
        context: Context | None = None,
        told: list[object] | None = None,
        nested: bool = False,
        **wish: object,
    ) -> Iterator[View]:
        """A view in which it is settled what is near."""
        context = context or self.context()
        tell = [].append if told is None else told.append
        with open_view(context, point, point.disks, ViewWish(**wish), tell=tell) as view:
            assert view.wait_settled(60)
            yield view
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("view", "read-ahead"))]
        assert left == [] or nested, left

    def targets(self) -> list[str]:
        """Roles of every target there is."""
        return sorted(target.tag.role for driver in self.drivers.values() for target in driver.list_targets())


def read(disk: ViewDisk, offset: int = 0, length: int | None = None) -> bytes:
    """Bytes of the disk; to its end without a length."""
    buffer = bytearray(b"\xaa" * (disk.size - offset if length is None else length))
    disk.readinto(offset, memoryview(buffer))
    return bytes(buffer)


def read_in_pieces(disk: ViewDisk, length: int) -> bytes:
    """All of it, ``length`` bytes at a time, in order."""
    return b"".join(read(disk, at, min(length, disk.size - at)) for at in range(0, disk.size, length))


def noise(seed: int, size: int) -> bytes:
    """``size`` bytes that do not compress, the same for the same ``seed``."""
    return random.Random(seed).randbytes(size)


def padded(content: bytes, offset: int, length: int) -> bytes:
    """What a read of ``content`` must give: zeros beyond its end."""
    return content[offset : offset + length].ljust(length, b"\0")
