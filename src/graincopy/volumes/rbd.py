"""The rbd driver (stages 3-7, 9): S is a Ceph image, T a snapshot of it, the change map diff-iterate.

``rbd:POOL[/NAMESPACE]/IMAGE`` names an image; a device of the kernel client, or a file of rbd-fuse under a loop device,
leads to one. T takes nothing until S is written. Everything goes through librbd: no kernel client is needed.

Each member of a group is its own snapshot: Ceph's group snapshots cannot serve as checkpoints
(docs/drivers/rbd.md), so one instant comes from the freeze window, or from a paused workload.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import ClassVar

from msgspec.structs import replace

from graincopy.core.errors import (
    SnapshotFailed,
    StorageUnreachable,
    TargetLost,
    TargetNoSpace,
    Unsupported,
    VolumeBusy,
    VolumeUnsupported,
)
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement
from graincopy.model.change_map import Changed, ChangeMap, Unknown
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes import live
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.places import Places
from graincopy.volumes.rbd_attach import attached_file, attached_folder
from graincopy.volumes.rbd_c import FEATURE_EXCLUSIVE_LOCK, CephError
from graincopy.volumes.rbd_changes import difference
from graincopy.volumes.rbd_cluster import Cluster, Pool
from graincopy.volumes.rbd_failures import failures, optional_pool, reading
from graincopy.volumes.rbd_image import SnapImage, open_live, whole_placement
from graincopy.volumes.rbd_name import PREFIX, ImageName, Located, locate, name_of, parse, parse_place
from graincopy.volumes.rbd_open_image import Image, Snap
from graincopy.volumes.rbd_records import (
    SNAP,
    Record,
    drop_record,
    key_of,
    parts_of,
    put_record,
    read_record,
    read_records,
)
from graincopy.volumes.topology import Broken, HostFiles, trace

_DELETED = "the snapshot was deleted by somebody else"


class RbdDriver(VolumeDriver):
    """Snapshots of Ceph images. ``cluster`` is None on a host without Ceph; ``places`` remembers pools with targets."""

    name: ClassVar[str] = "rbd"

    def __init__(self, cluster: Cluster | None, places: Places, host: HostFiles | None = None) -> None:
        self._maybe_cluster = cluster
        self._places = places
        self._host = host or HostFiles()

    def capabilities(self) -> VolumeCapabilities:
        """``exact`` is False: the first write to an object of a clone copies all of it up from the parent."""
        return VolumeCapabilities(change_map=True, checkpoints=True, block_device=True, freeze="outside")

    @property
    def _cluster(self) -> Cluster:
        if self._maybe_cluster is None:
            raise StorageUnreachable(storage="Ceph", reason="this host has no ceph.conf, and [rbd] conf names none")
        return self._maybe_cluster

    # --- stage 3: S -------------------------------------------------------------------------------

    def resolve(self, path: str) -> Claim | Refusal:
        """Raises StorageUnreachable for the name of an image whose cluster does not answer."""
        if path.startswith(PREFIX):
            name = parse(path)
            if name is None:
                remedy = "an image is named rbd:POOL/IMAGE or rbd:POOL/NAMESPACE/IMAGE"
                return Refusal(path=path, driver=self.name, reason=f"{path} names no image", remedy=remedy)
            return self._claim(path, Located(name, 0, 0), "it is an image of Ceph")
        if self._maybe_cluster is None:
            return Refusal(path=path, driver=self.name, reason="this host is no client of Ceph")
        found = self._locate(path)
        if isinstance(found, Located):
            why = f"{found.mount or path} lies on the image {found.image} of Ceph"
            return self._claim(path, found, why)
        reason, remedy, missing = found.reason, found.remedy, found.missing
        return Refusal(path=path, driver=self.name, reason=reason, remedy=remedy, missing=missing)

    def _locate(self, path: str) -> Located | Broken:
        stack = trace(path, self._host)
        if isinstance(stack, Broken):
            return stack
        return locate(stack, self._host, self._cluster.settings.fuse)

    def _claim(self, path: str, found: Located, why: str) -> Claim | Refusal:
        if found.fsid and found.fsid != self._cluster.fsid():
            return Refusal(path=path, driver=self.name, reason=f"{found.image} lies in another cluster ({found.fsid})")
        try:
            with self._live(found.image) as (_, image):
                size = image.size if found.inner_path is None else self._host.stat(path).st_size
        except CephError as failure:
            missing = failure.errno == errno.ENOENT
            reason = f"there is no image {found.image}" if missing else f"{found.image}: {failure.strerror}"
            return Refusal(path=path, driver=self.name, reason=reason, missing=missing)
        return Claim(
            path=path,
            driver=self.name,
            volume=found.image.volume,
            why=why,
            inner_path=found.inner_path,
            fs_type=found.fs_type,
            fs_offset=found.offset,
            fs_size=found.size,
            mount=found.mount,
            size=size,
        )

    def describe(self, volume: VolumeId) -> SourceVolume:
        name = name_of(volume)
        with failures(self._cluster, volume), self._live(name) as (pool, image):
            incarnation, size = self._incarnation(pool, image), image.size
        home_size, home_free = self._cluster.room(name.pool)
        return SourceVolume(
            id=volume, driver=self.name, size=size, incarnation=incarnation, home_size=home_size, home_free=home_free
        )

    def _incarnation(self, pool: Pool, image: Image) -> str:
        return f"{self._cluster.fsid()}.{pool.id}.{image.id()}"

    @contextmanager
    def _live(self, name: ImageName, *, writable: bool = False) -> Iterator[tuple[Pool, Image]]:
        with self._cluster.pool(name.pool, name.namespace) as pool, pool.image(name.image, writable=writable) as image:
            yield pool, image

    # --- stages 4 and 5: T ------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        """Only the tags are written: a snapshot cannot be there before its instant."""
        made: list[Target] = []
        try:
            for volume in volumes:
                made.append(self._prepare(volume, tag))
        except BaseException:
            for target in made:
                self.delete(target)
            raise
        return PreparedGroup(tuple(made))

    def _prepare(self, volume: VolumeId, tag: TargetTag) -> Target:
        name = name_of(volume)
        with failures(self._cluster, volume), self._live(name, writable=True) as (pool, image):
            if not image.features & FEATURE_EXCLUSIVE_LOCK and image.others():
                what = f"without exclusive-lock, what a client ({image.others()[0]}) holds back would come into T later"
                raise SnapshotFailed(volume=volume, reason=f"{what}; rbd feature enable {name} exclusive-lock")
            record = Record(
                volume=volume,
                incarnation=self._incarnation(pool, image),
                image_id=image.id(),
                snap=f"{SNAP}{tag.run}",
                size=image.size,
                tag=tag,
            )
            found = read_record(pool, record.key)
            if found is None:
                self._places.note(f"{PREFIX}{name.place}")
                put_record(pool, record)
        return self._target(name.place, found or record)

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        with ThreadPoolExecutor(max_workers=max(1, len(group.targets))) as pool:
            return tuple(pool.map(self._snapshot, group.targets))

    def _snapshot(self, target: Target) -> Target:
        place, image_id, snap = parts_of(target.id)
        with failures(self._cluster, target.volume), self._by_id(place, image_id, writable=True) as (_, image):
            try:
                image.snap_create(snap)
            except CephError as failure:
                if failure.errno != errno.EEXIST:  # a repeated call: the instant that was is kept
                    raise
        return target

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        """A snapshot is durable when it is made; its number and size are noted now."""
        return tuple(self._settle(target) for target in targets)

    def _settle(self, target: Target) -> Target:
        place, image_id, name = parts_of(target.id)
        with failures(self._cluster, target.volume), self._by_id(place, image_id) as (pool, image):
            record, snap = self._record(pool, target), image.snap(name)
            if snap is None:
                raise TargetLost(target=target.id, reason=_DELETED)
            self._try_out(target)
            if record.snap_id != snap.id:
                record = replace(record, snap_id=snap.id, size=snap.size)
                put_record(pool, record)
        return self._target(place, record)

    def _try_out(self, target: Target) -> None:
        """In a full pool a snapshot is made all the same, but without its map of objects, and cannot be opened."""
        place, image_id, snap = parts_of(target.id)
        try:
            with self._by_id(place, image_id, snap=snap):
                pass
        except CephError as failure:
            if failure.errno == errno.ENOENT:
                raise TargetNoSpace(volume=target.volume) from failure
            raise

    @contextmanager
    def _by_id(
        self, place: str, image_id: str, *, snap: str = "", writable: bool = False
    ) -> Iterator[tuple[Pool, Image]]:
        """The image that a target was made of, whatever it is called by now."""
        with (
            self._cluster.pool(*parse_place(place)) as pool,
            pool.image(id=image_id, snap=snap, writable=writable) as image,
        ):
            yield pool, image

    def _record(self, pool: Pool, target: Target) -> Record:
        _, image_id, snap = parts_of(target.id)
        try:
            record = read_record(pool, key_of(image_id, snap))
        except ValueError as damage:
            raise TargetLost(target=target.id, reason="its tag is damaged") from damage
        if record is None:
            raise TargetLost(target=target.id, reason="it was deleted")
        return record

    # --- stages 6 and 7: reading ------------------------------------------------------------------

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        place, image_id, snap = parts_of(target.id)
        check = partial(self._check, target)
        check()
        if claim.inner_path is not None:
            with attached_file(self._cluster, place, image_id, snap, claim, check) as image:
                yield image
            return
        with ExitStack() as held:
            with reading(self._cluster, target):
                _, opened = held.enter_context(self._by_id(place, image_id, snap=snap))
                file = SnapImage(opened, check)
            check()  # opened by its name: now it is known to be the one that was taken
            yield file

    def _check(self, target: Target) -> Snap:
        """The snapshot of ``target``, asked of the cluster now. Raises TargetLost."""
        place, image_id, name = parts_of(target.id)
        with reading(self._cluster, target), self._by_id(place, image_id) as (pool, image):
            record, snap = self._record(pool, target), image.snap(name)
        if snap is None:
            raise TargetLost(target=target.id, reason=_DELETED if record.snap_id else "it was never taken")
        if record.snap_id not in (0, snap.id):
            raise TargetLost(target=target.id, reason="somebody put another snapshot in its place")
        return snap

    def open_folder(self, target: Target, claim: Claim) -> AbstractContextManager[int]:
        if claim.inner_path is None:
            raise Unsupported(driver=self.name, power="show folders of an image that is a disk by itself")
        return attached_folder(self._cluster, *parts_of(target.id), claim, partial(self._check, target))

    def placement_at(self, base: Target, claim: Claim, now: Placement, changed: Extents) -> Placement:
        """For an image that is a disk: what :meth:`changed` does not name is equal, but what was given back must show.

        A placement knows objects only, a change map bytes: an object that is new since ``base`` is not new all over.
        """
        then = super().placement_at(base, claim, now, changed)
        if claim.inner_path is not None:
            return then
        return whole_placement(then.size, then.allocated() | now.allocated().clip(0, then.size))

    def changed(self, base: Target, now: Target) -> ChangeMap:
        """Objects first, from the cluster's own map where it keeps one; then the bytes in those that changed."""
        new = self._check(now)
        try:
            old = self._check(base)
        except TargetLost as gone:
            return Unknown(f"the checkpoint is gone ({gone.facts['reason']})")
        if base.incarnation != now.incarnation:
            return Unknown("the volume was recreated since the checkpoint")
        place, image_id, name = parts_of(now.id)
        try:
            with self._by_id(place, image_id, snap=name) as (_, image):
                whole = self._cluster.settings.whole_objects
                found, source = difference(image, parts_of(base.id)[2], new.size, whole_objects=whole)
        except CephError as failure:
            return Unknown(f"the cluster cannot tell ({failure.strerror})")
        self._check(now)
        try:
            self._check(base)
        except TargetLost as gone:
            return Unknown(f"the checkpoint went while it was looked at ({gone.facts['reason']})")
        resized = Extents.of((min(old.size, new.size), new.size))
        return Changed((found | resized).clip(0, new.size), source)

    # --- stage 9: what stays ----------------------------------------------------------------------

    def retag(self, target: Target, tag: TargetTag) -> Target:
        place, _, _ = parts_of(target.id)
        with reading(self._cluster, target), self._cluster.pool(*parse_place(place)) as pool:
            record = replace(self._record(pool, target), tag=tag)
            put_record(pool, record)
        return self._target(place, record)

    def delete(self, target: Target) -> Deleted | Absent:
        """First the snapshot, then its tag. Of an image that is gone only the tag is left."""
        place, image_id, snap = parts_of(target.id)
        with failures(self._cluster, target.volume):
            there = self._drop_snapshot(target, place, image_id, snap)
            with optional_pool(self._cluster), self._cluster.pool(*parse_place(place)) as pool:
                there = drop_record(pool, key_of(image_id, snap)) or there
        return Deleted() if there else Absent()

    def _drop_snapshot(self, target: Target, place: str, image_id: str, snap: str) -> bool:
        try:
            with self._by_id(place, image_id, writable=True) as (_, image):
                if image.snap(snap) is None:
                    return False
                image.snap_remove(snap)
                return True
        except CephError as failure:
            if failure.errno in (errno.EBUSY, errno.ENOTEMPTY):
                raise VolumeBusy(volume=target.id, holder="a clone that somebody made of it") from failure
            if failure.errno != errno.ENOENT:
                raise
            return False

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """In the pools of ``volumes``, of the configuration, and in every pool ever noted.

        Raises StorageUnreachable when asked for ``volumes``; a cluster that is only remembered may be away.
        """
        asked = [name.place for name in map(parse, volumes) if name is not None]
        if self._maybe_cluster is None:
            return ()
        noted = [place.removeprefix(PREFIX) for place in self._places.all() if place.startswith(PREFIX)]
        places = dict.fromkeys((*asked, *self._cluster.settings.pools, *noted))
        try:
            return tuple(target for place in places for target in self._targets_in(place))
        except StorageUnreachable:
            if asked:
                raise
            return ()

    def _targets_in(self, place: str) -> tuple[Target, ...]:
        records: list[Record] = []
        with optional_pool(self._cluster), self._cluster.pool(*parse_place(place)) as pool:
            records += read_records(pool)
        return tuple(self._target(place, record) for record in records)

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        name = parse(claim.path)
        if name is not None:
            return open_live(self._cluster, claim.path, name)
        _refuse_unmounted(claim)
        return live.open_sink(claim.path)

    def _target(self, place: str, record: Record) -> Target:
        return Target(
            id=f"{PREFIX}{place}/{record.image_id}@{record.snap}",
            driver=self.name,
            volume=VolumeId(record.volume),
            size=record.size,
            incarnation=record.incarnation,
            tag=record.tag,
        )


def _refuse_unmounted(claim: Claim) -> None:
    """A missing file must not be made anew in the folder that the image is mounted over at other times."""
    if claim.inner_path is None or os.path.lexists(claim.path):
        return
    root = claim.path.removesuffix(claim.inner_path)
    if root != claim.path and not os.path.ismount(root):
        raise VolumeUnsupported(path=claim.path, reason=f"its file system is not mounted at {root}")
