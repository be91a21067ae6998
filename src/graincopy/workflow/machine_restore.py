"""Stage R for virtual machines: their disks in place, or all of them anew under another name.

What libvirt would refuse is asked first, before anything is written: whether a machine runs, whether the name is free,
whether its networks are there. The disks themselves are the business of ``restore`` and ``export``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec

from graincopy.core.errors import (
    DefineRefused,
    DomainBusy,
    DomainInUse,
    HypervisorDown,
    PointUnknown,
    ToolMissing,
)
from graincopy.hypervisor import machine as machines
from graincopy.hypervisor.domain_copy import Copy, NewPlace, copy_domain, new_mac, new_uuid
from graincopy.hypervisor.link import Link
from graincopy.model.restore_point import DiskRecord, RestorePoint, RestoreRecord
from graincopy.workflow.context import Context
from graincopy.workflow.export import Folder, restore_to
from graincopy.workflow.machine_devices import is_device, refuse_unfit_devices, write_onto
from graincopy.workflow.machine_folders import entered_by
from graincopy.workflow.machines import StoredMachine, machines_with
from graincopy.workflow.restore import RestoredDisk, RestoreOutcome, restore_in_place


class StopWish(msgspec.Struct, frozen=True):
    """Whether machines that run may be shut down for a restore (in ``patience`` seconds), and started afterwards."""

    stop: bool = False
    force: bool = False  # pull the plug of one that does not shut down
    patience: float = 120.0
    start: bool = False


class NewMachine(msgspec.Struct, frozen=True, kw_only=True):
    """What a restored machine is to be called. ``onto``: disk NAME → block device, where no file is wanted."""

    name: str
    onto: Mapping[str, str]
    start: bool = False
    preallocate: bool = False


class MachineOutcome(msgspec.Struct, frozen=True):
    """A machine as it was made. ``changes``: what is not as it was, one clause each."""

    name: str
    uuid: str
    started: bool
    disks: tuple[RestoredDisk, ...]
    changes: tuple[str, ...]
    warnings: tuple[str, ...]


# --- in place ---------------------------------------------------------------------------------------


def restore_machines_in_place(
    context: Context,
    point: RestorePoint,
    disks: Sequence[DiskRecord],
    link: Link,
    wish: StopWish,
    *,
    compare: bool,
) -> tuple[RestoreOutcome, tuple[str, ...]]:
    """Bring ``disks`` back under their machines, which must be off; what was done with these, one clause each.

    A machine that libvirt does not know any more is defined again. Raises DomainInUse, DomainStays, DomainBusy,
    DefineRefused, and what ``restore_in_place`` raises. Nothing is written before all machines are off.
    """
    owners = machines_with(point, disks)
    try:
        states = {one.uuid: machines.is_running(link, one.uuid) for one in owners}
    except (HypervisorDown, ToolMissing) as failure:
        if wish.stop or wish.start:
            raise
        note = f"nobody was asked whether the machines run, nor told of the restore: {failure}"
        return restore_in_place(context, point, disks, compare=compare), (note,)
    said = []
    for one in owners:
        refuse_unready(link, one, states[one.uuid], wish)
    for one in owners:
        if machines.stop(link, one.uuid, one.name, patience=wish.patience, force=wish.force, clock=context.clock):
            said.append(f"{one.name} was shut down")
    context.step("stopped")
    outcome = restore_in_place(context, point, disks, compare=compare)
    for one in owners:
        if states[one.uuid] is None or machines.is_running(link, one.uuid) is None:
            machines.define(link, one.xml, one.name)
            said.append(f"{one.name} was defined again")
        if wish.start:
            machines.start(link, one.uuid, one.name)
            said.append(f"{one.name} was started")
    return outcome, tuple(said)


def refuse_unready(link: Link, one: StoredMachine, running: bool | None, wish: StopWish) -> None:
    """Raise what keeps ``one`` from being restored in place: DomainInUse, DomainBusy, DefineRefused (it is gone)."""
    if running is None:
        machines.refuse_taken(link, one.name)
        machines.refuse_lacking(link, one.name, one.domain)
    elif running and not wish.stop:
        raise DomainInUse(domain=one.name)
    elif not running:
        refuse_saved(link, one)


def refuse_saved(link: Link, one: StoredMachine) -> None:
    """Raise DomainBusy where its next start would go on from memory that fits its present disks only."""
    if machines.has_saved_state(link, one.uuid):
        failure = DomainBusy(domain=one.name, reason="its memory was saved, and fits its present disks only")
        failure.next_move = f"Start it and shut it down, or drop that memory: virsh managedsave-remove {one.name}."
        raise failure


def refuse_saved_of(context: Context, record: RestoreRecord, link: Link) -> None:
    """The same for all machines that have disks in the restore ``record``, where libvirt can be asked."""
    try:
        point = context.repository.find_point(record.point)
    except PointUnknown:
        return
    paths = {disk.path for disk in record.disks}
    for one in machines_with(point, [disk for disk in point.disks if disk.path in paths]):
        with suppress(HypervisorDown, ToolMissing):  # as for the restore: a disk that is open is refused in any case
            refuse_saved(link, one)


# --- anew -------------------------------------------------------------------------------------------


def disks_for(
    link: Link, point: RestorePoint, machine: StoredMachine, disks: Sequence[DiskRecord], wish: NewMachine
) -> dict[str, DiskRecord]:
    """Those of ``disks`` that ``wish`` brings back, by NAME. Raises DefineRefused and what write_onto would raise."""
    refuse_undefinable(link, machine, wish.name)
    wanted = {disk.name: disk for disk in machine.files if disk in disks}
    refuse_unfit_devices(point, wanted, wish.onto)
    return wanted


def restore_as(
    context: Context,
    point: RestorePoint,
    machine: StoredMachine,
    disks: Sequence[DiskRecord],
    link: Link,
    folder: Folder,
    wish: NewMachine,
) -> MachineOutcome:
    """Write those of ``disks`` that are ``machine``'s as new files of ``folder``, and define it under a new name.

    Raises DefineRefused before anything is written when the name is taken or a network is not there; OutputExists,
    OutputUnfit, RestoreNoSpace, StartRefused.
    """
    wanted = disks_for(link, point, machine, disks, wish)
    kept = [disk for disk in wanted.values() if disk.name not in wish.onto]
    devices = [(wanted[name], path) for name, path in wish.onto.items()]
    with entered_by(lambda: machines.qemu_user(link), os.path.dirname(folder.path_of("x"))):
        exported = restore_to(context, point, kept, folder, preallocate=wish.preallocate)
    written = write_onto(context, point, devices)
    placed = {disk.name: disk for disk in (*exported.disks, *written)}
    uuid = new_uuid(context.chance)
    text, changes = copied(context, machine, wish.name, uuid, placed)
    warnings = place_tpm(machine, uuid, placed)
    context.step("placed")
    machines.define(link, text, wish.name)
    if wish.start:
        machines.start(link, uuid, wish.name)
    return MachineOutcome(wish.name, uuid, wish.start, tuple(placed.values()), changes, (*exported.warnings, *warnings))


def refuse_undefinable(link: Link, machine: StoredMachine, name: str) -> None:
    """Raise DefineRefused when a machine like ``machine`` cannot be defined as ``name``."""
    if not name or "/" in name or any(ord(char) < 0x20 for char in name):
        raise DefineRefused(domain=name, reason="libvirt takes no such name")
    machines.refuse_taken(link, name)
    machines.refuse_lacking(link, name, machine.domain)


def copied(
    context: Context, machine: StoredMachine, name: str, uuid: str, placed: Mapping[str, RestoredDisk]
) -> tuple[str, tuple[str, ...]]:
    """The XML of ``machine`` for the disks ``placed`` (by NAME), and what is not as it was."""
    places = {
        dev: NewPlace(placed[disk.name].target, placed[disk.name].format, is_device(placed[disk.name].target))
        for dev, disk in machine.disks.items()
        if disk.name in placed
    }
    nvram = placed.get(machine.nvram.name) if machine.nvram else None
    found = copy_domain(
        machine.xml,
        Copy(
            name=name,
            uuid=uuid,
            disks=places,
            mac=lambda old: new_mac(old, context.chance),
            nvram=nvram.target if nvram else None,
        ),
    )
    return found.xml, found.changes


def place_tpm(machine: StoredMachine, uuid: str, placed: Mapping[str, RestoredDisk]) -> tuple[str, ...]:
    """Move the restored state of its TPM to where libvirt looks for that of ``uuid``; what could not be, in clauses.

    libvirt keeps it in a folder that is called after the machine's UUID.
    """
    warnings = []
    for record in machine.tpm:
        if record.name not in placed:
            continue
        restored = placed[record.name].target
        if machine.uuid not in record.path:
            warnings.append(f"the state of its TPM lies in {restored}; put it where {record.path} would be")
            continue
        place = record.path.replace(machine.uuid, uuid)
        try:
            os.makedirs(os.path.dirname(place), mode=0o711, exist_ok=True)
            with open(restored, "rb") as source, open(place, "xb") as target:
                target.write(source.read())
                os.fchown(target.fileno(), record.metadata.uid, record.metadata.gid)
                os.fsync(target.fileno())
        except OSError as failure:
            warnings.append(f"the state of its TPM lies in {restored} and could not be put at {place}: {failure}")
    return tuple(warnings)
