"""Restore points that go, and those that must not: somebody has pinned them."""

from __future__ import annotations

from graincopy.core.errors import ObjectMissing, PointPinned, PointUnknown
from graincopy.core.ids import PointId
from graincopy.repository import format, frame
from graincopy.repository.history import History
from graincopy.repository.objects import Objects
from graincopy.repository.points import Points, point_name
from graincopy.repository.records import ObjectKind
from graincopy.repository.restores import Restores
from graincopy.repository.runs import Alive, Runs


class Removal:
    """What expire needs of one repository."""

    def __init__(self, objects: Objects, points: Points, runs: Runs, restores: Restores, history: History) -> None:
        self._objects, self._points, self._runs = objects, points, runs
        self._restores, self._history = restores, history

    def pins(self, alive: Alive | None = None) -> dict[PointId, str]:
        """Restore points that must stay, and who holds them. Runs whose owner is provably dead hold nothing."""
        held = self._restores.pins()
        for run in self._runs.open_runs():
            if alive is None or alive(run.owner) is not False:
                held.update((pin, f"{run.kind} run {run.id} ({run.owner})") for pin in run.pins)
        return held

    def delete_point(self, id: PointId, alive: Alive | None = None) -> None:
        """Remove a restore point; its space comes back with collect. Raises PointUnknown or PointPinned.

        A run pins first and reads the point then; so the pins are looked at once more when the point is gone, and
        if one has come the point comes back. All of it is a run, for which collect waits.
        """
        name, medium = point_name(id), self._objects.medium
        try:
            sealed = medium.get(name)
        except ObjectMissing:
            raise PointUnknown(point=id) from None
        if _is_tombstone(sealed):
            raise PointUnknown(point=id)
        run = self._runs.open_run("expire", None)
        try:
            self._refuse_pinned(id, alive)
            self._points.remove(id)
            try:
                self._refuse_pinned(id, alive)
            except PointPinned:
                if not self._points.fenced(run.id):
                    medium.put(name, [sealed])
                raise
            self._history.forget(id)
        finally:
            self._runs.close_run(run)

    def _refuse_pinned(self, id: PointId, alive: Alive | None) -> None:
        holder = self.pins(alive).get(id)
        if holder is not None:
            raise PointPinned(point=id, holder=holder)


def _is_tombstone(sealed: bytes) -> bool:
    """A damaged object is no tombstone: it may be removed as the restore point that it was."""
    try:
        return format.decode_envelope_header(sealed).kind is ObjectKind.TOMBSTONE
    except frame.Malformed:
        return False
