"""One snapshot and its members (stages 4 and 5): taken once, looked at, noted as complete. Used by the btrfs driver."""

from __future__ import annotations

import os
from collections.abc import Sequence

from msgspec.structs import replace

from graincopy.core.errors import SourceChanged, TargetLost
from graincopy.model.snapshot import Target
from graincopy.volumes import btrfs_store, reflink_store
from graincopy.volumes.btrfs_store import source_path, split
from graincopy.volumes.places import sync_directory
from graincopy.volumes.reflink_clone import failures, is_taken, open_record, unshared


def by_snapshot(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """Path of the snapshot → its members."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(btrfs_store.snapshot_path(target.id), []).append(target)
    return found


def take_once(path: str, members: Sequence[Target]) -> None:
    """The instant of one subvolume; what a settled member shows already is kept. Raises SnapshotFailed, TargetNoSpace.

    A snapshot that nobody settled is of a call that failed.
    """
    if any(is_taken(target) for target in members):
        return
    with failures(members[0].volume):
        btrfs_store.remove_snapshot(path)
        btrfs_store.take(split(members[0].volume)[0], path)


def seen(target: Target) -> Target:
    """``target`` with the size that its file has in the snapshot. Raises SourceChanged."""
    try:
        fd = btrfs_store.open_in_snapshot(target)
    except TargetLost as lost:
        reason = f"it was replaced by another file ({lost.facts['reason']})"
        raise SourceChanged(path=source_path(target.volume), reason=reason) from lost
    try:
        return replace(target, size=os.fstat(fd).st_size)
    finally:
        os.close(fd)


def settle_one(target: Target) -> Target:
    """Note, durably, that the snapshot is there: it is on disk already. Raises TargetLost or TargetNoSpace."""
    fd, record = open_record(target, writable=True)
    try:
        if not record.taken:
            os.close(btrfs_store.open_in_snapshot(target))
            with failures(target.volume):
                reflink_store.write_record(fd, replace(record, size=target.size, taken=True))
                os.fsync(fd)
                sync_directory(os.path.dirname(target.id))
    finally:
        os.close(fd)
    return target


def allocated_of(target: Target) -> int:
    """Bytes of the file of ``target`` that nothing else shares; 0 when that cannot be told."""
    return unshared(lambda: btrfs_store.open_in_snapshot(target))
