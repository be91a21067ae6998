"""What takes a restore back, made before its first write: U on storage, or the overwritten grains in the repository."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import msgspec

from graincopy.core.bitmap import GrainBitmap
from graincopy.core.errors import OutputExists
from graincopy.core.extent import Extents
from graincopy.core.ids import PointId, VolumeId
from graincopy.core.units import ceil_div
from graincopy.model.restore_point import MapRoot, RestoreDisk, RestorePoint, RestoreRecord, RunRecord
from graincopy.model.snapshot import Role, Target, TargetTag
from graincopy.model.volume import Claim
from graincopy.repository.store import Session
from graincopy.transfer.pipeline import copy_grains
from graincopy.transfer.progress import Meter
from graincopy.volumes.base import FileSink
from graincopy.workflow.checkpoints import delete_target, tag_disks
from graincopy.workflow.context import Context
from graincopy.workflow.difference import Difference, Part
from graincopy.workflow.survey import Place


def take_undo(
    context: Context, point: RestorePoint, places: Sequence[Place], sinks: Sequence[FileSink | None], run: RunRecord
) -> dict[VolumeId, Target]:
    """U of every volume whose driver can snapshot and whose file exists, all at one instant and durable."""
    claims = [
        place.claim
        for place, sink in zip(places, sinks, strict=True)
        if sink is not None and sink.existed and context.snapshots(place.claim)
    ]
    if not claims:
        return {}
    tag = TargetTag(
        run=run.id,
        role=Role.UNDO,
        owner=context.owner,
        repository=context.repository.id,
        disks=tag_disks(point.workload, (place.file for place in places)),
        created=context.clock.now(),
        expires=context.clock.now() + context.limits.undo_keep_s,
    )
    return {target.volume: target for target in context.instant(claims, tag).targets.values()}


@contextmanager
def hold_file(context: Context, claim: Claim, restore: PointId, states: Collection[str]) -> Iterator[FileSink]:
    """The live file, for writing. One that was missing goes again on an error before ``restore`` is in ``states``."""
    with context.driver(claim).open_for_restore(claim) as sink:
        try:
            yield sink
        except BaseException:
            if not sink.existed and not _is_in(context, restore, states):
                sink.remove()
            raise


def make_missing(
    context: Context,
    parts: Sequence[Part],
    record: RestoreRecord,
    held: ExitStack,
    refuse: Callable[[list[Part]], None],
) -> list[Part]:
    """``parts`` with the files made that were missing; not earlier, since a kill would leave them with no record of it.

    Nothing has been written by then: on an error, such as one that ``refuse`` raises when all are there, they are
    taken away again and ``record`` is void. Raises OutputExists when somebody else made one.
    """
    made: list[FileSink] = []
    try:
        ready = []
        for part in parts:
            if part.sink is None:
                sink = held.enter_context(context.driver(part.place.claim).open_for_restore(part.place.claim))
                if sink.existed:
                    raise OutputExists(path=part.wanted.path)
                made.append(sink)
                part = msgspec.structs.replace(part, sink=sink)
            ready.append(part)
        if made:
            refuse(ready)
        return ready
    except BaseException:
        for sink in made:
            sink.remove()
        context.repository.mark_restore(record.id, "undone")
        raise


def _is_in(context: Context, restore: PointId, states: Collection[str]) -> bool:
    return any(one.record.id == restore and one.state in states for one in context.repository.restores())


@contextmanager
def drop_unused(context: Context, run: RunRecord, targets: Mapping[VolumeId, Target]) -> Iterator[None]:
    """On an error before the restore was recorded, or when the record is void, nothing was written: U goes.

    Afterwards it is what saves us.
    """
    try:
        yield
    except BaseException:
        if not _is_in(context, run.id, ("open", "undoing", "done")):
            for target in targets.values():
                delete_target(context, target)
        raise


def describe_undo(
    context: Context,
    point: RestorePoint,
    run: RunRecord,
    parts: Sequence[Part],
    differences: Sequence[Difference],
) -> RestoreRecord:
    """The restore record. Where S has no snapshots, the grains about to be overwritten are stored first, durably."""
    with context.repository.session(run) as session:
        disks = _describe_disks(context, session, parts, differences)
        session.finish()
    return RestoreRecord(
        id=run.id,
        point=point.id,
        workload=point.workload,
        owner=context.owner,
        opened=context.clock.now(),
        expires=context.clock.now() + context.limits.undo_keep_s,
        disks=disks,
    )


def _describe_disks(
    context: Context, session: Session, parts: Sequence[Part], differences: Sequence[Difference]
) -> tuple[RestoreDisk, ...]:
    return tuple(
        RestoreDisk(
            disk=part.wanted.id,
            name=part.wanted.name,
            path=part.wanted.path,
            size=part.wanted.size,
            size_before=part.live.size if part.existed else None,
            grains=GrainBitmap.from_extents(difference.grains).to_bytes(),
            metadata_before=part.live.metadata() if part.existed else None,
            undo_target=part.before.id if part.before else None,
            undo_driver=part.before.driver if part.before else None,
            undo_root=_save_overwritten(context, session, part, difference) if part.before is None else None,
        )
        for part, difference in zip(parts, differences, strict=True)
    )


def _save_overwritten(context: Context, session: Session, part: Part, difference: Difference) -> MapRoot | None:
    """A grain map of what the differing grains hold now; None for a file that did not exist.

    A file that the restore cuts loses its tail too: the grains behind the new end are saved as well.
    """
    if not part.existed:
        return None
    grain_size = context.repository.grain_size
    count = ceil_div(part.live.size, grain_size)
    grains = (difference.grains | cut_tail(part.wanted.size, part.live.size, grain_size)).clip(0, count)
    copied = copy_grains(
        part.live,
        part.wanted.path,
        grains,
        context.repository,
        session,
        workers=context.limits.workers,
        meter=Meter(f"keeping {part.wanted.name}", grains.total * grain_size, context.progress),
    )
    return session.update_map(MapRoot(), count, copied.entries)


def cut_tail(size: int, size_before: int | None, grain_size: int) -> Extents:
    """Grains from the new end to the old one, when the restore makes the file shorter."""
    return Extents.of((size, size_before or 0)).to_grains(grain_size)


def undo_of(record: RestoreRecord) -> str | None:
    """What a person may see as the undo of a restore: its target, or the repository."""
    for disk in record.disks:
        if disk.undo_target:
            return disk.undo_target
        if disk.undo_root is not None:
            return "repository"
    return None
