"""The claim on a LUN image below a loop device, as reflink and btrfs make it (stage 3)."""

from __future__ import annotations

import os

from graincopy.core.ids import VolumeId
from graincopy.model.volume import Claim
from graincopy.volumes.stack import Broken, Lun
from graincopy.volumes.topology import HostFiles


def claim_lun(
    path: str, lun: Lun, host: HostFiles, *, driver: str, volume: VolumeId, where: str, how: str
) -> Claim | Broken:
    """``driver``'s claim on ``path``: a file on the file system in ``lun``, or the loop device itself.

    ``where`` says how people find the image, ``how`` what can be done with it ("cloned").
    """
    if lun.inner_path is None:
        if lun.offset or lun.size not in (0, host.stat(lun.volume).st_size):
            what = f"{path} shows only a part of the LUN image {lun.volume}"
            return Broken(what, "name the whole loop device, or the disk image files on it")
        return Claim(path=path, driver=driver, volume=volume, why=f"the device shows {where}")
    if os.geteuid() != 0:
        return Broken(f"only root can attach a target of the LUN image {lun.volume}", "run graincopy as root")
    return Claim(
        path=path,
        driver=driver,
        volume=volume,
        why=f"{lun.mount} lies on {where}, which can be {how}",
        inner_path=lun.inner_path,
        fs_type=lun.fs_type,
        fs_offset=lun.offset,
        fs_size=lun.size,
        mount=lun.mount,
        size=host.stat(path).st_size,
    )
