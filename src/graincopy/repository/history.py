"""What happened to a restore point after it was published: trials of it.

    history/<point>/<id>     one trial, put once

A restore point never changes, so what is learnt of it later lies beside it. It goes with the point: expire removes it,
and collect removes what an expire that was cut off left.
"""

from __future__ import annotations

from graincopy.core.errors import ObjectDamaged, ObjectMissing
from graincopy.core.ids import PointId
from graincopy.model.restore_point import Trial
from graincopy.repository.objects import Objects
from graincopy.repository.records import ObjectKind

FOLDER = "history"


class History:
    """The histories of all restore points of one repository."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def put(self, trial: Trial) -> None:
        """Add ``trial``, durably. May be repeated."""
        self._objects.put(ObjectKind.TRIAL, f"{FOLDER}/{trial.point}/{trial.id}", trial)

    def of(self, point: PointId) -> tuple[Trial, ...]:
        """Trials of ``point``, oldest first. One that is damaged is left out; check reports it."""
        found = []
        for name in self._objects.names(f"{FOLDER}/{point}"):
            try:
                found.append(self._objects.get(ObjectKind.TRIAL, name, Trial))
            except (ObjectDamaged, ObjectMissing):
                continue
        return tuple(sorted(found, key=lambda trial: (trial.time, trial.id)))

    def forget(self, point: PointId) -> None:
        """Remove the history of ``point``. May be repeated."""
        for name in self._objects.names(f"{FOLDER}/{point}"):
            self._objects.medium.delete(name)

    def forget_orphans(self) -> None:
        """Remove the histories of restore points that are gone. Damaged ones are there."""
        names = self._objects.names(FOLDER)  # first: a point is there before its history
        there = {name.removeprefix("points/") for name in self._objects.names("points")}
        for name in names:
            if name.split("/")[1] not in there:
                self._objects.medium.delete(name)
