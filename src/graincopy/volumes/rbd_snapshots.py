"""Targets on Ceph, made (stages 4 and 5): tags, snapshots, and the group that gives several images one instant.

In a group each image gets two snapshots, U and then G: G is the instant and what T shows; U, which a diff can begin at,
is what stays as the checkpoint. What was written between the two is kept in the tag: it is dirty whatever a diff from U
says. (A diff from U alone would be wrong: an object that came after U and went after G is in neither of its ends, but
it is in the restore point.)
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
from msgspec.structs import replace

from graincopy.core.clock import Clock
from graincopy.core.errors import SnapshotFailed, TargetLost, TargetNoSpace
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.model.snapshot import Role, Target, TargetTag
from graincopy.volumes import rbd_group
from graincopy.volumes.base import PreparedGroup
from graincopy.volumes.places import Places
from graincopy.volumes.rbd_c import FEATURE_EXCLUSIVE_LOCK, CephError
from graincopy.volumes.rbd_changes import difference
from graincopy.volumes.rbd_cluster import Cluster, Pool
from graincopy.volumes.rbd_failures import failures, patiently
from graincopy.volumes.rbd_name import PREFIX, name_of, parse_place
from graincopy.volumes.rbd_open_image import Image, Snap
from graincopy.volumes.rbd_records import SNAP, Group, Record, parts_of, put_record, read_record
from graincopy.volumes.rbd_targets import DELETED, Targets, target_of

_MOST = 1000  # ranges in a tag
_GRAIN = 64 << 10  # bytes; what they are rounded to when they are more


class Snapshots:
    """Makes targets. ``cluster`` raises StorageUnreachable where there is none; ``places`` remembers where some are."""

    def __init__(self, cluster: Callable[[], Cluster], targets: Targets, places: Places, clock: Clock) -> None:
        self._cluster, self._targets, self._places, self._clock = cluster, targets, places, clock

    # --- stage 4 ----------------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag, promised: Mapping[VolumeId, bool]) -> PreparedGroup:
        """Tags, and a group where several can be in one: a snapshot cannot be there before its instant.

        ``promised``: whether it was said of a volume that it will be in the group. As VolumeDriver.prepare.
        """
        made: list[Target] = []
        found = [self._look(volume, tag) for volume in volumes]
        groups = _groups(tag, found, promised)
        try:
            for one in found:
                made.append(self._note(one, groups))
            for group in groups:
                self._gather(group, found)
        except BaseException:
            for target in made:
                self._targets.delete(target)
            raise
        return PreparedGroup(tuple(made), tuple(groups))

    def _look(self, volume: VolumeId, tag: TargetTag) -> _Found:
        name = name_of(volume)
        with failures(self._cluster(), volume), self._targets.live(name, writable=True) as (pool, image):
            if not image.features & FEATURE_EXCLUSIVE_LOCK and image.others():
                what = f"without exclusive-lock, what a client ({image.others()[0]}) holds back would come into T later"
                raise SnapshotFailed(volume=volume, reason=f"{what}; rbd feature enable {name} exclusive-lock")
            record = Record(
                volume=volume,
                incarnation=self._targets.incarnation(pool, image),
                image_id=image.id(),
                snap=f"{SNAP}{tag.run}",
                size=image.size,
                tag=tag,
            )
            alone = rbd_group.why_alone(image, wanted=self._cluster().settings.groups)
            noted = read_record(pool, record.key)
        return _Found(name.place, noted or record, noted is None, alone)

    def _note(self, found: _Found, groups: Sequence[Group]) -> Target:
        target = target_of(found.place, found.record)
        if found.fresh:
            group = next((one for one in groups if target.id in one.members), None)
            self._places.note(f"{PREFIX}{found.place}")
            with failures(self._cluster(), target.volume), self._cluster().pool(*parse_place(found.place)) as pool:
                put_record(pool, replace(found.record, group=group))
        return target

    def _gather(self, group: Group, found: Sequence[_Found]) -> None:
        """Make the group, and put its images in: always in the same order, so that two runs do not wait in a ring."""
        settings = self._cluster().settings
        members = {target_of(one.place, one.record).id: one for one in found}
        with failures(self._cluster(), group.name), self._cluster().pool(*parse_place(group.place)) as home:
            rbd_group.create(home, group)
            for one in (members[target] for target in group.members):
                volume = VolumeId(one.record.volume)
                with (
                    failures(self._cluster(), volume),
                    self._targets.by_id(one.place, one.record.image_id, writable=True) as (pool, image),
                ):
                    rbd_group.join(home, group, pool, image, volume, self._clock, settings.timeout)

    # --- stage 5 ----------------------------------------------------------------------------------

    def snapshot(self, prepared: PreparedGroup) -> tuple[Target, ...]:
        """As VolumeDriver.snapshot: U of each image, all at once, then G of each group."""
        with ThreadPoolExecutor(max_workers=max(1, len(prepared.targets))) as pool:
            taken = tuple(pool.map(self._snapshot, prepared.targets))
        groups: Sequence[Group] = prepared.handle if isinstance(prepared.handle, tuple) else ()
        for group in groups:
            with failures(self._cluster(), _names(taken)):
                self._take(group, _names(taken))
        return taken

    def _take(self, group: Group, volumes: str) -> None:
        try:
            patiently(lambda: rbd_group.take(self._cluster(), group), self._clock)
        except CephError as failure:
            if failure.errno not in (errno.EROFS, errno.EBUSY):
                raise
            kept = "a client keeps the lock of one of them to itself"
            raise SnapshotFailed(
                volume=volumes, reason=f"{kept}; [rbd] groups = false takes each at its own instant"
            ) from failure

    def _snapshot(self, target: Target) -> Target:
        place, image_id, snap = parts_of(target.id)
        with (
            failures(self._cluster(), target.volume),
            self._targets.by_id(place, image_id, writable=True) as (_, image),
        ):
            try:
                patiently(lambda: image.snap_create(snap), self._clock)
            except CephError as failure:
                if failure.errno != errno.EEXIST:  # a repeated call: the instant that was is kept
                    raise
        return target

    def settle(self, target: Target) -> Target:
        """A snapshot is durable when it is made; its number and size are noted now. As VolumeDriver.settle."""
        place, image_id, _ = parts_of(target.id)
        with failures(self._cluster(), target.volume), self._targets.by_id(place, image_id) as (pool, image):
            record = self._targets.record(pool, target)
            settled = self._settled(target, place, record, pool, image)
            if settled != record:
                put_record(pool, settled)
        return target_of(place, settled)

    def _settled(self, target: Target, place: str, record: Record, pool: Pool, image: Image) -> Record:
        base = image.snap(record.snap)
        if base is None:
            raise TargetLost(target=target.id, reason=DELETED)
        self._try_out(target, place, record, 0)
        if record.group is None:
            return replace(record, snap_id=base.id, size=base.size)
        rbd_group.leave(self._cluster(), record.group, pool, record.image_id)
        shown = image.group_snap(record.group.name)
        if shown is None:
            raise TargetLost(target=target.id, reason=DELETED)
        if record.shown:
            return record
        self._try_out(target, place, record, shown.id)
        between = self._between(place, record, base, shown)
        return replace(record, snap_id=base.id, size=shown.size, shown=shown.id, between=between)

    def _try_out(self, target: Target, place: str, record: Record, at: int) -> None:
        """In a full pool a snapshot is made all the same, but without its map of objects, and cannot be opened."""
        try:
            with self._targets.by_id(place, record.image_id, snap="" if at else record.snap, at=at):
                pass
        except CephError as failure:
            if failure.errno == errno.ENOENT:
                raise TargetNoSpace(volume=target.volume) from failure
            raise

    def _between(self, place: str, record: Record, base: Snap, shown: Snap) -> tuple[tuple[int, int], ...] | None:
        """What was written, given back or cut off from U to G: rarely more than a few ranges."""
        try:
            with self._targets.by_id(place, record.image_id, at=shown.id) as (_, image):
                whole = self._cluster().settings.whole_objects
                found, _ = difference(image, record.snap, shown.size, whole_objects=whole)
        except CephError:
            return None
        sizes = sorted((base.size, shown.size))
        found, grain = found | Extents.of((sizes[0], sizes[1])), _GRAIN
        while len(found) > _MOST:
            found, grain = found.align(grain), grain * 2
        return tuple(found)


class _Found(msgspec.Struct, frozen=True):
    """An image that is to get a target."""

    place: str
    record: Record
    fresh: bool  # no tag of this run is there yet
    alone: str  # why it cannot be in a group


def _groups(tag: TargetTag, found: Sequence[_Found], promised: Mapping[VolumeId, bool]) -> tuple[Group, ...]:
    """The groups of a run: all images that can be in one, by namespace, where they are several.

    Only targets of a backup need one instant: writers are held off before an undo is taken. Raises SnapshotFailed when
    what was promised cannot be kept.
    """
    if tag.role != Role.TARGET or len(found) < 2:
        return ()
    rooms: dict[str, list[tuple[str, str]]] = {}
    for one in found:
        wanted = promised.get(VolumeId(one.record.volume), not one.alone)
        if wanted and one.alone:
            raise SnapshotFailed(
                volume=one.record.volume, reason=f"it has no instant in common with others any more: {one.alone}"
            )
        if wanted:
            _, namespace = parse_place(one.place)
            rooms.setdefault(namespace, []).append((one.place, target_of(one.place, one.record).id))
    return tuple(rbd_group.group_of(tag.run, members) for members in rooms.values() if len(members) > 1)


def _names(targets: Sequence[Target]) -> str:
    return ", ".join(target.volume for target in targets)
