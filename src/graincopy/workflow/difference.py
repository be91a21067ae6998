"""Stage R, what to write: the grains in which S differs from the restore point, without reading S where it can.

    difference = diff(P, L) ∪ changed(checkpoint of L, U)

P is the point to restore, L the latest one, U the undo snapshot: S as it is now. Where L has no checkpoint, U is
compared with P grain by grain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec

from graincopy.core.errors import PathMissing, SourceChanged
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId, WorkloadId
from graincopy.core.units import ceil_div
from graincopy.model.audit import AuditAmount, choose
from graincopy.model.change_map import Changed, dirty_file, to_grains, whole_file
from graincopy.model.lineage import Incremental, Lineage, choose_base, histories
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim, SourceVolume
from graincopy.model.workload import WorkloadFile
from graincopy.repository.entries import ZERO, Entries
from graincopy.transfer.pipeline import copy_grains, differ
from graincopy.transfer.progress import Meter, ProgressSink
from graincopy.volumes.base import FileSink, Readable
from graincopy.workflow.audit import distrust, mismatches
from graincopy.workflow.context import Context
from graincopy.workflow.copying import ChangeMaps
from graincopy.workflow.survey import Place
from graincopy.workflow.trees import keep_attached


class Part(msgspec.Struct, frozen=True):
    """One disk on its way back: the wanted state, where it lies, the file itself, and U (None without snapshots)."""

    wanted: DiskRecord
    place: Place
    sink: FileSink | None  # None: the file is missing, and is made when everything that takes it away is durable
    before: Target | None

    @property
    def live(self) -> FileSink:
        """The file, which is there by now."""
        assert self.sink is not None
        return self.sink

    @property
    def existed(self) -> bool:
        """Whether the file was there before the restore."""
        return self.sink is not None and self.sink.existed


class Difference(msgspec.Struct, frozen=True):
    """Grains of one disk to write, how they were found, and how many bytes of S that took (audit included)."""

    grains: Extents
    how: str  # "change map", "compared" or "resumed"
    read_bytes: int = 0
    warning: str = ""


def place_of(context: Context, disk: DiskRecord) -> Place:
    """Where ``disk`` lies now; a file that is missing will be made where it lay. Raises VolumeUnsupported."""
    file = WorkloadFile(
        path=disk.path,
        name=disk.name,
        disk=disk.id,
        format=disk.format,
        representation=disk.representation,
        metadata=disk.metadata,
        tree_disk=disk.tree_disk,
    )
    try:
        claim = context.claim(file)
    except PathMissing:
        claim = Claim(
            path=disk.path,
            driver=disk.driver,
            volume=disk.volume,
            why="it is missing and will be made anew",
            inner_path=disk.inner_path,
            fs_offset=disk.fs_offset,
            representation=disk.representation,
            format=disk.format,
        )
        volume = SourceVolume(id=disk.volume, driver=disk.driver, size=0, incarnation="")
        return Place(file, claim, volume, missing=True)
    return Place(file, claim, context.driver(claim).describe(claim.volume))


class Past:
    """The restore points of ``workload``, targets and change maps: asked once, however many disks there are."""

    def __init__(self, context: Context, workload: WorkloadId) -> None:
        self.histories = histories(context.repository.points(), workload)
        self.change_maps = ChangeMaps()
        self._context = context
        self._targets: dict[tuple[str, VolumeId], tuple[Target, ...]] = {}

    def targets(self, claim: Claim) -> tuple[Target, ...]:
        """Targets of ours on the volume of ``claim``."""
        key = (claim.driver, claim.volume)
        if key not in self._targets:
            self._targets[key] = self._context.driver(claim).list_targets((claim.volume,))
        return self._targets[key]


def lineage_now(context: Context, point: RestorePoint, place: Place, past: Past | None = None) -> Lineage:
    """L, the latest restore point of the same workload that shows this disk, and its checkpoint if there is one."""
    past = past or Past(context, point.workload)
    return choose_base(
        (),
        point.workload,
        place.file,
        place.volume,
        place.claim,
        past.targets(place.claim),
        context.repository.id,
        changes=context.has_change_map(place.claim),
        history=past.histories.get(place.file.disk, ()),
    )


@contextmanager
def attached(context: Context, point: RestorePoint, parts: Sequence[Part], past: Past) -> Iterator[None]:
    """What the files of directories are looked up in stays attached inside: U, and the checkpoint of L."""
    seen: set[str] = set()
    with ExitStack() as held:
        for part in parts:
            place, before = part.place, part.before
            if before is None or place.claim.identity or place.file.tree_disk is None:
                continue
            lineage = lineage_now(context, point, place, past)
            targets = [before, *([lineage.checkpoint] if isinstance(lineage, Incremental) else ())]
            for target in (target for target in targets if target.id not in seen):
                seen.add(target.id)
                held.enter_context(keep_attached(context, place.claim, target))
        yield


def find_difference(
    context: Context,
    point: RestorePoint,
    part: Part,
    *,
    compare: bool,
    progress: ProgressSink,
    past: Past | None = None,
) -> Difference:
    """Where the disk as it is now differs from the one wanted; ``compare`` forces reading all of it."""
    if part.sink is None:
        return Difference(_resized(context, part.wanted, 0), "compared")
    if part.before is None:
        return compare_with(context, part.wanted, part.sink, progress)
    with context.driver(part.place.claim).open(part.before, part.place.claim) as now:
        known = None
        if not compare:
            known = presumed_difference(context, point, part.wanted, part.place, part.before, now, past)
        if known is None:
            return compare_with(context, part.wanted, now, progress)
        grains = known
        equal = now.placement().allocated().to_grains(context.repository.grain_size) - grains
        sample = _sample(context, equal.clip(0, _grain_count(context, part.wanted)), grains, context.limits.audit)
        if wrong := mismatches(context, now, part.wanted.path, sample, part.wanted.root):
            found = compare_with(context, part.wanted, now, progress)
            return msgspec.structs.replace(found, warning=distrust(part.wanted.name, wrong, sample.total))
    return Difference(
        grains.clip(0, _grain_count(context, part.wanted)), "change map", sample.total * context.repository.grain_size
    )


def presumed_difference(
    context: Context,
    point: RestorePoint,
    wanted: DiskRecord,
    place: Place,
    target: Target,
    now: Readable,
    past: Past | None = None,
) -> Extents | None:
    """The formula above: grains in which ``now``, the disk as ``target`` shows it, may differ from the one wanted.

    None when the changes since L cannot be told. The change map is believed; whoever needs certainty has to look.
    """
    driver = context.driver(place.claim)
    past = past or Past(context, point.workload)
    lineage = lineage_now(context, point, place, past)
    if not isinstance(lineage, Incremental):
        return None
    volume = past.change_maps.between(driver, lineage.checkpoint, target)
    if not isinstance(volume, Changed):
        return None
    try:
        placement = now.placement()
        before = driver.placement_at(lineage.checkpoint, place.claim, placement, volume.extents)
    except SourceChanged:
        return None
    since = dirty_file(before, placement, volume.extents)
    grains = to_grains(since, placement, context.repository.grain_size, lineage.disk_record.size)
    changed = grains.read | grains.zero | context.repository.map.diff(wanted.root, lineage.disk_record.root)
    return changed | _resized(context, wanted, now.size)


def compare_with(context: Context, wanted: DiskRecord, now: Readable, progress: ProgressSink) -> Difference:
    """Read all that is allocated and compare it with P; what is a hole differs where P has a chunk."""
    grain_size = context.repository.grain_size
    placement = now.placement()
    todo = to_grains(whole_file(placement), placement, grain_size)
    seen = copy_grains(
        now,
        wanted.path,
        todo.read,
        context.repository,
        None,
        workers=context.limits.workers,
        meter=Meter(f"comparing {wanted.name}", todo.read.total * grain_size, progress),
    )
    root = wanted.root
    said = context.repository.map.lookup(root, seen.entries.grains)
    differs = differ(seen.entries, said)
    chunks = Entries.join(list(context.repository.map.walk(root, todo.zero)))
    missing = Extents.from_points(chunks.grains[chunks.kinds != ZERO])
    grains = Extents.from_points(seen.entries.grains[differs]) | missing | _resized(context, wanted, now.size)
    return Difference(grains.clip(0, _grain_count(context, wanted)), "compared", seen.read_bytes)


def _resized(context: Context, wanted: DiskRecord, size: int) -> Extents:
    """Grains of P from the smaller of the two ends on: they have to be written when the sizes differ."""
    if size == wanted.size:
        return Extents.empty()
    return Extents.of((min(size, wanted.size), wanted.size)).to_grains(context.repository.grain_size)


def _grain_count(context: Context, wanted: DiskRecord) -> int:
    return ceil_div(wanted.size, context.repository.grain_size)


def _sample(context: Context, equal: Extents, written: Extents, audit: str) -> Extents:
    """Some of the grains presumed equal: beside what will be written, and from a place chosen by chance on."""
    count = AuditAmount.parse(audit).grains(equal.total)
    cursor = context.chance.below(int(equal.bounds[-1])) if len(equal) else 0
    return choose(equal, written, written.bounds, cursor, count, context.chance.below).grains
