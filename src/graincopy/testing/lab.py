"""What a volume driver gives the laws to work on: storage on which disks can be made, written and snapshotted.

Powers are declared, as a driver's are; a law that needs one that is missing is skipped with the reason and counted:
    buffered mmap direct              ways of writing (``how``)
    truncate punch zero_range collapse insert preallocate reflink_within reflink_from rename_over
    compress                          disks can be made that the storage compresses
    two_volumes                       ``make(volume=1)`` lies on another volume than ``make(volume=0)``
    one_instant                       ``snapshot`` shows one instant of all its claims while they are written
    resize_volume recreate_volume rename_volume
    exact                             changed() holds no clean grain here, whatever the driver can say in general
    remove hold                       the live file can be removed; it can be held open for writing by somebody else
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

from graincopy.core.ids import DiskId, PointId, RepositoryId, VolumeId, WorkloadId
from graincopy.model.snapshot import CheckpointDisk, Owner, Role, Target, TargetTag
from graincopy.model.volume import Claim
from graincopy.testing.laws import NotTried, require
from graincopy.volumes.base import VolumeDriver

OPERATIONS = (
    "truncate",
    "punch",
    "zero_range",
    "collapse",
    "insert",
    "preallocate",
    "reflink_within",
    "reflink_from",
    "rename_over",
)


class VolumeLab(ABC):
    """Storage to try a driver on. Everything made through it is gone after :meth:`reset`."""

    name: str
    block: int = 4096  # bytes; what collapse, insert, reflink and direct writes must be aligned to
    unit: int = 1  # bytes; the storage rounds the size of a disk up to a multiple of it
    powers: frozenset[str] = frozenset()
    fixed_size: bool = False  # a write beyond the end of a disk does not make it longer
    size_unit: int = 1  # bytes; what sizes of disks are multiples of
    patience: float = 5.0  # seconds in which what was deleted is really gone (the kernel detaches late)

    def __init__(self) -> None:
        self.taken: list[Target] = []

    # --- the driver -------------------------------------------------------------------------------

    @abstractmethod
    def driver(self) -> VolumeDriver:
        """A fresh driver object over the same storage."""

    def instant(self, volumes: Sequence[VolumeId], tag: TargetTag) -> Sequence[Target]:
        """One T of each volume, as the product would take it. Default: no freeze window."""
        return self.driver().create_targets(volumes, tag)

    def snapshot(self, claims: Sequence[Claim], tag: TargetTag | None = None) -> dict[VolumeId, Target]:
        """T of every volume of ``claims``, by volume."""
        volumes = tuple(dict.fromkeys(claim.volume for claim in claims))
        targets = self.instant(volumes, tag or self.tag())
        self.taken.extend(targets)
        return {target.volume: target for target in targets}

    def tag(self, role: Role = Role.TARGET) -> TargetTag:
        """A tag that no other run has."""
        owner = Owner(host="conformance", boot="conformance", pid=os.getpid(), started=0, hostname=socket.gethostname())
        return TargetTag(
            run=PointId(uuid.uuid4().hex),
            role=role,
            owner=owner,
            repository=RepositoryId("0" * 32),
            disks=(CheckpointDisk(workload=WorkloadId("conformance"), disk=DiskId("disk")),),
            created=0.0,
        )

    @abstractmethod
    def footprint(self) -> frozenset[str]:
        """Everything that exists on the storage and is no disk made by this lab."""

    def require_no_trace(self, before: frozenset[str]) -> None:
        """Raise LawBroken unless the footprint is ``before`` again, in time."""
        end = time.monotonic() + self.patience
        while self.footprint() != before and time.monotonic() < end:
            time.sleep(0.02)
        require(self.footprint() == before, f"left behind: {sorted(self.footprint() ^ before)}")

    def allocated(self, target: Target) -> int:
        """Bytes that T takes by itself. Default: what the driver says."""
        found = [item for item in self.driver().list_targets((target.volume,)) if item.id == target.id]
        if not found:
            raise NotTried("the driver does not list this target")
        return found[0].allocated

    # --- disks ------------------------------------------------------------------------------------

    def whole(self, size: int) -> int:
        """``size`` rounded up to one that a disk can have."""
        return -(-size // self.size_unit) * self.size_unit

    @abstractmethod
    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        """A new disk of zeros, ``size`` bytes, on volume number ``volume``."""

    @abstractmethod
    def read(self, claim: Claim) -> bytes:
        """The live bytes of the disk."""

    @abstractmethod
    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        """Write live; nothing is flushed."""

    def truncate(self, claim: Claim, size: int) -> None:
        self.lack("truncate")

    def punch(self, claim: Claim, offset: int, length: int) -> None:
        self.lack("punch")

    def zero_range(self, claim: Claim, offset: int, length: int) -> None:
        self.lack("zero_range")

    def collapse(self, claim: Claim, offset: int, length: int) -> None:
        self.lack("collapse")

    def insert(self, claim: Claim, offset: int, length: int) -> None:
        self.lack("insert")

    def preallocate(self, claim: Claim, offset: int, length: int) -> None:
        self.lack("preallocate")

    def reflink_within(self, claim: Claim, source: int, target: int, length: int) -> None:
        self.lack("reflink_within")

    def reflink_from(self, claim: Claim, donor: Claim, source: int, target: int, length: int) -> None:
        self.lack("reflink_from")

    def rename_over(self, claim: Claim, data: bytes) -> None:
        self.lack("rename_over")

    def remove(self, claim: Claim) -> None:
        self.lack("remove")

    def hold(self, claim: Claim) -> AbstractContextManager[None]:
        """Somebody else has the live file open for writing."""
        self.lack("hold")
        raise NotTried("hold")

    # --- volumes ----------------------------------------------------------------------------------

    def resize_volume(self, claim: Claim, size: int) -> None:
        self.lack("resize_volume")

    def recreate_volume(self, claim: Claim) -> None:
        """Another volume in place of the one that holds ``claim``, under the same name."""
        self.lack("recreate_volume")

    def rename_volume(self, claim: Claim) -> Claim:
        """The disk under the new name of its volume."""
        self.lack("rename_volume")
        return claim

    # --- powers -----------------------------------------------------------------------------------

    def need(self, *powers: str) -> None:
        """Raise NotTried unless all are declared."""
        for power in powers:
            if power not in self.powers:
                self.lack(power)

    def lack(self, power: str) -> None:
        raise NotTried(f"{self.name}: {self.why_not(power)}")

    def why_not(self, power: str) -> str:
        """One clause for the report."""
        return f"the lab has no power {power}"

    def reset_targets(self) -> None:
        """Delete every target that was taken."""
        driver = self.driver()
        while self.taken:
            driver.delete(self.taken.pop())

    def make_room(self) -> None:
        """Delete every target where one S has only few at once, so that the next one can be taken."""
        if self.driver().capabilities().live_targets:
            self.reset_targets()

    def reset(self) -> None:
        """Delete every target, and every disk (that part is the subclass's)."""
        self.reset_targets()

    def close(self) -> None:
        """The same, and whatever else was made for the lab."""
        self.reset()
