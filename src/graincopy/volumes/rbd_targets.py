"""Targets on Ceph, looked at and unmade (stages 6, 7 and 9): each is a tag, a snapshot or two, perhaps a group.

A tag is written before what it tells of is made (rbd_snapshots), and goes after it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
from msgspec.structs import replace

from graincopy.core.clock import Clock
from graincopy.core.errors import TargetLost, VolumeBusy
from graincopy.core.ids import VolumeId
from graincopy.model.snapshot import Absent, Deleted, Role, Target, TargetTag
from graincopy.volumes import rbd_group
from graincopy.volumes.rbd_c import CephError
from graincopy.volumes.rbd_cluster import Cluster, Pool
from graincopy.volumes.rbd_failures import failures, optional_pool, patiently, reading
from graincopy.volumes.rbd_name import PREFIX, ImageName, parse_place
from graincopy.volumes.rbd_open_image import Image, Snap
from graincopy.volumes.rbd_records import (
    Group,
    Record,
    drop_record,
    key_of,
    parts_of,
    put_record,
    read_record,
    read_records,
)

DELETED = "the snapshot was deleted by somebody else"


class Standing(msgspec.Struct, frozen=True):
    """What there is of a target: where a diff from it begins, what it shows, what lies between the two."""

    base: Snap
    shown: Snap
    between: tuple[tuple[int, int], ...] | None


class Targets:
    """What the driver has on a cluster. ``cluster`` raises StorageUnreachable where there is none."""

    def __init__(self, cluster: Callable[[], Cluster], clock: Clock) -> None:
        self._cluster, self._clock = cluster, clock

    @contextmanager
    def live(self, name: ImageName, *, writable: bool = False) -> Iterator[tuple[Pool, Image]]:
        """The image of that name. Raises CephError."""
        with (
            self._cluster().pool(name.pool, name.namespace) as pool,
            pool.image(name.image, writable=writable) as image,
        ):
            yield pool, image

    @contextmanager
    def by_id(
        self, place: str, image_id: str, *, snap: str = "", at: int = 0, writable: bool = False
    ) -> Iterator[tuple[Pool, Image]]:
        """The image that a target was made of, whatever it is called by now. Raises CephError."""
        with (
            self._cluster().pool(*parse_place(place)) as pool,
            pool.image(id=image_id, snap=snap, at=at, writable=writable) as image,
        ):
            yield pool, image

    def incarnation(self, pool: Pool, image: Image) -> str:
        """Another one when the image, its pool or its cluster is another under the same name."""
        return f"{self._cluster().fsid()}.{pool.id}.{image.id()}"

    # --- looking ----------------------------------------------------------------------------------

    def record(self, pool: Pool, target: Target) -> Record:
        """The tag of ``target``. Raises TargetLost, CephError."""
        _, image_id, snap = parts_of(target.id)
        try:
            record = read_record(pool, key_of(image_id, snap))
        except ValueError as damage:
            raise TargetLost(target=target.id, reason="its tag is damaged") from damage
        if record is None:
            raise TargetLost(target=target.id, reason="it was deleted")
        return record

    def check(self, target: Target) -> Standing:
        """What is there of ``target``, asked of the cluster now. Raises TargetLost."""
        place, image_id, _ = parts_of(target.id)
        with reading(self._cluster(), target), self.by_id(place, image_id) as (pool, image):
            record, snaps = self.record(pool, target), image.snaps()
        base = next((one for one in snaps if one.name == record.snap), None)
        if base is None:
            raise TargetLost(target=target.id, reason=DELETED if record.snap_id else "it was never taken")
        if record.snap_id not in (0, base.id):
            raise TargetLost(target=target.id, reason="somebody put another snapshot in its place")
        shown = next((one for one in snaps if one.id == record.shown), None) if record.shown else base
        if shown is None:
            raise TargetLost(target=target.id, reason=DELETED)
        return Standing(base, shown, record.between)

    def listed(self, place: str) -> tuple[Target, ...]:
        """Every target in ``place``. Raises StorageUnreachable, SnapshotFailed."""
        records: list[Record] = []
        with optional_pool(self._cluster()), self._cluster().pool(*parse_place(place)) as pool:
            records += read_records(pool)
        return tuple(target_of(place, record) for record in records)

    # --- stage 9 ----------------------------------------------------------------------------------

    def retag(self, target: Target, tag: TargetTag) -> Target:
        """As VolumeDriver.retag. A checkpoint is U alone: nothing but changes are asked of it."""
        place, _, _ = parts_of(target.id)
        with reading(self._cluster(), target), self._cluster().pool(*parse_place(place)) as pool:
            record = self.record(pool, target)
            group = record.group if tag.role == Role.CHECKPOINT else None
            with self._letting_go(target, group):
                kept = replace(record, tag=tag)
                put_record(pool, replace(kept, group=None, shown=0) if group else kept)
        return target_of(place, kept)

    def delete(self, target: Target) -> Deleted | Absent:
        """First the snapshots, then their tag. Of an image that is gone only the tag is left."""
        place, image_id, snap = parts_of(target.id)
        key, there, group = key_of(image_id, snap), False, None
        with failures(self._cluster(), target.volume):
            with optional_pool(self._cluster()), self._cluster().pool(*parse_place(place)) as pool:
                group = self._group(pool, key)
                if group is not None:
                    rbd_group.leave(self._cluster(), group, pool, image_id)
            with self._letting_go(target, group):
                there = self._drop_snapshot(target, place, image_id, snap)
                with optional_pool(self._cluster()), self._cluster().pool(*parse_place(place)) as pool:
                    there = drop_record(pool, key) or there
        return Deleted() if there else Absent()

    @contextmanager
    def _letting_go(self, target: Target, group: Group | None) -> Iterator[None]:
        """``target`` leaves ``group`` in the block, and the last one to leave takes the group away.

        Before the block, since a tag must not go before what it tells of; and after it, when two leave at once.
        """
        last = group is not None and not self._others(target, group)
        if group is not None and last:
            self._remove(group)
        yield
        if group is not None and not last and not self._others(target, group):
            self._remove(group)

    def _remove(self, group: Group) -> None:
        patiently(lambda: rbd_group.remove(self._cluster(), group), self._clock)

    def _others(self, target: Target, group: Group) -> bool:
        return any(self._in_group(one, group) for one in group.members if one != target.id)

    def _in_group(self, member: str, group: Group) -> bool:
        place, image_id, snap = parts_of(member)
        found = None
        with optional_pool(self._cluster()), self._cluster().pool(*parse_place(place)) as pool:
            found = self._group(pool, key_of(image_id, snap))
        return found == group

    def _group(self, pool: Pool, key: bytes) -> Group | None:
        try:
            record = read_record(pool, key)
        except ValueError:
            return None  # a damaged tag is nobody's: no target is made of it
        return record.group if record else None

    def _drop_snapshot(self, target: Target, place: str, image_id: str, snap: str) -> bool:
        try:
            with self.by_id(place, image_id, writable=True) as (_, image):
                if image.snap(snap) is None:
                    return False
                patiently(lambda: image.snap_remove(snap), self._clock)
                return True
        except CephError as failure:
            if failure.errno in (errno.EBUSY, errno.ENOTEMPTY):
                raise VolumeBusy(volume=target.id, holder="a clone that somebody made of it") from failure
            if failure.errno != errno.ENOENT:
                raise
            return False


def target_of(place: str, record: Record) -> Target:
    """What ``record`` in ``place`` is the tag of."""
    return Target(
        id=f"{PREFIX}{place}/{record.image_id}@{record.snap}",
        driver="rbd",
        volume=VolumeId(record.volume),
        size=record.size,
        incarnation=record.incarnation,
        tag=record.tag,
    )
