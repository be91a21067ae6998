"""The operation that tries whether a restore point comes up."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from typing import Any

from graincopy.app import host
from graincopy.app.answer import Answer
from graincopy.app.shown import point_line, trial_document, trial_line
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, TrialFailed, UsageWrong, printable
from graincopy.core.ids import digest_id
from graincopy.hypervisor.link import Link
from graincopy.hypervisor.sign import Sign, parse_sign
from graincopy.model.restore_point import RestorePoint, Trial
from graincopy.workflow.machines import StoredMachine, find_machine, machines_of
from graincopy.workflow.reap import reap
from graincopy.workflow.trial import TrialPlaces, TrialWish, hold_trial, reap_trials

Values = dict[str, Any]

_USUAL_PATIENCE = 300  # seconds


def verify(wiring: Wiring, values: Values) -> Answer:
    """Start machines of a restore point from throw-away copies, one after the other, and see whether they live."""
    if not values["boot"]:
        raise UsageWrong(what="verify needs --boot; graincopy check proves what is stored")
    repository = wiring.repository()
    point = repository.find_point(values["point"])
    machines = _chosen(point, values)
    patience = _USUAL_PATIENCE if values["timeout"] is None else values["timeout"]
    wishes = [TrialWish(_sign(values["until"], machine), float(patience)) for machine in machines]
    places = TrialPlaces(machine_runtime(wiring), os.path.join(wiring.cache_dir(), "overlays"))
    context = wiring.context(repository)
    reap(context)
    with link(wiring) as libvirt:
        reap_trials(context, libvirt, places.runtime)
        trials = [
            hold_trial(context, point, machine, libvirt, wish, places)
            for machine, wish in zip(machines, wishes, strict=True)
        ]
    if values["picture"] and trials[0].picture:
        with open(values["picture"], "wb") as file:
            file.write(trials[0].picture)
    answers = [_answer(point, trial) for trial in trials]
    return answers[0] if len(answers) == 1 else _together(point, answers)


def _chosen(point: RestorePoint, values: Values) -> tuple[StoredMachine, ...]:
    """The machine that is named, or all of them. Raises MachineUnknown, UsageWrong."""
    every = machines_of(point)
    if values["vm"] is not None or len(every) < 2:
        return (find_machine(point, values["vm"]),)
    if values["picture"]:
        raise UsageWrong(what=f"--picture takes one machine; say which with --vm: {', '.join(m.name for m in every)}")
    return every


def _answer(point: RestorePoint, trial: Trial) -> Answer:
    document = trial_document(trial) | {"restore_point": point.id}
    if trial.picture:
        document["picture"] = base64.b64encode(trial.picture).decode()
    name = printable(trial.machine)
    if trial.alive:
        return Answer(document, (f"{name} of {point_line(point)} lives: {trial_line(trial)}",), DONE)
    failure = TrialFailed(point=point.id, reason=f"{trial.machine}: {trial.reason}")
    lines = (f"{name} of {point_line(point)}: {trial_line(trial)}", *_last_words(trial))
    return Answer(document, lines, failure.exit_code, (f"{failure}. {failure.next_move}",))


def _together(point: RestorePoint, answers: Sequence[Answer]) -> Answer:
    """Of the machines of a set, tried one after the other: alive when all are."""
    trials = [answer.document for answer in answers]
    alive = all(answer.exit_code == DONE for answer in answers)
    return Answer(
        {"restore_point": point.id, "alive": alive, "trials": trials},
        tuple(line for answer in answers for line in answer.lines),
        max(answer.exit_code for answer in answers),
        tuple(warning for answer in answers for warning in answer.warnings),
    )


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
    """Where sockets for machines lie: short, emptied by a reboot, and where QEMU comes to whoever runs it.

    A state folder of one's own has one of its own here too.
    """
    if os.geteuid() == 0:
        state = wiring.config.paths.state
        return "/run/graincopy-machines" + (f"-{digest_id('runtime', [state])[:8]}" if state else "")
    return os.path.join(wiring.environ.get("XDG_RUNTIME_DIR") or wiring.state_dir(), "machines")


def _last_words(trial: Trial) -> tuple[str, ...]:
    said = [line for line in trial.console.splitlines() if line.strip()]
    return tuple(f"  console: {printable(line)}" for line in said[-5:])
