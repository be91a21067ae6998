"""Tags of targets on Ceph (stages 4 and 9): small records beside the images, so that a snapshot is never orphaned.

An RBD snapshot has no room for a tag, and an image's own metadata can only be written by whoever holds its exclusive
lock, which is the virtual machine. So each pool (and namespace) with targets has one object ``graincopy.targets``
whose omap holds ``IMAGE_ID@SNAPSHOT`` → JSON. A record is written before its snapshot is made, and removed
after; the object goes with its last record.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint8, c_void_p

import msgspec

from graincopy.core.errors import TargetLost
from graincopy.model.snapshot import TargetTag
from graincopy.volumes import rbd_c
from graincopy.volumes.rbd_c import CephError, done
from graincopy.volumes.rbd_cluster import Pool
from graincopy.volumes.rbd_name import PREFIX

OBJECT = b"graincopy.targets"
SNAP = "graincopy."  # and the run: name of a snapshot
_MANY = 1024  # keys of one answer
_CHANGED = (errno.ERANGE, errno.EOVERFLOW, errno.ENOENT)  # the object has another version than the one asserted


class Group(msgspec.Struct, frozen=True):
    """A group of ours: where it is kept, what it is called, and the targets (their ids) that come of it."""

    place: str  # POOL[/NAMESPACE]
    name: str
    members: tuple[str, ...]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one target. ``snap_id`` is 0 until it was settled.

    T is the snapshot ``snap``. In a group T is the group's snapshot of the image, of number ``shown``, and ``snap``,
    made just before, stands in for it where changes are computed from T; ``between`` is what was written to the image
    from the one to the other, None when that could not be told.
    """

    volume: str
    incarnation: str
    image_id: str
    snap: str  # name of the snapshot: that of the run that made it, whatever tag it has by now
    size: int  # bytes; that of S at the instant, once settled
    tag: TargetTag
    snap_id: int = 0
    group: Group | None = None
    shown: int = 0
    between: tuple[tuple[int, int], ...] | None = ()  # byte ranges

    @property
    def key(self) -> bytes:
        """Where the record lies."""
        return key_of(self.image_id, self.snap)


def key_of(image_id: str, snap: str) -> bytes:
    """Where the record of a snapshot lies."""
    return f"{image_id}@{snap}".encode()


def parts_of(target_id: str) -> tuple[str, str, str]:
    """Place, image id and snapshot name of a target. Raises TargetLost when it is none of ours."""
    where, _, snap = target_id.removeprefix(PREFIX).rpartition("@")
    place, _, image_id = where.rpartition("/")
    if not (place and image_id and snap.startswith(SNAP)):
        raise TargetLost(target=target_id, reason="it is not the name of a target")
    return place, image_id, snap


def read_records(pool: Pool) -> tuple[Record, ...]:
    """Every record of ours that can be understood; others are left alone. Raises CephError."""
    found = []
    for value in _all(pool)[0].values():
        try:
            found.append(msgspec.json.decode(value, type=Record))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return tuple(found)


def read_record(pool: Pool, key: bytes) -> Record | None:
    """Raises CephError, and ValueError when the record is damaged."""
    value = _all(pool)[0].get(key)
    return None if value is None else msgspec.json.decode(value, type=Record)


def put_record(pool: Pool, record: Record) -> None:
    """Durable on return. Raises CephError."""
    value = msgspec.json.encode(record)
    with _writing(pool) as operation:
        sizes = (c_size_t * 1)(len(value))
        pool.rados.rados_write_op_omap_set(
            operation, rbd_c.keys_array([record.key]), rbd_c.keys_array([value]), sizes, 1
        )
        done(_operate(pool, operation))


def drop_record(pool: Pool, key: bytes) -> bool:
    """Take a record away, and the object with its last one unless somebody adds one meanwhile. Was it there?"""
    found, _ = _all(pool)
    if key in found:
        with _writing(pool) as operation:
            pool.rados.rados_write_op_omap_rm_keys(operation, rbd_c.keys_array([key]), 1)
            done(_operate(pool, operation), errno.ENOENT)
    left, version = _all(pool)
    if not left and version:
        with _writing(pool) as operation:
            pool.rados.rados_write_op_assert_version(operation, version)
            pool.rados.rados_write_op_remove(operation)
            done(_operate(pool, operation), *_CHANGED)
    return key in found


def _operate(pool: Pool, operation: c_void_p) -> int:
    return int(pool.rados.rados_write_op_operate(operation, pool.handle, OBJECT, None, 0))


def _all(pool: Pool) -> tuple[dict[bytes, bytes], int]:
    """Every key and value, and the object's version; version 0 when there is no object."""
    found: dict[bytes, bytes] = {}
    more = True
    try:
        while more:
            batch, more = _after(pool, max(found, default=b""))
            found |= batch
        return found, int(pool.rados.rados_get_last_version(pool.handle))
    except CephError as failure:
        if failure.errno != errno.ENOENT:
            raise
        return {}, 0


def _after(pool: Pool, key: bytes) -> tuple[dict[bytes, bytes], bool]:
    operation = c_void_p(pool.rados.rados_create_read_op())
    iterator, more, result = c_void_p(), c_uint8(), c_int()
    try:
        pool.rados.rados_read_op_omap_get_vals2(operation, key, b"", _MANY, byref(iterator), byref(more), byref(result))
        done(pool.rados.rados_read_op_operate(operation, pool.handle, OBJECT, 0))
        done(result.value)
        try:
            return dict(_drain(pool, iterator)), bool(more.value)
        finally:
            pool.rados.rados_omap_get_end(iterator)
    finally:
        pool.rados.rados_release_read_op(operation)


def _drain(pool: Pool, iterator: c_void_p) -> Iterator[tuple[bytes, bytes]]:
    key, value, size = c_char_p(), c_void_p(), c_size_t()
    while True:
        done(pool.rados.rados_omap_get_next(iterator, byref(key), byref(value), byref(size)))
        if key.value is None:
            return
        yield key.value, ctypes.string_at(value, size.value)


@contextmanager
def _writing(pool: Pool) -> Iterator[c_void_p]:
    operation = c_void_p(pool.rados.rados_create_write_op())
    try:
        yield operation
    finally:
        pool.rados.rados_release_write_op(operation)
