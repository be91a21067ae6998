"""The operation that tries whether a restore point comes up."""

from __future__ import annotations

import base64
import os
from typing import Any

from graincopy.app import host
from graincopy.app.answer import Answer
from graincopy.app.shown import point_line, trial_document, trial_line
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, TrialFailed, UsageWrong, printable
from graincopy.hypervisor.link import Link
from graincopy.hypervisor.sign import Sign, parse_sign
from graincopy.model.restore_point import Trial
from graincopy.workflow.machines import StoredMachine, find_machine
from graincopy.workflow.reap import reap
from graincopy.workflow.trial import TrialPlaces, TrialWish, hold_trial, reap_trials

Values = dict[str, Any]

_USUAL_PATIENCE = 300  # seconds


def verify(wiring: Wiring, values: Values) -> Answer:
    """Start a machine of a restore point from a throw-away copy, and see whether it lives."""
    if not values["boot"]:
        raise UsageWrong(what="verify needs --boot; graincopy check proves what is stored")
    repository = wiring.repository()
    point = repository.find_point(values["point"])
    machine = find_machine(point, values["vm"])
    patience = _USUAL_PATIENCE if values["timeout"] is None else values["timeout"]
    wish = TrialWish(_sign(values["until"], machine), float(patience))
    places = TrialPlaces(machine_runtime(wiring), os.path.join(wiring.cache_dir(), "overlays"))
    context = wiring.context(repository)
    reap(context)
    with link(wiring) as libvirt:
        reap_trials(context, libvirt, places.runtime)
        trial = hold_trial(context, point, machine, libvirt, wish, places)
    if values["picture"] and trial.picture:
        with open(values["picture"], "wb") as file:
            file.write(trial.picture)
    document = trial_document(trial) | {"restore_point": point.id}
    if trial.picture:
        document["picture"] = base64.b64encode(trial.picture).decode()
    if trial.alive:
        return Answer(document, (f"{printable(machine.name)} of {point_line(point)} lives: {trial_line(trial)}",), DONE)
    failure = TrialFailed(point=point.id, reason=trial.reason)
    lines = (f"{printable(machine.name)} of {point_line(point)}: {trial_line(trial)}", *_last_words(trial))
    return Answer(document, lines, failure.exit_code, (f"{failure}. {failure.next_move}",))


def _sign(text: str | None, machine: StoredMachine) -> Sign:
    """What was asked for; else the agent, where the machine has one."""
    if text is None and not machine.domain.agent:
        raise UsageWrong(what=f"{machine.name} has no guest agent; say what to wait for with --until console:TEXT")
    try:
        return parse_sign(text or "agent")
    except ValueError as failure:
        raise UsageWrong(what=f"--until: {failure}") from failure


def link(wiring: Wiring) -> Link:
    """The libvirt of the configuration; nothing is connected yet."""
    return Link(wiring.config.vm.uri, host.SystemClock())


def machine_runtime(wiring: Wiring) -> str:
    """Where sockets for machines lie: a place that QEMU can reach whoever runs it, and that a reboot empties."""
    if os.geteuid() == 0 and not wiring.config.paths.state:
        return "/run/graincopy-machines"
    runtime = wiring.environ.get("XDG_RUNTIME_DIR") if os.geteuid() else None
    return os.path.join(runtime or wiring.state_dir(), "machines")


def _last_words(trial: Trial) -> tuple[str, ...]:
    said = [line for line in trial.console.splitlines() if line.strip()]
    return tuple(f"  console: {printable(line)}" for line in said[-5:])
