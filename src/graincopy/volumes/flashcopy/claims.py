"""Stage 3: which vdisk of which array holds a path, from the host's own topology; the array is asked last."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from graincopy.model.volume import Claim, Refusal
from graincopy.volumes.flashcopy import names
from graincopy.volumes.flashcopy.host import HostDevices
from graincopy.volumes.stack import INNER, Broken, Device, Stack, span
from graincopy.volumes.topology import HostFiles, describe_device, trace

DRIVER = "flashcopy"
ArrayOf = Callable[[str], "str | None"]  # uid → name of the configured array that has such a vdisk


def claim_path(path: str, host: HostFiles, devices: HostDevices, array_of: ArrayOf) -> Claim | Refusal:
    """The claim on the vdisk under the real ``path``, or why there is none. No effect."""
    found = _under(path, host)
    if isinstance(found, Broken):
        return _refuse(path, found)
    stack, lower, end = found
    uid = _uid(lower, end, devices)
    if isinstance(uid, Broken):
        return _refuse(path, uid)
    array = array_of(uid)
    if array is None:
        return _refuse(path, Broken(f"{lower[-1].name} ({uid}) is a LUN of none of the configured arrays"))
    if os.geteuid() != 0:
        return _refuse(path, Broken("only root can attach a target of a LUN", "run graincopy as root"))
    return _claim_device(path, array, uid, lower) if stack is None else _claim_file(path, array, uid, stack)


def _under(path: str, host: HostFiles) -> tuple[Stack | None, tuple[Device, ...], Broken | None] | Broken:
    """The stack of a file (None for a device), the devices under it, and why they are not followed further."""
    try:
        real = host.real(path)
        found = host.stat(real)
    except OSError:
        found = None
    if found is not None and stat.S_ISBLK(found.st_mode):
        devices, end = describe_device(f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}", host)
        return (None, devices, end) if devices else end or Broken(f"{path} is not known")
    stack = trace(path, host)
    if isinstance(stack, Broken):
        return stack
    floor = stack.floors[0]
    if not floor.devices:
        return floor.end or Broken(f"{floor.mount.point} lies on no block device")
    return stack, floor.devices, floor.end


def _uid(lower: tuple[Device, ...], end: Broken | None, devices: HostDevices) -> str | Broken:
    bottom = lower[-1]
    uid = devices.uid_of(bottom.name)
    if uid is None:
        return Broken(f"{bottom.name} is no LUN with a WWN, nor a multipath device over one")
    if end is not None and not bottom.name.startswith("dm-"):
        return end
    return uid


def _claim_device(path: str, array: str, uid: str, lower: tuple[Device, ...]) -> Claim | Refusal:
    if len(lower) > 1:
        return _refuse(path, Broken(f"{path} is only a partition of the LUN", "name the whole device, or files on it"))
    why = f"the device is a LUN of array {array}"
    return Claim(path=path, driver=DRIVER, volume=names.volume_id(array, uid), why=why, size=lower[0].size)


def _claim_file(path: str, array: str, uid: str, stack: Stack) -> Claim | Refusal:
    floor = stack.floors[0]
    mount = floor.mount
    if mount.fs_type not in INNER:
        remedy = "use ext4 or XFS on the LUN"
        return _refuse(path, Broken(f"{mount.fs_type} at {mount.point} cannot be attached from a target", remedy))
    if floor.facts.trouble:
        return _refuse(path, Broken(f"{mount.point}: {floor.facts.trouble}", "keep all of the file system on the LUN"))
    offset, size = span(floor.devices)
    return Claim(
        path=stack.path,
        driver=DRIVER,
        volume=names.volume_id(array, uid),
        why=f"{mount.point} lies on a LUN of array {array}",
        inner_path=floor.inner_path,
        fs_type=mount.fs_type,
        fs_offset=offset,
        fs_size=size,
        mount=mount.point,
        size=stack.size,
    )


def _refuse(path: str, why: Broken) -> Refusal:
    return Refusal(path=path, driver=DRIVER, reason=why.reason, remedy=why.remedy, missing=why.missing)
