"""Operations that keep the repository in order: retention, space, proof."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from graincopy.app import host
from graincopy.app.answer import Answer
from graincopy.app.reading import workload_named
from graincopy.app.shown import plan_answer
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, WARNED, CheckFailed, MediumFull, MediumReadOnly, UsageWrong, printable
from graincopy.core.units import format_size
from graincopy.model.retention import RetentionPolicy
from graincopy.repository.check import Finding
from graincopy.repository.check import check as run_check
from graincopy.repository.collect import collect as run_collect
from graincopy.repository.records import PieceKind
from graincopy.repository.repository import Repository
from graincopy.transfer.progress import Meter
from graincopy.workflow.expire import expire as run_expire
from graincopy.workflow.expire import plan as plan_expire
from graincopy.workflow.reap import reap

Values = dict[str, Any]
SPANS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def expire(wiring: Wiring, values: Values) -> Answer:
    """Remove restore points by retention rules."""
    if values["point"]:
        return _remove_one(wiring, values)
    counts = {f"keep_{span}": values[f"keep_{span}"] or 0 for span in SPANS}
    if not any(counts.values()):
        raise UsageWrong(what="expire needs at least one rule, such as --keep-last 7")
    try:
        policy = RetentionPolicy(**counts)
    except ValueError as failure:
        raise UsageWrong(what=str(failure)) from failure
    repository = wiring.repository()
    context = wiring.context(repository)
    planned = plan_expire(context, policy, workload_named(repository, values["workload"]))
    if values["dry_run"]:
        return plan_answer(planned)
    removed = run_expire(context, planned)
    document = {"removed": list(removed), "plan": msgspec.to_builtins(planned)}
    return Answer(document, (f"removed {len(removed)} restore points; graincopy collect reclaims their space",))


def _remove_one(wiring: Wiring, values: Values) -> Answer:
    """Remove the one point that was named; also one that is damaged and cannot be read any more."""
    repository = wiring.repository()
    damaged = [id for id, _ in repository.unreadable_points() if id.startswith(values["point"])]
    point = damaged[0] if len(damaged) == 1 else repository.find_point(values["point"]).id
    if not values["dry_run"]:
        repository.delete_point(point, host.alive)
    verb = "would remove" if values["dry_run"] else "removed"
    return Answer({"removed": [point]}, (f"{verb} restore point {point}",))


def collect(wiring: Wiring, values: Values) -> Answer:
    """Reclaim space."""
    repository = wiring.repository()
    context = wiring.context(repository)
    if not values["dry_run"]:
        reap(context)
    patience = context.limits.collect_patience_s if values["patience"] is None else float(values["patience"])
    outcome = run_collect(
        repository,
        alive=context.alive,
        clock=context.clock,
        patience=patience,
        step=context.step,
        dry_run=values["dry_run"],
    )
    verb = "would free" if values["dry_run"] else "freed"
    line = f"{verb} {format_size(outcome.freed_bytes)} in {outcome.swept} packs; {outcome.repacked} packs rewritten"
    warnings = tuple(
        f"{name} cannot be read and was kept; graincopy check --data says whom that concerns"
        for name in outcome.kept_damaged
    )
    return Answer(msgspec.to_builtins(outcome), (line,), WARNED if warnings else DONE, warnings)


def check(wiring: Wiring, values: Values) -> Answer:
    """Prove the repository. Findings are listed and end in exit code 63."""
    repository = wiring.repository()
    meter = Meter("checking", repository.total_bytes() if values["data"] else 0, wiring.progress)
    findings = run_check(repository, data=values["data"], progress=meter.add)
    document = {"findings": [msgspec.to_builtins(finding) for finding in findings], "data": values["data"]}
    if values["data"]:
        _mark_suspects(repository, findings)
    if not findings:
        proof = "every byte is as it was written" if values["data"] else "the structure is whole"
        return Answer(document, (f"no findings: {proof}",))
    lines = tuple(
        f"{printable(finding.name)}: {printable(finding.what)}"
        + (f"; affects {', '.join(point[:12] for point in finding.points)}" if finding.points else "")
        for finding in findings
    )
    affected = {point for finding in findings for point in finding.points}
    failure = CheckFailed(count=len(findings), points=len(affected))
    return Answer(document, lines, failure.exit_code, (f"{failure}. {failure.next_move}",))


def _mark_suspects(repository: Repository, findings: Sequence[Finding]) -> None:
    """Have damaged packs stored anew by the next backups. A medium that cannot be written now is found again later."""
    for finding in findings:
        if finding.name.startswith(tuple(f"{kind.folder}/" for kind in PieceKind)):
            with suppress(MediumReadOnly, MediumFull):
                repository.suspect(finding.name)
