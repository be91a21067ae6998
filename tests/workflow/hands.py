"""The workflow's hands over memory: storage, medium, clock and chance that a test holds all the strings of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graincopy.core.ids import DiskId, WorkloadId, digest_id
from graincopy.media.memory import MemoryMedium, MemoryStore
from graincopy.model.change_map import Changed, ChangeMap
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.snapshot import Owner, Target
from graincopy.model.volume import Claim, VolumeCapabilities
from graincopy.model.workload import Workload, WorkloadFile
from graincopy.repository.repository import Repository
from graincopy.testing.memory_lab import MemoryFilesLab, MemoryLab
from graincopy.transfer.progress import silent
from graincopy.views.image import StoredImage
from graincopy.volumes.base import FileSink, VolumeDriver
from graincopy.volumes.memory import MemoryDriver
from graincopy.volumes.memory_storage import GRAIN, MemoryStorage
from graincopy.volumes.wrappers import Wrapped
from graincopy.workflow.backup import BackupOutcome, BackupWish, backup
from graincopy.workflow.context import Context, Limits
from graincopy.workflow.restore import RestoreOutcome, restore_in_place
from graincopy.workflow.undo import UndoneDisk, find_restore, undo
from graincopy.workloads.memory import MemorySource

OWNER = Owner(host="here", boot="boot", pid=1, started=1, hostname="here")


class Clock:
    """Stands still unless somebody sleeps or moves it."""

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

    def __init__(self, seed: str = "seed") -> None:
        self._seed, self._count = seed, 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._seed}:{self._count}".encode()).digest(size)

    def below(self, limit: int) -> int:
        return int.from_bytes(self.token(8), "big") % limit


class NoMap(Wrapped):
    """Snapshots, but nobody can tell what changed between two of them."""

    def capabilities(self) -> VolumeCapabilities:
        return VolumeCapabilities(group_instant=True)

    def changed(self, base: Target, now: Target) -> ChangeMap:
        raise AssertionError("asked without the power")


class NoSnapshots(NoMap):
    """As ``locked``: T is S itself as long as the run lasts."""

    def capabilities(self) -> VolumeCapabilities:
        return VolumeCapabilities(snapshots=False)


class Blurred(Wrapped):
    """A change map that is right but coarse: runs of eight grains."""

    def changed(self, base: Target, now: Target) -> ChangeMap:
        answer = super().changed(base, now)
        if not isinstance(answer, Changed):
            return answer
        coarse = answer.extents.to_grains(8 * GRAIN).to_bytes(8 * GRAIN)
        return Changed(coarse.clip(0, now.size), answer.source)


class Lying(Wrapped):
    """Says that nothing changed."""

    def changed(self, base: Target, now: Target) -> ChangeMap:
        answer = super().changed(base, now)
        return Changed(answer.extents.clip(0, 0), answer.source) if isinstance(answer, Changed) else answer


DRIVERS: dict[str, Callable[[VolumeDriver], VolumeDriver]] = {
    "reference": lambda driver: driver,
    "blurred": Blurred,
    "no map": NoMap,
    "no snapshots": NoSnapshots,
}


class Hands:
    """Disks in memory, repositories in memory, and the workflow between them."""

    def __init__(
        self, wrap: Callable[[VolumeDriver], VolumeDriver] = lambda driver: driver, files: bool = True
    ) -> None:
        self.lab: MemoryLab = MemoryFilesLab() if files else MemoryLab()
        self.clock = Clock()
        self.wrap = wrap
        self.stores: list[MemoryStore] = []
        self.steps: list[str] = []
        self.cut: str | None = None  # the step at which the run is cut off

    @property
    def storage(self) -> MemoryStorage:
        return self.lab.storage

    def new_repository(self) -> int:
        """Number of a new repository."""
        self.stores.append(MemoryStore())
        chance = Chance(f"made {len(self.stores)}")
        medium = MemoryMedium(self.stores[-1])
        Repository.create(
            medium, passphrase=None, grain_size=GRAIN, fan_out=8, clock=self.clock, chance=chance, owner=OWNER
        )
        return len(self.stores) - 1

    def context(self, number: int = 0, **limits: Any) -> Context:
        """As a new process would have it: nothing is known but what lies on medium and storage."""
        chance = Chance(f"{len(self.steps)} {len(self.stores[number].objects)} {self.clock.time}")
        self.clock.time += 1
        medium = MemoryMedium(self.stores[number])
        repository = Repository.open(medium, passphrase=None, clock=self.clock, chance=chance, owner=OWNER)
        driver = self.wrap(MemoryDriver(self.storage))
        return Context(
            repository=repository,
            drivers={driver.name: driver},
            clock=self.clock,
            chance=chance,
            owner=OWNER,
            alive=lambda owner: True,
            precious={},
            limits=Limits(workers=1, **{"audit": "3", **limits}),
            progress=silent,
            step=self._step,
        )

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name == self.cut:
            self.cut = None
            raise CutOff(name)

    def workload(self, name: str, claims: Sequence[Claim]) -> Workload:
        """A workload of the disks at ``claims``."""
        files = tuple(
            WorkloadFile(path=one.path, name=one.path.rpartition("/")[2], disk=DiskId(digest_id("path", [one.path])))
            for one in claims
        )
        return Workload(id=WorkloadId(digest_id("name", [name])), name=name, kind="memory", files=files)

    def backup(self, workload: Workload, repository: int = 0, **wishes: Any) -> BackupOutcome:
        return backup(self.context(repository), MemorySource([workload]), workload, BackupWish(**wishes))

    def restore(self, point: RestorePoint, repository: int = 0, compare: bool = False) -> RestoreOutcome:
        return restore_in_place(self.context(repository), point, point.disks, compare=compare)

    def undo(self, restore: str, repository: int = 0, force: bool = False) -> tuple[UndoneDisk, ...]:
        context = self.context(repository)
        return undo(context, find_restore(context.repository, restore), force=force)

    def content(self, disk: DiskRecord, repository: int = 0) -> bytes:
        """All bytes of a stored disk."""
        buffer = bytearray(disk.size)
        StoredImage(self.context(repository).repository, disk.root, disk.size).readinto(0, memoryview(buffer))
        return bytes(buffer)


class CutOff(Exception):
    """The run ends here, as by an error nobody foresaw."""


class MemoryFolder:
    """Restored files by name; each appears when it is whole."""

    def __init__(self) -> None:
        self._lab = MemoryFilesLab()
        self.files: dict[str, bytes] = {}

    def refuse_existing(self, names: Sequence[str]) -> None:
        assert not set(names) & set(self.files)

    @contextmanager
    def new_file(self, name: str, size: int, preallocate: bool) -> Iterator[FileSink]:
        claim = self._lab.make(size)
        with self._lab.driver().open_for_restore(claim) as sink:
            yield sink
        self.files[name] = self._lab.read(claim)

    def path_of(self, name: str) -> str:
        return f"/{name}"
