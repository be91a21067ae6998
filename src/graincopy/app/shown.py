"""Restore points and plans as lines for people, where several operations show the same."""

from __future__ import annotations

import datetime

import msgspec

from graincopy.app.answer import Answer, table
from graincopy.core.errors import printable
from graincopy.core.units import format_duration, format_size
from graincopy.model.plan import BackupPlan, ExpirePlan, RestorePlan
from graincopy.model.restore_point import DiskRecord, RestorePoint, Trial


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


def disk_table(point: RestorePoint) -> tuple[str, ...]:
    """The disks of a restore point as a table."""
    return table(
        ("DISK", "SIZE", "DIRTY", "READ", "AUDIT", "STORED", "CHANGE MAP"), [disk_line(disk) for disk in point.disks]
    )


def plan_answer(plan: BackupPlan | RestorePlan | ExpirePlan) -> Answer:
    """A plan that is printed and not carried out."""
    return Answer({"plan": msgspec.to_builtins(plan)}, plan.lines())


def point_document(point: RestorePoint) -> dict[str, object]:
    """One restore point for machines."""
    return {
        "restore_point": point.id,
        "workload": point.workload,
        "workload_name": point.workload_name,
        "time": point.time,
        "sequence": point.sequence,
        "base": point.base,
        "consistency": point.consistency,
        "instant": point.instant,
        "incomplete": point.incomplete,
        "freeze_ms": point.freeze_ms,
        "duration_s": point.duration_s,
        "hostname": point.hostname,
        "disks": [disk_document(disk) for disk in point.disks],
        "missing": point.missing,
        "warnings": list(point.warnings),
        "notes": list(point.notes),
    }


def disk_document(disk: DiskRecord) -> dict[str, object]:
    """One disk of a restore point for machines."""
    return {
        "name": disk.name,
        "path": disk.path,
        "volume": disk.volume,
        "driver": disk.driver,
        "representation": disk.representation,
        "format": disk.format,
        "size": disk.size,
        "allocated": disk.allocated,
        "change_map": disk.change_map,
        "checkpoint": disk.checkpoint,
        "dirty_bytes": disk.dirty_bytes,
        "read_bytes": disk.read_bytes,
        "audit_bytes": disk.audit_bytes,
        "audit_mismatches": disk.audit.mismatches,
        "audit_bound": disk.audit.wrong_at_most,
        "stored_bytes": disk.stored_bytes,
    }


def trial_line(trial: Trial) -> str:
    """One trial on one line."""
    found = f"gave its sign of life ({printable(trial.sign)})" if trial.alive else f"FAILED: {printable(trial.reason)}"
    picture = ", with a picture" if trial.picture else ""
    return f"trial of {when(trial.time)}: {found} after {format_duration(trial.duration_s)}{picture}"


def trial_document(trial: Trial) -> dict[str, object]:
    """One trial for machines, without its picture."""
    return {
        "trial": trial.id,
        "machine": trial.machine,
        "time": trial.time,
        "duration_s": trial.duration_s,
        "sign": trial.sign,
        "alive": trial.alive,
        "reason": trial.reason or None,
        "console": trial.console,
        "picture_bytes": len(trial.picture),
        "hostname": trial.hostname,
    }
