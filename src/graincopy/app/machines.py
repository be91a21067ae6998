"""The operation ``workloads``: virtual machines, sets and subsystems that can be backed up."""

from __future__ import annotations

from typing import Any

from graincopy.app.answer import Answer, table
from graincopy.app.groups import sets_and_subsystems
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, WARNED, HypervisorDown, HypervisorRefused, ToolMissing, printable
from graincopy.workloads.libvirt_facts import Machine


def workloads(wiring: Wiring, _values: dict[str, Any]) -> Answer:
    """What ``graincopy backup`` can be told. A libvirt that is not there is a warning; the rest is listed."""
    machines, warnings = _machines(wiring)
    groups = sets_and_subsystems(wiring)
    rows = [(f"vm:{one.name}", _state(one), ", ".join(one.disks)) for one in machines]
    rows += [(str(one["workload"]), "", ", ".join(map(str, _members(one)))) for one in groups]
    shown = [tuple(printable(cell) for cell in row) for row in rows]
    return Answer(
        {"workloads": [*map(_document, machines), *groups], "warnings": list(warnings)},
        table(("WORKLOAD", "STATE", "WHAT IS IN IT"), [(first, second, third) for first, second, third in shown]),
        WARNED if warnings else DONE,
        warnings,
    )


def _machines(wiring: Wiring) -> tuple[tuple[Machine, ...], tuple[str, ...]]:
    try:
        return wiring.machines().overview(), ()
    except (HypervisorDown, HypervisorRefused, ToolMissing) as failure:
        return (), (f"virtual machines are not listed: {failure}",)


def _members(group: dict[str, object]) -> list[object]:
    members = group["members"]
    return list(members) if isinstance(members, list) else []


def _state(machine: Machine) -> str:
    if not machine.running:
        return "off"
    return "running" if machine.agent == "connected" else "running, no guest agent"


def _document(machine: Machine) -> dict[str, object]:
    return {
        "workload": f"vm:{machine.name}",
        "kind": "vm",
        "members": list(machine.disks),
        "name": machine.name,
        "uuid": machine.uuid,
        "running": machine.running,
        "persistent": machine.persistent,
        "agent": machine.agent,
    }
