"""What the freeze window may freeze, in which order, and how long it will take (stage 5): decided before any effect.

All of it is pure but :func:`file_system_at`, :func:`devices_under` and :func:`own_precious`, which look at the host.
Freezing itself: :mod:`graincopy.volumes.freeze`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from graincopy.core.errors import FreezeRefused, FreezeTooLong
from graincopy.volumes import freeze_guard
from graincopy.volumes.topology import HostFiles, Stack, devices_of, trace

CLONE_MS_PER_EXTENT = 0.013  # XFS, measured; Btrfs takes half of it
CLONE_MS = 8.0  # a clone of next to nothing
FREEZE_MS = 40.0  # freeze and thaw of one synced file system
FREEZE_MS_MORE = 10.0  # each further one, frozen in parallel


class FileSystem(msgspec.Struct, frozen=True):
    """A mounted file system: one mount point of it, its superblock's ``device`` ("maj:min"), and what carries it.

    ``beneath`` are the devices of the file systems on which its storage lies (loop devices), nearest first.
    """

    point: str
    device: str
    beneath: tuple[str, ...] = ()


class FreezePlan(msgspec.Struct, frozen=True):
    """File systems by wave; a wave is frozen in parallel, the inner ones first, and thawed in the other order."""

    waves: tuple[tuple[FileSystem, ...], ...]

    @property
    def all(self) -> tuple[FileSystem, ...]:
        """Every file system to be frozen, inner ones first."""
        return tuple(one for wave in self.waves for one in wave)


class FreezeLimits(msgspec.Struct, frozen=True):
    """What the configuration says: seconds until the guard thaws by itself; milliseconds that are worth a warning."""

    deadline_s: float = 10.0
    warn_ms: float = 1000.0


class MountReport(msgspec.Struct, frozen=True):
    """One file system in the window: milliseconds that the freeze itself took, and that it was held."""

    point: str
    freeze_ms: float
    held_ms: float


class FreezeReport(msgspec.Struct, frozen=True):
    """The window as it was: from the begin of the first freeze to the end of the last thaw, in milliseconds."""

    freeze_ms: float
    predicted_ms: float
    mounts: tuple[MountReport, ...]
    warnings: tuple[str, ...] = ()


def plan_freeze(file_systems: Sequence[FileSystem]) -> FreezePlan:
    """Waves: whatever carries another one is frozen after it. A file system named twice is frozen once."""
    chosen = {one.device: one for one in reversed(file_systems)}

    def depth(one: FileSystem) -> int:
        riders = [depth(other) for other in chosen.values() if one.device in other.beneath]
        return 1 + max(riders, default=-1)

    depths = {device: depth(one) for device, one in chosen.items()}
    ordered = sorted(chosen.values(), key=lambda one: one.point)
    return FreezePlan(
        tuple(
            tuple(one for one in ordered if depths[one.device] == level)
            for level in range(1 + max(depths.values(), default=-1))
        )
    )


def refuse(plan: FreezePlan, precious: Mapping[str, str], devices_of: Callable[[str], Sequence[str]]) -> None:
    """Raise FreezeRefused when something that is needed inside the window lies on a file system to be frozen.

    ``precious`` is what → path; ``devices_of`` tells the devices of the file system that holds a path and of all
    that carry it: freezing an outer one stops the inner one just as well.
    """
    frozen = {one.device: one for one in plan.all}
    for what, path in precious.items():
        for device in devices_of(path):
            if device in frozen:
                raise FreezeRefused(mount=frozen[device].point, what=what, path=path)


def predict_ms(extents: Sequence[int], filesystems: int, clones_ms: Sequence[float] = ()) -> float:
    """How long writers will stand still, in milliseconds: the snapshots and the freezes around them.

    ``clones_ms`` is what drivers say of their own; ``extents`` are the volumes of drivers that say nothing. Volumes
    are added up: clones run in parallel, but share a journal and its locks (measured: no faster than in turn).
    """
    if not filesystems:
        return 0.0
    told = sum(CLONE_MS + count * CLONE_MS_PER_EXTENT for count in extents)
    return FREEZE_MS + (filesystems - 1) * FREEZE_MS_MORE + told + sum(clones_ms)


def check_prediction(predicted_ms: float, extents: Sequence[int], limits: FreezeLimits) -> tuple[str, ...]:
    """Warnings about a long window; raises FreezeTooLong when it would reach the deadline."""
    limit_ms = limits.deadline_s * 1000
    if predicted_ms >= limit_ms:
        why = f"{sum(extents)} extents in {len(extents)} volumes"
        raise FreezeTooLong(predicted_ms=round(predicted_ms), limit_ms=round(limit_ms), why=why)
    if predicted_ms < limits.warn_ms:
        return ()
    return (
        f"the freeze window was predicted to take {predicted_ms:.0f} ms, because the most fragmented volume has "
        f"{max(extents, default=0)} extents; see docs/freeze.md",
    )


def file_system_at(path: str, host: HostFiles | None = None) -> FileSystem:
    """The file system that holds ``path`` (or its nearest parent that exists), and what carries it. Raises OSError."""
    host = host or HostFiles()
    real = os.path.realpath(path)
    while not os.path.lexists(real):
        real = os.path.dirname(real)
    mount = host.mount_of(real)
    if mount is None:
        return FileSystem(real, "")
    devices, _ = devices_of(mount, host)
    backing = devices[-1].backing if devices else None
    below = trace(backing.path, host) if backing and not backing.deleted else None
    beneath = tuple(floor.mount.device for floor in below.floors) if isinstance(below, Stack) else ()
    return FileSystem(mount.point, mount.device, beneath)


def devices_under(path: str) -> tuple[str, ...]:
    """Devices of the file system that holds ``path`` and of those that carry it, for :func:`refuse`."""
    found = file_system_at(path)
    return (found.device, *found.beneath)


def own_precious() -> dict[str, str]:
    """What of graincopy's own is needed inside the window, whatever the configuration says: what → path."""
    found = {
        "the running Python": os.path.realpath(sys.executable),
        "the Python library": os.path.dirname(os.path.realpath(os.__file__)),
        "the virtual environment": sys.prefix,
        "graincopy itself": os.path.dirname(os.path.realpath(freeze_guard.__file__)),
    }
    for fd, what in ((1, "the output of graincopy"), (2, "the log of graincopy")):
        path = _regular_file_behind(fd)
        if path is not None:
            found[what] = path
    return found


def _regular_file_behind(fd: int) -> str | None:
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None
    return path if os.path.isfile(path) else None
