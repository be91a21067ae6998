"""Targets of the lvm-thin driver made readable (stage 7): they have a device while anybody reads them, and no longer.

LVM's snapshots are created inactive, with the flag that keeps them so, and LVM is not asked to activate them: T has the
UUIDs of S, and udev would move links by UUID to it and let others assemble what lies on it. The device is made here,
read-only and hidden from udev's rules, with LVM's name and UUID for it, so that LVM knows whose it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock

import msgspec

from graincopy.core.errors import AttachFailed, TargetLost
from graincopy.core.placement import Placement
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.volumes import ioctl
from graincopy.volumes.attach import OPTIONS, AttachedFileSystem, unclean
from graincopy.volumes.base import FileImage
from graincopy.volumes.image import FdImage
from graincopy.volumes.lvm_thin_report import LogicalVolume, external_device, external_origin
from graincopy.volumes.lvm_thin_tools import Lvm, ToolFailed
from graincopy.volumes.lvm_thin_watch import PoolWatch, WatchedImage
from graincopy.volumes.mounts import mount_detached

Find = Callable[[Target], tuple[LogicalVolume, Sequence[LogicalVolume]]]
PlacementOf = Callable[[LogicalVolume, LogicalVolume | None, bool], Placement]


class _Active(msgspec.Struct):
    volume: LogicalVolume
    pool: LogicalVolume | None
    device: str
    external: bool
    users: int = 0
    file_system: AttachedFileSystem | None = None


class Activations:
    """The active targets of one driver object. Safe to use from several threads."""

    def __init__(
        self, lvm: Lvm, find: Find, placement: PlacementOf, watch: Callable[[LogicalVolume], PoolWatch]
    ) -> None:
        """``find`` gives a target, and all volumes, as they are; ``placement`` its blocks; ``watch`` minds its pool."""
        self._lvm, self._find, self._placement, self._watch = lvm, find, placement, watch
        self._active: dict[str, _Active] = {}
        self._lock = Lock()

    @contextmanager
    def raw(self, target: Target) -> Iterator[FileImage]:
        """All of ``target``. Raises TargetLost, AttachFailed; and TargetNoSpace from a read, when the pool fills up."""
        with self._use(target) as active:
            try:
                fd = os.open(active.device, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise TargetLost(target=target.id, reason=error.strerror) from error
            placement = partial(self._placement, active.volume, active.pool, active.external)
            with FdImage(fd, ioctl.device_size(fd), placement) as image:
                yield WatchedImage(image, self._watch(active.volume))

    @contextmanager
    def file(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        """The file of ``claim`` in ``target``. Raises SourceChanged, and what :meth:`raw` raises."""
        assert claim.inner_path is not None
        with (
            self._file_system(target, claim) as (mounted, volume),
            mounted.open_file(claim.inner_path, claim.path) as image,
        ):
            yield WatchedImage(image, self._watch(volume))

    @contextmanager
    def folder(self, target: Target, claim: Claim) -> Iterator[int]:
        """Descriptor of the folder of ``claim`` in ``target``. Raises as :meth:`file` does."""
        assert claim.inner_path is not None
        with self._file_system(target, claim) as (mounted, _):
            fd = mounted.open_folder(claim.inner_path, claim.path)
            try:
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def _file_system(self, target: Target, claim: Claim) -> Iterator[tuple[AttachedFileSystem, LogicalVolume]]:
        with self._use(target) as active:
            with self._lock:
                if active.file_system is None:
                    active.file_system = _mount(active.device, claim.fs_type or "", target.volume)
            yield active.file_system, active.volume

    @contextmanager
    def _use(self, target: Target) -> Iterator[_Active]:
        with self._lock:
            active = self._active.get(target.id)
            if active is None:
                active = self._active[target.id] = self._activate(target)
            active.users += 1
        try:
            yield active
        finally:
            with self._lock:
                active.users -= 1
                if not active.users:
                    del self._active[target.id]
                    self._let_go(active)

    def _activate(self, target: Target) -> _Active:
        volume, every = self._find(target)
        try:
            external = self._external(volume, every)
            device = self._lvm.show(volume, external)
        except ToolFailed as error:
            raise AttachFailed(volume=target.volume, reason=str(error)) from error
        pool = next((one for one in every if one.uuid == volume.pool_uuid), None)
        return _Active(volume, pool, device, bool(external))

    def _external(self, volume: LogicalVolume, every: Sequence[LogicalVolume]) -> str:
        """The device that T reads what it has no block for from; as S, which LVM has set up, has it in its table."""
        if not external_origin(volume, every):
            return ""
        origin = next((one for one in every if one.uuid == volume.origin_uuid and one.segtype == "thin"), None)
        if origin is None:
            raise ToolFailed(f"{volume.path} has an external origin, and the volume that it is a snapshot of is gone")
        return external_device(self._lvm.table(origin))

    def _let_go(self, active: _Active) -> None:
        if active.file_system is not None:
            active.file_system.close()
        # Another process of ours may be reading the same target; then it is the last one to take it away. What stays
        # all the same is taken away before the target is removed.
        with suppress(ToolFailed):
            self._lvm.hide(active.volume)


def _mount(device: str, fs_type: str, volume: str) -> AttachedFileSystem:
    """The file system on the read-only ``device``, where nobody sees it. Raises AttachFailed.

    Not through a loop device, as elsewhere: the kernel keeps writers off this one, and udev would look into the other.
    """
    try:
        trouble = unclean(device, fs_type)
        if trouble is not None:
            raise AttachFailed(volume=volume, reason=trouble)
        return AttachedFileSystem(mount_detached(fs_type, device, OPTIONS[fs_type]), 0)
    except OSError as error:
        raise AttachFailed(volume=volume, reason=error.strerror or str(error)) from error
