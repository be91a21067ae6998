"""Source volumes, and how a file sits on one (stage 3)."""

from __future__ import annotations

import msgspec

from graincopy.core.ids import VolumeId
from graincopy.model.workload import Representation


class VolumeCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """Powers of a volume driver, declared and tested, never guessed."""

    snapshots: bool = True  # T differs from S: writers go on while T is read
    group_instant: bool = False  # all members of one create_targets() show one instant
    change_map: bool = False  # changed() can answer with ranges
    checkpoints: bool = False  # an instant can be kept between runs to compute changes from
    exact: bool = False  # changed() holds no clean grain
    grain: int = 4096  # bytes; what changed() is rounded to
    block_device: bool = False  # a volume can carry a file system that is attached from T
    freeze: str = "none"  # who stops writers: "none", "outside" (the freeze window does), "own" (the driver does)
    live_targets: int = 0  # how many T one S can have at once; 0 = no limit
    copies: bool = False  # T is a whole copy, made in the freeze window: only for what is asked to be taken so


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A driver's word that it can snapshot the volume that holds ``path``, and how the file sits on it.

    ``inner_path`` is None when the file (or device) *is* the volume; else it is the file's path inside the
    file system of type ``fs_type`` that begins ``fs_offset`` bytes into the volume, takes ``fs_size`` bytes there
    (0: to the volume's end) and is mounted at ``mount``.
    """

    path: str
    driver: str
    volume: VolumeId
    why: str  # one clause for people
    inner_path: str | None = None
    fs_type: str | None = None
    fs_offset: int = 0
    fs_size: int = 0
    mount: str | None = None
    size: int | None = None  # bytes of the file now, where that can be told
    representation: Representation = Representation.FILE  # whose bytes an image opened with this claim shows
    format: str = "raw"  # through which they are seen
    group: str = ""  # claims of one driver with the same one are snapshotted at one instant
    still: bool = False  # S itself is read, writers held off: no target of it outlives a write
    tracked: bool | None = None  # changes of this file are known and checkpoints kept; None: as the driver declares

    @property
    def identity(self) -> bool:
        """The file is the volume."""
        return self.inner_path is None


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a driver does not take ``path``, and what would make it do so. ``missing``: nothing is there."""

    path: str
    driver: str
    reason: str
    remedy: str = ""
    missing: bool = False


class SourceVolume(msgspec.Struct, frozen=True, kw_only=True):
    """S as its driver sees it now."""

    id: VolumeId
    driver: str
    size: int  # bytes
    incarnation: str  # another string when S was recreated, even under the same id
    extents: int = 0  # how many extents a snapshot has to touch; predicts the freeze window
    allocated: int = 0  # bytes
    home: str = ""  # path of the file system or pool that T will lie on; must not be frozen
    home_size: int = 0  # bytes of that file system or pool; 0 when it cannot be told
    home_free: int = 0  # bytes free there
