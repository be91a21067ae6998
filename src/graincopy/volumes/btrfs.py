"""The btrfs driver (stages 3-7, 9): S is a file of a subvolume, T the same file in a read-only snapshot of it.

One snapshot serves all members of a run on one subvolume, in a time that does not depend on what is in it. The file is
(a) the LUN image below a loop device that carries the file system with the disk files, or (b) the disk file itself; in
both cases it is the volume, as in the reflink driver, and two snapshots are compared as two clones are there
(docs/decisions/0008-btrfs-subvolumes.md). Subvolumes: btrfs-subvolume(8), linux/btrfs.h.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import ClassVar

from msgspec.structs import replace

from graincopy.core.errors import VolumeUnsupported
from graincopy.core.ids import VolumeId
from graincopy.model.change_map import ChangeMap
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes import btrfs_ioctl, btrfs_store, live, reflink_store
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.btrfs_snapshot import allocated_of, by_snapshot, seen, settle_one, take_once
from graincopy.volumes.btrfs_store import home_of, incarnation_of, open_taken, source_path, split
from graincopy.volumes.lun_claim import claim_lun
from graincopy.volumes.places import Places
from graincopy.volumes.reflink_attach import Attachments
from graincopy.volumes.reflink_changes import changed_between
from graincopy.volumes.reflink_clone import failures, flush, is_taken, opened, raw_devices, retag
from graincopy.volumes.reflink_store import Record, Stray
from graincopy.volumes.stack import Broken, Floor, Lun, Stack
from graincopy.volumes.topology import HostFiles, trace

SNAPSHOT_MS = 12.0  # one subvolume of a synced file system, measured with some load beside it
_MAY_REMOVE = "user_subvol_rm_allowed"  # mount option


class BtrfsDriver(VolumeDriver):
    """Snapshots of subvolumes. ``places`` remembers where targets were made; ``host`` is what ``resolve`` looks at.

    Without ``in_place`` it takes LUN images only: a snapshot also keeps what the neighbours of a disk file overwrite,
    so that files in a subvolume full of other things are better cloned one by one.
    """

    name: ClassVar[str] = "btrfs"

    def __init__(self, places: Places, host: HostFiles | None = None, *, in_place: bool = True) -> None:
        self._places = places
        self._in_place = in_place
        self._host = host or HostFiles()
        self._attachments = Attachments(open_taken)

    def capabilities(self) -> VolumeCapabilities:
        """``group_instant`` is False, also for files of one subvolume: writes that are only in the page cache reach the
        snapshot file by file, in the order in which the kernel writes them out. What was written with O_DIRECT, or was
        followed by fsync, is seen in its order; so is everything where the file system inside a LUN is frozen."""
        return VolumeCapabilities(change_map=True, checkpoints=True, block_device=True, freeze="outside")

    # --- stage 3: S -------------------------------------------------------------------------------

    def resolve(self, path: str) -> Claim | Refusal:
        stack = trace(path, self._host)
        found = stack if isinstance(stack, Broken) else self._claim(stack)
        if isinstance(found, Claim):
            return found
        return Refusal(path=path, driver=self.name, reason=found.reason, remedy=found.remedy, missing=found.missing)

    def _claim(self, stack: Stack) -> Claim | Broken:
        lun = stack.lun()
        below = self._claim_lun(stack.path, lun) if isinstance(lun, Lun) else lun
        if isinstance(below, Claim) or stack.devices:
            return below
        if not self._in_place and not isinstance(lun, Lun):
            return Broken(f"{stack.path} is no LUN image, and only these are taken here", "", True)
        if not self._in_place:
            return below
        volume = self._volume(stack.floors[0])
        if isinstance(volume, Broken):
            return below if isinstance(lun, Lun) else volume
        size = self._host.stat(stack.path).st_size
        why = f"the file lies in the Btrfs subvolume at {split(volume)[0]}, which can be snapshotted"
        return Claim(path=stack.path, driver=self.name, volume=volume, why=why, size=size)

    def _claim_lun(self, path: str, lun: Lun) -> Claim | Broken:
        volume = self._volume(lun.home)
        if isinstance(volume, Broken):
            return volume
        where = f"the LUN image {lun.volume} in the Btrfs subvolume at {split(volume)[0]}"
        return claim_lun(path, lun, self._host, driver=self.name, volume=volume, where=where, how="snapshotted")

    def _volume(self, floor: Floor) -> VolumeId | Broken:
        """The name of the file on ``floor``, when its subvolume can be snapshotted by this user."""
        mount = floor.mount
        if mount.fs_type != "btrfs":
            return Broken(f"{mount.point} is {mount.fs_type}, not Btrfs", "", True)
        try:
            root = btrfs_store.subvolume_root(floor.path)
            if root is None:
                what = f"only a part of its Btrfs subvolume is mounted at {mount.point}"
                return Broken(what, "mount the subvolume itself", True)
            return self._not_permitted(root, floor) or btrfs_store.volume_id(root, os.path.relpath(floor.path, root))
        except OSError as error:
            return Broken(f"its Btrfs subvolume cannot be looked at: {error.strerror}", "run graincopy as root", True)

    def _not_permitted(self, root: str, floor: Floor) -> Broken | None:
        if not os.access(home_of(root), os.W_OK | os.X_OK):
            return Broken(f"nothing can be written beside or in the Btrfs subvolume at {root}", "", True)
        if os.geteuid() == 0:
            return None
        if os.stat(root).st_uid != os.geteuid() or not os.access(floor.path, os.R_OK):
            return Broken(f"the Btrfs subvolume at {root} belongs to another user", "run graincopy as root", True)
        if _MAY_REMOVE in floor.mount.super_options:
            return None
        remedy = f"run graincopy as root, or mount {floor.mount.point} with {_MAY_REMOVE}"
        return Broken("only root may delete snapshots of Btrfs subvolumes here", remedy, True)

    def describe(self, volume: VolumeId) -> SourceVolume:
        """``extents`` is 0: a snapshot touches none."""
        with failures(volume), opened(source_path(volume)) as fd:
            found, home = os.fstat(fd), os.fstatvfs(fd)
            return SourceVolume(
                id=volume,
                driver=self.name,
                size=found.st_size,
                incarnation=incarnation_of(fd),
                allocated=found.st_blocks * 512,
                home=home_of(split(volume)[0]),
                home_size=home.f_blocks * home.f_frsize,
                home_free=home.f_bavail * home.f_frsize,
            )

    # --- stages 4 and 5: T ------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        """Targets are tagged, the file system is synced: the snapshot inside the window finds little to write out."""
        made: list[Target] = []
        try:
            for volume in volumes:
                made.append(self._prepare(volume, tag))
            with failures(", ".join(volumes)):
                raw = tuple(device for volume in volumes for device in raw_devices(source_path(volume)))
                flush(raw)
                self._sync(made)
        except BaseException:
            for target in made:
                self.delete(target)
            raise
        return PreparedGroup(tuple(made), handle=raw, predicted_ms=SNAPSHOT_MS * len(by_snapshot(made)))

    def _prepare(self, volume: VolumeId, tag: TargetTag) -> Target:
        with failures(volume), opened(source_path(volume)) as fd:
            home = home_of(split(volume)[0])
            path = btrfs_store.target_path(home, volume, tag.run)
            record = Record(
                volume=os.fsencode(volume), incarnation=incarnation_of(fd), size=os.fstat(fd).st_size, tag=tag
            )
            self._places.note(home)
            return reflink_store.create_target(path, record, 0).target(path, self.name)

    def _sync(self, targets: Sequence[Target]) -> None:
        """And take away snapshots of a run of this id that died before it settled any target of them."""
        for path, members in by_snapshot(targets).items():
            if not any(is_taken(target) for target in members):
                btrfs_store.remove_snapshot(path)
            with opened(source_path(members[0].volume)) as fd:
                btrfs_ioctl.sync_file_system(fd)

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        if all(is_taken(target) for target in group.targets):
            return group.targets  # a repeated call: the instant that was is kept
        flush(group.handle if isinstance(group.handle, tuple) else ())
        wanted = by_snapshot(group.targets)
        with ThreadPoolExecutor(max_workers=max(1, len(wanted))) as pool:
            list(pool.map(take_once, wanted, wanted.values()))
        return tuple(seen(target) for target in group.targets)

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        return tuple(settle_one(target) for target in targets)

    # --- stages 6 and 7: reading ------------------------------------------------------------------

    def open(self, target: Target, claim: Claim) -> AbstractContextManager[FileImage]:
        return self._attachments.open(target, claim)

    def open_folder(self, target: Target, claim: Claim) -> AbstractContextManager[int]:
        return self._attachments.open_folder(target, claim)

    def changed(self, base: Target, now: Target) -> ChangeMap:
        """Extents of the file in two snapshots. As long as the base exists, whatever is written lies elsewhere: also in
        nodatacow files, because the kernel copies on write what a snapshot shares."""
        return changed_between(base, now, open_taken)

    # --- stage 9: what stays ----------------------------------------------------------------------

    def retag(self, target: Target, tag: TargetTag) -> Target:
        return retag(target, tag)

    def delete(self, target: Target) -> Deleted | Absent:
        with failures(target.volume):
            return Deleted() if btrfs_store.remove(target.id) else Absent()

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """``allocated`` counts bytes of the file that nothing else shares; the snapshot keeps those of others, too."""
        found = [one for home in self._homes(volumes) for one in btrfs_store.scan(home)[0]]
        targets = [one.record.target(one.path, self.name) for one in found]
        return tuple(replace(target, allocated=allocated_of(target)) for target in targets)

    def list_strays(self, volumes: Sequence[VolumeId] = ()) -> tuple[Stray, ...]:
        """What lies in folders of ours and is damaged or not ours. It is reported, never deleted."""
        return tuple(one for home in self._homes(volumes) for one in btrfs_store.scan(home)[1])

    def _homes(self, volumes: Sequence[VolumeId]) -> list[str]:
        near = [home for volume in volumes for home in btrfs_store.homes(volume)]
        return list(dict.fromkeys(os.path.realpath(path) for path in (*near, *self._places.all())))

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        _refuse_unmounted(claim)
        return live.open_sink(claim.path)


def _refuse_unmounted(claim: Claim) -> None:
    """A missing file must not be made anew in the folder that its file system is mounted over at other times."""
    if os.path.lexists(claim.path):
        return
    root = claim.mount or split(claim.volume)[0]
    if not (os.path.ismount(root) if claim.mount else btrfs_store.is_root(root)):
        raise VolumeUnsupported(path=claim.path, reason=f"its file system is not mounted at {root}")
