"""Stage V, the trial: a stored machine is started from a throw-away copy of its disks, and has to give a sign of life.

Read from the medium alone, as it would have to be after the loss of everything else: no target of S is taken. Nothing
is restored first: the disks are a view, what the guest writes goes to nameless files. It has no network and a name,
an identity, firmware variables and a TPM of its own. libvirt takes it down when our connection ends, however that
ends; what libvirt forgets when it is restarted itself carries a tag and is reaped. Crash points: ``opened``,
``served``, ``started``, ``judged``, ``recorded``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack

import msgspec

from graincopy import __version__
from graincopy.core.errors import StartRefused, UsageWrong
from graincopy.core.ids import PointId
from graincopy.hypervisor import machine as machines
from graincopy.hypervisor.domain_copy import Copy, NewPlace, copy_domain, new_mac, new_uuid
from graincopy.hypervisor.link import Link
from graincopy.hypervisor.owned import TRIAL, MachineTag, list_owned, write_tag
from graincopy.hypervisor.shown_disks import Export, has_screen, isolate, show_disks, with_console
from graincopy.hypervisor.sign import Sign
from graincopy.model.restore_point import DiskRecord, RestorePoint, Trial
from graincopy.workflow.context import Context
from graincopy.workflow.machine_folders import drop_folder, run_folder
from graincopy.workflow.machines import StoredMachine
from graincopy.workflow.served import served
from graincopy.workflow.trial_guest import Outcome, picture_of, started, watch
from graincopy.workflow.trial_tpm import forget_tpm, noted, tpm_state
from graincopy.workflow.view import View, ViewWish, open_view

TAIL = 4000  # bytes of the console that the record keeps
_PICTURE_LIMIT = 4 << 20  # bytes; larger ones are not kept
_SMALL = 64 << 20  # bytes


class TrialWish(msgspec.Struct, frozen=True):
    """What is waited for, and for how many seconds."""

    sign: Sign
    patience: float


class TrialPlaces(msgspec.Struct, frozen=True):
    """Where things of a trial lie: sockets in a folder of their own below ``runtime``, writes in ``scratch``."""

    runtime: str
    scratch: str


def hold_trial(
    context: Context, point: RestorePoint, machine: StoredMachine, link: Link, wish: TrialWish, places: TrialPlaces
) -> Trial:
    """Start ``machine`` of ``point``, judge it, take everything down, record it. A dead machine is an answer too.

    Raises UsageWrong for a sign that it cannot give, HypervisorDown, and what opening a view raises.
    """
    _refuse_unfit(machine, wish.sign)
    user = machines.qemu_user(link)  # and libvirt answers, before anything is opened
    records = _wanted(machine)
    with ExitStack() as held:
        view = held.enter_context(open_view(context, point, records, ViewWish(hybrid=False)))
        context.step("opened")
        folder = held.enter_context(run_folder(places.runtime, _folder(context, view.run.id), user))
        exports = held.enter_context(
            served(
                view,
                records,
                os.path.join(folder, "nbd"),
                context.clock.monotonic,
                scratch=places.scratch,
                owner=user,
            )
        )
        context.step("served")
        trial = _judge(context, view, machine, link, wish, folder, exports)
        context.step("judged")
        context.repository.history.put(trial)
        context.step("recorded")
    return trial


def reap_trials(context: Context, link: Link, runtime: str) -> tuple[str, ...]:
    """Destroy the trial machines whose owner is dead, and their folders; their names. Raises HypervisorDown."""
    gone = []
    for owned in list_owned(link):
        if owned.tag.role == TRIAL and context.alive(owned.tag.owner) is False:
            machines.destroy(link, owned.uuid)
            gone.append(owned.name)
    known = {run.id for run in context.repository.open_runs()}
    for name in os.listdir(runtime) if os.path.isdir(runtime) else ():
        # A folder without a run: of a trial that died, whose run was closed already. Other repositories' stay.
        run = noted(name) or name
        if name.startswith(_folder(context, "")) and run.rpartition("-")[2] not in known:
            forget_tpm(os.path.join(runtime, run))
            drop_folder(os.path.join(runtime, run))
    return tuple(gone)


def _folder(context: Context, run: str) -> str:
    return f"{context.repository.id[:8]}-trial-{run}"


def _refuse_unfit(machine: StoredMachine, sign: Sign) -> None:
    if not machine.disks:
        raise UsageWrong(what=f"no disk of {machine.name} is in this restore point; there is nothing to start from")
    if not sign.text and not machine.domain.agent:
        raise UsageWrong(what=f"{machine.name} has no guest agent to answer; say --until console:TEXT")


def _wanted(machine: StoredMachine) -> tuple[DiskRecord, ...]:
    """Everything of it, each once."""
    return tuple({record.name: record for record in machine.files}.values())


def _judge(
    context: Context,
    view: View,
    machine: StoredMachine,
    link: Link,
    wish: TrialWish,
    folder: str,
    exports: Mapping[str, Export],
) -> Trial:
    began, moment = context.clock.monotonic(), context.clock.now()
    outcome = _watched(context, view, machine, link, wish, folder, exports)
    findings = [str(finding) for one in view.report() for finding in one.findings]
    if findings:
        outcome.alive, outcome.reason = False, f"parts of it cannot be read: {findings[0]}"
    return Trial(
        id=PointId(view.run.id),
        point=view.point.id,
        machine=machine.name,
        time=moment,
        duration_s=context.clock.monotonic() - began,
        sign=str(wish.sign),
        alive=outcome.alive,
        reason=outcome.reason,
        console=outcome.console[-TAIL:].decode("utf-8", "replace"),
        picture=outcome.picture if len(outcome.picture) <= _PICTURE_LIMIT else b"",
        hostname=context.owner.hostname,
        version=__version__,
    )


def _watched(
    context: Context,
    view: View,
    machine: StoredMachine,
    link: Link,
    wish: TrialWish,
    folder: str,
    exports: Mapping[str, Export],
) -> Outcome:
    """What came of starting the machine: its sign of life, or why there was none."""
    nvram = _throw_away_nvram(view, machine, folder)
    uuid = new_uuid(context.chance)
    text = _trial_xml(context, view, machine, uuid, exports, nvram)
    outcome = Outcome()
    states = [(record, bytes(_whole(view, record.name))) for record in machine.tpm]
    try:
        with (
            tpm_state(folder, machine.uuid, uuid, states) as lacking,
            started(link, machine.name, text, uuid) as domain,
        ):
            context.step("started")
            outcome = watch(context.clock, link, domain, uuid, wish.sign, wish.patience)
            outcome.picture = picture_of(domain) if has_screen(text) else b""
    except StartRefused as failure:
        outcome.reason = f"it cannot be started: {failure.facts['reason']}"
    if lacking and not outcome.alive:
        outcome.reason += f" (without the state of its TPM: {lacking})"
    return outcome


def _trial_xml(
    context: Context,
    view: View,
    machine: StoredMachine,
    uuid: str,
    exports: Mapping[str, Export],
    nvram: str | None,
) -> str:
    copied = copy_domain(
        machine.xml,
        Copy(
            name=f"{machine.name}-trial-{view.run.id[:8]}",
            uuid=uuid,
            disks={dev: NewPlace("") for dev in machine.disks},
            mac=lambda old: new_mac(old, context.chance),
            nvram=nvram,
            networks=False,
        ),
    )
    text = show_disks(copied.xml, {dev: exports[record.name] for dev, record in machine.disks.items()})
    tag = MachineTag(
        role=TRIAL,
        run=view.run.id,
        point=view.point.id,
        repository=context.repository.id,
        owner=context.owner,
    )
    return write_tag(with_console(isolate(text)), tag)


def _throw_away_nvram(view: View, machine: StoredMachine, folder: str) -> str | None:
    """A copy of the firmware variables, where the point has them; else libvirt makes new ones."""
    if machine.nvram is None:
        return None
    path = os.path.join(folder, "nvram")
    with open(path, "wb") as file:
        file.write(_whole(view, machine.nvram.name))
    return path


def _whole(view: View, name: str) -> bytearray:
    """The content of a small file."""
    disk = next(disk for disk in view.disks if disk.name == name)
    if disk.size > _SMALL:
        raise UsageWrong(what=f"{name} has {disk.size} bytes: that is neither firmware variables nor a TPM's state")
    content = bytearray(disk.size)
    disk.readinto(0, memoryview(content))
    return content
