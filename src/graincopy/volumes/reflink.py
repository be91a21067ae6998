"""The reflink driver (stages 3-7, 9): S is a file on XFS or Btrfs, T its FICLONE copy, the change map two FIEMAPs.

S is (a) the LUN image file below a loop device that carries the file system with the disk files, or (b) the disk file
itself. Either way the volume is one file, its bytes are the file's bytes, and two clones of it share an extent exactly
as long as nobody wrote there: what lies at equal positions is equal. FICLONE, FIEMAP: linux/fs.h, linux/fiemap.h.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import ClassVar

from msgspec.structs import replace

from graincopy.core.ids import VolumeId
from graincopy.model.change_map import ChangeMap
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes import ioctl, live, reflink_store
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.fiemap import count_extents
from graincopy.volumes.lun_claim import claim_lun
from graincopy.volumes.mounts import refuse_unmounted
from graincopy.volumes.places import Places
from graincopy.volumes.reflink_attach import Attachments
from graincopy.volumes.reflink_changes import changed_between
from graincopy.volumes.reflink_clone import (
    PREFIX,
    allocated_of,
    clone_one,
    failures,
    flush,
    incarnation_of,
    is_taken,
    open_taken,
    opened,
    predict_clone_ms,
    raw_devices,
    retag,
    settle_one,
    source_path,
    warm,
)
from graincopy.volumes.reflink_store import Record, Stray
from graincopy.volumes.topology import Broken, HostFiles, Lun, trace


class ReflinkDriver(VolumeDriver):
    """Clones on XFS and Btrfs. ``places`` remembers where targets were made; ``host`` is what ``resolve`` looks at."""

    name: ClassVar[str] = "reflink"

    def __init__(self, places: Places, host: HostFiles | None = None) -> None:
        self._places = places
        self._host = host or HostFiles()
        self._attachments = Attachments()

    def capabilities(self) -> VolumeCapabilities:
        """``group_instant`` is False: it holds for LUNs frozen around the clones, not for files cloned in place while
        they are written (:func:`graincopy.model.instant.instant_of`). ``exact`` is False: compressed extents and
        preallocations are called changed when nothing in them is."""
        return VolumeCapabilities(change_map=True, checkpoints=True, block_device=True, freeze="outside")

    # --- stage 3: S -------------------------------------------------------------------------------

    def resolve(self, path: str) -> Claim | Refusal:
        stack = trace(path, self._host)
        if isinstance(stack, Broken):
            return Refusal(path=path, driver=self.name, reason=stack.reason, remedy=stack.remedy, missing=stack.missing)
        lun = stack.lun()
        below = self._claim_lun(stack.path, lun) if isinstance(lun, Lun) else lun
        if isinstance(below, Claim):
            return below
        here = stack.in_place()
        if not isinstance(here, Broken):
            here = _may_make_targets(stack.path) or here
        if not isinstance(here, Broken):
            why = f"the file lies on {here.mount.fs_type} at {here.mount.point}, where it can be cloned"
            size = self._host.stat(stack.path).st_size
            return Claim(path=stack.path, driver=self.name, volume=VolumeId(PREFIX + stack.path), why=why, size=size)
        reasons = (below, here) if stack.devices or isinstance(lun, Lun) else (here, below)
        reason = "; ".join(dict.fromkeys(one.reason for one in reasons))
        remedy = next((one.remedy for one in reasons if one.remedy), "")
        return Refusal(path=path, driver=self.name, reason=reason, remedy=remedy)

    def _claim_lun(self, path: str, lun: Lun) -> Claim | Broken:
        trouble = _may_make_targets(lun.volume)
        if trouble is not None:
            return trouble
        volume, where = VolumeId(PREFIX + lun.volume), f"the LUN image {lun.volume}"
        return claim_lun(path, lun, self._host, driver=self.name, volume=volume, where=where, how="cloned")

    def describe(self, volume: VolumeId) -> SourceVolume:
        path = source_path(volume)
        with failures(volume), opened(path) as fd:
            found, home = os.fstat(fd), os.fstatvfs(fd)
            return SourceVolume(
                id=volume,
                driver=self.name,
                size=found.st_size,
                incarnation=incarnation_of(fd),
                extents=count_extents(fd),
                allocated=found.st_blocks * 512,
                home=os.path.dirname(path),
                home_size=home.f_blocks * home.f_frsize,
                home_free=home.f_bavail * home.f_frsize,
            )

    # --- stages 4 and 5: T ------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        """Targets are tagged, and on XFS warmed: nobody can open them before :meth:`settle`."""
        made: list[Target] = []
        predicted = 0.0
        try:
            for volume in volumes:
                made.append(self._prepare(volume, tag))
                with failures(volume), opened(source_path(volume)) as fd:
                    predicted += predict_clone_ms(fd)
            with failures(", ".join(volumes)):
                raw = tuple(device for volume in volumes for device in raw_devices(source_path(volume)))
                flush(raw)
        except BaseException:
            for target in made:
                self.delete(target)
            raise
        return PreparedGroup(tuple(made), handle=raw, predicted_ms=predicted)

    def _prepare(self, volume: VolumeId, tag: TargetTag) -> Target:
        source = source_path(volume)
        path = reflink_store.target_path(source, tag.run)
        with failures(volume), opened(source) as fd:
            record = Record(
                volume=os.fsencode(volume), incarnation=incarnation_of(fd), size=os.fstat(fd).st_size, tag=tag
            )
            self._places.note(os.path.dirname(source))
            os.fdatasync(fd)  # the clone writes out what is dirty: let it find little inside the window
            record = reflink_store.create_target(path, record, ioctl.inode_flags(fd))
            if not record.taken:
                self._warm(fd, path)
        return record.target(path, self.name)

    def _warm(self, source: int, path: str) -> None:
        fd = reflink_store.open_target(path, writable=True)
        try:
            warm(source, fd)
        except BaseException:
            reflink_store.remove_target(path)
            raise
        finally:
            os.close(fd)

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        if all(is_taken(target) for target in group.targets):
            return group.targets  # a repeated call: the instant that was is kept
        raw = group.handle if isinstance(group.handle, tuple) else ()
        flush(raw)
        with ThreadPoolExecutor(max_workers=max(1, len(group.targets))) as pool:
            return tuple(pool.map(clone_one, group.targets))

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        return tuple(settle_one(target) for target in targets)

    # --- stages 6 and 7: reading ------------------------------------------------------------------

    def open(self, target: Target, claim: Claim) -> AbstractContextManager[FileImage]:
        return self._attachments.open(target, claim)

    def open_folder(self, target: Target, claim: Claim) -> AbstractContextManager[int]:
        return self._attachments.open_folder(target, claim)

    def changed(self, base: Target, now: Target) -> ChangeMap:
        """Positions are compared, so the answer is right for any two clones of one file system that both still exist.

        Sound as long as the base keeps its blocks to itself from the first to the last look at it: it is read before
        and after the other one, and must not have moved (defragmentation and Btrfs balance do move blocks).
        """
        return changed_between(base, now, open_taken)

    # --- stage 9: what stays ----------------------------------------------------------------------

    def retag(self, target: Target, tag: TargetTag) -> Target:
        return retag(target, tag)

    def delete(self, target: Target) -> Deleted | Absent:
        return Deleted() if reflink_store.remove_target(target.id) else Absent()

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """Also beside every place ever noted. ``allocated`` counts bytes that no other file shares: what two targets
        share with each other, but not with S, counts for neither."""
        found = [one for directory in self._directories(volumes) for one in reflink_store.scan(directory)[0]]
        return tuple(replace(one.record.target(one.path, self.name), allocated=allocated_of(one.path)) for one in found)

    def list_strays(self, volumes: Sequence[VolumeId] = ()) -> tuple[Stray, ...]:
        """What lies in folders of ours and is damaged or not ours. It is reported, never deleted."""
        return tuple(one for directory in self._directories(volumes) for one in reflink_store.scan(directory)[1])

    def _directories(self, volumes: Sequence[VolumeId]) -> list[str]:
        beside = [os.path.dirname(source_path(volume)) for volume in volumes]
        return list(dict.fromkeys(os.path.realpath(path) for path in (*beside, *self._places.all())))

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        refuse_unmounted(claim)
        return live.open_sink(claim.path)


def _may_make_targets(source: str) -> Broken | None:
    directory = os.path.dirname(source)
    if os.access(directory, os.W_OK | os.X_OK) and os.access(source, os.R_OK):
        return None
    return Broken(f"no permission to clone {source} beside itself", "run graincopy as the owner of the file or as root")
