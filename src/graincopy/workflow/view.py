"""Stage V: a restore point as readable disks. Clean grains come from the original volume, dirty ones from the medium.

A view answers at once, from the medium. Meanwhile a thread takes a thin T of each S, finds out which grains S and the
restore point presumably share, and from then on these are read from T. The same thread lets the run's heart beat,
and at the end takes T away. If any of that cannot be done the view goes on without it, and the report says why.

The run is of kind "view": it pins the restore point and keeps nobody from backing up, restoring or collecting. When
its owner dies, T (role "view") and the run are reaped. Crash points: ``opened``, those of the instant, ``local`` once
for each disk, ``closing``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from graincopy.core.errors import GraincopyError
from graincopy.core.extent import Extents
from graincopy.model.lineage import First
from graincopy.model.restore_point import DiskRecord, RestorePoint, RunRecord
from graincopy.model.snapshot import Role, Target, TargetTag
from graincopy.model.volume import Claim
from graincopy.views.disk import Finding, RestoredDisk
from graincopy.views.hybrid import LocalGrains
from graincopy.views.image import StoredImage
from graincopy.views.memory import CACHE_BYTES, ViewMemory
from graincopy.volumes.base import FileImage
from graincopy.workflow.checkpoints import delete_target, tag_disks
from graincopy.workflow.context import Context
from graincopy.workflow.difference import lineage_now, place_of, presumed_difference
from graincopy.workflow.heart import BEAT_SECONDS
from graincopy.workflow.reap import reap
from graincopy.workflow.survey import Place


class DiskReport(msgspec.Struct, frozen=True):
    """Where the bytes of one disk have come from so far. ``near``: what is read from S, or why nothing is."""

    name: str
    size: int
    near: str
    local_bytes: int
    medium_bytes: int
    zero_bytes: int
    mismatches: int  # grains presumed equal that were not
    findings: tuple[Finding, ...]


class ViewWish(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. ``trust_map``: believe the change map, and read from T without proof."""

    hybrid: bool = True
    trust_map: bool = False
    cache_bytes: int = CACHE_BYTES
    beat_s: float = BEAT_SECONDS
    delay_s: float = 0.25  # before anything near is looked for: the first reads have the machine to themselves


class View:
    """An open view. Its disks may be read from several threads until :meth:`close`."""

    def __init__(
        self,
        context: Context,
        point: RestorePoint,
        records: Sequence[DiskRecord],
        run: RunRecord,
        wish: ViewWish,
        tell: Callable[[Finding], None],
    ) -> None:
        self.point, self.run = point, run
        self._context, self._records, self._wish = context, tuple(records), wish
        self._memory = ViewMemory(context.repository, wish.cache_bytes, ahead=True)
        self.disks = tuple(self._disk(record, tell) for record in records)
        self._near = {record.name: "not asked for" for record in records}
        self._locals: dict[str, LocalGrains] = {}
        self._settled = threading.Event()
        self._hurry = threading.Event()
        self._ending = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="view")

    def _disk(self, record: DiskRecord, tell: Callable[[Finding], None]) -> RestoredDisk:
        repository = self._context.repository
        image = StoredImage(repository, record.root, record.size, self._memory)
        return RestoredDisk(record.name, image, repository.grain_size, self._context.clock, tell)

    def start(self) -> None:
        """Begin to look for what is near, and to give signs of life."""
        self._keeper.start()

    def wait_settled(self, seconds: float | None = None) -> bool:
        """Wait until it is decided for every disk what is read from S; False when that takes longer."""
        self._hurry.set()
        return self._settled.wait(seconds)

    def report(self) -> tuple[DiskReport, ...]:
        """The split so far, disk by disk."""
        return tuple(self._report(disk) for disk in self.disks)

    def _report(self, disk: RestoredDisk) -> DiskReport:
        local = self._locals.get(disk.name)
        return DiskReport(
            name=disk.name,
            size=disk.size,
            near=(local.lost if local is not None else None) or self._near[disk.name],
            local_bytes=disk.split.local_bytes,
            medium_bytes=disk.split.medium_bytes,
            zero_bytes=disk.split.zero_bytes,
            mismatches=local.mismatches if local is not None else 0,
            findings=tuple(disk.findings),
        )

    @property
    def fetched_bytes(self) -> int:
        """Bytes read from the packs of the repository so far, grain maps included."""
        return self._memory.fetched_bytes

    def close(self) -> None:
        """T is gone and no thread is left on return. May be repeated."""
        self._ending.set()
        self._hurry.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        self._memory.close()

    # --- the keeper: a thread of its own from here on -----------------------------------------------

    def _keep(self) -> None:
        with ExitStack() as held:
            try:
                if self._wish.hybrid:
                    self._hurry.wait(self._wish.delay_s)
                    self._find_near(held)
            finally:
                self._settled.set()
            while not self._ending.wait(self._wish.beat_s):
                self._beat()
            self._context.step("closing")

    def _beat(self) -> None:
        """A sign of life that cannot be given now is given next time."""
        with suppress(GraincopyError, OSError):
            self._context.repository.beat(self.run)

    def _find_near(self, held: ExitStack) -> None:
        """A T of every volume that still is there, and the disks' files in it."""
        if self._ending.is_set():
            return
        with suppress(GraincopyError, OSError):
            reap(self._context)  # storage with one target per volume may still hold that of a view that died
        volumes: dict[tuple[str, str], list[tuple[DiskRecord, Claim]]] = {}
        for record in self._records:
            claim = self._claim(record)
            if claim is not None:
                volumes.setdefault((claim.driver, claim.volume), []).append((record, claim))
        for members in volumes.values():
            self._take(members, held)

    def _claim(self, record: DiskRecord) -> Claim | None:
        try:
            claim = self._context.claim(record)
        except (GraincopyError, OSError) as failure:
            self._near[record.name] = f"nothing: {failure}"
            return None
        if not self._context.snapshots(claim):
            self._near[record.name] = f"nothing: the {claim.driver} driver makes no snapshots"
            return None
        return claim

    def _take(self, members: Sequence[tuple[DiskRecord, Claim]], held: ExitStack) -> None:
        """T of one volume, and each disk that it holds."""
        if self._ending.is_set():
            return
        tag = self._tag([record for record, _ in members])
        try:
            (target,) = self._context.instant([claim for _, claim in members], tag).targets.values()
        except (GraincopyError, OSError) as failure:
            self._near.update((record.name, f"nothing: {failure}") for record, _ in members)
            return
        held.callback(self._discard, target)
        for record, claim in members:
            try:
                self._attach(record, claim, target, held)
            except (GraincopyError, OSError) as failure:
                self._near[record.name] = f"nothing: {failure}"

    def _tag(self, records: Sequence[DiskRecord]) -> TargetTag:
        return TargetTag(
            run=self.run.id,
            role=Role.VIEW,
            owner=self._context.owner,
            repository=self._context.repository.id,
            disks=tag_disks(self.point.workload, records),
            created=self._context.clock.now(),
        )

    def _discard(self, target: Target) -> None:
        """What cannot be deleted is tagged, and reaped when this process has ended."""
        with suppress(GraincopyError, OSError):
            delete_target(self._context, target)

    def _attach(self, record: DiskRecord, claim: Claim, target: Target, held: ExitStack) -> None:
        """Open the disk's file in T, presume what it shares with the restore point, and let the disk read it."""
        image = held.enter_context(self._context.driver(claim).open(target, claim))
        differing, near = self._presume(record, target, image)
        if differing is None:
            self._near[record.name] = near
            return
        repository = self._context.repository
        trust = self._wish.trust_map
        local = LocalGrains(image, repository.grain_size, differing, repository.chunk_id, trust=trust)
        self._locals[record.name], self._near[record.name] = local, near
        disk = next(disk for disk in self.disks if disk.name == record.name)
        disk.attach(local)
        held.callback(disk.detach)  # before the image closes
        self._context.step("local")

    def _presume(self, record: DiskRecord, target: Target, image: FileImage) -> tuple[Extents | None, str]:
        """Grains that need not be looked for in T, and how that is known.

        Where nobody can tell what changed, every grain is looked for that the latest restore point shares with this
        one: each is proved before it counts. Unless proofs were declined: then nothing is read from T.
        """
        found = place_of(self._context, record)
        volume = msgspec.structs.replace(found.volume, incarnation=target.incarnation)
        place = Place(found.file, found.claim, volume)
        reason = "nobody can tell what changed"
        try:
            differing = presumed_difference(self._context, self.point, record, place, target, image)
            if differing is not None:
                return differing, "change map"
        except (GraincopyError, OSError) as failure:
            reason = str(failure)
        if self._wish.trust_map:
            return None, f"nothing: {reason}, and unproved grains are not guessed"
        return self._guess(record, place), "by trial"

    def _guess(self, record: DiskRecord, place: Place) -> Extents:
        try:
            lineage = lineage_now(self._context, self.point, place)
            if isinstance(lineage, First):
                return Extents.empty()
            return self._context.repository.map.diff(record.root, lineage.disk_record.root)
        except (GraincopyError, OSError):
            return Extents.empty()


def _quiet(_finding: Finding) -> None:
    """Findings are in the report all the same."""


@contextmanager
def open_view(
    context: Context,
    point: RestorePoint,
    disks: Sequence[DiskRecord],
    wish: ViewWish | None = None,
    *,
    tell: Callable[[Finding], None] = _quiet,
) -> Iterator[View]:
    """``disks`` of ``point``, to be read until the end of the block. Raises PointUnknown.

    ``tell`` hears, in whatever thread it happens, of each thing that could not be read. The process that opened the
    view owns it: it must not fork and leave.
    """
    run = context.repository.open_run("view", point.workload, pins=(point.id,))
    try:
        context.step("opened")
        view = View(context, point, disks, run, wish or ViewWish(), tell)
        try:
            view.start()
            yield view
        finally:
            view.close()
    finally:
        context.repository.close_run(run)
