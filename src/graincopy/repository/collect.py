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

from collections.abc import Callable, Iterable

from graincopy.core.clock import Clock
from graincopy.core.errors import RunsOpen
from graincopy.core.ids import PointId
from graincopy.model.restore_point import MapRoot, RestorePoint, RunRecord
from graincopy.repository import segments
from graincopy.repository.collect_plan import CollectOutcome, CollectPlan, plan_collect, settle
from graincopy.repository.index import Index
from graincopy.repository.mark import Marks
from graincopy.repository.pack import list_packs
from graincopy.repository.records import Condemned, ObjectKind
from graincopy.repository.repack import repack, rewrite_index
from graincopy.repository.repository import Repository
from graincopy.repository.runs import Alive

_NEVER_STORING = ("collect", "view")  # kinds of run that reuse nothing: their pins protect what they read
_PAUSE = 1.0  # seconds between two looks at the runs that are waited for


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
            doomed, moving = settle(plan, index, marks)
            moved, unreadable = repack(self._repository, index, marks.mask, moving, self._step)
        except BaseException:
            if name is not None:
                self._repository.medium.delete(name)  # nothing has gone yet
            raise
        doomed = tuple(pack for pack in doomed if pack not in unreadable)
        rewrite_index(self._repository, index, doomed, moved, old_segments, self._step)
        for pack in doomed:
            self._step("sweep")
            self._repository.medium.delete(pack.name)
        self._tidy([*stale, *([name] if name is not None else [])])
        return CollectOutcome(
            swept=len(doomed),
            repacked=len(moving) - len(unreadable),
            freed_bytes=sum(pack.size for pack in doomed) - sum(directory.pack.size for directory in moved),
            fenced=tuple(self._fenced),
            kept_damaged=tuple(pack.name for pack in unreadable),
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

    # --- tidy -------------------------------------------------------------------------------------

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
