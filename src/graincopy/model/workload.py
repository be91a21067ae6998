"""What is backed up together: a workload and its files (stage 2)."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from graincopy.core.ids import DiskId, WorkloadId


class Representation(StrEnum):
    """Whose bytes a stored disk holds. Lineage never crosses the two."""

    FILE = "file"  # the bytes of the file as they lie on the volume
    GUEST = "guest"  # what the guest sees, through the stated format


class Consistency(StrEnum):
    """What a restore point promises about the state inside, weakest first."""

    CRASH = "crash"  # as after a power cut
    FILE_SYSTEM = "file-system"  # the guest's file systems were frozen
    APPLICATION = "application"  # the applications took part


class FileMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a disk file needs back besides its bytes."""

    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    xattrs: dict[str, bytes] = {}
    nodatacow: bool = False


class WorkloadFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of Ef. ``path`` is absolute and real; undecodable bytes are surrogate-escaped."""

    path: str
    name: str  # the disk's NAME, unique in the workload
    disk: DiskId
    format: str = "raw"  # as stated by the workload's definition; never probed
    representation: Representation = Representation.FILE
    metadata: FileMetadata = FileMetadata()
    state: bool = False  # what a machine keeps beside its disks: small, and open for writing as long as it runs
    tree: str = ""  # path of the Tree that it was found in; empty: it was named itself
    tree_disk: DiskId | None = None  # stands for all files of one tree on one volume in the tags of targets

    @property
    def tag_disk(self) -> DiskId:
        """What stands for this disk in the tags of targets."""
        return self.tree_disk or self.disk


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that is backed up with everything in it. ``path`` is absolute and real."""

    path: str
    name: str  # the folder that ``restore --to`` makes of it; unique in the workload
    exclude: tuple[str, ...] = ()  # patterns of paths below it (fnmatch, * also over /) that are left out


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """A named set of files that one request backs up at one instant."""

    id: WorkloadId
    name: str
    kind: str  # "files", "vm", "set" or "subsystem"
    files: tuple[WorkloadFile, ...]
    definitions: dict[str, bytes] = {}  # VM XML and the like, by name
    notes: tuple[str, ...] = ()  # what was left out, and why
    trees: tuple[Tree, ...] = ()  # their files are in ``files``, and are listed anew at the instant
    one_instant: bool = False  # useless unless all files show one instant, or its writers stand still
    paused: bool = False  # its writers stand still while it is quiesced


class SourceCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """Powers of a workload source."""

    quiesce: bool = False  # can bring the workload to a better consistency than crash
    define: bool = False  # can recreate the workload from its definitions
    discover: bool = False  # can list workloads
