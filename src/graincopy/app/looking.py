"""Operations that look at this host's storage: volumes, targets, conformance; and the configuration."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from dataclasses import replace
from typing import Any

import msgspec

from graincopy.app import host
from graincopy.app.answer import Answer, table
from graincopy.app.config import explain
from graincopy.app.shown import when
from graincopy.app.wiring import BEYOND_PATHS, Wiring
from graincopy.core.errors import DONE, WARNED, ConformanceFailed, GraincopyError, printable
from graincopy.core.units import format_size
from graincopy.model.reap import Decision, Delete, Keep
from graincopy.model.volume import Claim, Refusal
from graincopy.repository.repository import Repository
from graincopy.volumes.base import VolumeDriver
from graincopy.workflow.context import resolve
from graincopy.workflow.reap import reap, survey_targets

Values = dict[str, Any]


def volumes(wiring: Wiring, values: Values) -> Answer:
    """For each path: which driver takes it, where it lies, what can be done there, and why others do not take it."""
    drivers = wiring.drivers()
    documents: list[dict[str, object]] = []
    lines: list[str] = []
    for text in values["path"]:
        path = text if text.startswith(BEYOND_PATHS) else os.path.realpath(text)
        refusals = [one for driver in drivers.values() if not isinstance(one := driver.resolve(path), Claim)]
        best = resolve(drivers, path)
        document, said = _claimed(drivers[best.driver], best) if isinstance(best, Claim) else _unsupported(path)
        documents.append({"path": path, "refusals": [msgspec.to_builtins(one) for one in refusals], **document})
        lines += [*said, *(_refused(one) for one in refusals)]
    unsupported = any(document["driver"] is None for document in documents)
    return Answer(documents, tuple(lines), WARNED if unsupported else DONE)


def _claimed(driver: VolumeDriver, claim: Claim) -> tuple[dict[str, object], list[str]]:
    source = driver.describe(claim.volume)
    document = {
        "driver": claim.driver,
        "volume": claim.volume,
        "claim": msgspec.to_builtins(claim),
        "source": msgspec.to_builtins(source),
        "capabilities": msgspec.to_builtins(driver.capabilities()),
    }
    return document, [
        f"{printable(claim.path)}: {claim.driver}, {printable(claim.why)}",
        f"  volume {printable(claim.volume)}, {format_size(source.size)}, {source.extents} extents",
    ]


def _unsupported(path: str) -> tuple[dict[str, object], list[str]]:
    return {"driver": None}, [f"{printable(path)}: not supported"]


def _refused(refusal: Refusal) -> str:
    remedy = f" ({printable(refusal.remedy)})" if refusal.remedy else ""
    return f"  not {refusal.driver}: {printable(refusal.reason)}{remedy}"


_AT_ONCE = "a machine that is brought back at once"
_HEAD = ("TARGET", "ROLE", "ALLOCATED", "CREATED", "STATE", "WHY")


def targets(wiring: Wiring, values: Values) -> Answer:
    """What is on the storage, who owns it, and with --reap: remove what nobody needs."""
    failures: tuple[str, ...] = ()
    try:
        repository = wiring.repository()
    except GraincopyError as failure:
        if values["reap"]:
            raise
        repository = None
        failures = (f"without the repository only owners are known: {failure}",)
    if values["reap"] and not values["dry_run"]:
        assert repository is not None
        reaped = reap(wiring.context(repository), silence=values["silence"])
        decisions, failures = reaped.decisions, reaped.failures + _reap_trials(wiring, repository)
    else:
        decisions = survey_targets(wiring.drivers(), repository, host.alive, host.SystemClock().now(), wiring.limits())
    document: dict[str, Any] = {
        "targets": [_target_document(one) for one in decisions],
        "restores": _restores(repository),
        "failures": list(failures),
    }
    lines = table(_HEAD, [_target_row(one, values["reap"]) for one in decisions]) + tuple(
        f"restore {record['restore']} of {', '.join(record['paths']) or _AT_ONCE}: {record['state']}"
        for record in document["restores"]
    )
    return Answer(document, lines, WARNED if failures else DONE, failures)


def _target_row(one: Decision, reaping: bool) -> tuple[str, ...]:
    return (
        printable(one.target.id),
        one.target.tag.role,
        format_size(one.target.allocated),
        when(one.target.tag.created),
        _verb(one, reaping),
        printable(one.reason),
    )


def _reap_trials(wiring: Wiring, repository: Repository) -> tuple[str, ...]:
    """Machines that trials left. libvirt is only asked where one has left a folder: it may well not be there."""
    from graincopy.app.trial import link, machine_runtime

    runtime = machine_runtime(wiring)
    if not os.path.isdir(runtime) or not os.listdir(runtime):
        return ()
    from graincopy.workflow.trial import reap_trials

    try:
        with link(wiring) as libvirt:
            reap_trials(wiring.context(repository), libvirt, runtime)
    except GraincopyError as failure:
        return (f"machines of trials that died: {failure}",)
    return ()


def _restores(repository: Any) -> list[dict[str, Any]]:
    """Restores that can still be finished or undone."""
    if repository is None:
        return []
    return [
        {
            "restore": state.record.id,
            "restore_point": state.record.point,
            "state": state.state,
            "paths": [disk.path for disk in state.record.disks],
            "expires": state.record.expires,
        }
        for state in repository.restores()
        if state.state != "undone"
    ]


def _verb(decision: Decision, reaped: bool) -> str:
    if isinstance(decision, Keep):
        return "look" if decision.report else "kept"
    if isinstance(decision, Delete):
        return "deleted" if reaped else "to delete"
    return "promoted" if reaped else "to promote"


def _target_document(decision: Decision) -> dict[str, object]:
    target = decision.target
    return {
        "id": target.id,
        "driver": target.driver,
        "volume": target.volume,
        "role": target.tag.role,
        "run": target.tag.run,
        "repository": target.tag.repository,
        "owner": str(target.tag.owner),
        "created": target.tag.created,
        "size": target.size,
        "allocated": target.allocated,
        "decision": type(decision).__name__.lower(),
        "reason": decision.reason,
    }


def validate_volume(wiring: Wiring, values: Values) -> Answer:
    """The volume laws against the user's storage. Where the directory lies on a LUN, its file system is frozen."""
    from graincopy.app.validating import labs_for
    from graincopy.testing.validate import validate_volume as run

    driver, place = values["driver"], values["directory"]
    makers = labs_for(wiring, driver, place)
    found = []
    for make in makers:
        with closing(make()) as lab:
            several = f"{lab.name}: " if len(makers) > 1 else ""
            found += [replace(verdict, law=several + verdict.law) for verdict in run(lab)]
    return _validated(f"{driver} on {place}", found)


def validate_medium(wiring: Wiring, values: Values) -> Answer:
    """The medium laws against the user's place for backups, which must be empty; what was made in it is removed."""
    from graincopy.testing.medium_labs import DirectoryLab
    from graincopy.testing.validate import validate_medium as run

    wiring.medium(values["url"], create=True)
    path = wiring.path_of(values["url"])
    try:
        return _validated(values["url"], list(run(DirectoryLab(path))))
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _validated(what: str, results: list[Any]) -> Answer:
    broken = [result for result in results if result.outcome == "failed"]
    rows = [(result.law, result.outcome, printable(result.message)) for result in results]
    document = {"laws": [{"law": row[0], "outcome": row[1], "message": row[2]} for row in rows]}
    lines = table(("LAW", "OUTCOME", ""), rows)
    if not broken:
        return Answer(document, lines)
    failure = ConformanceFailed(what=what, count=len(broken))
    return Answer(document, lines, failure.exit_code, (f"{failure}. {failure.next_move}",))


def config(wiring: Wiring, _values: Values) -> Answer:
    """Every setting in force and where it comes from."""
    document = {"path": wiring.config_path, "config": msgspec.to_builtins(wiring.config)}
    return Answer(document, explain(wiring.config, wiring.config_path))
