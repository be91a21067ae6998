"""Operations that only read the repository."""

from __future__ import annotations

from typing import Any

import msgspec

from graincopy.app.answer import Answer, table
from graincopy.app.shown import disk_table, point_document, point_line, trial_document, trial_line, when
from graincopy.app.wiring import Wiring
from graincopy.core.errors import printable
from graincopy.core.ids import WorkloadId
from graincopy.core.units import format_size
from graincopy.repository.repository import Repository
from graincopy.workflow.expire import diff as diff_points

Values = dict[str, Any]


def points(wiring: Wiring, values: Values) -> Answer:
    """All restore points, newest first."""
    repository = wiring.repository()
    wanted = workload_named(repository, values["workload"])
    found = [point for point in repository.points() if wanted in (None, point.workload)]
    rows = [
        (
            point.id[:12],
            when(point.time),
            printable(point.workload_name),
            str(len(point.disks)),
            point.consistency + (" INCOMPLETE" if point.incomplete else ""),
            format_size(sum(disk.size for disk in point.disks)),
        )
        for point in found
    ]
    head = ("POINT", "TIME", "WORKLOAD", "DISKS", "CONSISTENCY", "SIZE")
    return Answer([point_document(point) for point in found], table(head, rows))


def workload_named(repository: Repository, text: str | None) -> WorkloadId | None:
    """The workload with this name or id; the text itself when there is none, so that nothing matches."""
    if text is None:
        return None
    for point in repository.points():
        if text in (point.workload_name, point.workload):
            return point.workload
    return WorkloadId(text)


def show(wiring: Wiring, values: Values) -> Answer:
    """One restore point, whole."""
    repository = wiring.repository()
    point = repository.find_point(values["point"])
    trials = repository.history.of(point.id)
    freeze = "nothing was frozen" if point.freeze_ms is None else f"writers held {point.freeze_ms:.0f} ms"
    lines = (
        f"restore point {point.id}",
        f"  workload {printable(point.workload_name)} ({point.workload}), {when(point.time)} on {point.hostname}",
        f"  consistency {point.consistency}, instant: {point.instant}; {freeze}",
        f"  base {point.base or 'none'}",
        *disk_table(point),
        *(f"  {printable(disk.name)}: {printable(disk.path)} on {printable(disk.volume)}" for disk in point.disks),
        *(f"warning: {printable(warning)}" for warning in point.warnings),
        *(trial_line(trial) for trial in trials),
    )
    return Answer(point_document(point) | {"trials": [trial_document(trial) for trial in trials]}, lines)


def diff(wiring: Wiring, values: Values) -> Answer:
    """Where two restore points differ."""
    repository = wiring.repository()
    context = wiring.context(repository)
    first, second = repository.find_point(values["first"]), repository.find_point(values["second"])
    found = diff_points(context, first, second)
    document = {
        "first": first.id,
        "second": second.id,
        "grain_size": repository.grain_size,
        "disks": [msgspec.to_builtins(disk) for disk in found],
    }
    rows = [
        (
            printable(disk.name),
            format_size(disk.differing_bytes),
            str(len(disk.extents)),
            f"only in the {disk.only_in}" if disk.only_in else "",
        )
        for disk in found
    ]
    lines = (
        f"{point_line(first)}  →  {point_line(second)}",
        *table(("DISK", "DIFFERING", "EXTENTS", ""), rows),
    )
    return Answer(document, lines)
