"""Stage V, the trial: a stored machine is started from a throw-away copy of its disks, and has to give a sign of life.

Read from the medium alone, as it would have to be after the loss of everything else: no target of S is taken. Nothing
is restored first: the disks are a view, what the guest writes goes to nameless files. It has no network and a name,
an identity and firmware variables of its own. libvirt takes it down when our connection ends, however that ends;
what libvirt forgets when it is restarted itself carries a tag and is reaped. Crash points: ``opened``, ``served``,
``started``, ``judged``, ``recorded``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import msgspec

from graincopy import __version__
from graincopy.core.errors import GraincopyError, StartRefused, UsageWrong
from graincopy.core.ids import PointId
from graincopy.hypervisor import machine as machines
from graincopy.hypervisor.console import Console, take_picture
from graincopy.hypervisor.domain_copy import Copy, NewPlace, copy_domain, new_mac, new_uuid
from graincopy.hypervisor.link import Link, binding
from graincopy.hypervisor.owned import TRIAL, MachineTag, list_owned, write_tag
from graincopy.hypervisor.shown_disks import Export, has_screen, isolate, show_disks, with_console
from graincopy.hypervisor.sign import Sign, agent_answers
from graincopy.model.restore_point import DiskRecord, RestorePoint, Trial
from graincopy.views.source import ViewDisk
from graincopy.workflow.context import Context
from graincopy.workflow.machines import StoredMachine
from graincopy.workflow.served import served
from graincopy.workflow.view import View, ViewWish, open_view

LOOK_SECONDS = 0.5
TAIL = 4000  # bytes of the console that the record keeps
_PICTURE_LIMIT = 4 << 20  # bytes; larger ones are not kept
_NVRAM_LIMIT = 64 << 20  # bytes


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
        if name.startswith(_folder(context, "")) and name.rpartition("-")[2] not in known:
            shutil.rmtree(os.path.join(runtime, name), ignore_errors=True)
    return tuple(gone)


def _folder(context: Context, run: str) -> str:
    return f"{context.repository.id[:8]}-trial-{run}"


@contextmanager
def run_folder(runtime: str, name: str, owner: tuple[int, int] | None) -> Iterator[str]:
    """A folder for one run, that QEMU (``owner``) may enter and nobody else. It goes at the end."""
    folder = make_folder(runtime, name, owner)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(runtime: str, name: str, owner: tuple[int, int] | None) -> str:
    """The same, for whoever takes it away himself; it may be there already. Raises OSError."""
    os.makedirs(runtime, mode=0o711, exist_ok=True)
    folder = os.path.join(runtime, name)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if owner is not None:
        os.chown(folder, *owner)
    return folder


def _refuse_unfit(machine: StoredMachine, sign: Sign) -> None:
    if not machine.disks:
        raise UsageWrong(what=f"no disk of {machine.name} is in this restore point; there is nothing to start from")
    if not sign.text and not machine.domain.agent:
        raise UsageWrong(what=f"{machine.name} has no guest agent to answer; say --until console:TEXT")


def _wanted(machine: StoredMachine) -> tuple[DiskRecord, ...]:
    """Disks and firmware variables, each once."""
    records = [*machine.disks.values(), *([machine.nvram] if machine.nvram else [])]
    return tuple({record.name: record for record in records}.values())


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
    nvram = _throw_away_nvram(view, machine, folder)
    uuid = new_uuid(context.chance)
    text = _trial_xml(context, view, machine, uuid, exports, nvram)
    outcome = _Outcome()
    try:
        with _started(link, machine.name, text, uuid) as domain:
            context.step("started")
            outcome = _watch(context, link, domain, uuid, wish)
            outcome.picture = _picture(domain) if has_screen(text) else b""
    except StartRefused as failure:
        outcome.reason = f"it cannot be started: {failure.facts['reason']}"
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


class _Outcome:
    """What is found out step by step."""

    alive = False
    reason = ""
    console = b""
    picture = b""


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
    disk = next(disk for disk in view.disks if disk.name == machine.nvram.name)
    path = os.path.join(folder, "nvram")
    with open(path, "wb") as file:
        file.write(_whole(disk))
    return path


def _whole(disk: ViewDisk) -> bytearray:
    if disk.size > _NVRAM_LIMIT:
        raise UsageWrong(what=f"{disk.name} has {disk.size} bytes: these are no firmware variables")
    content = bytearray(disk.size)
    disk.readinto(0, memoryview(content))
    return content


# --- the guest --------------------------------------------------------------------------------------


@contextmanager
def _started(link: Link, name: str, text: str, uuid: str) -> Iterator[Any]:
    """The virDomain of ``text``, not yet let go; gone at the end of the block. Raises StartRefused."""
    libvirt = binding()
    flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY
    try:
        domain = link.call(lambda connection: connection.createXML(text, flags), domain=name, again=False)
    except GraincopyError as failure:
        machines.destroy(link, uuid)
        raise StartRefused(domain=name, reason=failure.facts.get("reason", failure)) from failure
    try:
        yield domain
    finally:
        machines.destroy(link, uuid)


def _watch(context: Context, link: Link, domain: Any, uuid: str, wish: TrialWish) -> _Outcome:
    """Let it run until it gives its sign of life, ends, or time is up."""
    libvirt, outcome = binding(), _Outcome()
    console = None
    try:
        with suppress(libvirt.libvirtError):
            console = Console(domain)
        domain.resume()
        give_up = context.clock.monotonic() + wish.patience
        while True:
            if console is not None:
                outcome.console = console.listen()
            if _gives(link, uuid, wish.sign, outcome.console):
                outcome.alive = True
                return outcome
            outcome.reason = _why_not(domain, libvirt) or outcome.reason
            if outcome.reason:
                return outcome
            if context.clock.monotonic() >= give_up:
                outcome.reason = f"no sign of life ({wish.sign}) within {wish.patience:g} s"
                return outcome
            context.clock.sleep(LOOK_SECONDS)
    except (libvirt.libvirtError, GraincopyError) as failure:
        outcome.reason = outcome.reason or f"it went away: {failure}"
        return outcome
    finally:
        if console is not None:
            console.close()


def _gives(link: Link, uuid: str, sign: Sign, said: bytes) -> bool:
    if sign.text:
        return sign.text.encode("utf-8", "surrogateescape") in said
    return agent_answers(link, uuid)


def _why_not(domain: Any, libvirt: Any) -> str:
    """Why it will not come any more; "" while it may."""
    state, cause = domain.state()[:2]
    if state == libvirt.VIR_DOMAIN_PAUSED and cause == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
        return "it stands still because a disk cannot be read"
    if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED):
        return "it shut down or crashed"
    return ""


def _picture(domain: Any) -> bytes:
    libvirt = binding()
    try:
        return take_picture(domain) or b""
    except libvirt.libvirtError:
        return b""  # it may have gone at this moment; the picture is a courtesy
