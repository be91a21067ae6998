"""What a guest sees of its disk, read over NBD from a QEMU (stage 7)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np

from graincopy.core.errors import GraincopyError
from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State
from graincopy.hypervisor.nbd import ALLOCATION, LONGEST, ZERO, NbdClient
from graincopy.volumes.image import fill_zeros

Lost = Callable[[str], GraincopyError]
Zeros = Callable[[], Extents]


class NbdPool:
    """Connections to one export, one for each thread that reads at the moment."""

    def __init__(self, path: str, export: str) -> None:
        """Raises OSError: what cannot be reached is known at once."""
        self._path, self._export = path, export
        self._idle: list[NbdClient] = []
        self._closed = False
        self.give(self.take())

    def take(self) -> NbdClient:
        """A connection that nobody else has. Raises OSError."""
        try:
            return self._idle.pop()
        except IndexError:
            return NbdClient(self._path, self._export, [ALLOCATION])

    def give(self, client: NbdClient) -> None:
        """Back for the next one."""
        if self._closed:
            client.close()
        else:
            self._idle.append(client)

    def close(self) -> None:
        """Let all go; may be repeated."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class NbdImage:
    """A FileImage (volumes/base): ``size`` bytes of the export at ``path``, which may be longer by a part of a sector.

    ``lost`` makes the error for a snapshot that QEMU gave up, or a QEMU that ended; what else cannot be read is an
    OSError. ``piece``: no request reaches over a multiple of so many bytes. ``zeros``: what reads as zeros, where the
    export itself must not be asked.
    """

    def __init__(
        self, path: str, export: str, size: int, lost: Lost, piece: int = LONGEST, zeros: Zeros | None = None
    ) -> None:
        """Raises what ``lost`` makes."""
        self.size = size
        self._lost, self._piece, self._zeros = lost, piece, zeros
        try:
            self._pool = NbdPool(path, export)
        except OSError as error:
            raise lost(f"QEMU does not show it ({error.strerror or error})") from error

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros. Raises OSError, and what ``lost`` makes."""
        wanted = max(0, min(len(buffer), self.size - offset))
        if wanted:
            self._with(lambda client: self._read(client, offset, buffer[:wanted]))
        fill_zeros(buffer[wanted:])

    def _read(self, client: NbdClient, offset: int, buffer: memoryview) -> None:
        at, stop = offset, offset + len(buffer)
        while at < stop:
            end = min(stop, (at // self._piece + 1) * self._piece)
            client.readinto(at, buffer[at - offset : end - offset])
            at = end

    def placement(self) -> Placement:
        """The disk is the volume; what QEMU knows to read as zeros is a hole."""
        if self._zeros is not None:
            try:
                return without(self._zeros(), self.size)
            except OSError as error:
                raise self._lost(f"QEMU no longer shows it ({error.strerror or error})") from error
        found: list[Placement] = []
        self._with(lambda client: found.append(placement_of(client, self.size)))
        return found[0]

    def _with(self, act: Callable[[NbdClient], None]) -> None:
        try:
            client = self._pool.take()
        except OSError as error:
            raise self._lost(f"QEMU no longer shows it ({error.strerror or error})") from error
        try:
            act(client)
        except ConnectionError as error:
            client.close()
            raise self._lost("QEMU ended, or closed the connection") from error
        except TimeoutError as error:
            client.close()
            raise self._lost("QEMU does not answer") from error
        except OSError as error:
            self._pool.give(client)
            if error.errno == errno.EINVAL:  # what NBD makes of EACCES: copy-before-write gave the snapshot up
                raise self._lost("QEMU gave the snapshot up rather than stop the guest") from error
            raise
        else:
            self._pool.give(client)

    def verify(self) -> None:
        """What was read was right when it was read: a snapshot that is given up answers nothing any more."""

    def close(self) -> None:
        """Let it go; may be repeated."""
        self._pool.close()


def placement_of(client: NbdClient, size: int) -> Placement:
    """Identity, with holes where ``client`` knows zeros."""
    return without(client.extents(ALLOCATION, ZERO), size)


def without(zeros: Extents, size: int) -> Placement:
    """All of ``size`` bytes lies where it is and is written, except ``zeros``."""
    kept = Extents.whole(size) - zeros.clip(0, size)
    states = np.full(len(kept), State.WRITTEN, np.uint8)
    return Placement(size, kept.starts, kept.stops, kept.starts, states)
