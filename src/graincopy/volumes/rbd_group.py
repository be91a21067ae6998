"""One instant over several images (stage 5): Ceph's group snapshot, in a group of our own that lives as long as a run.

librbd takes the exclusive locks of all members, answers whoever asks for one that it is busy, and only then makes the
snapshots: no member is written from the first of them to the last (librbd/api/Group.cc, Ceph 16). Such a snapshot lies
in a namespace of its own: it is read by its number, and cannot be the beginning of a diff, nor outlive its group.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence

from graincopy.core.clock import Clock
from graincopy.core.errors import SnapshotFailed, VolumeBusy
from graincopy.core.ids import VolumeId
from graincopy.volumes.rbd_c import FEATURE_EXCLUSIVE_LOCK, CephError, done, libraries
from graincopy.volumes.rbd_cluster import Cluster, Pool
from graincopy.volumes.rbd_name import parse_place
from graincopy.volumes.rbd_open_image import Image
from graincopy.volumes.rbd_records import SNAP, Group

_INSTANT = b"instant"  # name of the one snapshot of a group
_PAUSE = 0.1  # seconds


def group_of(run: str, members: Sequence[tuple[str, str]]) -> Group:
    """The group of a run for ``members``, (place, target id) each: the same one however often it is asked for."""
    targets = tuple(sorted(target for _, target in members))
    digest = hashlib.sha256("\n".join(targets).encode(errors="surrogateescape")).hexdigest()
    return Group(min(members)[0], f"{SNAP}{run}.{digest[:8]}", targets)


def why_alone(image: Image, *, wanted: bool) -> str:
    """Why an image cannot be in a group of ours, one clause; empty when it can. Raises CephError."""
    if not wanted:
        return "[rbd] groups is false"
    if not image.features & FEATURE_EXCLUSIVE_LOCK:
        return "it has no exclusive-lock"
    name = image.group()
    return f"it is in the group {name} of somebody" if name and not name.startswith(SNAP) else ""


def create(pool: Pool, group: Group) -> None:
    """Make the group, empty, unless it is there. Raises CephError."""
    done(libraries()[1].rbd_group_create(pool.handle, group.name.encode()), errno.EEXIST)


def join(home: Pool, group: Group, pool: Pool, image: Image, volume: VolumeId, clock: Clock, patience: float) -> None:
    """Put ``image`` of ``pool`` into the group. Another backup has it in one for ``patience`` seconds at most.

    Raises VolumeBusy, SnapshotFailed when it is in somebody's group, CephError.
    """
    until, called = clock.monotonic() + patience, image.name().encode(errors="surrogateescape")
    while True:
        added = libraries()[1].rbd_group_image_add(home.handle, group.name.encode(), pool.handle, called)
        if added != -errno.EEXIST:
            done(added)
            return
        name = image.group()
        if name == group.name:
            return
        if name and not name.startswith(SNAP):
            raise SnapshotFailed(volume=volume, reason=f"somebody put it into the group {name} meanwhile")
        if clock.monotonic() >= until:
            raise VolumeBusy(volume=volume, holder=f"another backup (its group {name})")
        clock.sleep(_PAUSE)


def take(cluster: Cluster, group: Group) -> None:
    """The instant of all members; made already, it is kept. Raises CephError."""
    with cluster.pool(*parse_place(group.place)) as home:
        made = libraries()[1].rbd_group_snap_create(home.handle, group.name.encode(), _INSTANT)
        done(made, errno.EEXIST)


def leave(cluster: Cluster, group: Group, pool: Pool, image_id: str) -> None:
    """Take an image out, so that it can be in other groups; what was taken of it stays. Raises CephError."""
    with cluster.pool(*parse_place(group.place)) as home:
        left = libraries()[1].rbd_group_image_remove_by_id(
            home.handle, group.name.encode(), pool.handle, image_id.encode()
        )
        done(left, errno.ENOENT)


def remove(cluster: Cluster, group: Group) -> None:
    """The group, with its snapshot in every member. Raises CephError."""
    try:
        with cluster.pool(*parse_place(group.place)) as home:
            done(libraries()[1].rbd_group_remove(home.handle, group.name.encode()), errno.ENOENT)
    except CephError as failure:
        if failure.errno != errno.ENOENT:  # else its pool is gone, and it with it
            raise
