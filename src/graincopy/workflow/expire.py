"""Retention removes restore points; the space is reclaimed by collect."""

from __future__ import annotations

import msgspec

from graincopy.core.ids import DiskId, PointId, WorkloadId
from graincopy.model.plan import ExpirePlan
from graincopy.model.planner import plan_expire
from graincopy.model.restore_point import RestorePoint
from graincopy.model.retention import RetentionPolicy
from graincopy.workflow.context import Context


class DiskDifference(msgspec.Struct, frozen=True):
    """Where one disk differs between two restore points."""

    name: str
    disk: DiskId
    differing_bytes: int
    extents: tuple[tuple[int, int], ...]  # byte ranges, grain-aligned, clipped to the larger size
    only_in: str | None = None  # "first" or "second"


def plan(context: Context, policy: RetentionPolicy, workload: WorkloadId | None = None) -> ExpirePlan:
    """What :func:`expire` would remove now. No effect."""
    points = [point for point in context.repository.points() if workload in (None, point.workload)]
    return plan_expire(points, policy, context.clock.now(), pinned_points(context))


def expire(context: Context, planned: ExpirePlan) -> tuple[PointId, ...]:
    """Remove the restore points that ``planned`` removes, oldest first; those pinned since then stay."""
    removed = []
    for point in planned.removed:
        if point in pinned_points(context):
            continue
        context.step("removing")
        context.repository.delete_point(point, context.alive)
        removed.append(point)
    context.step("removed")
    return tuple(removed)


def pinned_points(context: Context) -> dict[PointId, str]:
    """Restore points that somebody uses now, and who. The dead use nothing."""
    runs = [run for run in context.repository.open_runs() if context.alive(run.owner) is not False]
    pinned = {pin: f"{run.kind} {run.id}" for run in runs for pin in run.pins}
    for state in context.repository.restores():
        if state.state in ("open", "undoing") or (state.state == "done" and context.clock.now() < state.record.expires):
            pinned[state.record.point] = f"restore {state.record.id}, which can be undone"
    return pinned


def diff(context: Context, first: RestorePoint, second: RestorePoint) -> tuple[DiskDifference, ...]:
    """Where the disks of two restore points differ, in O(differences)."""
    before = {disk.id: disk for disk in first.disks}
    after = {disk.id: disk for disk in second.disks}
    found = []
    for disk in [*after.values(), *(one for one in before.values() if one.id not in after)]:
        one, other = before.get(disk.id), after.get(disk.id)
        if one is None or other is None:
            only = "second" if one is None else "first"
            found.append(DiskDifference(disk.name, disk.id, disk.size, ((0, disk.size),), only))
            continue
        grains = context.repository.map.diff(one.root, other.root)
        extents = grains.to_bytes(context.repository.grain_size).clip(0, max(one.size, other.size))
        found.append(DiskDifference(disk.name, disk.id, extents.total, tuple(extents)))
    return tuple(found)
