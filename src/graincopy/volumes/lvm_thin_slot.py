"""The one metadata snapshot that a thin pool can hold: taken, used and given back (stage 6).

The kernel keeps it in the pool's own metadata, so it outlives processes and reboots; and there is a single slot for
everybody. Order, and why:
    lock      pool-wide and host-wide: flock(2) on the node of the metadata device. It ends with its holder.
    intend    a tag on the pool says that the slot is ours: durable, and it travels with the storage.
    reserve   T exists already, so the metadata snapshot shows it.
    release   and only then the tag goes.
A slot that is held without our tag is somebody else's and is left alone. One that is held with it is ours from a
crash, for the lock proves that no other graincopy uses it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from graincopy.volumes.lvm_thin_report import INTENT, LogicalVolume, dm_name
from graincopy.volumes.lvm_thin_tools import Lvm, ToolFailed


class SlotTaken(Exception):
    """The metadata snapshot of the pool is, or has become, somebody else's. Its text is one clause."""


@contextmanager
def metadata_snapshot(lvm: Lvm, pool: LogicalVolume) -> Iterator[str]:
    """Path of the pool's metadata device, with a metadata snapshot that is ours inside the ``with``.

    Waits for other graincopy processes. Raises SlotTaken (also at the end, when somebody took ours away: what was read
    is worth nothing), ToolFailed, and OSError when the pool is not active.
    """
    with _locked(pool, wait=True) as metadata:
        if _held(lvm, pool) is not None:
            if not _intended(lvm, pool):
                raise SlotTaken("somebody else holds the metadata snapshot of the pool")
            lvm.pool_message(pool.vg, pool.name, "release_metadata_snap")
        lvm.change_tags(pool, add=[INTENT])
        lvm.pool_message(pool.vg, pool.name, "reserve_metadata_snap")
        ours = _held(lvm, pool)
        try:
            yield metadata
        finally:
            _give_back(lvm, pool, ours)


def _give_back(lvm: Lvm, pool: LogicalVolume, ours: int | None) -> None:
    held = _held(lvm, pool)
    if held == ours is not None:
        lvm.pool_message(pool.vg, pool.name, "release_metadata_snap")
    lvm.change_tags(pool, remove=[INTENT])
    if held != ours:
        raise SlotTaken("somebody took the metadata snapshot of the pool away while it was read")


def recover_slot(lvm: Lvm, pool: LogicalVolume) -> bool:
    """Give back what a crash of ours left; True when something was done. Does nothing while a living one uses it.

    Raises ToolFailed, and OSError when the pool is not active.
    """
    if INTENT not in pool.tags:
        return False
    try:
        with _locked(pool, wait=False):
            if not _intended(lvm, pool):  # as it is now that we have the lock
                return False
            if _held(lvm, pool) is not None:
                lvm.pool_message(pool.vg, pool.name, "release_metadata_snap")
            lvm.change_tags(pool, remove=[INTENT])
            return True
    except BlockingIOError:
        return False


def _held(lvm: Lvm, pool: LogicalVolume) -> int | None:
    return lvm.pool_status(pool.vg, pool.name).held


def _intended(lvm: Lvm, pool: LogicalVolume) -> bool:
    found = [one for one in lvm.volumes() if one.uuid == pool.uuid]
    if not found:
        raise ToolFailed(f"the pool {pool.path} is gone")
    return INTENT in found[0].tags


@contextmanager
def _locked(pool: LogicalVolume, wait: bool) -> Iterator[str]:
    """Path of the metadata device, locked. Raises OSError, BlockingIOError when it is locked and ``wait`` is False."""
    path = f"/dev/mapper/{dm_name(pool.vg, pool.metadata_lv or f'{pool.name}_tmeta')}"
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield path
    finally:
        os.close(fd)
