"""The volume seam: one contract between the workflow and whatever storage holds the disks.

Contract (each law is a test in ``graincopy.testing.volume_suite``)
    1  Isolation       writes to S after the snapshot never show in T
    2  Soundness       every byte that changed lies in ``changed(a, b)``
    3  Precision       rounded to the declared grain it holds no clean grain, or ``exact`` is not declared
    4  Reconstruction  image(a) patched with b's bytes at ``changed(a, b)`` equals image(b)
    5  Composition     changed(a, c) ⊆ changed(a, b) ∪ changed(b, c) for exact drivers
    6  Normal form     sorted, disjoint, coalesced, inside the volume
    7  One instant     an ordered write across members is never seen inverted, or ``group_instant`` is not declared
    8  Idempotence     every verb may be repeated and says what it did
    9  Restart         a fresh driver object sees the same world
    10 Middle delete   deleting one target leaves the others readable and comparable
    11 Honesty         a declared power works; an undeclared one raises ``Unsupported`` before any effect
    12 Resize, recreate and rename of S are noticed
    13 Thinness        T takes ~0 right after creation and grows only with what S dirties
    14 No trace        after ``delete`` no object of ours is left

A target is made in two moves, so that one freeze window can span several drivers: ``prepare`` may take its time
and leaves tagged, empty targets; ``snapshot`` is the instant, runs inside the window, and does nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

import msgspec

from graincopy.core.errors import Unsupported
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement
from graincopy.model.change_map import ChangeMap
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.model.workload import FileMetadata


class Readable(Protocol):
    """A file that can be read at any offset until closed, from several threads at once."""

    @property
    def size(self) -> int:
        """Bytes."""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros. Raises OSError when bytes cannot be read."""

    def placement(self) -> Placement:
        """Where the file lies on its volume, asked of the storage now, never from a cache."""


class FileImage(Readable, Protocol):
    """One file as T shows it."""

    def verify(self) -> None:
        """Raise SourceWritten or TargetLost when what was read so far may not be one instant."""

    def close(self) -> None:
        """Release it; may be repeated."""


class FileSink(Readable, Protocol):
    """The live file on S, held for writing by us alone, from ``open_for_restore`` to ``close``.

    Its ``size`` is that of the moment; its placement counts from the file's own start.
    """

    path: str
    existed: bool  # False: it was missing and has just been created, empty

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``. Raises RestoreNoSpace or OSError."""

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, as a hole where the file system can."""

    def resize(self, size: int) -> None:
        """Cut or extend the file to ``size`` bytes."""

    def sync(self) -> None:
        """Everything written, and the file's directory entry, is durable on return."""

    def metadata(self) -> FileMetadata:
        """What the file has besides its bytes."""

    def apply(self, metadata: FileMetadata) -> tuple[str, ...]:
        """Give the file this metadata; what could not be set is answered, one clause each."""

    def free_bytes(self) -> int | None:
        """Room for newly allocated bytes where the file lies; None when that cannot be told."""

    def remove(self) -> None:
        """Take the file away: the undo of a restore that created it."""

    def close(self) -> None:
        """Let the file go; may be repeated."""


class PreparedGroup(msgspec.Struct, frozen=True):
    """Tagged, still empty targets of one driver, and whatever it needs at the instant (``handle``)."""

    targets: tuple[Target, ...]
    handle: object = None
    predicted_ms: float | None = None  # how long ``snapshot`` will take, where the driver can tell


class VolumeDriver(ABC):
    """One kind of storage. Objects are cheap, hold no state that matters, and may be made anew at any time."""

    name: ClassVar[str]

    @abstractmethod
    def capabilities(self) -> VolumeCapabilities:
        """Declared powers."""

    @abstractmethod
    def resolve(self, path: str) -> Claim | Refusal:
        """Whether this driver can snapshot the volume that holds the real, absolute ``path``. No effect."""

    def resolve_guest(self, path: str, format: str) -> Claim | Refusal:
        """Like :meth:`resolve`, for the bytes that a guest sees through ``format``, which is stated and never probed.

        Default: refused, because this driver shows the bytes of files.
        """
        return Refusal(path=path, driver=self.name, reason="it shows the file's bytes, not what a guest sees in them")

    @abstractmethod
    def describe(self, volume: VolumeId) -> SourceVolume:
        """S as it is now. Raises SnapshotFailed when it is gone."""

    @abstractmethod
    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        """Provision one thin, tagged, empty T for each S. Repeating it under the same run id finds them again.

        Raises SnapshotFailed, TargetNoSpace or VolumeBusy; then nothing untagged is left.
        """

    @abstractmethod
    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        """The instant: after it every T of the group shows its S. Called inside the freeze window.

        Raises SnapshotFailed or TargetNoSpace; the caller deletes the group's targets.
        """

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        """After the window: make the snapshots durable (a crash must not empty a checkpoint). Default: they are."""
        return tuple(targets)

    @abstractmethod
    def open(self, target: Target, claim: Claim) -> AbstractContextManager[FileImage]:
        """The file of ``claim`` as ``target`` shows it, read-only; T is attached for as long as any file is open.

        The file is looked up in T by path. Raises SourceChanged when T does not have it, TargetLost, AttachFailed.
        """

    def open_folder(self, target: Target, claim: Claim) -> AbstractContextManager[int]:
        """A descriptor of the folder at ``claim.inner_path`` as ``target`` shows it; T stays attached meanwhile.

        Only for claims on a file inside a volume's file system. Raises SourceChanged when T does not have the folder.
        """
        raise Unsupported(driver=self.name, power="show folders of a target")

    def changed(self, base: Target, now: Target) -> ChangeMap:
        """Volume ranges that may differ between two targets of one S, or why that is unknown."""
        raise Unsupported(driver=self.name, power="tell what changed between two targets")

    def placement_at(self, base: Target, claim: Claim, now: Placement, changed: Extents) -> Placement:
        """Where the file lay in the checkpoint ``base``, for :func:`~graincopy.model.change_map.dirty_file`.

        ``now`` is its placement in the newer target, ``changed`` the volume ranges that changed in between. Default:
        asked of the storage. A driver whose change map tells everything by itself need not have kept it: what did not
        change lies as it does now. Raises SourceChanged.
        """
        with self.open(base, claim) as before:
            return before.placement()

    def retag(self, target: Target, tag: TargetTag) -> Target:
        """Give T another role (promote to checkpoint, take disks off it). Durable on return, idempotent."""
        raise Unsupported(driver=self.name, power="keep checkpoints")

    @abstractmethod
    def delete(self, target: Target) -> Deleted | Absent:
        """Remove T and whatever was made for it."""

    @abstractmethod
    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """Every target of ours on the places this driver knows, those of ``volumes`` included."""

    @abstractmethod
    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        """The live file, for writing, with other writers held off. A missing file is created.

        Raises SourceInUse when anyone has it open for writing.
        """

    def create_targets(self, volumes: Sequence[VolumeId], tag: TargetTag) -> tuple[Target, ...]:
        """Prepare, snapshot and settle in one go, without a freeze window: for stopped workloads and for tests."""
        group = self.prepare(volumes, tag)
        try:
            return self.settle(self.snapshot(group))
        except BaseException:
            for target in group.targets:
                self.delete(target)
            raise
