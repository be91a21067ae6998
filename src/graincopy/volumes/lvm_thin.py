"""The lvm-thin driver (stages 3-7, 9): S is a thin logical volume, T its thin snapshot, the change map thin_delta's.

S is (a) the disk itself (/dev/VG/LV), or (b) carries the ext4 or XFS on which the disk files lie. T is made by
``lvcreate --snapshot``: device-mapper suspends S around it, which flushes S and freezes its file system, so nobody
else may freeze it before. Each S has its own instant: LVM has no command for several, and suspending the members
beforehand makes lvcreate lose count of the pool's transactions (docs/drivers/lvm-thin.md).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import ClassVar, TypeVar

from msgspec.structs import replace

from graincopy.core.clock import Clock
from graincopy.core.errors import (
    SnapshotFailed,
    SourceChanged,
    TargetLost,
    TargetNoSpace,
    VolumeBusy,
    VolumeUnsupported,
)
from graincopy.core.ids import VolumeId
from graincopy.model.change_map import ChangeMap, Unknown
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes import live
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.lvm_thin_attach import Activations
from graincopy.volumes.lvm_thin_claim import claim_volume
from graincopy.volumes.lvm_thin_list import named, pool_of, source_of, target_of, unlike
from graincopy.volumes.lvm_thin_map import Maps
from graincopy.volumes.lvm_thin_path import locate
from graincopy.volumes.lvm_thin_report import (
    LogicalVolume,
    Record,
    decode_tags,
    encode_tags,
    own_tags,
    target_name,
    unfit,
)
from graincopy.volumes.lvm_thin_sink import PoolSink
from graincopy.volumes.lvm_thin_slot import recover_slot
from graincopy.volumes.lvm_thin_tools import Lvm, ToolFailed
from graincopy.volumes.lvm_thin_watch import PoolLimits, PoolWatch, check_pool, room
from graincopy.volumes.mounts import refuse_unmounted
from graincopy.volumes.stack import Broken
from graincopy.volumes.topology import HostFiles

_Answer = TypeVar("_Answer")
_DEVICE_MAPPER = "class/misc/device-mapper"  # below /sys: without it no volume of LVM is active here


class LvmThinDriver(VolumeDriver):
    """Thin snapshots of LVM. There is no state but LVM's own: T is found by its name, and its record is in its tags."""

    name: ClassVar[str] = "lvm-thin"

    def __init__(
        self,
        clock: Clock,
        *,
        limits: PoolLimits | None = None,
        lvm: Lvm | None = None,
        host: HostFiles | None = None,
    ) -> None:
        self._clock, self._limits = clock, limits or PoolLimits()
        self._lvm, self._host = lvm or Lvm(), host or HostFiles()
        self._maps = Maps(self._lvm)
        self._active = Activations(self._lvm, self._find, self._maps.placement, self._watch)

    def capabilities(self) -> VolumeCapabilities:
        """``grain`` is the smallest block of a pool. One with larger blocks rounds to those: hence not ``exact``."""
        return VolumeCapabilities(change_map=True, checkpoints=True, grain=65536, block_device=True, freeze="own")

    # --- stage 3: S -------------------------------------------------------------------------------

    def resolve(self, path: str) -> Claim | Refusal:
        place = locate(path, self._host)
        answer = place if isinstance(place, Broken) else claim_volume(place, self._lvm, self.name)
        if isinstance(answer, Claim):
            return answer
        return Refusal(path=path, driver=self.name, reason=answer.reason, remedy=answer.remedy, missing=answer.missing)

    def describe(self, volume: VolumeId) -> SourceVolume:
        """``home_free`` is what is left of the scarcer one of data and metadata space, as a share of the pool."""
        every = self._volumes(volume)
        source = source_of(every, volume)
        pool = pool_of(every, source)
        free = 1 - max(pool.data_used or 0.0, pool.metadata_used or 0.0) if pool else 0.0
        return SourceVolume(
            id=volume,
            driver=self.name,
            size=source.size,
            incarnation=source.incarnation,
            allocated=round(source.size * (source.data_used or 0.0)),
            home_size=pool.size if pool else 0,
            home_free=round(pool.size * free) if pool else 0,
        )

    # --- stages 4 and 5: T ------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        """Nothing is made yet: LVM makes T and its tags in one step, at the instant. Raises TargetNoSpace, too."""
        every = self._volumes(", ".join(volumes))
        targets = []
        for volume in volumes:
            source = source_of(every, volume)
            problem = unfit(source)
            if problem is not None:
                raise SnapshotFailed(volume=volume, reason=problem[0])
            made = named(every, target_name(source, tag.run))
            target = None if made is None else target_of(made, every, self.name)
            if target is None:
                check_pool(self._lvm, source.vg, source.pool, self._limits)
                target = Target(
                    id=target_name(source, tag.run),
                    driver=self.name,
                    volume=volume,
                    size=source.size,
                    incarnation=source.incarnation,
                    tag=tag,
                )
            targets.append(target)
        return PreparedGroup(tuple(targets), handle=every)

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        every = group.handle if isinstance(group.handle, tuple) else ()
        return tuple(
            self._snapshot(target, source_of(every, target.volume)) if named(every, target.id) is None else target
            for target in group.targets
        )

    def _snapshot(self, target: Target, source: LogicalVolume) -> Target:
        record = Record(volume=target.volume, incarnation=target.incarnation, tag=target.tag)
        try:
            return replace(
                target, held_ms=self._lvm.create_snapshot(source, target.id, encode_tags(record, 1), self._clock)
            )
        except ToolFailed as error:
            now = self._volumes(target.volume)
            if named(now, target.id) is not None and "already exists" in str(error):
                return target  # the same prepared group, taken once more
            if not any(one.uuid == source.uuid and one.path == source.path for one in now):
                raise SourceChanged(path=source.path, reason="it was removed or renamed") from error
            if "free space in thin pool" in str(error):
                raise TargetNoSpace(volume=f"thin pool {source.vg}/{source.pool} ({error})") from error
            raise SnapshotFailed(volume=target.volume, reason=str(error)) from error

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        """LVM has made them durable. Here the answer is checked: T must be of the very S that was prepared."""
        every = self._volumes(", ".join(target.volume for target in targets))
        settled = []
        for target in targets:
            made = named(every, target.id)
            if made is None:
                raise TargetLost(target=target.id, reason="it was removed")
            if not target.incarnation.startswith(f"{made.origin_uuid}."):
                raise SourceChanged(path=target.volume, reason="it was replaced by another logical volume")
            settled.append(replace(target, size=made.size))
        return tuple(settled)

    # --- stages 6 and 7: reading ------------------------------------------------------------------

    def open(self, target: Target, claim: Claim) -> AbstractContextManager[FileImage]:
        """Raises TargetNoSpace from any read, too, when the pool fills up meanwhile."""
        return self._active.raw(target) if claim.inner_path is None else self._active.file(target, claim)

    def _watch(self, made: LogicalVolume) -> PoolWatch:
        return PoolWatch(self._lvm, made.vg, made.pool, self._limits, self._clock)

    def open_folder(self, target: Target, claim: Claim) -> AbstractContextManager[int]:
        if claim.inner_path is None:
            return super().open_folder(target, claim)
        return self._active.folder(target, claim)

    def changed(self, base: Target, now: Target) -> ChangeMap:
        every = self._volumes(now.volume)
        new, old = named(every, now.id), named(every, base.id)
        if new is None:
            raise TargetLost(target=now.id, reason="it was removed")
        if old is None:
            return Unknown("the checkpoint is gone")
        return unlike(old, new) or self._maps.changed(old, new, pool_of(every, new))

    # --- stage 9: what stays ----------------------------------------------------------------------

    def retag(self, target: Target, tag: TargetTag) -> Target:
        every = self._volumes(target.volume)
        made = named(every, target.id)
        known = None if made is None else decode_tags(made.tags)
        if made is None or known is None:
            raise TargetLost(target=target.id, reason="it was removed" if made is None else "its tags are damaged")
        record, generation = known
        if record.tag != tag:
            fresh = encode_tags(replace(record, tag=tag), generation + 1)
            self._do(target.volume, lambda: self._lvm.change_tags(made, fresh, own_tags(made.tags)))
        return replace(target, tag=tag)

    def delete(self, target: Target) -> Deleted | Absent:
        """Also gives back the pool's metadata snapshot when a run of ours died with it."""
        every = self._volumes(target.volume)
        made = named(every, target.id)
        if made is None:
            return Absent()
        try:
            self._lvm.hide(made)  # a crash may have left it
            self._lvm.remove(made)
        except ToolFailed as error:
            if named(self._volumes(target.volume), target.id) is None:
                return Absent()  # somebody else was quicker
            raise VolumeBusy(volume=made.path, holder=f"somebody ({error})") from error
        pool = pool_of(every, made)
        if pool is not None:
            self._recover(pool)
        return Deleted()

    def _recover(self, pool: LogicalVolume) -> None:
        try:
            recover_slot(self._lvm, pool)
        except (ToolFailed, OSError) as error:
            reason = f"its metadata snapshot is left from a crash and cannot be released: {error}"
            raise SnapshotFailed(volume=f"thin pool {pool.path}", reason=reason) from error

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """All of them, in every volume group. What they alone take LVM does not tell: ``allocated`` is 0."""
        if os.geteuid() != 0 or not os.path.exists(f"{self._host.sys}/{_DEVICE_MAPPER}"):
            return ()
        try:
            if self._lvm.missing() is not None:
                return ()
            every = self._lvm.volumes()
        except ToolFailed as error:
            raise SnapshotFailed(volume="the volume groups of this host", reason=str(error)) from error
        return tuple(target for one in every if (target := target_of(one, every, self.name)) is not None)

    # --- the way back -----------------------------------------------------------------------------

    @contextmanager
    def open_for_restore(self, claim: Claim) -> Iterator[FileSink]:
        """Raises VolumeUnsupported where the volume, or the mount of its file system, is not there.

        And TargetNoSpace from a write, before the pool is full.
        """
        _refuse_absent(claim)
        # a volume's lasting name is a symbolic link, which open_sink does not follow
        path = os.path.realpath(claim.path) if claim.identity else claim.path
        every = self._volumes(claim.volume)
        source = source_of(every, claim.volume)
        pool = pool_of(every, source)
        if pool is None:
            raise SnapshotFailed(volume=claim.volume, reason="its thin pool is gone")
        with live.open_sink(path) as sink:
            yield PoolSink(sink, partial(room, self._lvm, pool, self._limits), self._watch(source).look)

    # --- shared -----------------------------------------------------------------------------------

    def _volumes(self, volume: str) -> tuple[LogicalVolume, ...]:
        return self._do(volume, self._lvm.volumes)

    def _do(self, volume: str, verb: Callable[[], _Answer]) -> _Answer:
        try:
            return verb()
        except ToolFailed as error:
            raise SnapshotFailed(volume=volume, reason=str(error)) from error

    def _find(self, target: Target) -> tuple[LogicalVolume, Sequence[LogicalVolume]]:
        """T, and every volume, as they are now. Raises TargetLost."""
        try:
            every = self._lvm.volumes()
        except ToolFailed as error:
            raise TargetLost(target=target.id, reason=str(error)) from error
        made = named(every, target.id)
        if made is None:
            raise TargetLost(target=target.id, reason="it was removed")
        return made, every


def _refuse_absent(claim: Claim) -> None:
    """Nothing is made anew in /dev, nor in the folder that the volume is mounted over at other times."""
    if claim.inner_path is not None:
        refuse_unmounted(claim)
        return
    try:
        there = stat.S_ISBLK(os.stat(claim.path).st_mode)
    except FileNotFoundError:
        there = False
    if not there:
        reason = "the logical volume is not there; make one of the same size with lvcreate --thin first"
        raise VolumeUnsupported(path=claim.path, reason=reason)
