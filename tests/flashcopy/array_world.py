"""What the flashcopy tests share: a clock that passes by itself, an array without bytes, a driver on a direct line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graincopy.core.ids import PointId, RepositoryId, VolumeId
from graincopy.model.snapshot import Owner, Role, Target, TargetTag
from graincopy.testing.array import Array, LineBroken
from graincopy.testing.array_plane import NoPlane
from graincopy.volumes.flashcopy import names
from graincopy.volumes.flashcopy.connection import Lost, Reply
from graincopy.volumes.flashcopy.driver import ArrayTerms, FlashCopyDriver
from graincopy.volumes.flashcopy.host import HostDevices
from graincopy.volumes.instant import take_instant

GIB = 1 << 30
ARRAY = "lab"
HOST = "thishost"


class QuickClock:
    """Time passes only while somebody sleeps, and at once."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class DirectLine:
    """A Connection without SSH."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.dead = False

    def run(self, line: str) -> Reply:
        if self.dead:
            raise Lost("dead")
        try:
            answer = self.array.execute(line)
        except LineBroken as broken:
            raise Lost(f"cut at {broken}") from broken
        return Reply(answer.status, answer.out, answer.err)

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class World:
    """One array with three volumes of somebody else's, and what one host knows of it."""

    folder: str
    clock: QuickClock = field(default_factory=QuickClock)
    wait: float = 0.0

    def __post_init__(self) -> None:
        self.plane = NoPlane()
        self.array = Array(self.plane, self.clock)
        self.uids = [self.array.make(f"ds{number}", (number + 1) * GIB, HOST).lower() for number in range(3)]
        self.before = self.array.footprint()
        self.line = DirectLine(self.array)
        self._runs = 0

    @property
    def volumes(self) -> list[VolumeId]:
        return [names.volume_id(ARRAY, uid) for uid in self.uids]

    def driver(self, folder: str | None = None) -> FlashCopyDriver:
        """A fresh driver object; another ``folder`` is another host."""
        terms = ArrayTerms(name=ARRAY, host_name=HOST, notes_folder=folder or self.folder, wait=self.wait)
        devices = HostDevices(self.clock, (f"{self.folder}/by-id",), f"{self.folder}/sys", patience=0.0)
        return FlashCopyDriver([terms], {ARRAY: self.line}, devices, self.clock)

    def tag(self, role: Role = Role.TARGET) -> TargetTag:
        """A tag of a run of its own."""
        self._runs += 1
        owner = Owner(host="this", boot="boot", pid=self._runs, started=7, hostname="here")
        return TargetTag(
            run=PointId(f"{self._runs:032x}"),
            role=role,
            owner=owner,
            repository=RepositoryId("0" * 32),
            disks=(),
            created=self.clock.now(),
        )

    def take(self, *numbers: int, role: Role = Role.TARGET) -> tuple[Target, ...]:
        """Targets of the volumes with these numbers, at one instant."""
        group = self.driver(), [self.volumes[number] for number in numbers]
        return tuple(take_instant([group], self.tag(role), clock=self.clock).targets.values())

    def states(self) -> set[str]:
        """Of all mappings."""
        return {one.state for one in self.array.maps.values()}

    def said(self, verb: str) -> list[str]:
        """Every line with this verb that the array was given."""
        return [line for line in self.array.log if line.split()[0] == verb]

    def untouched(self) -> bool:
        """The array shows what it did before, and the sources are as they were."""
        return self.array.footprint() == self.before

    def delete(self, targets: Sequence[Target]) -> None:
        """Each by a driver object of its own."""
        for target in targets:
            self.driver().delete(target)
