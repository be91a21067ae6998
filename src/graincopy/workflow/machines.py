"""Stages R and V, beside them: the virtual machines that a restore point holds, and which disks are whose. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from graincopy.core.errors import MachineUnknown, ObjectDamaged, UsageWrong
from graincopy.core.ids import DiskId, digest_id
from graincopy.hypervisor.domain_xml import Domain, parse_domain
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.workloads.libvirt_facts import definition_name, uuids

_NO_MACHINES = "none: only files were backed up"


class StoredMachine(msgspec.Struct, frozen=True):
    """One virtual machine of a restore point. ``disks`` by target dev; what was left out of the backup is absent."""

    uuid: str
    name: str
    xml: str  # as it was defined
    domain: Domain
    disks: Mapping[str, DiskRecord]
    nvram: DiskRecord | None = None
    tpm: tuple[DiskRecord, ...] = msgspec.field(default=())

    @property
    def files(self) -> tuple[DiskRecord, ...]:
        """Everything of it that is stored."""
        return (*self.disks.values(), *([self.nvram] if self.nvram else []), *self.tpm)


def machines_of(point: RestorePoint) -> tuple[StoredMachine, ...]:
    """Every virtual machine of ``point``, in the order of their UUIDs. Raises ObjectDamaged."""
    return tuple(_machine(point, uuid) for uuid in uuids(point.definitions))


def find_machine(point: RestorePoint, name: str | None) -> StoredMachine:
    """The one called ``name`` (or with that UUID), or the only one. Raises MachineUnknown, UsageWrong."""
    found = machines_of(point)
    wanted = [one for one in found if name is None or name in (one.name, one.uuid)]
    names = ", ".join(one.name for one in found) or _NO_MACHINES
    if not wanted:
        raise MachineUnknown(point=point.id, machine=name or "", machines=names)
    if len(wanted) > 1:
        raise UsageWrong(what=f"restore point {point.id[:12]} holds several machines; say which with --vm: {names}")
    return wanted[0]


def machines_with(point: RestorePoint, disks: Sequence[DiskRecord]) -> tuple[StoredMachine, ...]:
    """Those to which any of ``disks`` belongs."""
    wanted = {disk.id for disk in disks}
    return tuple(one for one in machines_of(point) if any(disk.id in wanted for disk in one.files))


def _machine(point: RestorePoint, uuid: str) -> StoredMachine:
    text = point.definitions[definition_name(uuid, "inactive.xml")].decode("utf-8", "replace")
    try:
        domain = parse_domain(text)
    except ValueError as failure:
        raise ObjectDamaged(name=f"restore point {point.id}", reason=f"the XML of {uuid}: {failure}") from failure
    by_id = {disk.id: disk for disk in point.disks}
    by_path = {disk.path: disk for disk in point.disks}
    disks = {}
    for disk in domain.disks:
        # By path where the disk is taken once for several machines, and bears the id of the first.
        record = by_id.get(_id("vm-disk", uuid, disk.dev)) or by_path.get(_known(disk.source.path, by_path))
        if record is not None and disk.device not in ("cdrom", "floppy"):
            disks[disk.dev] = record
    nvram = by_id.get(_id("vm-nvram", uuid))
    tpm = tuple(disk for disk in point.disks if disk.id == _id("vm-tpm", uuid, os.path.basename(disk.path)))
    return StoredMachine(uuid, domain.name, text, domain, disks, nvram, tpm)


def _known(path: str, by_path: Mapping[str, DiskRecord]) -> str:
    return path if path in by_path else os.path.realpath(path) if path else ""


def _id(kind: str, *parts: str) -> DiskId:
    return DiskId(digest_id(kind, parts))
