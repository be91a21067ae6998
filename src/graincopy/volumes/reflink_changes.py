"""The change map between two clones of one file, for reflink and btrfs: their extents compared (stage 8)."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from graincopy.core.errors import TargetLost
from graincopy.core.placement import Placement
from graincopy.model.change_map import Changed, ChangeMap, Unknown
from graincopy.model.snapshot import Target
from graincopy.volumes.fiemap import read_placement
from graincopy.volumes.reflink_store import Record

_STEADY_ATTEMPTS = 4  # a file system that moves blocks under us all the time gets a full comparison instead


def changed_between(base: Target, now: Target, opened: Callable[[Target], tuple[int, Record]]) -> ChangeMap:
    """What differs between two targets that ``opened`` opens: files whose bytes never change, on one file system.

    Raises TargetLost when the newer one is gone.
    """
    new_fd, new = opened(now)
    try:
        try:
            old_fd, old = opened(base)
        except TargetLost as lost:
            return Unknown(f"the checkpoint is gone ({lost.facts['reason']})")
        try:
            return _unlike(old, new) or _compare(old_fd, old.size, new_fd, new.size)
        finally:
            os.close(old_fd)
    except OSError as error:
        return Unknown(f"the extents cannot be read ({error.strerror})")
    finally:
        os.close(new_fd)


def _unlike(base: Record, now: Record) -> Unknown | None:
    """Why two targets are not of one S, if so."""
    if base.volume != now.volume:
        return Unknown("the checkpoint is of another volume")
    if base.incarnation != now.incarnation:
        return Unknown("the volume was recreated since the checkpoint")
    return None


def _compare(
    base_fd: int,
    base_size: int,
    now_fd: int,
    now_size: int,
    read: Callable[[int, int], Placement] = read_placement,
) -> ChangeMap:
    before = read(base_fd, base_size)
    for _ in range(_STEADY_ATTEMPTS):
        now = read(now_fd, now_size)
        after = read(base_fd, base_size)
        if _equal(before, after):
            return Changed(now.differs(after), "extents")
        before = after
    return Unknown("the file system moves blocks while they are compared (balance or defragmentation)")


def _equal(one: Placement, other: Placement) -> bool:
    return all(
        np.array_equal(getattr(one, field), getattr(other, field)) for field in ("starts", "stops", "volume", "states")
    )
