"""The rbd driver (stages 3-7, 9): S is a Ceph image, T a snapshot of it, the change map diff-iterate.

``rbd:POOL[/NAMESPACE]/IMAGE`` names an image; a device of the kernel client, or a file of rbd-fuse under a loop device,
leads to one. T takes nothing until S is written. Everything goes through librbd: no kernel client is needed.

Several images that are disks by themselves are snapshotted as a group, at one instant (rbd_group). Disks that are files
on a mounted image need none: the freeze window is their instant.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import ClassVar

from graincopy.core.clock import Clock
from graincopy.core.errors import StorageUnreachable, Unsupported
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement
from graincopy.model.change_map import ChangeMap
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes import live
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.mounts import refuse_unmounted
from graincopy.volumes.places import Places
from graincopy.volumes.rbd_attach import attached_file, attached_folder
from graincopy.volumes.rbd_c import CephError
from graincopy.volumes.rbd_changes import changed
from graincopy.volumes.rbd_cluster import SILENT, Cluster, unreachable
from graincopy.volumes.rbd_failures import failures, reading
from graincopy.volumes.rbd_group import why_alone
from graincopy.volumes.rbd_image import SnapImage, open_live, whole_placement
from graincopy.volumes.rbd_name import PREFIX, Located, locate, name_of, parse
from graincopy.volumes.rbd_records import parts_of
from graincopy.volumes.rbd_snapshots import Snapshots
from graincopy.volumes.rbd_targets import Targets
from graincopy.volumes.topology import Broken, HostFiles, trace

_LARGE_MAP = 4 << 20  # bytes; that of 64 TiB in objects of 4 MiB


class RbdDriver(VolumeDriver):
    """Snapshots of Ceph images. ``cluster`` is None on a host without Ceph; ``places`` remembers pools with targets."""

    name: ClassVar[str] = "rbd"

    def __init__(self, cluster: Cluster | None, places: Places, clock: Clock, host: HostFiles | None = None) -> None:
        self._maybe_cluster = cluster
        self._places = places
        self._host = host or HostFiles()
        self._targets = Targets(lambda: self._cluster, clock)
        self._snapshots = Snapshots(lambda: self._cluster, self._targets, places, clock)
        self._promised: dict[VolumeId, bool] = {}  # what claims said of the group; without one the image decides

    def capabilities(self) -> VolumeCapabilities:
        """``exact`` is False: the first write to an object of a clone copies all of it up from the parent.

        ``group_instant`` holds for the claims of one group: images with exclusive-lock that are in nobody's group.
        """
        together = self._maybe_cluster is not None and self._maybe_cluster.settings.groups
        return VolumeCapabilities(
            group_instant=together, change_map=True, checkpoints=True, block_device=True, freeze="outside"
        )

    @property
    def _cluster(self) -> Cluster:
        if self._maybe_cluster is None:
            raise StorageUnreachable(storage="Ceph", reason="this host has no ceph.conf, and [rbd] conf names none")
        return self._maybe_cluster

    # --- stage 3: S -------------------------------------------------------------------------------

    def resolve(self, path: str) -> Claim | Refusal:
        """Raises StorageUnreachable for an image whose cluster does not answer."""
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
            with self._targets.live(found.image) as (_, image):
                size = image.size if found.inner_path is None else self._host.stat(path).st_size
                alone, map_size = why_alone(image, wanted=self._cluster.settings.groups), image.map_size()
        except CephError as failure:
            if failure.errno in SILENT:
                raise unreachable(self._cluster.conf, failure) from failure
            missing = failure.errno == errno.ENOENT
            reason = f"there is no image {found.image}" if missing else f"{found.image}: {failure.strerror}"
            return Refusal(path=path, driver=self.name, reason=reason, missing=missing)
        if alone and found.inner_path is None:
            why += f"; it has an instant of its own: {alone}"
        if map_size > _LARGE_MAP:
            why += f"; each snapshot copies its map of objects, {map_size >> 20} MiB: larger objects make that less"
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
            group=self._promise(found, alone),
        )

    def _promise(self, found: Located, alone: str) -> str:
        """The group of the claim. What lies on a mounted image is frozen, and needs none."""
        if found.inner_path is not None:
            self._promised.setdefault(found.image.volume, False)
            return ""
        self._promised[found.image.volume] = not alone
        return "" if alone else f"{self._cluster.fsid()}/{found.image.namespace}"

    def describe(self, volume: VolumeId) -> SourceVolume:
        name = name_of(volume)
        with failures(self._cluster, volume), self._targets.live(name) as (pool, image):
            incarnation, size = self._targets.incarnation(pool, image), image.size
        home_size, home_free = self._cluster.room(name.pool)
        return SourceVolume(
            id=volume, driver=self.name, size=size, incarnation=incarnation, home_size=home_size, home_free=home_free
        )

    # --- stages 4 and 5: T ------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        self._cluster.guard()  # from here on images may be locked
        return self._snapshots.prepare(volumes, tag, self._promised)

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        return self._snapshots.snapshot(group)

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        with ThreadPoolExecutor(max_workers=max(1, len(targets))) as pool:
            return tuple(pool.map(self._snapshots.settle, targets))

    # --- stages 6 and 7: reading ------------------------------------------------------------------

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        place, image_id, _ = parts_of(target.id)
        check = partial(self._targets.check, target)
        at = check().shown.id
        if claim.inner_path is not None:
            with attached_file(self._cluster, place, image_id, at, claim, check) as image:
                yield image
            return
        with ExitStack() as held:
            with reading(self._cluster, target):
                _, opened = held.enter_context(self._targets.by_id(place, image_id, at=at))
                file = SnapImage(opened, check)
            yield file

    def open_folder(self, target: Target, claim: Claim) -> AbstractContextManager[int]:
        if claim.inner_path is None:
            raise Unsupported(driver=self.name, power="show folders of an image that is a disk by itself")
        place, image_id, _ = parts_of(target.id)
        check = partial(self._targets.check, target)
        return attached_folder(self._cluster, place, image_id, check().shown.id, claim, check)

    def placement_at(self, base: Target, claim: Claim, now: Placement, changed: Extents) -> Placement:
        """For an image that is a disk nothing is asked: what :meth:`changed` does not name lies as it does now.

        What it names was written then, as far as anybody needs to know: what is a hole by now must show as given back.
        """
        if claim.inner_path is not None:
            return super().placement_at(base, claim, now, changed)
        return whole_placement(base.size, (now.allocated() | changed).clip(0, base.size))

    def changed(self, base: Target, now: Target) -> ChangeMap:
        return changed(self._targets, base, now, whole_objects=self._cluster.settings.whole_objects)

    # --- stage 9: what stays ----------------------------------------------------------------------

    def retag(self, target: Target, tag: TargetTag) -> Target:
        self._cluster.guard()
        return self._targets.retag(target, tag)

    def delete(self, target: Target) -> Deleted | Absent:
        self._cluster.guard()
        return self._targets.delete(target)

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
            return tuple(target for place in places for target in self._targets.listed(place))
        except StorageUnreachable:
            if asked:
                raise
            return ()

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        name = parse(claim.path)
        if name is not None:
            self._cluster.guard()
            return open_live(self._cluster, claim.path, name)
        refuse_unmounted(claim)
        return live.open_sink(claim.path)
