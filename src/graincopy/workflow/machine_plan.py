"""Before stage R: what a restore would do with virtual machines, besides what it does with their disks. No effect.

What would be refused is refused here too, with the same error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec
from msgspec.structs import replace

from graincopy.core.errors import HypervisorDown, ToolMissing, printable
from graincopy.hypervisor import machine as machines
from graincopy.hypervisor.domain_copy import new_uuid
from graincopy.hypervisor.link import Link
from graincopy.model.plan import PlannedRestore, RestorePlan
from graincopy.model.planner import RestorePlace, plan_restore
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.workload import Representation
from graincopy.workflow.context import Context
from graincopy.workflow.export import Folder
from graincopy.workflow.instant_restore import on_overlays, refuse_no_room, unfinished
from graincopy.workflow.machine_restore import (
    NewMachine,
    StopWish,
    copied,
    disks_for,
    refuse_undefinable,
    refuse_unready,
)
from graincopy.workflow.machines import StoredMachine, machines_with
from graincopy.workflow.restore import RestoredDisk
from graincopy.workflow.restore import plan as plan_in_place


class PlannedMachine(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of one machine. ``changes``: what would not be as it was, one clause each."""

    name: str
    of: str  # its name in the restore point
    uuid: str | None  # None: a new one
    steps: tuple[str, ...]
    changes: tuple[str, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """For people, one fact a line."""
        head = f"Machine {self.name}" + (f", a copy of {self.of}" if self.uuid is None else "")
        said = [head, *(f"  {step}" for step in self.steps), *(f"  note: {change}" for change in self.changes)]
        return tuple(printable(line) for line in said)


class MachinesPlan(msgspec.Struct, frozen=True):
    """A restore to come, of disks and of their machines."""

    disks: RestorePlan
    machines: tuple[PlannedMachine, ...]

    def lines(self) -> tuple[str, ...]:
        """For people, one fact a line."""
        return (*self.disks.lines(), *(line for one in self.machines for line in one.lines()))


def plan_machines_in_place(
    context: Context, point: RestorePoint, disks: Sequence[DiskRecord], link: Link, wish: StopWish, *, compare: bool
) -> MachinesPlan:
    """What ``restore_machines_in_place`` would do now. Raises what that raises before it writes."""
    owners = machines_with(point, disks)
    try:
        states = {one.uuid: machines.is_running(link, one.uuid) for one in owners}
        for one in owners:
            refuse_unready(link, one, states[one.uuid], wish)
    except (HypervisorDown, ToolMissing) as failure:
        if wish.stop or wish.start:
            raise
        plan = plan_in_place(context, point, disks, None, compare)
        return MachinesPlan(replace(plan, notes=(*plan.notes, f"the machines cannot be asked about: {failure}")), ())
    planned = [
        PlannedMachine(name=one.name, of=one.name, uuid=one.uuid, steps=_steps_in_place(states[one.uuid], wish))
        for one in owners
    ]
    return MachinesPlan(plan_in_place(context, point, disks, None, compare), tuple(planned))


def _steps_in_place(running: bool | None, wish: StopWish) -> tuple[str, ...]:
    steps = ["is off"] if running is False else []
    if running:
        late = "then its plug is pulled" if wish.force else "else nothing is written"
        steps.append(f"is shut down before, within {wish.patience:g} s, {late}")
    if running is None:
        steps.append("is not known to libvirt, and is defined again")
    return (*steps, "is started when its disks are back" if wish.start else "stays off")


# --- under another name -----------------------------------------------------------------------------


def plan_as(
    context: Context,
    point: RestorePoint,
    machine: StoredMachine,
    disks: Sequence[DiskRecord],
    link: Link,
    folder: Folder,
    wish: NewMachine,
) -> MachinesPlan:
    """What ``restore_as`` would do now. Raises what that raises before it writes."""
    wanted = disks_for(link, point, machine, disks, wish)
    folder.refuse_existing([name for name in wanted if name not in wish.onto])
    placed = {
        name: _placed(name, wish.onto.get(name) or folder.path_of(name), _kind(disk, name in wish.onto))
        for name, disk in wanted.items()
    }
    devices = tuple(f"{name} is written onto all of {path}" for name, path in wish.onto.items())
    steps = (*devices, "is defined, with a new UUID and new MAC addresses", *_started(wish.start))
    one = _planned_copy(context, machine, wish.name, placed, steps)
    return MachinesPlan(_plan_of(point, placed, folder), (one,))


def plan_instant(
    context: Context, point: RestorePoint, machine: StoredMachine, name: str, link: Link, folder: Folder
) -> MachinesPlan:
    """What ``instant_restore`` would do now. Raises what that raises before it makes anything."""
    begun = unfinished(context, point, name, link)
    if begun is None:
        refuse_undefinable(link, machine, name)
        refuse_no_room(folder, tuple(machine.disks.values()), machine)
    placed = on_overlays(machine, folder)
    pulled = "its disks are pulled to their place while it runs"
    if begun is not None:
        steps: tuple[str, ...] = ("was begun, and goes on", pulled)
        found = PlannedMachine(name=name, of=machine.name, uuid=begun.uuid, steps=steps)
    else:
        steps = ("is defined, with a new UUID and new MAC addresses", "is started at once, off a view", pulled)
        found = _planned_copy(context, machine, name, placed, steps)
    return MachinesPlan(replace(_plan_of(point, placed, folder), steps=()), (found,))


def _started(start: bool) -> tuple[str, ...]:
    return ("is started when its disks are there" if start else "stays off",)


def _kind(disk: DiskRecord, on_device: bool) -> str:
    return "raw" if on_device and disk.representation is Representation.GUEST else disk.format


def _placed(name: str, path: str, kind: str) -> RestoredDisk:
    return RestoredDisk(name, path, "planned", 0, 0, 0, 0, format=kind)


def _planned_copy(
    context: Context,
    machine: StoredMachine,
    name: str,
    placed: Mapping[str, RestoredDisk],
    steps: tuple[str, ...],
) -> PlannedMachine:
    _, changes = copied(context, machine, name, new_uuid(context.chance), placed)
    kept = tuple(
        f"the state of its TPM goes with it ({record.name})" for record in machine.tpm if record.name in placed
    )
    return PlannedMachine(name=name, of=machine.name, uuid=None, steps=(*steps, *kept), changes=changes)


def _plan_of(point: RestorePoint, placed: Mapping[str, RestoredDisk], folder: Folder) -> RestorePlan:
    places = {name: RestorePlace(path=one.target) for name, one in placed.items()}
    plan = plan_restore(point, places, os.path.dirname(folder.path_of("x")))
    return replace(plan, disks=tuple(_in_format(disk, placed[disk.name].format) for disk in plan.disks))


def _in_format(disk: PlannedRestore, kind: str) -> PlannedRestore:
    return replace(disk, format=kind)
