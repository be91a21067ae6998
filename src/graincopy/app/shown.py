"""Restore points and plans as lines for people, where several operations show the same."""

from __future__ import annotations

import datetime

import msgspec

from graincopy.app.answer import Answer
from graincopy.core.errors import printable
from graincopy.core.units import format_size
from graincopy.model.plan import BackupPlan, ExpirePlan, RestorePlan
from graincopy.model.restore_point import DiskRecord, RestorePoint


def when(seconds: float) -> str:
    """Wall-clock ``seconds`` in local time, to the second."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def point_line(point: RestorePoint) -> str:
    """One restore point on one line."""
    return f"{point.id[:12]} of {printable(point.workload_name)}, {when(point.time)}"


def disk_line(disk: DiskRecord) -> tuple[str, ...]:
    """One disk of a backup as a table row."""
    sizes = (disk.size, disk.dirty_bytes, disk.read_bytes, disk.audit_bytes, disk.stored_bytes)
    return (printable(disk.name), *(format_size(size) for size in sizes), disk.change_map)


def plan_answer(plan: BackupPlan | RestorePlan | ExpirePlan) -> Answer:
    """A plan that is printed and not carried out."""
    return Answer({"plan": msgspec.to_builtins(plan)}, plan.lines())
