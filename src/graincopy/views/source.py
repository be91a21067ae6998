"""What a view hands to its faces: a disk that can be read anywhere, and where its bytes come from.

NBD, FUSE and the reader of guest files know this and nothing else of a view.
"""

from __future__ import annotations

from typing import Protocol

import msgspec


class Span(msgspec.Struct, frozen=True):
    """Bytes ``[start, stop)`` of a disk: they read as zeros (a hole), or lie on this host (T), or on the medium."""

    start: int
    stop: int
    zero: bool
    local: bool


class ViewDisk(Protocol):
    """One disk of a restore point as a readable image. Every method may be called from several threads at once."""

    @property
    def name(self) -> str:
        """The disk's NAME, unique in its restore point."""

    @property
    def size(self) -> int:
        """Bytes."""

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros.

        Raises OSError (EIO) when bytes of the range are damaged, or when the medium is gone and stays gone through a
        bounded number of retries. Other ranges, and the same one later, may be asked for all the same.
        """

    def extents(self, offset: int, length: int) -> list[Span]:
        """The range, cut to the disk's size, as neighbouring spans in ascending order, without a gap.

        Raises OSError (EIO) like :meth:`readinto`: the grain map lies on the medium too.
        """
