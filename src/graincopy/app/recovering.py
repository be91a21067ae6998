"""Operations that bring virtual machines back: in place, under another name, at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from graincopy.app.answer import Answer
from graincopy.app.making import restore_answer
from graincopy.app.shown import point_line
from graincopy.app.trial import link, machine_runtime
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, WARNED, UsageWrong, printable
from graincopy.core.units import format_size
from graincopy.hypervisor.link import Link
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.volumes.new_file import NewFiles
from graincopy.workflow.context import Context
from graincopy.workflow.instant_restore import InstantPlaces, instant_restore
from graincopy.workflow.machine_restore import (
    MachineOutcome,
    NewMachine,
    StopWish,
    restore_as,
    restore_machines_in_place,
)
from graincopy.workflow.machines import StoredMachine, find_machine
from graincopy.workflow.reap import reap
from graincopy.workflow.view import ViewWish

Values = dict[str, Any]

_USUAL_PATIENCE = 120  # seconds to shut down


def recover(
    wiring: Wiring, context: Context, point: RestorePoint, disks: Sequence[DiskRecord], values: Values
) -> Answer:
    """``restore``, where libvirt has a say."""
    _refuse_unfit(values)
    reap(context)
    with link(wiring) as libvirt:
        if values["in_place"]:
            return _in_place(context, point, disks, libvirt, values)
        machine = find_machine(point, values["vm"])
        if values["instant"]:
            return _instant(wiring, context, point, machine, libvirt, values)
        return _anew(context, point, machine, disks, libvirt, values)


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
    if not values["in_place"] and not values["as"] and not values["instant"]:
        raise UsageWrong(what="--vm, --onto and --start need to know what the machine is to be called: --as NEWVM")


# --- in place ---------------------------------------------------------------------------------------


def _in_place(
    context: Context, point: RestorePoint, disks: Sequence[DiskRecord], libvirt: Link, values: Values
) -> Answer:
    wish = StopWish(
        stop=values["stop"],
        force=values["force_stop"],
        patience=float(values["stop_timeout"] if values["stop_timeout"] is not None else _USUAL_PATIENCE),
        start=values["start"],
    )
    wanted = _of_machine(point, disks, values["vm"])
    outcome, said = restore_machines_in_place(context, point, wanted, libvirt, wish, compare=values["compare"])
    answer = restore_answer(outcome.restore, point, outcome.undo, outcome.disks, outcome.warnings)
    document = answer.document
    assert isinstance(document, dict)
    return Answer({**document, "machines": list(said)}, (*answer.lines, *said), answer.exit_code, answer.warnings)


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
    wish = NewMachine(
        name=values["as"],
        onto=_devices(values["onto"] or ()),
        start=values["start"],
        preallocate=values["preallocate"],
    )
    folder = NewFiles(values["to"])
    return _made(point, machine, restore_as(context, point, machine, disks, libvirt, folder, wish))


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
