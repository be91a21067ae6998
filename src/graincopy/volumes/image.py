"""One file of T (or a locked S) behind a descriptor: what the reader of stage 8 gets its bytes from."""

from __future__ import annotations

import os
from collections.abc import Callable

from graincopy.core.placement import Placement


def _always_right() -> None:
    """T is a snapshot: nothing that was read can have moved."""


class FdImage:
    """A FileImage (volumes/base) over ``fd``, which it owns. Reads may come from several threads at once.

    ``placement_of`` is asked anew each time; ``verify`` says whether what was read so far is one instant.
    """

    def __init__(
        self, fd: int, size: int, placement_of: Callable[[], Placement], verify: Callable[[], None] = _always_right
    ) -> None:
        self.size = size  # bytes
        self._fd = fd
        self._placement_of = placement_of
        self._verify = verify

    @property
    def fd(self) -> int:
        """The descriptor; -1 once it is closed."""
        return self._fd

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros. Raises OSError when bytes cannot be read."""
        wanted = max(0, min(len(buffer), self.size - offset))
        done = read_fully(self._fd, offset, buffer[:wanted])
        fill_zeros(buffer[done:])

    def placement(self) -> Placement:
        """Where the file lies on its volume now. Raises OSError."""
        return self._placement_of()

    def verify(self) -> None:
        """Raise SourceWritten or TargetLost when what was read so far may not be one instant."""
        self._verify()

    def close(self) -> None:
        """Let the file go; may be repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> FdImage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_fully(fd: int, offset: int, buffer: memoryview) -> int:
    """Read until ``buffer`` is full or the file ends; how many bytes came. Raises OSError."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def fill_zeros(buffer: memoryview) -> None:
    """Overwrite with zeros."""
    if len(buffer):
        buffer[:] = bytes(len(buffer))
