"""Which disks the qemu driver takes, and why not the others (stage 3)."""

from __future__ import annotations

import os

from msgspec.structs import replace

from graincopy.core.ids import VolumeId
from graincopy.model.volume import Claim, Refusal
from graincopy.model.workload import Representation
from graincopy.volumes import qemu_rest
from graincopy.volumes.qemu_graph import NoPlace
from graincopy.volumes.qemu_header import HeaderUnfit
from graincopy.volumes.qemu_host import writers_of
from graincopy.volumes.qemu_resting import Resting
from graincopy.volumes.qemu_running import Running
from graincopy.volumes.qemu_source import PREFIX, file_size

DRIVER = "qemu"


class Claims:
    """Disks of QEMUs that are ``running``, and those that can be taken at rest."""

    def __init__(self, running: Running, resting: Resting) -> None:
        self._running, self._resting = running, resting

    def resolve(self, path: str, kind: str) -> Claim | Refusal:
        """Whether the disk at ``path``, of the format ``kind``, can be shown as its guest sees it, or why not."""
        real = os.path.realpath(path)
        if not os.path.exists(real):
            return replace(_refusal(path, f"{path} does not exist"), missing=True)
        if kind not in ("raw", "qcow2"):
            return _refusal(path, f"the format {kind} is not shown through QEMU here")
        if any("\udc80" <= char <= "\udcff" for char in real):
            return _refusal(path, "QEMU takes no path that is not UTF-8", "rename the file")
        try:
            found = self._running.find(real)
        except NoPlace as error:
            return _refusal(path, str(error), error.remedy)
        if found is None:
            return self._claim_at_rest(real, kind)
        if found.disk.format != kind:
            return _refusal(path, f"QEMU has it open as {found.disk.format}, not as {kind}")
        size = file_size(real) if kind == "raw" else found.disk.size
        why = f"the QEMU at {found.monitor} has it open, and can copy before it writes"
        return _claim(real, kind, size, why, group=found.monitor)

    def _claim_at_rest(self, path: str, kind: str) -> Claim | Refusal:
        if kind == "raw":
            return _refusal(path, "no QEMU that graincopy knows has it open", "name its monitor in qemu.monitors")
        try:
            header = qemu_rest.header_of(path)
            qemu_rest.layers_of(path, header)
        except (HeaderUnfit, OSError) as error:
            return _refusal(path, f"it cannot be shown as qcow2: {error}")
        writers = writers_of(path)
        if writers:
            remedy = "name the monitor of that QEMU in qemu.monitors, or shut the machine down"
            return _refusal(path, f"{', '.join(map(str, writers))} has it open for writing", remedy)
        inner = self._resting.holder(path)
        if isinstance(inner, Refusal):
            return _refusal(path, inner.reason, inner.remedy)
        still = not self._resting.snapshots(inner)
        why = f"its machine is off: {inner.why}; QEMU shows what the guest sees"
        return _claim(path, kind, header.size, why, still=still)


def _claim(path: str, kind: str, size: int, why: str, *, group: str = "", still: bool = False) -> Claim:
    return Claim(
        path=path,
        driver=DRIVER,
        volume=VolumeId(f"{PREFIX}{kind}:{path}"),
        why=why,
        size=size,
        representation=Representation.GUEST,
        format=kind,
        group=group,
        still=still,
    )


def _refusal(path: str, reason: str, remedy: str = "") -> Refusal:
    return Refusal(path=path, driver=DRIVER, reason=reason, remedy=remedy)
