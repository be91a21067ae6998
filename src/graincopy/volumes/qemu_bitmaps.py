"""Dirty bitmaps of disks of a running QEMU (stages 4, 5): one begins before an instant, older ones are copied after.

A bit is set when a write *completes*, which is later than when it reaches the storage. So the copies are made by a
``transaction``: QEMU lets all requests come to their end before its first action (``bdrv_drain_all`` in
``qmp_transaction`` of blockdev.c), and whatever reached the storage by the instant is in the copy then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graincopy.core.units import KIB
from graincopy.hypervisor.qmp import Commands
from graincopy.volumes.qemu_graph import LiveDisk

GRAIN = 64 * KIB  # bytes: of bitmaps, and of what copy-before-write copies
PREFIX = "graincopy-"  # of the names of bitmaps


def bitmap_of(run: str) -> str:
    """The bitmap that knows what changed after the target of ``run``."""
    return PREFIX + run


def frozen_of(run: str, until: str) -> str:
    """What the bitmap of ``run`` knew at the instant of ``until``."""
    return f"{PREFIX}{run}@{until}"


def is_copy_for(name: str, until: str) -> bool:
    """Whether ``name`` is a bitmap as it was at the instant of ``until``."""
    return name.startswith(PREFIX) and name.endswith(f"@{until}")


def begin(monitor: Commands, wanted: Sequence[tuple[LiveDisk, str]]) -> None:
    """Begin on each disk the bitmap that is named with it, all at once; one that is there already goes on."""
    monitor.transaction(
        [
            (
                "block-dirty-bitmap-add",
                {"node": disk.disk, "name": name, "granularity": GRAIN, "persistent": disk.persistent},
            )
            for disk, name in wanted
            if disk.bitmap(name) is None
        ]
    )


def freeze(monitor: Commands, disks: Sequence[tuple[LiveDisk, str]]) -> None:
    """Copies of the older bitmaps that are sound, each disk with the run that they are made for.

    What they know now is what changed up to the instant, or more. Copies that are there stay as they are.
    """
    actions: list[tuple[str, Mapping[str, Any]]] = []
    for disk, until in disks:
        for name in [one.name for one in disk.bitmaps if one.sound and not one.busy and _is_tracking(one.name)]:
            if name == bitmap_of(until):
                continue
            frozen = frozen_of(name.removeprefix(PREFIX), until)
            if disk.bitmap(frozen) is None:
                data = {"node": disk.disk, "name": frozen, "granularity": GRAIN, "disabled": True}
                actions.append(("block-dirty-bitmap-add", data))
                merge = {"node": disk.disk, "target": frozen, "bitmaps": [name]}
                actions.append(("block-dirty-bitmap-merge", merge))
    monitor.transaction(actions)


def remove(monitor: Commands, node: str, names: Sequence[str]) -> None:
    """All of them, or none. Raises QmpRefused, OSError."""
    monitor.transaction([("block-dirty-bitmap-remove", {"node": node, "name": name}) for name in names])


def _is_tracking(name: str) -> bool:
    return name.startswith(PREFIX) and "@" not in name
