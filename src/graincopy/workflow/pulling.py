"""Stage R, the instant recovery: the loop that brings every disk of a running machine to its place."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from graincopy.core.clock import Clock
from graincopy.core.errors import RecoveryStalled
from graincopy.hypervisor.pull import REFUSALS, Puller
from graincopy.transfer.progress import Progress, ProgressSink

LOOK_SECONDS = 0.5
TRIES = 20  # beginnings of one job without any progress


class _Disk(msgspec.Struct):
    size: int
    tries: int = 0
    best: int = 0
    trouble: str = ""


def pull_all(puller: Puller, machine: str, sizes: Mapping[str, int], clock: Clock, progress: ProgressSink) -> None:
    """Return when nothing is below any of the disks (name → bytes) any more.

    One after the other: QEMU 7.2 dies of the end of one block-stream job while another runs (seen: a machine with two
    disks that had little in them, nearly every time). A job that ends in an error is begun again, and a machine that
    stands still is let go on: the view may just have come back. Raises RecoveryStalled when that leads nowhere, or the
    machine went away.
    """
    for name, size in sizes.items():
        disk = _Disk(size)
        while not _step(puller, machine, name, disk, progress):
            clock.sleep(LOOK_SECONDS)


def _step(puller: Puller, machine: str, name: str, disk: _Disk, progress: ProgressSink) -> bool:
    """One look at one disk; whether it is done."""
    try:
        puller.revive()
        found = puller.look(name)
        if not found.running and not found.ended:
            disk.tries += 1
            puller.begin(name)
    except REFUSALS as failure:
        disk.trouble, disk.tries = str(failure), disk.tries + 1
        found = None
    if found is not None and found.ended:
        progress(Progress(name, disk.size, disk.size))
        return True
    if found is not None and found.done > disk.best:
        disk.best, disk.tries = found.done, 0
        progress(Progress(name, disk.size * found.done // max(1, found.total), disk.size))
    if disk.tries > TRIES:
        raise RecoveryStalled(domain=machine, reason=disk.trouble or f"the job of {name} ends before it is done")
    return False
