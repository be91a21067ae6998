"""Restore points, and the tombstones that lie where a fenced run's point would be.

Both live at ``points/<run id>``: a run publishes by creating that name exclusively, and is fenced by somebody else
creating it first.
"""

from __future__ import annotations

import threading

import msgspec

from graincopy.core.errors import ObjectDamaged, ObjectMissing, PointAmbiguous, PointUnknown
from graincopy.core.ids import PointId, WorkloadId
from graincopy.model.restore_point import RestorePoint, order_key
from graincopy.model.snapshot import Deleted
from graincopy.repository.objects import Objects
from graincopy.repository.records import ObjectKind, Tombstone


class Unreadable(msgspec.Struct, frozen=True):
    """A restore point (or tombstone) that is there and cannot be read."""

    id: PointId
    error: ObjectDamaged


class PointListing(msgspec.Struct, frozen=True):
    """Everything under ``points/``."""

    points: tuple[RestorePoint, ...]  # newest first
    tombstones: tuple[Tombstone, ...]
    unreadable: tuple[Unreadable, ...]


def point_name(point: str) -> str:
    """Object name of a restore point, and of the tombstone in its place."""
    return f"points/{point}"


class Points:
    """Reads and removes restore points. Points never change, so that each is read once."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._seen: dict[PointId, RestorePoint] = {}
        self._lock = threading.Lock()

    def listing(self, fresh: bool = False, beginning: str = "") -> PointListing:
        """All that is there now; ``beginning``: only ids that begin so, and nothing else is read."""
        points: list[RestorePoint] = []
        tombstones: list[Tombstone] = []
        unreadable: list[Unreadable] = []
        for name in self._objects.names("points"):
            id = PointId(name.removeprefix("points/"))
            if not id.startswith(beginning):
                continue
            try:
                found = self.read(id, fresh=fresh)
            except ObjectMissing:
                continue
            except ObjectDamaged as error:
                unreadable.append(Unreadable(id, error))
                continue
            if isinstance(found, Tombstone):
                tombstones.append(found)
            else:
                points.append(found)
        points.sort(key=order_key, reverse=True)
        return PointListing(tuple(points), tuple(tombstones), tuple(unreadable))

    def read(self, id: PointId, *, fresh: bool = False) -> RestorePoint | Tombstone:
        """What lies at ``points/<id>``. Raises ObjectMissing or ObjectDamaged."""
        with self._lock:
            if id in self._seen and not fresh:
                return self._seen[id]
        name = point_name(id)
        sealed = self._objects.medium.get(name)
        if self._objects.kind_of(name, sealed) is ObjectKind.TOMBSTONE:
            return self._objects.unseal(ObjectKind.TOMBSTONE, name, sealed, Tombstone)
        point = self._objects.unseal(ObjectKind.POINT, name, sealed, RestorePoint)
        if point.id != id:
            raise ObjectDamaged(name=name, reason="it is another restore point")
        with self._lock:
            self._seen[id] = point
        return point

    def point(self, id: PointId) -> RestorePoint:
        """The restore point ``id``. Raises PointUnknown or ObjectDamaged."""
        try:
            found = self.read(id)
        except ObjectMissing:
            raise PointUnknown(point=id) from None
        if isinstance(found, Tombstone):
            raise PointUnknown(point=id)
        return found

    def exists(self, id: PointId) -> bool:
        """Whether a restore point or a tombstone is there."""
        return self._objects.medium.size(point_name(id)) is not None

    def fenced(self, id: str) -> bool:
        """Whether a tombstone lies there. What cannot be read counts as one: its run may have been fenced."""
        try:
            return isinstance(self.read(PointId(id)), Tombstone)
        except ObjectMissing:
            return False
        except ObjectDamaged:
            return True

    def remove(self, id: PointId) -> bool:
        """Delete it; whether it was there."""
        with self._lock:
            self._seen.pop(id, None)
        return isinstance(self._objects.medium.delete(point_name(id)), Deleted)

    def find(self, text: str, workload: WorkloadId | None = None) -> RestorePoint:
        """By id, unique prefix, ``latest`` or ``latest~N``. Raises PointUnknown, PointAmbiguous, ObjectDamaged."""
        back = _steps_back(text)
        listing = self.listing(beginning="" if back is not None else text)
        points = [point for point in listing.points if workload in (None, point.workload)]
        if back is not None:
            if back >= len(points):
                raise PointUnknown(point=text)
            return points[back]
        if not text or (not points and not listing.unreadable):
            raise PointUnknown(point=text)
        if len(points) + len(listing.unreadable) > 1:
            raise PointAmbiguous(point=text, count=len(points) + len(listing.unreadable))
        if not points:
            raise listing.unreadable[0].error
        return points[0]


def _steps_back(text: str) -> int | None:
    """0 for ``latest``, N for ``latest~N``, None for anything else."""
    head, mark, steps = text.partition("~")
    if head != "latest" or (mark and not steps.isdecimal()):
        return None
    return int(steps) if mark else 0
