"""Collect: give back the space of what no restore point needs, while others go on backing up and restoring.

    plan      list packs; mark what restore points reach; packs with nothing live go, sparse ones are repacked
    condemn   say durably which packs: runs that open from now on do not reuse what is in them
    wait      until every run that was open then has published, ended or been fenced
    re-mark   with what those runs published; a planned pack that became live stays
    rewrite   repacked pieces and a new index, durable before anything goes
    sweep     delete the packs; last, the condemnation

Packs are listed *before* runs are: a pack in the list belongs to a run that had opened by then, so it is either
published, or its run is seen and waited for. The other way round, a run could open after the runs were listed and
put a pack before the packs are: it would look like rubbish, and nobody would wait.

A crash anywhere is safe. What was condemned stays unused until the next collect, which starts from what it finds;
a piece that is stored twice is harmless. One collect at a time: two that see each other both step back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import numpy as np

from graincopy.core.clock import Clock
from graincopy.core.errors import ObjectDamaged, ObjectMissing, RunsOpen
from graincopy.core.extent import Mask
from graincopy.core.ids import PieceId, PointId, new_id
from graincopy.core.units import format_size
from graincopy.model.restore_point import MapRoot, RestorePoint, RunRecord
from graincopy.repository import index as segments
from graincopy.repository.format import Rows
from graincopy.repository.index import Index, keep_rows, merge_rows, rows_of
from graincopy.repository.mark import Marks
from graincopy.repository.pack import PackDirectory, PackWriter, list_packs
from graincopy.repository.records import Condemned, ObjectKind, PackRef, PieceKind
from graincopy.repository.repository import Repository
from graincopy.repository.runs import Alive

LIVE_SHARE = 0.5  # packs with less of their bytes live are repacked
_NEVER_STORING = ("collect", "view")  # kinds of run that reuse nothing: their pins protect what they read
_PAUSE = 1.0  # seconds between two looks at the runs that are waited for
_REPACK_BATCH = 256  # pieces in memory at a time


class CollectPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a collect is going to do. Sizes in bytes."""

    packs: int
    stored_bytes: int
    sweep: tuple[PackRef, ...] = ()
    repack: tuple[PackRef, ...] = ()
    live_in_repack: int = 0

    @property
    def freed_bytes(self) -> int:
        """What there will be less, roughly: new packs have headers of their own."""
        return sum(pack.size for pack in (*self.sweep, *self.repack)) - self.live_in_repack

    def lines(self) -> tuple[str, ...]:
        """For people."""
        return (
            f"{self.packs} packs hold {format_size(self.stored_bytes)}",
            f"{len(self.sweep)} hold nothing that a restore point needs and go",
            f"{len(self.repack)} are mostly unneeded; {format_size(self.live_in_repack)} in them are stored anew",
            f"{format_size(max(0, self.freed_bytes))} come back",
        )


class CollectOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a collect did. Sizes in bytes."""

    swept: int  # packs that are gone
    repacked: int  # of these, packs of which something was stored anew
    freed_bytes: int
    fenced: tuple[PointId, ...] = ()
    kept_damaged: tuple[str, ...] = ()  # packs that were to be repacked and cannot be read


def plan_collect(packs: Sequence[PackRef], live: Mapping[str, int]) -> CollectPlan:
    """The plan for ``packs``, of which ``live`` bytes (by pack id) are needed."""
    sweep = tuple(pack for pack in packs if not live.get(pack.id))
    repack = tuple(pack for pack in packs if 0 < live.get(pack.id, 0) < LIVE_SHARE * pack.size)
    return CollectPlan(
        packs=len(packs),
        stored_bytes=sum(pack.size for pack in packs),
        sweep=sweep,
        repack=repack,
        live_in_repack=sum(live[pack.id] for pack in repack),
    )


def collect(
    repository: Repository,
    *,
    alive: Alive,
    clock: Clock,
    patience: float,
    step: Callable[[str], None] = lambda name: None,
    dry_run: bool = False,
    silence: float | None = None,
) -> CollectOutcome:
    """Reclaim space. Runs of dead local owners are fenced at once, others waited for, ``patience`` seconds at most.

    ``silence``: a run that gave no sign of life for so many seconds of our own clock is fenced too, though nobody
    can say that it is dead (stopped, or on another host); it will lose. ``step`` is called before each effect.
    Raises RunsOpen (nothing was swept), ObjectMissing or ObjectDamaged (neither; check says what is affected).
    """
    if dry_run:
        plan = _Collection(repository, alive, clock, step).plan()
        return CollectOutcome(
            swept=len(plan.sweep) + len(plan.repack), repacked=len(plan.repack), freed_bytes=max(0, plan.freed_bytes)
        )
    step("open")
    run = repository.open_run("collect", None)
    try:
        return _Collection(repository, alive, clock, step, run).work(patience, silence)
    finally:
        repository.close_run(run)


class _Collection:
    """One collect at work."""

    def __init__(
        self,
        repository: Repository,
        alive: Alive,
        clock: Clock,
        step: Callable[[str], None],
        run: RunRecord | None = None,
    ) -> None:
        self._repository, self._alive, self._clock, self._step = repository, alive, clock, step
        self._run = run
        self._fenced: list[PointId] = []
        self._damaged: list[str] = []
        self._planned_roots: tuple[MapRoot, ...] = ()

    def work(self, patience: float, silence: float | None) -> CollectOutcome:
        self._be_alone()
        stale = self._repository.objects.names("condemned")  # of collects that did not end: nobody else is at work
        plan = self.plan()
        name = self._condemn(plan)
        try:
            if name is not None:
                self._wait(patience, silence)
            index, old_segments, marks = self._mark_again(plan)
            doomed, moving = _settle(plan, index, marks)
            moved, unreadable = self._repack(index, marks, moving)
        except BaseException:
            if name is not None:
                self._repository.medium.delete(name)  # nothing has gone yet
            raise
        doomed = tuple(pack for pack in doomed if pack.id not in unreadable)
        self._rewrite(index, doomed, moved, old_segments)
        for pack in doomed:
            self._step("sweep")
            self._repository.medium.delete(pack.name)
        self._tidy([*stale, *([name] if name is not None else [])])
        return CollectOutcome(
            swept=len(doomed),
            repacked=len(moving) - len(unreadable),
            freed_bytes=sum(pack.size for pack in doomed) - sum(directory.pack.size for directory in moved),
            fenced=tuple(self._fenced),
            kept_damaged=tuple(self._damaged),
        )

    # --- plan, condemn, wait ----------------------------------------------------------------------

    def plan(self) -> CollectPlan:
        """Mark and plan. No effect."""
        packs = list_packs(self._repository.medium)  # before any listing of runs: see above
        self._planned_roots = tuple(self._roots())
        index = self._repository.load_index(rebuild=True)  # after the points: what they refer to was listed before
        marks = self._mark(index, self._planned_roots, self._absent(index), frozenset())
        return plan_collect(packs, marks.live_bytes())

    def _be_alone(self) -> None:
        """Fence the dead. Raises RunsOpen when another collect is at work, or may be."""
        for run in self._repository.open_runs():
            if run == self._run:
                continue
            if self._alive(run.owner) is False:
                self._fence(run)
            elif run.kind == "collect":
                raise RunsOpen(count=1, owners=f"{run.owner}, another collect")

    def _condemn(self, plan: CollectPlan) -> str | None:
        packs = tuple(pack.name for pack in (*plan.sweep, *plan.repack))
        if not packs or self._run is None:
            return None
        self._step("condemn")
        name = f"condemned/{self._run.id}"
        self._repository.objects.put(ObjectKind.CONDEMNED, name, Condemned(collect=self._run.id, packs=packs))
        return name

    def _wait(self, patience: float, silence: float | None) -> None:
        """Until no run is open that was open when the packs were condemned. Raises RunsOpen."""
        waited = {run.id for run in self._storing_runs()}
        started = self._clock.monotonic()
        heard = {id: (started, self._repository.heartbeat(id)) for id in waited}
        while waiting := [run for run in self._storing_runs() if run.id in waited]:
            now = self._clock.monotonic()
            for run in waiting:
                since, beat = heard[run.id]
                if self._repository.heartbeat(run.id) != beat:
                    heard[run.id] = (now, self._repository.heartbeat(run.id))
                elif silence is not None and now - since >= silence:
                    self._fence(run)
            waiting = [run for run in waiting if run.id not in self._fenced]
            if waiting and now - started >= patience:
                raise RunsOpen(count=len(waiting), owners=", ".join(sorted({str(run.owner) for run in waiting})))
            if waiting:
                self._step("wait")
                self._clock.sleep(_PAUSE)

    def _storing_runs(self) -> list[RunRecord]:
        """Open runs that may store or reuse something; those of provably dead owners are fenced."""
        runs = [run for run in self._repository.open_runs() if run.kind not in _NEVER_STORING]
        for run in runs:
            if self._alive(run.owner) is False:
                self._fence(run)
        return [run for run in runs if run.id not in self._fenced]

    def _fence(self, run: RunRecord) -> None:
        self._step("fence")
        self._repository.fence(run.id)
        self._fenced.append(run.id)

    # --- mark -------------------------------------------------------------------------------------

    def _roots(self) -> Iterable[MapRoot]:
        """Maps of all restore points. Raises RunsOpen or ObjectDamaged when one of them cannot be told."""
        points = {point.id: point for point in self._all_points()}
        for run in self._repository.open_runs():  # after the points: a pin is put before its point is read
            lost = [pin for pin in run.pins if pin not in points]
            if lost and self._alive(run.owner) is not False:
                # being deleted at this moment, and coming back because it is pinned
                raise RunsOpen(count=1, owners=f"{run.owner}, which holds restore point {lost[0]}")
        return [disk.root for point in points.values() for disk in point.disks]

    def _all_points(self) -> tuple[RestorePoint, ...]:
        for _, error in self._repository.unreadable_points():
            raise error  # nobody can say what it needs
        return self._repository.points()

    def _absent(self, index: Index) -> frozenset[str]:
        """Packs of ``index`` that are not there, or not of their size; what is listed now was there before."""
        there = set(list_packs(self._repository.medium))
        return frozenset(pack.name for pack in index.packs if pack not in there)

    def _mark(self, index: Index, roots: Iterable[MapRoot], absent: frozenset[str], avoid: frozenset[str]) -> Marks:
        """What ``roots`` and undos need. Raises ObjectMissing when a restore point needs what is not there."""
        marks = Marks(index, absent, avoid)
        self._repository.map.reachable(roots, marks.mark)
        marks.refuse_missing()
        self._repository.map.reachable(self._repository.undo_roots(), marks.mark)  # of a fenced run: as far as it is
        return marks

    def _mark_again(self, plan: CollectPlan) -> tuple[Index, tuple[str, ...], Marks]:
        """The index, its segments, and what is live now. What was live when planned still counts."""
        self._step("mark")
        roots = (*self._roots(), *self._planned_roots)
        old_segments = segments.list_segments(self._repository.medium)
        index = self._repository.load_index(rebuild=True)  # after the points, and after the listing of what will go
        condemned = frozenset(pack.name for pack in (*plan.sweep, *plan.repack))
        return index, old_segments, self._mark(index, roots, self._absent(index), condemned)

    # --- repack, rewrite, tidy --------------------------------------------------------------------

    def _repack(
        self, index: Index, marks: Marks, moving: Sequence[PackRef]
    ) -> tuple[list[PackDirectory], frozenset[str]]:
        """Store the live pieces of ``moving`` anew: new packs, and those of ``moving`` that cannot be read."""
        repository, moved = self._repository, list[PackDirectory]()
        unreadable = set[str]()
        for kind in PieceKind:
            writer = PackWriter(kind, repository.codec, repository.medium, repository.chance, on_put=moved.append)
            for pack in (pack for pack in moving if pack.kind is kind):
                self._step("repack")
                try:
                    self._move(index.rows(), marks.mask, pack, writer)
                except (ObjectDamaged, ObjectMissing):
                    unreadable.add(pack.id)
                    self._damaged.append(pack.name)
            writer.flush()
        return moved, frozenset(unreadable)

    def _move(self, rows: Rows, live: Mask, pack: PackRef, writer: PackWriter) -> None:
        here = np.flatnonzero(live & (rows.pack == rows.packs.index(pack)))
        for start in range(0, len(here), _REPACK_BATCH):
            batch = here[start : start + _REPACK_BATCH]
            offsets, lengths = rows.offset[batch].astype(np.int64), rows.length[batch].astype(np.int64)
            contents, _ = self._repository.reader.fetch(pack, rows.ids[batch], offsets, lengths)
            for piece, content in zip(rows.ids[batch], contents, strict=True):
                writer.add(PieceId(piece.tobytes()), content)

    def _rewrite(
        self, index: Index, doomed: Sequence[PackRef], moved: Sequence[PackDirectory], old_segments: Sequence[str]
    ) -> None:
        """New segments without ``doomed`` and without packs that are not there; then the old ones go."""
        repository, rows = self._repository, index.rows()
        there = set(list_packs(repository.medium)) - set(doomed)
        stays = np.array([pack in there for pack in rows.packs], np.bool_)
        if bool(stays.all()) and not moved and len(old_segments) <= 1:
            return
        kept = merge_rows([keep_rows(rows, stays[rows.pack]), *(rows_of(directory) for directory in moved)])
        owner = new_id(repository.chance)  # no run: nobody can fence it
        for number, start in enumerate(range(0, len(kept), segments.SEGMENT_ROWS)):
            part = np.zeros(len(kept), np.bool_)
            part[start : start + segments.SEGMENT_ROWS] = True
            self._step("index")
            name = segments.segment_name(owner, number)
            segments.put_segment(repository.medium, repository.codec, repository.chance, name, keep_rows(kept, part))
        for name in old_segments:
            self._step("unindex")
            repository.medium.delete(name)

    def _tidy(self, condemnations: Iterable[str]) -> None:
        """Remove what nobody needs any more: condemnations, tombstones of the dead, traces of ended runs."""
        repository = self._repository
        for name in condemnations:
            self._step("pardon")
            repository.medium.delete(name)
        repository.history.forget_orphans()
        repository.forget_ended_runs()  # while the tombstones are there: without one, a record means an open run
        dead = [stone.run for stone in repository.tombstones() if stone.owner and self._alive(stone.owner) is False]
        for name in segments.list_segments(repository.medium):  # listed when their owners were dead already
            if segments.segment_owner(name) in dead:
                repository.medium.delete(name)
        for run in dead:
            self._step("bury")
            repository.remove_tombstone(run)


def _settle(plan: CollectPlan, index: Index, marks: Marks) -> tuple[tuple[PackRef, ...], tuple[PackRef, ...]]:
    """Packs that go, and those of them that hold something live that must be moved first."""
    live = marks.live_bytes()
    known = set(index.packs)
    dead = tuple(pack for pack in (*plan.sweep, *plan.repack) if not live.get(pack.id))
    moving = tuple(pack for pack in plan.repack if live.get(pack.id) and pack in known)
    return (*dead, *moving), moving
