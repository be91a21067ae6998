"""Operations that make something: repositories, restore points, restored disks."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from graincopy.app.answer import Answer, table
from graincopy.app.host import raise_file_limit
from graincopy.app.notify import notify
from graincopy.app.shown import disk_table, plan_answer, point_document, point_line
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, WARNED, GraincopyError, PointUnknown, UsageWrong, printable
from graincopy.core.units import format_duration, format_size, parse_size
from graincopy.model.audit import AuditAmount
from graincopy.model.restore_point import RestorePoint
from graincopy.volumes.new_file import NewFiles
from graincopy.workflow.backup import BackupOutcome, BackupWish
from graincopy.workflow.backup import backup as run_backup
from graincopy.workflow.backup import plan as plan_backup
from graincopy.workflow.context import Context
from graincopy.workflow.export import restore_to
from graincopy.workflow.reap import reap
from graincopy.workflow.restore import RestoredDisk, restore_in_place
from graincopy.workflow.restore import plan as plan_restore
from graincopy.workflow.undo import find_restore
from graincopy.workflow.undo import undo as run_undo

Values = dict[str, Any]


def init(wiring: Wiring, values: Values) -> Answer:
    """Make a repository."""
    try:
        grain_size = parse_size(values["grain_size"])
    except ValueError as failure:
        raise UsageWrong(what=f"--grain-size: {failure}") from failure
    repository = wiring.create_repository(grain_size, not values["no_encryption"])
    document = {
        "repository": repository.id,
        "url": wiring.repo_url(),
        "grain_size": repository.grain_size,
        "fan_out": repository.fan_out,
        "encrypted": not values["no_encryption"],
    }
    kind = "without encryption" if values["no_encryption"] else "encrypted"
    line = f"made repository {repository.id[:8]} at {wiring.repo_url()}: {format_size(grain_size)} grains, {kind}"
    return Answer(document, (line,))


def backup(wiring: Wiring, values: Values) -> Answer:
    """Take a restore point, and tell the people who want to know."""
    _check_audit(values["audit"])
    urls = wiring.config.notify
    try:
        answer = _backup(wiring, values)
    except GraincopyError as failure:
        if "failure" in urls.on and not values["dry_run"]:
            notify(urls.urls, "graincopy: backup failed", f"{failure}. {failure.next_move}")
        raise
    kind = "warning" if answer.exit_code == WARNED else "success"
    if values["dry_run"] or kind not in urls.on or not urls.urls:
        return answer
    body = "\n".join((*answer.lines, *answer.warnings))
    undelivered = notify(urls.urls, f"graincopy: backup done{' with warnings' if answer.warnings else ''}", body)
    return _with_warnings(answer, undelivered)


def _backup(wiring: Wiring, values: Values) -> Answer:
    raise_file_limit()
    source = wiring.source(values["exclude"] or ())
    workload = source.describe(values["workload"], values["name"])
    repository = wiring.repository()
    context = wiring.context(repository)
    if values["dry_run"]:
        return plan_answer(plan_backup(context, workload))
    reap(context)
    wish = BackupWish(
        audit=values["audit"],
        keep_checkpoint=not values["no_checkpoint"],
        allow_partial=values["allow_partial"],
    )
    return _backup_answer(context, run_backup(context, source, workload, wish))


def _check_audit(text: str | None) -> None:
    try:
        AuditAmount.parse(text or "0")
    except ValueError as failure:
        raise UsageWrong(what=f"--audit: {failure}") from failure


def _backup_answer(context: Context, outcome: BackupOutcome) -> Answer:
    point = outcome.point
    document = point_document(point) | {
        "metadata_bytes": outcome.metadata_bytes,
        "targets_left": [
            {"id": target.id, "role": target.tag.role, "volume": target.volume, "allocated": target.allocated}
            for target in outcome.targets_left
        ],
        "warnings": list(outcome.warnings),
    }
    frozen = "" if point.freeze_ms is None else f", writers held {point.freeze_ms:.0f} ms"
    lines = (
        f"restore point {point.id} of {point.workload_name} in {format_duration(point.duration_s)}{frozen}",
        *disk_table(point),
        *(f"note: {printable(note)}" for note in point.notes),
        *_audit_lines(point),
    )
    return Answer(document, lines, WARNED if outcome.warnings else DONE, outcome.warnings)


def _audit_lines(point: RestorePoint) -> tuple[str, ...]:
    """The bound that the audit gives, for each disk that had one; and of how many it says nothing."""
    waiting = sum(1 for disk in point.disks if disk.audit.waited)
    turns = (f"audit: {waiting} of {len(point.disks)} files were not looked at; they have their turn in later runs",)
    return (turns if waiting else ()) + tuple(
        f"audit of {disk.name}: {disk.audit.grains} grains agree; at 95 % at most {disk.audit.wrong_at_most:.2%}"
        f" of the unchanged ones can be wrong; all are covered {_each(disk.audit.full_cover_runs)}"
        for disk in point.disks
        if disk.audit.grains and disk.audit.wrong_at_most is not None and not disk.audit.mismatches
    )


def _each(runs: int | None) -> str:
    return "in each run" if runs == 1 else f"every {runs} runs"


def restore(wiring: Wiring, values: Values) -> Answer:
    """Bring disks back, in place or as new files."""
    if bool(values["in_place"]) == bool(values["to"]):
        raise UsageWrong(what="restore needs one of --in-place and --to DIR")
    raise_file_limit()
    repository = wiring.repository()
    context = wiring.context(repository)
    point = repository.find_point(values["point"])
    disks = repository.find_disks(point, values["disk"])
    if concerns_machines(point, values):
        from graincopy.app.recovering import recover

        return recover(wiring, context, point, disks, values)
    if values["dry_run"]:
        return plan_answer(plan_restore(context, point, disks, values["to"], values["compare"]))
    reap(context)
    if values["to"]:
        folder = NewFiles(values["to"])
        exported = restore_to(context, point, disks, folder, preallocate=values["preallocate"])
        return restore_answer(None, point, None, exported.disks, exported.warnings)
    outcome = restore_in_place(context, point, disks, compare=values["compare"])
    return restore_answer(outcome.restore, point, outcome.undo, outcome.disks, outcome.warnings)


def concerns_machines(point: RestorePoint, values: Values) -> bool:
    """Whether libvirt has a say: disks go back under machines, or something was asked that only it can do."""
    asked = any(values[name] for name in ("as", "vm", "onto", "instant", "stop", "force_stop", "start"))
    return asked or (bool(values["in_place"]) and _holds_machines(point))


def _holds_machines(point: RestorePoint) -> bool:
    return any(name.startswith("libvirt/") for name in point.definitions)


def restore_answer(
    restore_id: str | None,
    point: RestorePoint,
    undo_id: str | None,
    disks: tuple[RestoredDisk, ...],
    warnings: tuple[str, ...],
) -> Answer:
    """What a restore did; ``restore_id`` and ``undo_id`` are None where nothing was written in place."""
    document = {
        "restore": restore_id,
        "restore_point": point.id,
        "undo": undo_id,
        "disks": [_restored_document(disk) for disk in disks],
        "warnings": list(warnings),
    }
    rows = [
        (disk.name, disk.target, format_size(disk.differing_bytes), format_size(disk.written_bytes), disk.how)
        for disk in disks
    ]
    lines = [f"restored {point_line(point)}", *table(("DISK", "TO", "DIFFERING", "WRITTEN", "FOUND BY"), rows)]
    if undo_id:
        lines.append(f"take it back with: graincopy undo {restore_id}")
    return Answer(document, tuple(lines), WARNED if warnings else DONE, warnings)


def _restored_document(disk: RestoredDisk) -> dict[str, object]:
    return {
        "name": disk.name,
        "target": disk.target,
        "format": disk.format,
        "how": disk.how,
        "differing_bytes": disk.differing_bytes,
        "written_bytes": disk.written_bytes,
        "read_bytes": disk.read_bytes,
        "fetched_bytes": disk.fetched_bytes,
    }


def undo(wiring: Wiring, values: Values) -> Answer:
    """Take a restore back."""
    context = wiring.context(wiring.repository())
    state = find_restore(context.repository, values["restore"])
    with suppress(PointUnknown):
        if _holds_machines(context.repository.find_point(state.record.point)):
            from graincopy.app.recovering import refuse_undo

            refuse_undo(wiring, context, state)
    if values["dry_run"]:
        lines = tuple(f"would bring back {disk.path}" for disk in state.record.disks)
        return Answer({"restore": state.record.id, "paths": [disk.path for disk in state.record.disks]}, lines)
    undone = run_undo(context, state, force=values["force"])
    document = {
        "restore": state.record.id,
        "disks": [
            {"name": disk.name, "target": disk.path, "written_bytes": disk.written_bytes, "removed": disk.removed}
            for disk in undone
        ],
    }
    lines = tuple(
        f"{disk.path} is as it was before the restore" + (" (removed)" if disk.removed else "") for disk in undone
    )
    return Answer(document, lines)


def _with_warnings(answer: Answer, more: tuple[str, ...]) -> Answer:
    """Warnings about the notification: reported, but they do not change the result of the backup."""
    if not more:
        return answer
    document = answer.document
    if isinstance(document, dict):
        document = {**document, "notification_warnings": list(more)}
    return Answer(document, answer.lines, answer.exit_code, answer.warnings + more)
