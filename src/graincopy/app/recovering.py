"""Operations that bring virtual machines back: in place, under another name, at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from graincopy.app.answer import Answer
from graincopy.app.making import restore_answer
from graincopy.app.shown import plan_answer, point_line
from graincopy.app.trial import link, machine_runtime
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, WARNED, UsageWrong, printable
from graincopy.core.units import format_size
from graincopy.hypervisor.link import Link
from graincopy.model.restore_point import DiskRecord, RestorePoint, RestoreState
from graincopy.volumes.new_file import NewFiles
from graincopy.workflow.context import Context
from graincopy.workflow.export import restore_to
from graincopy.workflow.instant_restore import InstantPlaces, instant_restore
from graincopy.workflow.machine_devices import refuse_unfit_devices, write_onto
from graincopy.workflow.machine_plan import MachinesPlan, plan_as, plan_instant, plan_machines_in_place
from graincopy.workflow.machine_restore import (
    MachineOutcome,
    NewMachine,
    StopWish,
    refuse_saved_of,
    restore_as,
    restore_machines_in_place,
)
from graincopy.workflow.machines import StoredMachine, find_machine
from graincopy.workflow.reap import reap
from graincopy.workflow.restore import plan as plan_restore
from graincopy.workflow.view import ViewWish

Values = dict[str, Any]

_USUAL_PATIENCE = 120  # seconds to shut down


def recover(
    wiring: Wiring, context: Context, point: RestorePoint, disks: Sequence[DiskRecord], values: Values
) -> Answer:
    """``restore``, where libvirt has a say."""
    _refuse_unfit(values)
    if not (values["in_place"] or values["as"] or values["instant"]):
        return _onto(context, point, disks, values)
    if values["dry_run"]:
        with link(wiring) as libvirt:
            return _planned(_plan(context, point, disks, libvirt, values))
    reap(context)
    with link(wiring) as libvirt:
        if values["in_place"]:
            return _in_place(context, point, disks, libvirt, values)
        machine = find_machine(point, values["vm"])
        if values["instant"]:
            return _instant(wiring, context, point, machine, libvirt, values)
        return _anew(context, point, machine, disks, libvirt, values)


def _plan(
    context: Context, point: RestorePoint, disks: Sequence[DiskRecord], libvirt: Link, values: Values
) -> MachinesPlan:
    if values["in_place"]:
        wanted = _of_machine(point, disks, values["vm"])
        return plan_machines_in_place(context, point, wanted, libvirt, _stop_wish(values), compare=values["compare"])
    machine = find_machine(point, values["vm"])
    if values["instant"]:
        name, directory = _name_and_place(machine, values)
        return plan_instant(context, point, machine, name, libvirt, NewFiles(directory))
    return plan_as(context, point, machine, disks, libvirt, NewFiles(values["to"]), _new_machine(values))


def _planned(plan: MachinesPlan) -> Answer:
    document = {"plan": msgspec.to_builtins(plan.disks), "machines": msgspec.to_builtins(plan.machines)}
    return Answer(document, plan.lines())


def _refuse_unfit(values: Values) -> None:
    """Options that do not go together."""
    names = ("as", "onto", "instant") if values["in_place"] else ("stop", "force_stop", "stop_timeout")
    wrong = [f"--{name.replace('_', '-')}" for name in names if values[name]]
    if wrong:
        raise UsageWrong(what=f"{wrong[0]} goes with {'--to DIR' if values['in_place'] else '--in-place'}")
    if values["force_stop"] and not values["stop"]:
        raise UsageWrong(what="--force-stop goes with --stop")
    if values["instant"] and (values["disk"] or values["onto"]):
        raise UsageWrong(what="--instant brings a whole machine back, into files; leave --disk and --onto out")
    if (values["vm"] or values["start"]) and not (values["in_place"] or values["as"] or values["instant"]):
        raise UsageWrong(what="--vm and --start need to know what the machine is to be called: --as NEWVM")


def refuse_undo(wiring: Wiring, context: Context, state: RestoreState) -> None:
    """Raise DomainBusy where disks would be taken back under a machine whose memory was saved with them."""
    with link(wiring) as libvirt:
        refuse_saved_of(context, state.record, libvirt)


# --- onto devices -----------------------------------------------------------------------------------


def _onto(context: Context, point: RestorePoint, disks: Sequence[DiskRecord], values: Values) -> Answer:
    """Disks onto block devices, whatever they lay on before, and the others as new files; no machine is asked about."""
    wanted, onto = {disk.name: disk for disk in disks}, _devices(values["onto"])
    refuse_unfit_devices(point, wanted, onto)
    kept = [disk for disk in disks if disk.name not in onto]
    if values["dry_run"]:
        plan = plan_restore(context, point, kept, values["to"], values["compare"])
        notes = tuple(f"{name} is written onto all of {path}" for name, path in onto.items())
        return plan_answer(msgspec.structs.replace(plan, notes=(*plan.notes, *notes)))
    reap(context)
    exported = restore_to(context, point, kept, NewFiles(values["to"]), preallocate=values["preallocate"])
    written = write_onto(context, point, [(wanted[name], path) for name, path in onto.items()])
    return restore_answer(None, point, None, (*exported.disks, *written), exported.warnings)


# --- in place ---------------------------------------------------------------------------------------


def _in_place(
    context: Context, point: RestorePoint, disks: Sequence[DiskRecord], libvirt: Link, values: Values
) -> Answer:
    wish, wanted = _stop_wish(values), _of_machine(point, disks, values["vm"])
    outcome, said = restore_machines_in_place(context, point, wanted, libvirt, wish, compare=values["compare"])
    answer = restore_answer(outcome.restore, point, outcome.undo, outcome.disks, outcome.warnings)
    document = answer.document
    assert isinstance(document, dict)
    return Answer({**document, "machines": list(said)}, (*answer.lines, *said), answer.exit_code, answer.warnings)


def _stop_wish(values: Values) -> StopWish:
    return StopWish(
        stop=values["stop"],
        force=values["force_stop"],
        patience=float(values["stop_timeout"] if values["stop_timeout"] is not None else _USUAL_PATIENCE),
        start=values["start"],
    )


def _of_machine(point: RestorePoint, disks: Sequence[DiskRecord], name: str | None) -> tuple[DiskRecord, ...]:
    """``disks``, or those of them that belong to the machine called ``name``."""
    if name is None:
        return tuple(disks)
    files = {disk.id for disk in find_machine(point, name).files}
    return tuple(disk for disk in disks if disk.id in files)


# --- under another name -----------------------------------------------------------------------------


def _anew(
    context: Context,
    point: RestorePoint,
    machine: StoredMachine,
    disks: Sequence[DiskRecord],
    libvirt: Link,
    values: Values,
) -> Answer:
    folder, wish = NewFiles(values["to"]), _new_machine(values)
    return _made(point, machine, restore_as(context, point, machine, disks, libvirt, folder, wish))


def _new_machine(values: Values) -> NewMachine:
    return NewMachine(
        name=values["as"],
        onto=_devices(values["onto"] or ()),
        start=values["start"],
        preallocate=values["preallocate"],
    )


def _devices(texts: Sequence[str]) -> Mapping[str, str]:
    """NAME → absolute path, of every ``DISK=DEVICE``."""
    found = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise UsageWrong(what=f"--onto takes DISK=DEVICE, not {text}")
        found[name] = os.path.abspath(path)
    return found


def _instant(
    wiring: Wiring,
    context: Context,
    point: RestorePoint,
    machine: StoredMachine,
    libvirt: Link,
    values: Values,
) -> Answer:
    name, directory = _name_and_place(machine, values)
    places = InstantPlaces(NewFiles(directory), machine_runtime(wiring))
    wish = ViewWish(hybrid=not values["medium_only"], trust_map=values["trust_map"])

    def ready() -> None:
        sys.stderr.write(f"{printable(name)} runs; its disks are being pulled to {printable(directory)}\n")
        sys.stderr.flush()

    return _made(point, machine, instant_restore(context, point, machine, name, libvirt, places, wish, ready))


def _name_and_place(machine: StoredMachine, values: Values) -> tuple[str, str]:
    """NEWVM and DIR. ``--to NEWVM`` alone means a folder of that name beside the machine's first disk."""
    if values["as"]:
        return values["as"], values["to"]
    if "/" in values["to"] or not machine.disks:
        raise UsageWrong(what="--instant needs to know what the machine is to be called: --as NEWVM")
    first = next(iter(machine.disks.values()))
    return values["to"], os.path.join(os.path.dirname(first.path), values["to"])


def _made(point: RestorePoint, machine: StoredMachine, outcome: MachineOutcome) -> Answer:
    answer = restore_answer(None, point, None, outcome.disks, outcome.warnings)
    document = answer.document
    assert isinstance(document, dict)
    document = {
        **document,
        "machine": {"name": outcome.name, "uuid": outcome.uuid, "of": machine.name, "started": outcome.started},
        "changes": list(outcome.changes),
    }
    size = format_size(sum(disk.written_bytes for disk in outcome.disks))
    state = "defined and started" if outcome.started else "defined"
    lines = (
        f"{printable(outcome.name)} is {state}: {printable(machine.name)} of {point_line(point)}, {size}",
        *answer.lines[1:],
        *(f"note: {printable(change)}" for change in outcome.changes),
    )
    return Answer(document, lines, WARNED if outcome.warnings else DONE, answer.warnings)
