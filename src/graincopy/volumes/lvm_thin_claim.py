"""The lvm-thin driver's claim (stage 3): LVM is asked what kind of volume lies under a path. No effect."""

from __future__ import annotations

import os

from graincopy.model.volume import Claim
from graincopy.volumes.lvm_thin_path import OnVolume
from graincopy.volumes.lvm_thin_report import unfit
from graincopy.volumes.lvm_thin_tools import Lvm, ToolFailed
from graincopy.volumes.stack import Broken


def claim_volume(place: OnVolume, lvm: Lvm, driver: str) -> Claim | Broken:
    """``driver``'s claim on what lies at ``place``, when LVM can make thin snapshots of the volume there."""
    if os.geteuid() != 0:
        return Broken("only root can make snapshots with LVM", "run graincopy as root")
    package = lvm.missing()
    if package is not None:
        return Broken(f"{package} is needed and not there", f"apt-get install {package}")
    try:
        found = [one for one in lvm.volumes() if one.uuid == place.uuid]
    except ToolFailed as error:
        return Broken(str(error))
    if not found:
        return Broken(f"{place.path} lies on a logical volume that LVM does not list", "try pvscan --cache")
    volume = found[0]
    problem = unfit(volume)
    if problem is not None:
        return Broken(*problem)
    what = "the path is" if place.mount is None else f"{place.mount.point} lies on"
    return Claim(
        path=place.path,
        driver=driver,
        volume=volume.volume,
        why=f"{what} the thin volume {volume.path} in the pool {volume.pool}",
        inner_path=place.inner_path,
        fs_type=place.mount.fs_type if place.mount else None,
        mount=place.mount.point if place.mount else None,
        size=volume.size if place.size is None else place.size,
    )
