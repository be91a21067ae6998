"""Where a file's ranges lie, asked of the kernel (stage 3 for S, stage 8 for T).

``FS_IOC_FIEMAP``: Documentation/filesystems/fiemap.rst. On ext4 and XFS positions are bytes of the device below,
on Btrfs they are logical addresses: comparable with one another, not with the device.
"""

from __future__ import annotations

import errno
import fcntl
import os

import numpy as np
from numpy.typing import NDArray

from graincopy.core.extent import Array
from graincopy.core.placement import Placement, State
from graincopy.volumes import ioctl

BATCH = 8192  # extents per call

_EXTENT = np.dtype(
    [("logical", "=u8"), ("physical", "=u8"), ("length", "=u8"), ("_1", "=u8", 2), ("flags", "=u4"), ("_2", "=u4", 3)]
)
_OPAQUE = (
    ioctl.FIEMAP_EXTENT_DELALLOC
    | ioctl.FIEMAP_EXTENT_UNKNOWN
    | ioctl.FIEMAP_EXTENT_ENCODED
    | ioctl.FIEMAP_EXTENT_DATA_ENCRYPTED
    | ioctl.FIEMAP_EXTENT_DATA_INLINE
    | ioctl.FIEMAP_EXTENT_NOT_ALIGNED
    | ioctl.FIEMAP_EXTENT_DATA_TAIL
)
_NO_FIEMAP = (errno.EOPNOTSUPP, errno.ENOTTY)


def read_placement(fd: int, size: int, sync: bool = True, batch: int = BATCH) -> Placement:
    """Placement of the first ``size`` bytes of ``fd``.

    With ``sync`` dirty pages get their place first; without it data in the page cache may still look like a hole or
    unwritten, so leave it out only where nothing can be dirty. A map that moves meanwhile gives a well-formed answer
    that mixes its states. Raises OSError; EOPNOTSUPP or ENOTTY where the file system has no such map.
    """
    parts: list[NDArray[np.void]] = []
    at = 0
    while at < size:
        found = _read_batch(fd, at, size - at, sync and not parts, batch)
        if not len(found):
            break
        parts.append(found)
        reached = int((found["logical"] + found["length"]).max())
        if found["flags"][-1] & ioctl.FIEMAP_EXTENT_LAST or reached <= at:
            break
        at = reached
    table = np.concatenate(parts) if parts else np.empty(0, _EXTENT)
    return _placement(size, table)


def _read_batch(fd: int, start: int, length: int, sync: bool, batch: int) -> NDArray[np.void]:
    """Up to ``batch`` extents that touch ``[start, start + length)``."""
    buffer = bytearray(ioctl.FIEMAP_HEADER.size + batch * _EXTENT.itemsize)
    flags = ioctl.FIEMAP_FLAG_SYNC if sync else 0
    ioctl.FIEMAP_HEADER.pack_into(buffer, 0, start, length, flags, 0, batch, 0)
    fcntl.ioctl(fd, ioctl.FS_IOC_FIEMAP, buffer)
    mapped = ioctl.FIEMAP_HEADER.unpack_from(buffer)[3]
    return np.frombuffer(buffer, _EXTENT, mapped, ioctl.FIEMAP_HEADER.size)


def _placement(size: int, table: NDArray[np.void]) -> Placement:
    """Extents → segments. One that begins before its predecessor ends (the map moved) loses its beginning."""
    starts = table["logical"].astype(np.int64)
    stops = starts + table["length"].astype(np.int64)
    volume = table["physical"].astype(np.int64)
    if len(starts):
        reached = np.append(0, np.maximum.accumulate(stops)[:-1])
        cut = np.maximum(reached - starts, 0)
        starts, volume = starts + cut, volume + cut
    return Placement.from_arrays(size, starts, stops, volume, _states(table["flags"]))


def _states(flags: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Extent flags → :class:`State`; whatever makes an extent opaque wins over unwritten."""
    states = np.where(flags & ioctl.FIEMAP_EXTENT_UNWRITTEN, State.UNWRITTEN, State.WRITTEN)
    return np.where(flags & _OPAQUE, State.OPAQUE, states).astype(np.uint8)


def count_extents(fd: int) -> int:
    """How many extents the file has, without reading them. Raises OSError as :func:`read_placement`."""
    header = bytearray(ioctl.FIEMAP_HEADER.pack(0, 2**64 - 1, 0, 0, 0, 0))
    fcntl.ioctl(fd, ioctl.FS_IOC_FIEMAP, header)
    return int(ioctl.FIEMAP_HEADER.unpack(header)[3])


def shared_extents(fd: int, size: int) -> int:
    """Bytes of the file whose blocks other files use too, as far as the file system marks them."""
    total, at = 0, 0
    while at < size:
        found = _read_batch(fd, at, size - at, False, BATCH)
        if not len(found):
            break
        total += int(found["length"][found["flags"] & ioctl.FIEMAP_EXTENT_SHARED != 0].sum())
        reached = int((found["logical"] + found["length"]).max())
        if reached <= at:
            break
        at = reached
    return total


def unshared_bytes(fd: int) -> int:
    """Bytes of the file that no other file shares (st_blocks counts the shared ones too). Raises OSError."""
    size = os.fstat(fd).st_size
    placement = read_placement(fd, size, sync=False)
    return max(0, int((placement.stops - placement.starts).sum()) - shared_extents(fd, size))


def seek_placement(fd: int, size: int) -> Placement:
    """Placement by SEEK_DATA and SEEK_HOLE: data is opaque (no volume positions), the rest holes. Raises OSError."""
    segments: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                break
            raise
        segments.append((start, at))
    table: Array = np.array(segments, np.int64).reshape(-1, 2)
    opaque = np.full(len(table), State.OPAQUE, np.uint8)
    return Placement.from_arrays(size, table[:, 0], table[:, 1], np.zeros(len(table), np.int64), opaque)


def best_placement(fd: int, size: int, sync: bool = True) -> Placement:
    """:func:`read_placement` where the file system has it, else :func:`seek_placement`. Raises OSError."""
    try:
        return read_placement(fd, size, sync)
    except OSError as error:
        if error.errno not in _NO_FIEMAP:
            raise
        return seek_placement(fd, size)


def own_placement(fd: int, size: int, sync: bool = True) -> Placement:
    """:func:`best_placement` in the file's own bytes: for a file that is its own volume. Raises OSError."""
    found = best_placement(fd, size, sync)
    return Placement(size, found.starts, found.stops, found.starts, found.states)
