"""Whose storage ``validate-volume`` works on: the labs for what a user names, by driver.

reflink, btrfs, locked, copied, lvm-thin, flashcopy DIR     files in DIR
qemu DIR                                                    disks in DIR, of a qemu-storage-daemon and, where
                                                            files can be cloned, of none
rbd POOL, rbd POOL/NAMESPACE                                images of that pool
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable

from graincopy.app import host
from graincopy.app.wiring import Wiring
from graincopy.core.errors import OutputUnfit, StorageUnreachable, ToolMissing, UsageWrong
from graincopy.model.volume import Claim
from graincopy.testing.lab import VolumeLab

LabMaker = Callable[[], VolumeLab]


def labs_for(wiring: Wiring, driver: str, place: str) -> tuple[LabMaker, ...]:
    """What makes the labs of ``driver`` on ``place``, one after the other. Raises UsageWrong, OutputUnfit,
    StorageUnreachable, ToolMissing.
    """
    makers = {"qemu": _qemu, "rbd": _rbd}
    known = (*wiring.drivers_to_validate(), "qemu")
    if driver not in known:
        raise UsageWrong(what=f"there is no volume driver {driver}; choose one of {', '.join(sorted(known))}")
    return makers.get(driver, _files)(wiring, driver, place)


def _files(wiring: Wiring, driver: str, place: str) -> tuple[LabMaker, ...]:
    from graincopy.testing.file_lab import FileLab

    directory, make_driver = _directory(place), wiring.drivers_to_validate()[driver]
    return (lambda: FileLab([directory], make_driver, host.SystemClock(), name=driver),)


def _directory(place: str) -> str:
    directory = os.path.abspath(place)
    if not os.path.isdir(directory):
        raise OutputUnfit(path=directory, reason="it is no directory")
    return directory


def _qemu(wiring: Wiring, _driver: str, place: str) -> tuple[LabMaker, ...]:
    """Switched on, raw and qcow2; switched off only where files are cloned: under a lease nobody could write."""
    from graincopy.hypervisor.daemon import PROGRAM
    from graincopy.testing.qemu_lab import QemuLab

    directory = _directory(place)
    if shutil.which(PROGRAM) is None:
        raise ToolMissing(tool=PROGRAM, install="qemu-system-common")
    running: tuple[LabMaker, ...] = (lambda: QemuLab(directory, "qcow2"), lambda: QemuLab(directory, "raw"))
    reflink = wiring.drivers_to_validate()["reflink"]()
    with tempfile.NamedTemporaryFile(prefix="graincopy-validate-", dir=directory) as probe:
        cloned = isinstance(reflink.resolve(os.path.realpath(probe.name)), Claim)
    return (*running, lambda: QemuLab(directory, "qcow2", [reflink], running=False)) if cloned else running


def _rbd(wiring: Wiring, driver: str, place: str) -> tuple[LabMaker, ...]:
    from graincopy.testing.rbd_lab import RbdLab
    from graincopy.volumes.places import MemoryPlaces

    if os.path.isdir(place):
        return _files(wiring, driver, place)
    conf, settings = wiring.ceph_conf(), wiring.ceph_settings()
    pool, _, namespace = place.removeprefix("rbd:").partition("/")
    if not os.path.exists(conf):
        raise StorageUnreachable(storage="Ceph", reason=f"there is no {conf}; [rbd] conf says where it is")
    if shutil.which("rados") is None:
        raise ToolMissing(tool="rados", install="ceph-common")
    clock, places = host.SystemClock(), MemoryPlaces()
    return (lambda: RbdLab(conf, places, clock, settings=settings, pool=pool, namespace=namespace),)
