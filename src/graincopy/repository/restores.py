"""Restore records: what another host would need to finish an in-place restore, or to take it back.

    restores/<id>/opened     the record; durable before the first byte is written on S
    restores/<id>/done       every byte of the restore is written
    restores/<id>/undoing    an undo has begun
    restores/<id>/undone     the undo is complete, or nothing was written: the record binds nobody any more
    restores/<id>/resumed    a later run finishes it, and writes more grains than the record names

Each is put once; the last one that is there is the state ("resumed" is none, it lies beside). An open or undoing
restore pins its restore point, and every record that is not undone pins the grains that its undo needs.
"""

from __future__ import annotations

from graincopy.core.clock import Clock
from graincopy.core.errors import ObjectMissing, RestoreUnknown, RunFenced
from graincopy.core.ids import PointId
from graincopy.model.restore_point import MapRoot, RestoreRecord, RestoreState
from graincopy.repository.objects import Objects
from graincopy.repository.points import Points
from graincopy.repository.records import Beat, ObjectKind

STATES = ("opened", "done", "undoing", "undone")
RESUMED = "resumed"


class Restores:
    """The restore records of one repository."""

    def __init__(self, objects: Objects, points: Points, clock: Clock) -> None:
        self._objects, self._points, self._clock = objects, points, clock

    def open(self, record: RestoreRecord) -> None:
        """Put ``record``, durably; only then may S be written. ``record.id`` is the id of the run. May be repeated.

        Raises RunFenced when the run was fenced meanwhile: chunks that its undo reuses may have been swept.
        """
        self._objects.put(ObjectKind.RESTORE, _name(record.id, "opened"), record)
        if self._points.fenced(record.id):
            self.advance(record.id, "undone")
            raise RunFenced(run=record.id)

    def advance(self, restore: PointId, state: str) -> None:
        """Record that ``restore`` came as far as ``state``, or that it is "resumed". May be repeated.

        Raises ValueError for another word.
        """
        if state not in (*STATES[1:], RESUMED):
            raise ValueError(f"{state!r} is no state of a restore")
        self._objects.put(ObjectKind.RESTORE, _name(restore, state), Beat(time=self._clock.now()))

    def states(self) -> tuple[RestoreState, ...]:
        """All records and how far they came, oldest first. Raises ObjectDamaged."""
        reached: dict[str, set[str]] = {}
        for name in self._objects.names("restores"):
            _, restore, state = name.split("/")
            reached.setdefault(restore, set()).add(state)
        found = []
        for restore, states in reached.items():
            try:
                record = self._objects.get(ObjectKind.RESTORE, _name(restore, "opened"), RestoreRecord)
            except ObjectMissing:
                continue  # forgotten at this moment, or in part before a crash
            last = next(state for state in reversed(STATES) if state in states or state == "opened")
            state = "open" if last == "opened" else last
            found.append(RestoreState(record=record, state=state, resumed=RESUMED in states))
        return tuple(sorted(found, key=lambda state: (state.record.opened, state.record.id)))

    def find(self, restore: str) -> RestoreState:
        """Raises RestoreUnknown."""
        for state in self.states():
            if state.record.id == restore:
                return state
        raise RestoreUnknown(restore=restore, reason="no such record")

    def forget(self, restore: PointId) -> None:
        """Remove the record; its undo is not possible any more. May be repeated."""
        self._objects.medium.delete(_name(restore, "opened"))  # first: without it the others say nothing
        for state in (*STATES[1:], RESUMED):
            self._objects.medium.delete(_name(restore, state))

    def pins(self) -> dict[PointId, str]:
        """Restore points that an unfinished restore needs, and which."""
        states = (state for state in self.states() if state.state in ("open", "undoing"))
        return {state.record.point: f"restore {state.record.id}" for state in states}

    def undo_roots(self) -> tuple[MapRoot, ...]:
        """Maps of grains that an undo would bring back."""
        disks = (disk for state in self.states() if state.state != "undone" for disk in state.record.disks)
        return tuple(disk.undo_root for disk in disks if disk.undo_root is not None)


def _name(restore: str, state: str) -> str:
    return f"restores/{restore}/{state}"
