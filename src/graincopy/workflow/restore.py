"""The restore in place: the grains of a restore point straight from the medium onto S; undoable, resumable.

Order, and why. Writers are held off first, so that U, the undo snapshot, shows what will be overwritten. U is
durable before anything else happens. The record is in the repository before the first byte is written: from then
on the restore can be finished or taken back, from any host. Crash points: ``opened``, those of the instant,
``differed``, ``saved``, ``recorded``, ``written`` once for each disk, ``done``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from graincopy.core.bitmap import GrainBitmap
from graincopy.core.errors import RestoreFailed, RestoreNoSpace, RestoreOpen, WorkloadBusy
from graincopy.core.extent import Extents
from graincopy.core.ids import PointId
from graincopy.model.audit import AuditAmount, choose
from graincopy.model.lineage import Incremental
from graincopy.model.plan import RestorePlan
from graincopy.model.planner import RestorePlace, plan_restore
from graincopy.model.restore_point import DiskRecord, RestorePoint, RestoreRecord, RestoreState
from graincopy.transfer.progress import Meter, ProgressSink
from graincopy.transfer.writer import write_grains
from graincopy.workflow.audit import mismatches
from graincopy.workflow.context import Context
from graincopy.workflow.difference import Difference, Part, Past, attached, find_difference, lineage_now, place_of
from graincopy.workflow.heart import Heart
from graincopy.workflow.restored_trees import finish_live, trees_of
from graincopy.workflow.survey import Place, refuse_busy
from graincopy.workflow.undo_state import describe_undo, drop_unused, hold_file, make_missing, take_undo, undo_of


class RestoredDisk(msgspec.Struct, frozen=True):
    """What was done to one disk, in bytes."""

    name: str
    target: str  # path that was written
    how: str  # "change map", "compared" or "resumed"
    differing_bytes: int
    written_bytes: int
    read_bytes: int
    fetched_bytes: int
    format: str = "raw"  # of the file that was written


class RestoreOutcome(msgspec.Struct, frozen=True):
    """A finished restore, and what takes it back."""

    restore: PointId
    point: RestorePoint
    undo: str | None
    disks: tuple[RestoredDisk, ...]
    warnings: tuple[str, ...] = ()


def plan(
    context: Context, point: RestorePoint, disks: Sequence[DiskRecord], to: str | None, compare: bool
) -> RestorePlan:
    """What a restore of ``disks`` would do now. No effect."""
    places = {}
    past = Past(context, point.workload)
    for disk in disks:
        if to is not None:
            places[disk.name] = RestorePlace(path=f"{to}/{disk.name}")
            continue
        place = place_of(context, disk)
        lineage = lineage_now(context, point, place, past)
        places[disk.name] = RestorePlace(
            path=disk.path,
            size_before=place.claim.size,
            change_map=isinstance(lineage, Incremental),
            reason=getattr(lineage, "reason", ""),
            snapshots=context.snapshots(place.claim),
        )
    return plan_restore(point, places, to, compare)


def restore_in_place(
    context: Context, point: RestorePoint, disks: Sequence[DiskRecord], *, compare: bool
) -> RestoreOutcome:
    """Bring ``disks`` of ``point`` back onto the files they came from.

    Where an earlier restore of the same point was cut off, that one is finished. Raises SourceInUse while anyone
    writes to one of the files, WorkloadBusy while another run works on the workload, RestoreOpen when another point's
    restore is unfinished, RestoreNoSpace, RestoreFailed.
    """
    unfinished = unfinished_restore(context, point, disks)
    with ExitStack() as held:
        run = context.repository.open_run("restore", point.workload, pins=_pins(context, point))
        held.callback(context.repository.close_run, run)
        heart = Heart(context.repository, run, context.clock, context.progress)
        context.step("opened")
        refuse_busy(context, run)
        places = [place_of(context, disk) for disk in disks]
        # somebody may have begun or ended one before our run was open
        if unfinished_restore(context, point, disks) != unfinished:
            raise WorkloadBusy(workload=point.workload, run=run.id, owner="a restore or undo that has just ended")
        if unfinished is not None:
            return _resume(context, point, disks, places, unfinished.record, held, heart)
        sinks = [
            None if at.missing else held.enter_context(hold_file(context, at.claim, run.id, ("open",))) for at in places
        ]
        targets = take_undo(context, point, places, sinks, run)
        with drop_unused(context, run, targets):
            parts = [
                Part(disk, place, sink, targets.get(place.claim.volume) if sink and sink.existed else None)
                for disk, place, sink in zip(disks, places, sinks, strict=True)
            ]
            past = Past(context, point.workload)
            with attached(context, point, parts, past):
                differences = [
                    find_difference(context, point, part, compare=compare, progress=heart, past=past) for part in parts
                ]
            context.step("differed")
            _refuse_without_space(context, parts, differences)
            record = describe_undo(context, point, run, parts, differences)
            context.step("saved")
            context.repository.put_restore(record)
            context.step("recorded")
            parts = make_missing(
                context, parts, record, held, lambda parts: _refuse_without_space(context, parts, differences)
            )
        return _finish(context, point, parts, differences, record, heart)


def _resume(
    context: Context,
    point: RestorePoint,
    disks: Sequence[DiskRecord],
    places: Sequence[Place],
    record: RestoreRecord,
    held: ExitStack,
    progress: ProgressSink,
) -> RestoreOutcome:
    """Finish the restore of ``record``.

    Compared, not taken from the record: nobody knows what came to the files since it was cut off, and it may have
    been cut off because the change map is wrong. When that finds more grains than the record names, this is noted
    first: the undo then asks U which of them it had differently.
    """
    parts = []
    for disk, place in zip(disks, places, strict=True):
        parts.append(Part(disk, place, held.enter_context(hold_file(context, place.claim, record.id, ("open",))), None))
    left = [find_difference(context, point, part, compare=True, progress=progress) for part in parts]
    named = {disk.disk: GrainBitmap.from_bytes(disk.grains).to_extents() for disk in record.disks}
    if any(difference.grains - named[part.wanted.id] for part, difference in zip(parts, left, strict=True)):
        context.repository.mark_restore(record.id, "resumed")
    left = [msgspec.structs.replace(difference, how="resumed") for difference in left]
    return _finish(context, point, parts, left, record, progress)


def unfinished_restore(context: Context, point: RestorePoint, disks: Sequence[DiskRecord]) -> RestoreState | None:
    """The restore of ``point`` that was cut off, if it was of these disks. Raises RestoreOpen for any other."""
    wanted = {disk.path for disk in disks}
    for state in context.repository.restores():
        paths = {disk.path for disk in state.record.disks}
        if state.state not in ("open", "undoing") or not paths & wanted:
            continue
        if state.state == "open" and state.record.point == point.id and paths == wanted:
            return state
        raise RestoreOpen(restore=state.record.id, path=min(paths & wanted), point=state.record.point)
    return None


def _pins(context: Context, point: RestorePoint) -> tuple[PointId, ...]:
    """P, and L of the same workload: neither may be collected while the difference is computed."""
    latest = [one.id for one in context.repository.points() if one.workload == point.workload][:1]
    return tuple({point.id: None, **dict.fromkeys(latest)})


def _refuse_without_space(context: Context, parts: Sequence[Part], differences: Sequence[Difference]) -> None:
    """Every grain written may need a fresh block: where T shares it, or where there was a hole."""
    needed: dict[str, int] = {}
    for part, difference in zip(parts, differences, strict=True):
        size = difference.grains.total * context.repository.grain_size
        home = part.place.claim.mount or part.place.volume.home or part.wanted.path
        needed[home] = needed.get(home, 0) + size
        free = part.sink.free_bytes() if part.sink else None
        if free is not None and needed[home] > free:
            raise RestoreNoSpace(path=part.wanted.path, needed=needed[home], free=free)


def _finish(
    context: Context,
    point: RestorePoint,
    parts: Sequence[Part],
    differences: Sequence[Difference],
    record: RestoreRecord,
    progress: ProgressSink,
) -> RestoreOutcome:
    """Write, prove, and say that it is done."""
    restored = []
    warnings: list[str] = []
    for part, difference in zip(parts, differences, strict=True):
        if difference.warning:
            warnings.append(difference.warning)
        if not part.existed:
            part.live.apply(part.wanted.metadata)  # nodatacow can only be set before the first write
        restored.append(_write(context, part, difference, progress))
        warnings += (f"{part.wanted.name}: {clause}" for clause in part.live.apply(part.wanted.metadata))
        part.live.sync()
        _prove(context, part, difference.grains, record)
        context.step("written")
    warnings += finish_live(trees_of(point, [part.wanted for part in parts]))
    context.repository.mark_restore(record.id, "done")
    context.step("done")
    return RestoreOutcome(record.id, point, undo_of(record), tuple(restored), tuple(warnings))


def _write(context: Context, part: Part, difference: Difference, progress: ProgressSink) -> RestoredDisk:
    grain_size = context.repository.grain_size
    differing = difference.grains.to_bytes(grain_size).clip(0, part.wanted.size).total
    if part.live.size != part.wanted.size:
        part.live.resize(part.wanted.size)
    bill = write_grains(
        context.repository,
        part.wanted.root,
        difference.grains,
        part.live,
        part.wanted.size,
        fresh=not part.existed,
        workers=context.limits.workers,
        meter=Meter(part.wanted.name, differing, progress),
    )
    return RestoredDisk(
        name=part.wanted.name,
        target=part.wanted.path,
        how=difference.how,
        differing_bytes=differing,
        written_bytes=bill.written_bytes,
        read_bytes=difference.read_bytes,
        fetched_bytes=bill.fetched_bytes,
        format=part.wanted.format,
    )


def _prove(context: Context, part: Part, written: Extents, record: RestoreRecord) -> None:
    """Read back some of what was written and some of what was presumed equal. Raises RestoreFailed on a mismatch."""
    grain_size = context.repository.grain_size
    allocated = part.live.placement().allocated().to_grains(grain_size)
    count = AuditAmount.parse(context.limits.audit).grains(allocated.total)
    cursor = context.chance.below(int(allocated.bounds[-1])) if len(allocated) else 0
    sample = choose(allocated, Extents.empty(), written.bounds, cursor, count, context.chance.below).grains
    wrong = mismatches(context, part.live, part.wanted.path, sample, part.wanted.root)
    if wrong:
        raise RestoreFailed(
            path=part.wanted.path, restore=record.id, reason=f"{wrong} of {sample.total} grains read back differ"
        )
