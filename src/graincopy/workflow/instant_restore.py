"""Stage R, the instant recovery: a machine runs at once, off a view, and its disks are pulled to their place meanwhile.

Each disk is a qcow2 file at its final place on top of a read-only export of ours. What the guest writes goes to that
file and nowhere else, so that no write depends on graincopy. When graincopy dies, reads of what is not pulled yet make
the machine stand still; the same command again takes the view up at the same socket, lets it go on, and pulls the
rest. Order: a restore record that pins the point → the definition, with a tag that says all the rest → the files →
the socket → the start. So whoever comes later finds by the tag what there is to do. Crash points: ``opened``,
``recorded``, ``defined``, ``placed``, ``served``, ``started``, ``pulled``, ``released``, ``finished``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import msgspec

from graincopy.core.errors import DefineRefused, Interrupted, RestoreNoSpace, Terminated
from graincopy.core.ids import PointId, new_id
from graincopy.hypervisor import machine as machines
from graincopy.hypervisor.domain_copy import new_uuid
from graincopy.hypervisor.domain_xml import parse_domain
from graincopy.hypervisor.link import Link
from graincopy.hypervisor.owned import INSTANT, MachineTag, OwnedMachine, drop_tag, list_owned, write_tag
from graincopy.hypervisor.pull import LibvirtPuller, make_overlay
from graincopy.hypervisor.shown_disks import Export, stack_on, stand_alone
from graincopy.model.restore_point import DiskRecord, RestorePoint, RestoreRecord
from graincopy.volumes.live import free_bytes
from graincopy.volumes.places import make_directory, sync_directory
from graincopy.workflow.context import Context
from graincopy.workflow.export import Folder, restore_to
from graincopy.workflow.machine_folders import drop_folder, entered_by, make_folder
from graincopy.workflow.machine_restore import MachineOutcome, copied, place_tpm, refuse_undefinable
from graincopy.workflow.machines import StoredMachine
from graincopy.workflow.pulling import pull_all
from graincopy.workflow.restore import RestoredDisk
from graincopy.workflow.served import format_of, served
from graincopy.workflow.view import View, ViewWish, open_view


class InstantPlaces(msgspec.Struct, frozen=True):
    """Where a recovered machine goes: its disks to ``folder``, the sockets of views below ``runtime``."""

    folder: Folder
    runtime: str


def instant_restore(
    context: Context,
    point: RestorePoint,
    machine: StoredMachine,
    name: str,
    link: Link,
    places: InstantPlaces,
    wish: ViewWish,
    ready: Callable[[], None],
) -> MachineOutcome:
    """Let ``machine`` of ``point`` run as ``name`` at once; return when its disks need nothing but themselves.

    ``ready`` is called when it runs. Where an earlier one of the same point and name was cut off, that one is taken up
    again. Raises DefineRefused, OutputExists, RestoreNoSpace, StartRefused, RecoveryStalled.
    """
    owned = unfinished(context, point, name, link)
    disks = dict(machine.disks)
    records = tuple({disk.name: disk for disk in disks.values()}.values())
    with ExitStack() as held:
        if owned is None:
            refuse_undefinable(link, machine, name)
            refuse_no_room(places.folder, records, machine)
        view = held.enter_context(open_view(context, point, records, wish))
        context.step("opened")
        changes: tuple[str, ...] = ()
        if owned is None:
            owned, changes = _define(context, point, machine, name, link, places)
        paths = _paths(link, owned, machine, places.folder)
        user, home = machines.qemu_user(link), os.path.dirname(places.folder.path_of("x"))
        with entered_by(lambda: user, home):
            warnings = _place_small(context, point, machine, owned, places.folder)
        folder = make_folder(places.runtime, os.path.basename(owned.tag.folder), user)
        socket = os.path.join(folder, "nbd")
        exports = held.enter_context(served(view, records, socket, context.clock.monotonic, owner=user))
        with entered_by(lambda: user, home):
            for dev, disk in disks.items():
                _place(paths[dev], disk, exports[disk.name])
        context.step("served")
        try:
            machines.start(link, owned.uuid, name)
            ready()
            context.step("started")
            sizes = {dev: disk.size for dev, disk in disks.items()}
            pull_all(LibvirtPuller(link, owned.uuid), name, sizes, context.clock, context.progress)
        except (KeyboardInterrupt, Terminated) as failure:
            raise _cut_off(failure, name) from failure
        context.step("pulled")
        _finish(context, link, machine, owned)
        restored = tuple(_restored(view, disk, paths[dev]) for dev, disk in disks.items())
    return MachineOutcome(name, owned.uuid, True, restored, changes, warnings)


# --- what is there already --------------------------------------------------------------------------


def unfinished(context: Context, point: RestorePoint, name: str, link: Link) -> OwnedMachine | None:
    """The machine called ``name`` that was begun from ``point`` and is not finished. Raises DefineRefused."""
    for owned in list_owned(link):
        if owned.name != name or owned.tag.role != INSTANT:
            continue
        if (owned.tag.repository, owned.tag.point) != (context.repository.id, point.id):
            raise DefineRefused(domain=name, reason=f"it is being recovered from restore point {owned.tag.point}")
        if owned.tag.owner != context.owner and context.alive(owned.tag.owner):
            raise DefineRefused(domain=name, reason=f"it is being recovered by {owned.tag.owner}")
        return owned
    return None


def refuse_no_room(folder: Folder, records: Sequence[DiskRecord], machine: StoredMachine) -> None:
    """Names and room, before anything is done."""
    if not records:
        raise DefineRefused(domain=machine.name, reason="no disk of it is in this restore point")
    folder.refuse_existing([disk.name for disk in machine.files])
    needed, path = sum(disk.allocated for disk in records), folder.path_of(records[0].name)
    free = free_bytes(path)
    if needed > free:
        raise RestoreNoSpace(path=os.path.dirname(path), needed=needed - free, free=free)


# --- making it --------------------------------------------------------------------------------------


def _define(
    context: Context, point: RestorePoint, machine: StoredMachine, name: str, link: Link, places: InstantPlaces
) -> tuple[OwnedMachine, tuple[str, ...]]:
    """The record, then the definition with everything in its tag; and what is not as it was."""
    restore = _pin(context, point, link)
    context.step("recorded")
    uuid = new_uuid(context.chance)
    placed = on_overlays(machine, places.folder)
    text, changes = copied(context, machine, name, uuid, placed)
    tag = MachineTag(
        role=INSTANT,
        run=new_id(context.chance),
        point=point.id,
        repository=context.repository.id,
        owner=context.owner,
        folder=os.path.join(places.runtime, f"instant-{uuid}"),
        restore=restore,
        disks={dev: disk.name for dev, disk in machine.disks.items()},
    )
    socket = os.path.join(tag.folder, "nbd")
    exports = {dev: Export(socket, _on_the_wire(disk.name), format_of(disk)) for dev, disk in machine.disks.items()}
    paths = {dev: placed[disk.name].target for dev, disk in machine.disks.items()}
    machines.define(link, write_tag(stack_on(text, exports, paths), tag), name)
    context.step("defined")
    return OwnedMachine(uuid=uuid, name=name, tag=tag), changes


def on_overlays(machine: StoredMachine, folder: Folder) -> Mapping[str, RestoredDisk]:
    """Where everything of ``machine`` will lie, and in which format, by NAME."""
    placed = {disk.name: _planned(disk, disk.format, folder) for disk in small(machine)}
    return placed | {disk.name: _planned(disk, "qcow2", folder) for disk in machine.disks.values()}


def small(machine: StoredMachine) -> tuple[DiskRecord, ...]:
    """What is not pulled, but there before the start: firmware variables and the state of a TPM."""
    return (*([machine.nvram] if machine.nvram else []), *machine.tpm)


def _place_small(
    context: Context, point: RestorePoint, machine: StoredMachine, owned: OwnedMachine, folder: Folder
) -> tuple[str, ...]:
    """The small files, as far as they are not there yet."""
    missing = [disk for disk in small(machine) if not os.path.exists(folder.path_of(disk.name))]
    exported = restore_to(context, point, missing, folder)
    placed = {disk.name: disk for disk in exported.disks}
    context.step("placed")
    return (*exported.warnings, *place_tpm(machine, owned.uuid, placed))


def _pin(context: Context, point: RestorePoint, link: Link) -> str:
    """The id of a restore record that keeps ``point`` as long as the machine needs it.

    It names no disk: there is nothing that an undo could bring back. One that a crash left before it was used will do.
    """
    used = {owned.tag.restore for owned in list_owned(link)}
    for state in context.repository.restores():
        record = state.record
        if state.state == "open" and record.point == point.id and not record.disks and record.id not in used:
            return record.id
    record = RestoreRecord(
        id=PointId(new_id(context.chance)),
        point=point.id,
        workload=point.workload,
        owner=context.owner,
        opened=context.clock.now(),
        expires=context.clock.now(),
        disks=(),
    )
    context.repository.put_restore(record)
    return record.id


def _planned(disk: DiskRecord, kind: str, folder: Folder) -> RestoredDisk:
    return RestoredDisk(disk.name, folder.path_of(disk.name), "pulled", disk.size, 0, 0, 0, format=kind)


def _on_the_wire(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _paths(link: Link, owned: OwnedMachine, machine: StoredMachine, folder: Folder) -> Mapping[str, str]:
    """Where its disks lie, by target dev, as it is defined. Raises DefineRefused when that is not ``folder``."""
    found = parse_domain(machines.description(link, owned.uuid))
    paths = {disk.dev: disk.source.path for disk in found.disks}
    for dev, disk in machine.disks.items():
        if paths.get(dev) != folder.path_of(disk.name):
            raise DefineRefused(domain=owned.name, reason=f"it is being recovered to {paths.get(dev, 'elsewhere')}")
    return paths


def _place(path: str, disk: DiskRecord, export: Export) -> None:
    """The file of ``disk``, where it is not there yet: empty, on top of ``export``. Durable under its name."""
    if os.path.exists(path):
        return
    make_directory(os.path.dirname(path))
    part = f"{path}.part"
    make_overlay(part, disk.size, export)
    if os.geteuid() == 0:
        os.chown(part, disk.metadata.uid, disk.metadata.gid)
    os.rename(part, path)
    sync_directory(os.path.dirname(path))


# --- the end ----------------------------------------------------------------------------------------


def _finish(context: Context, link: Link, machine: StoredMachine, owned: OwnedMachine) -> None:
    """Define it without anything of ours, let the point go, and clean up.

    The tag goes after the point was let go: cut off before, the same command finds the machine and ends this.
    """
    text = write_tag(machines.description(link, owned.uuid), None)
    machines.define(link, write_tag(stand_alone(text, machine.xml, machine.disks), owned.tag), owned.name)
    for state in ("done", "undone"):
        context.repository.mark_restore(PointId(owned.tag.restore), state)
    context.step("released")
    drop_folder(owned.tag.folder)
    drop_tag(link, owned.uuid)
    context.step("finished")
    context.repository.forget_restore(PointId(owned.tag.restore))


def _restored(view: View, disk: DiskRecord, path: str) -> RestoredDisk:
    report = next((one for one in view.report() if one.name == disk.name), None)
    read = report.local_bytes if report else 0
    fetched = report.medium_bytes if report else 0
    return RestoredDisk(disk.name, path, "pulled", disk.size, read + fetched, read, fetched, format="qcow2")


def _cut_off(failure: BaseException, name: str) -> Interrupted | Terminated:
    """The same error, with the move that belongs here."""
    found = failure if isinstance(failure, Terminated) else Interrupted()
    found.next_move = f"{name} stands still as soon as it reads what is not pulled yet. Run the same command again."
    return found
