"""Taking an in-place restore back: per file, only the grains that the restore wrote, and its size.

A whole volume is never rolled back: that would revert the neighbours too. A grain that is neither as the restore
left it nor as it was before has been changed since, and is refused unless forced. Crash points: ``opened``,
``checked``, ``undone`` once for each disk, ``marked``, ``cleaned``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import msgspec
import numpy as np
from numpy.typing import NDArray

from graincopy.core.bitmap import GrainBitmap
from graincopy.core.errors import PointUnknown, RestoreUnknown, UndoConflict
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.units import ceil_div
from graincopy.model.restore_point import DiskRecord, MapRoot, RestoreDisk, RestorePoint, RestoreState
from graincopy.model.snapshot import Target
from graincopy.repository.entries import Entries
from graincopy.repository.repository import Repository
from graincopy.transfer.pipeline import copy_grains, differ
from graincopy.transfer.progress import Meter, silent
from graincopy.views.image import StoredImage
from graincopy.volumes.base import FileSink, Readable
from graincopy.workflow.checkpoints import delete_target
from graincopy.workflow.context import Context
from graincopy.workflow.difference import compare_with, place_of
from graincopy.workflow.survey import refuse_busy
from graincopy.workflow.undo_state import cut_tail, hold_file

PIECE_BYTES = 1 << 20


class UndoneDisk(msgspec.Struct, frozen=True):
    """One file as it was before, and what that took."""

    name: str
    path: str
    written_bytes: int
    removed: bool = False  # the file had not existed before the restore


def find_restore(repository: Repository, text: str) -> RestoreState:
    """The restore whose id begins with ``text`` and that can still be taken back. Raises RestoreUnknown."""
    found = [state for state in repository.restores() if state.record.id.startswith(text)]
    if len(found) != 1:
        raise RestoreUnknown(restore=text, reason="several begin so" if found else "none has this id")
    if found[0].state == "undone":
        raise RestoreUnknown(restore=text, reason="it has been undone already")
    return found[0]


def undo(context: Context, state: RestoreState, *, force: bool) -> tuple[UndoneDisk, ...]:
    """Bring back bytes and sizes of the files that ``state`` restored, then remove U.

    Raises SourceInUse, UndoConflict, WorkloadBusy, RestoreUnknown when U is gone.
    """
    record = state.record
    point = _point_of(context, state)
    with ExitStack() as held:
        run = context.repository.open_run("undo", record.workload, pins=(record.point,))
        held.callback(context.repository.close_run, run)
        context.step("opened")
        refuse_busy(context, run)
        state = find_restore(context.repository, record.id)  # as it is now that nobody else is at it
        jobs = []
        for disk in record.disks:
            wanted = _wanted(point, disk)
            claim = place_of(context, wanted).claim
            sink = held.enter_context(hold_file(context, claim, record.id, ("undoing",)))
            before = held.enter_context(_open_before(context, state, disk, wanted))
            more = Extents.empty()
            if state.resumed and disk.undo_target is not None:  # the map that named its grains may have lied: ask U
                more = compare_with(context, wanted, before, context.progress).grains
            jobs.append(_Job(context, disk, wanted, sink, before, state.state != "done", more))
        if not force:
            for job in jobs:
                job.refuse_conflicts()
        context.step("checked")
        context.repository.mark_restore(record.id, "undoing")
        undone = []
        for job in jobs:
            undone.append(job.bring_back())
            context.step("undone")
        context.repository.mark_restore(record.id, "undone")
        context.step("marked")
    for target in undo_targets(context, state):
        delete_target(context, target)
    context.step("cleaned")
    return tuple(undone)


def _point_of(context: Context, state: RestoreState) -> RestorePoint:
    try:
        return context.repository.point(state.record.point)
    except PointUnknown as gone:
        raise RestoreUnknown(restore=state.record.id, reason="it expired, and its restore point was removed") from gone


def undo_targets(context: Context, state: RestoreState) -> tuple[Target, ...]:
    """The U that this restore still has on storage."""
    wanted = {disk.undo_target for disk in state.record.disks} - {None}
    drivers = {disk.undo_driver for disk in state.record.disks if disk.undo_driver}
    return tuple(
        target
        for name in drivers
        if name in context.drivers
        for target in context.drivers[name].list_targets(_volumes_of(context, state))
        if target.id in wanted
    )


def _volumes_of(context: Context, state: RestoreState) -> tuple[VolumeId, ...]:
    point = _point_of(context, state)
    return tuple({disk.volume: None for disk in point.disks})


def _wanted(point: RestorePoint, disk: RestoreDisk) -> DiskRecord:
    return next(record for record in point.disks if record.id == disk.disk)


class _Job:
    """One disk to bring back: the live file, what it held before, and what the restore wrote."""

    def __init__(
        self,
        context: Context,
        disk: RestoreDisk,
        wanted: DiskRecord,
        sink: FileSink,
        before: Readable,
        cut_off: bool,
        more: Extents,
    ) -> None:
        self._context = context
        self._cut_off = cut_off
        self._disk = disk
        self._wanted = wanted
        self._sink = sink
        self._before = before
        self._grain = context.repository.grain_size
        grains = GrainBitmap.from_bytes(disk.grains).to_extents()
        self._grains = grains | more | cut_tail(disk.size, disk.size_before, self._grain)
        self._grains = self._grains.clip(0, ceil_div(max(disk.size, disk.size_before or 0), self._grain))

    def refuse_conflicts(self) -> None:
        """Raise UndoConflict when a grain is neither as restored nor as before. A missing file has nothing to lose."""
        if not self._sink.existed:
            return
        now = self._name(self._sink)
        restored = self._context.repository.map.lookup(self._wanted.root, now.grains)
        strange = differ(now, restored) & differ(now, self._name(self._before))
        changed = [grain for grain in now.grains[strange].tolist() if not (self._cut_off and self._is_torn(grain))]
        conflicts = Extents.from_points(np.array(changed, np.int64)) | self._resized()
        if conflicts:
            raise UndoConflict(path=self._disk.path, count=conflicts.total)

    def _is_torn(self, grain: int) -> bool:
        """Half written by the restore or undo that was cut off: every byte is as restored or as before."""
        restored = StoredImage(self._context.repository, self._wanted.root, self._wanted.size)
        now, new, old = (self._bytes_of(image, grain) for image in (self._sink, restored, self._before))
        return bool(((now == new) | (now == old)).all())

    def _bytes_of(self, image: Readable, grain: int) -> NDArray[np.uint8]:
        content = bytearray(self._grain)
        image.readinto(grain * self._grain, memoryview(content))
        return np.frombuffer(content, np.uint8)

    def _resized(self) -> Extents:
        """Grains that came or went since, when the file's size is neither as restored nor as before."""
        size, restored = self._sink.size, self._disk.size
        if size in (restored, self._disk.size_before or 0):  # 0: the restore made the file, and was cut off then
            return Extents.empty()
        return (Extents.of((size, restored)) | Extents.of((restored, size))).to_grains(self._grain)

    def bring_back(self) -> UndoneDisk:
        """Write the grains and the size of before; a file that the restore made goes."""
        if self._disk.size_before is None:
            self._sink.remove()
            return UndoneDisk(self._disk.name, self._disk.path, 0, removed=True)
        size = self._disk.size_before
        gone = Extents.of((self._sink.size, size)).to_grains(self._grain) - self._grains  # deleted or cut since
        if self._sink.size != size:
            self._sink.resize(size)
        written = self._lay(self._before, self._grains.to_bytes(self._grain).clip(0, size))
        written += self._lay(self._untouched(), gone.to_bytes(self._grain).clip(0, size))
        if self._disk.metadata_before is not None:
            self._sink.apply(self._disk.metadata_before)
        self._sink.sync()
        return UndoneDisk(self._disk.name, self._disk.path, written)

    def _untouched(self) -> Readable:
        """What shows grains that the restore did not write: U; or, as they did not differ, the point itself."""
        if self._disk.undo_target is not None:
            return self._before
        return StoredImage(self._context.repository, self._wanted.root, self._wanted.size)

    def _lay(self, image: Readable, ranges: Extents) -> int:
        """Copy ``ranges`` of ``image`` onto the file, holes as holes; how many bytes these were."""
        holes = ranges & image.placement().zero()
        for start, stop in holes:
            self._sink.zero(start, stop - start)
        for start, stop in (ranges - holes).split(PIECE_BYTES):
            piece = memoryview(bytearray(stop - start))
            image.readinto(start, piece)
            self._sink.write(start, piece)
        return ranges.total

    def _name(self, image: Readable) -> Entries:
        meter = Meter("checking", 0, silent)
        repository = self._context.repository
        return copy_grains(image, self._disk.path, self._grains, repository, None, workers=1, meter=meter).entries


def _open_before(
    context: Context, state: RestoreState, disk: RestoreDisk, wanted: DiskRecord
) -> AbstractContextManager[Readable]:
    """The file as it was before the restore: from U, or from the grains kept in the repository."""
    if disk.undo_target is None:
        return nullcontext(StoredImage(context.repository, disk.undo_root or MapRoot(), disk.size_before or 0))
    for target in undo_targets(context, state):
        if target.id == disk.undo_target:
            return context.driver(target).open(target, place_of(context, wanted).claim)
    raise RestoreUnknown(restore=state.record.id, reason=f"its undo snapshot {disk.undo_target} is gone")
