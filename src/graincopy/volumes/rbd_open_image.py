"""One Ceph image, open (stages 3-9): read, written, snapshotted, compared. No decisions."""

from __future__ import annotations

import ctypes
import errno
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, byref, c_int, c_size_t, c_uint64, c_void_p
from typing import Any

import msgspec
import numpy as np

from graincopy.core.extent import Array, Extents
from graincopy.volumes import rbd_c
from graincopy.volumes.rbd_c import done


class Snap(msgspec.Struct, frozen=True):
    """One snapshot of an image."""

    id: int
    size: int  # bytes
    name: str


class Image:
    """One open image, live or at a snapshot. Reads and writes may come from several threads."""

    def __init__(self, handle: c_void_p, client: int) -> None:
        self._handle, self._client = handle, client  # ``client``: how the cluster knows us
        self._rbd = rbd_c.libraries()[1]

    def close(self) -> None:
        """May be repeated."""
        handle, self._handle = self._handle, c_void_p()
        if handle.value:
            self._rbd.rbd_close(handle)

    @property
    def size(self) -> int:
        """Bytes, now or at the snapshot."""
        return self._number(self._rbd.rbd_get_size)

    @property
    def features(self) -> int:
        """Bits of RBD_FEATURE_*."""
        return self._number(self._rbd.rbd_get_features)

    def map_size(self) -> int:
        """Bytes of the cluster's map of objects, which every snapshot copies: 2 bits each. 0: there is none."""
        info = rbd_c.ImageInfo()
        done(self._rbd.rbd_stat(self._handle, byref(info), ctypes.sizeof(info)))
        return -(-int(info.num_objs) // 4) if self.features & rbd_c.FEATURE_OBJECT_MAP else 0

    def fast_diff(self) -> bool:
        """Whether the cluster keeps a map of changed objects, and calls it valid."""
        kept = bool(self.features & rbd_c.FEATURE_FAST_DIFF)
        return kept and not self._number(self._rbd.rbd_get_flags) & rbd_c.FLAGS_INVALID

    def _number(self, call: Any) -> int:
        value = c_uint64()
        done(call(self._handle, byref(value)))
        return value.value

    def id(self) -> str:
        """Unique in the cluster, kept on rename, another one when the image is made anew."""
        buffer = ctypes.create_string_buffer(256)
        done(self._rbd.rbd_get_id(self._handle, buffer, 256))
        return buffer.value.decode()

    def name(self) -> str:
        """The name that the image has now."""
        buffer, size = ctypes.create_string_buffer(4096), c_size_t(4096)
        done(self._rbd.rbd_get_name(self._handle, buffer, byref(size)))
        return buffer.value.decode(errors="surrogateescape")

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``, all of it inside the image. Raises CephError."""
        got = 0
        while got < len(buffer):
            into = (ctypes.c_char * (len(buffer) - got)).from_buffer(buffer[got:])
            got += done(self._rbd.rbd_read(self._handle, offset + got, len(buffer) - got, into))

    def write(self, offset: int, data: memoryview) -> None:
        """All of ``data``, inside the image. Raises CephError."""
        if len(data):
            held = (ctypes.c_char * len(data)).from_buffer(bytearray(data) if data.readonly else data)
            done(self._rbd.rbd_write(self._handle, offset, len(data), held))

    def write_zeros(self, offset: int, length: int) -> None:
        """Exactly this range reads as zeros; whole objects are given back. Raises CephError."""
        if length:
            done(self._rbd.rbd_write_zeroes(self._handle, offset, length, 0, 0))

    def discard(self, offset: int, length: int) -> None:
        """Give the range back; what of it reads as zeros then is the cluster's choice. Raises CephError."""
        done(self._rbd.rbd_discard(self._handle, offset, length))

    def resize(self, size: int) -> None:
        """Cut or extend to ``size`` bytes. Raises CephError."""
        done(self._rbd.rbd_resize(self._handle, size))

    def flush(self) -> None:
        """What was written is durable. Raises CephError."""
        done(self._rbd.rbd_flush(self._handle))

    def lock(self) -> None:
        """Be the only writer until the image is closed; needs exclusive-lock. Raises CephError (EBUSY, EROFS)."""
        done(self._rbd.rbd_lock_acquire(self._handle, rbd_c.LOCK_EXCLUSIVE))

    def others(self) -> tuple[str, ...]:
        """Addresses of the clients that have the image open for writing, ourselves apart. Raises CephError."""
        count = c_size_t(16)
        while True:
            found = (rbd_c.Watcher * count.value)()
            result = self._rbd.rbd_watchers_list(self._handle, found, byref(count))
            if result != -errno.ERANGE:
                break
        done(result)
        try:
            return tuple(one.addr.decode() for one in found[: count.value] if one.id != self._client)
        finally:
            self._rbd.rbd_watchers_list_cleanup(found, count)

    # --- snapshots ----------------------------------------------------------------------------------

    def snap(self, name: str) -> Snap | None:
        """The snapshot of this name, if there is one. Raises CephError."""
        return next((one for one in self.snaps() if one.name == name), None)

    def snaps(self) -> tuple[Snap, ...]:
        """Raises CephError."""
        count = c_int(32)
        while True:
            found = (rbd_c.SnapInfo * count.value)()
            result = self._rbd.rbd_snap_list(self._handle, found, byref(count))
            if result != -errno.ERANGE:
                break
        done(result)
        try:
            return tuple(Snap(one.id, one.size, one.name.decode(errors="surrogateescape")) for one in found[:result])
        finally:
            self._rbd.rbd_snap_list_end(ctypes.cast(found, POINTER(rbd_c.SnapInfo)))

    def snap_create(self, name: str) -> None:
        """The instant; durable on return. Raises CephError (EEXIST, ENOSPC, EDQUOT)."""
        done(self._rbd.rbd_snap_create(self._handle, name.encode()))

    def snap_remove(self, name: str) -> None:
        """Raises CephError (ENOENT, EBUSY)."""
        done(self._rbd.rbd_snap_remove(self._handle, name.encode()))

    def show(self, snap_id: int) -> None:
        """From now on this is the image at the snapshot of that number. Raises CephError (ENOENT)."""
        done(self._rbd.rbd_snap_set_by_id(self._handle, snap_id))

    # --- groups -------------------------------------------------------------------------------------

    def group(self) -> str:
        """Name of the group that the image is in, empty when it is in none. Raises CephError."""
        found = rbd_c.GroupInfo()
        done(self._rbd.rbd_get_group(self._handle, byref(found), ctypes.sizeof(found)))
        try:
            return (found.name or b"").decode(errors="surrogateescape")
        finally:
            self._rbd.rbd_group_info_cleanup(byref(found), ctypes.sizeof(found))

    def group_snap(self, group: str) -> Snap | None:
        """The image's part of a snapshot of ``group``, if there is one. Raises CephError."""
        return next((one for one in self.snaps() if self._group_of(one) == group), None)

    def _group_of(self, snap: Snap) -> str | None:
        kind, found = c_int(), rbd_c.SnapGroup()
        done(self._rbd.rbd_snap_get_namespace_type(self._handle, snap.id, byref(kind)))
        if kind.value != rbd_c.SNAP_OF_GROUP:
            return None
        if self._rbd.rbd_snap_get_group_namespace(self._handle, snap.id, byref(found), ctypes.sizeof(found)) < 0:
            return None  # of somebody's group that is going away
        try:
            return (found.name or b"").decode(errors="surrogateescape")
        finally:
            self._rbd.rbd_snap_group_namespace_cleanup(byref(found), ctypes.sizeof(found))

    # --- what is there, what changed ----------------------------------------------------------------

    def diff(self, since: str | None, start: int, stop: int, *, whole_objects: bool) -> tuple[Extents, Extents]:
        """Bytes of ``[start, stop)`` that changed since the snapshot ``since`` (None: since the image was empty).

        Two answers: what has data now, and what reads as zeros now. With ``whole_objects`` only as fine as objects,
        which costs nothing where the cluster keeps a map of them; else one question for each object.
        Raises CephError (ENOENT when ``since`` is gone).
        """
        seen = array("q")
        arguments = (None if since is None else since.encode(), start, stop - start, 1, int(whole_objects))
        if stop > start:
            away_from_signals(lambda: self._iterate(arguments, seen))
        return extents_of(seen)

    def _iterate(self, arguments: tuple[object, ...], seen: array[int]) -> None:
        keep = seen.extend

        def note(offset: int, length: int, exists: int, _: object) -> int:
            try:
                keep((offset, length, exists))
            except MemoryError:
                return -errno.ENOMEM
            return 0

        done(self._rbd.rbd_diff_iterate2(self._handle, *arguments, rbd_c.DIFF(note), None))


def away_from_signals(work: Callable[[], None]) -> None:
    """Not in the main thread: there a signal would raise in the callback, and with it a change would be lost."""
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(work).result()


def extents_of(seen: array[int]) -> tuple[Extents, Extents]:
    """Triples (offset, length, exists) → what has data, what has none."""
    table: Array = np.frombuffer(seen, np.int64).reshape(-1, 3) if len(seen) else np.empty((0, 3), np.int64)
    starts, stops, exists = table[:, 0], table[:, 0] + table[:, 1], table[:, 2] != 0
    return (
        Extents.from_arrays(starts[exists], stops[exists]),
        Extents.from_arrays(starts[~exists], stops[~exists]),
    )
