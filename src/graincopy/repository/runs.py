"""Runs: who is at work in the repository, and how one is stopped for good without its help (fencing).

    open_run    puts runs/<id>                       from now on every collect sees it, and waits for it
    session     lists condemned packs, loads the index      in this order, and after the run's record is durable
    publish     creates points/<id> exclusively      the run's last word; lost when a tombstone is there: RunFenced
    fence       creates a tombstone at points/<id>   the run can never publish

Why the order matters: collect condemns packs and *then* lists the runs; a run puts its record and *then* lists what
is condemned. So at least one of them sees the other: either the run does not reuse a condemned pack, or collect
waits for it. The index comes last, because one that was loaded before may list packs that were swept meanwhile.
Clocks decide nothing; they only say how long somebody is patient. docs/locking.md has the whole table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError, ObjectDamaged, ObjectMissing, PointUnknown, RunFenced, RunsOpen
from graincopy.core.ids import PointId, WorkloadId, new_id
from graincopy.model.restore_point import RestorePoint, RunRecord
from graincopy.model.snapshot import Existing, Owner
from graincopy.repository.objects import Objects
from graincopy.repository.points import Points, point_name
from graincopy.repository.records import Beat, ObjectKind, Tombstone

Alive = Callable[[Owner], bool | None]  # None: on another host, nobody here can know

_UNKNOWN = Owner(host="", boot="", pid=0, started=0, hostname="an unknown host: its record is damaged")


def run_name(run: str) -> str:
    """Object name of a run's record."""
    return f"runs/{run}"


class Runs:
    """The runs of one repository."""

    def __init__(self, objects: Objects, points: Points, clock: Clock, owner: Owner) -> None:
        self._objects, self._points, self._clock, self._owner = objects, points, clock, owner
        self._beats: dict[PointId, int] = {}

    def open_run(self, kind: str, workload: WorkloadId | None, pins: Sequence[PointId] = ()) -> RunRecord:
        """Announce a run; its id is the name that its restore point will have. Durable on return.

        ``pins`` are restore points that must stay while it is open; read them only after this. Raises
        PointUnknown when one of them is gone, RunsOpen when the medium admits one writer and there is one.
        """
        id = PointId(new_id(self._objects.chance))
        run = RunRecord(
            id=id, kind=kind, workload=workload, owner=self._owner, opened=self._clock.now(), pins=tuple(pins)
        )
        self._objects.put(ObjectKind.RUN, run_name(id), run)
        try:
            self._refuse(run)
        except GraincopyError:
            self.close_run(run)
            raise
        return run

    def _refuse(self, run: RunRecord) -> None:
        """Raises what :meth:`open_run` raises; to be asked when the record of ``run`` is durable."""
        for pin in run.pins:
            if not self._points.exists(pin):
                raise PointUnknown(point=pin)
        if not self._objects.medium.capabilities().exclusive_create:
            others = [other for other in self.open_runs() if other.id != run.id]
            if others:
                raise RunsOpen(count=len(others), owners=", ".join(str(other.owner) for other in others))

    def open_runs(self) -> tuple[RunRecord, ...]:
        """Runs that are neither published, fenced nor closed, by id.

        One whose record is damaged is of kind "damaged" and of an owner that nobody knows: collect waits for it.
        """
        found = []
        for name in self._objects.names("runs"):
            try:
                run = self._objects.get(ObjectKind.RUN, name, RunRecord)
            except ObjectMissing:
                continue  # it ended at this moment
            except ObjectDamaged:
                id = PointId(name.removeprefix("runs/"))
                run = RunRecord(id=id, kind="damaged", workload=None, owner=_UNKNOWN, opened=0.0)
            found.append(run)
        return tuple(run for run in found if not self._points.exists(run.id))

    def beat(self, run: RunRecord) -> None:
        """A sign of life: a new numbered object, then the one before goes."""
        last = self._beats.get(run.id)
        number = 1 + (self.heartbeat(run.id) if last is None else last)
        self._objects.put(ObjectKind.BEAT, _beat_name(run.id, number), Beat(time=self._clock.now()))
        self._beats[run.id] = number
        self._objects.medium.delete(_beat_name(run.id, number - 1))

    def heartbeat(self, run: PointId) -> int:
        """Number of the run's latest sign of life; 0 when there is none."""
        return max((int(name.rsplit("-", 1)[1]) for name in self._beat_names(run)), default=0)

    def publish(self, point: RestorePoint) -> int:
        """Make ``point`` a restore point, durably, and close its run; the bytes that it takes. May be repeated.

        The session must be finished: everything that the point refers to is durable before it is. Raises
        RunFenced.
        """
        name = point_name(point.id)
        sealed = self._objects.seal(ObjectKind.POINT, name, point)
        if isinstance(self._objects.medium.put(name, [sealed]), Existing) and not self._is_published(point):
            raise RunFenced(run=point.id)
        self._forget(point.id)
        return len(sealed)

    def close_run(self, run: RunRecord) -> None:
        """End a run without publishing. May be repeated."""
        self._forget(run.id)

    def fence(self, run: PointId) -> bool:
        """Stop ``run`` for good. False when it had published before."""
        try:
            owner = self._objects.get(ObjectKind.RUN, run_name(run), RunRecord).owner
        except (ObjectMissing, ObjectDamaged):
            owner = None
        tombstone = Tombstone(run=run, owner=owner, fenced=self._clock.now())
        lost = isinstance(self._objects.put(ObjectKind.TOMBSTONE, point_name(run), tombstone), Existing)
        fenced = not lost or self._points.fenced(run)
        self._forget(run)
        return fenced

    def is_fenced(self, run: PointId) -> bool:
        """Whether a tombstone lies where the run's restore point would."""
        return self._points.fenced(run)

    def sequence(self) -> int:
        """One more than that of any restore point that can be seen."""
        return 1 + max((point.sequence for point in self._points.listing().points), default=0)

    def _beat_names(self, run: PointId) -> tuple[str, ...]:
        return tuple(name for name in self._objects.names("beats") if name.startswith(f"beats/{run}-"))

    def forget_ended(self) -> None:
        """Remove what runs left that were published or fenced and did not come to tidy up."""
        for name in self._objects.names("runs"):
            run = PointId(name.removeprefix("runs/"))
            if self._points.exists(run):
                self._forget(run)
        beating = {PointId(name.removeprefix("beats/").partition("-")[0]) for name in self._objects.names("beats")}
        for run in beating:
            if self._objects.medium.size(run_name(run)) is None:
                self._forget(run)

    def _is_published(self, point: RestorePoint) -> bool:
        return self._points.read(point.id, fresh=True) == point

    def _forget(self, run: PointId) -> None:
        for name in self._beat_names(run):
            self._objects.medium.delete(name)
        self._objects.medium.delete(run_name(run))
        self._beats.pop(run, None)


def _beat_name(run: PointId, number: int) -> str:
    return f"beats/{run}-{number:08d}"
