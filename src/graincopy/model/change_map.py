"""The central computation: what of a file is dirty between two instants (stage 6).

    dirty(file) = { ranges whose placement differs between base and now } ∪ placement⁻¹( dirty(volume) )

clipped to the file; a grown tail is dirty; what became a hole or unwritten is zero. Both terms matter: a
range can be moved onto blocks that were not rewritten (reflink, insert range), and blocks can be rewritten
under a range that did not move.
"""

from __future__ import annotations

import msgspec

from graincopy.core.extent import Extents
from graincopy.core.placement import Placement


class Changed(msgspec.Struct, frozen=True):
    """A driver's answer: every byte of the volume that changed lies in ``extents``."""

    extents: Extents
    source: str  # where it comes from, for reports: "extents", "thin_delta", "bitmap" …


class Unknown(msgspec.Struct, frozen=True):
    """A driver's answer: the changes cannot be told. The file is compared in full, and the reason reported."""

    reason: str


ChangeMap = Changed | Unknown


class DirtyFile(msgspec.Struct, frozen=True):
    """What has to be done about one file, in bytes of the file; the two sets are disjoint.

    ``read`` may have new content and is read from T; ``zero`` reads as zeros now and is not read.
    """

    read: Extents
    zero: Extents

    @property
    def dirty(self) -> Extents:
        """Everything that may differ from the base."""
        return self.read | self.zero


def dirty_file(base: Placement, now: Placement, volume: Extents) -> DirtyFile:
    """The central computation for one file, given the dirty ranges of its ``volume``."""
    dirty = now.differs(base) | now.to_file(volume)
    return DirtyFile(read=dirty & now.allocated(), zero=dirty & now.zero())


def whole_file(now: Placement) -> DirtyFile:
    """Without a base: everything allocated is read, the rest is zero."""
    return DirtyFile(read=now.allocated(), zero=now.zero())


class DirtyGrains(msgspec.Struct, frozen=True):
    """:class:`DirtyFile` in grain numbers, disjoint: a grain is zero only when every byte of it is known to be."""

    read: Extents
    zero: Extents


def to_grains(dirty: DirtyFile, now: Placement, grain: int, size_before: int | None = None) -> DirtyGrains:
    """Round ``dirty`` outward to grains. A dirty grain is not read when all of it reads as zeros now.

    A file that became shorter than ``size_before`` has a new last grain: what lay behind its end is gone from it.
    """
    touched = dirty.dirty.to_grains(grain)
    if size_before is not None and 0 < now.size < size_before:
        touched = touched | Extents.of((now.size - 1, now.size)).to_grains(grain)
    needs_reading = now.allocated().to_grains(grain)
    return DirtyGrains(read=touched & needs_reading, zero=touched - needs_reading)
