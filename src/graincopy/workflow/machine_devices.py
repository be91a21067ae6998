"""Below stage R: disks of a restore point onto block devices, whatever they lay on before."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence

from graincopy.core.errors import DiskUnknown, OutputUnfit, PathMissing, RestoreNoSpace
from graincopy.core.extent import Extents
from graincopy.core.units import ceil_div
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.workload import Representation
from graincopy.transfer.progress import Meter
from graincopy.transfer.writer import write_grains
from graincopy.volumes.live import open_sink
from graincopy.workflow.context import Context
from graincopy.workflow.heart import Heart
from graincopy.workflow.restore import RestoredDisk


def write_onto(
    context: Context, point: RestorePoint, places: Sequence[tuple[DiskRecord, str]]
) -> tuple[RestoredDisk, ...]:
    """Write each disk onto the block device at its path, all of it. Raises SourceInUse."""
    if not places:
        return ()
    run = context.repository.open_run("export", point.workload, pins=(point.id,))
    try:
        heart = Heart(context.repository, run, context.clock, context.progress)
        return tuple(_write_onto(context, disk, path, heart) for disk, path in places)
    finally:
        context.repository.close_run(run)


def refuse_unfit_devices(point: RestorePoint, wanted: Mapping[str, DiskRecord], onto: Mapping[str, str]) -> None:
    """Raise DiskUnknown, or what is the matter with a device of ``onto`` (NAME → path).

    PathMissing, OutputUnfit for no block device, RestoreNoSpace for one that is too small, SourceInUse.
    """
    for name, path in onto.items():
        if name not in wanted:
            raise DiskUnknown(point=point.id, disk=name, disks=", ".join(wanted))
        _refuse_device(wanted[name], path)


def _refuse_device(disk: DiskRecord, path: str) -> None:
    if not os.path.exists(path):
        raise PathMissing(path=path)
    if not is_device(path):
        raise OutputUnfit(path=path, reason="it is no block device; leave --onto out for a new file")
    with open_sink(os.path.realpath(path)) as sink:
        if sink.size < disk.size:
            raise RestoreNoSpace(path=path, needed=disk.size - sink.size, free=0)


def _write_onto(context: Context, disk: DiskRecord, path: str, heart: Heart) -> RestoredDisk:
    with open_sink(os.path.realpath(path)) as sink:
        bill = write_grains(
            context.repository,
            disk.root,
            Extents.whole(ceil_div(disk.size, context.repository.grain_size)),
            sink,
            disk.size,
            fresh=False,
            workers=context.limits.workers,
            meter=Meter(disk.name, disk.size, heart),
        )
        sink.sync()
    context.step("written")
    kind = "raw" if disk.representation is Representation.GUEST else disk.format
    return RestoredDisk(
        name=disk.name,
        target=path,
        how="whole device",
        differing_bytes=disk.size,
        written_bytes=bill.written_bytes,
        read_bytes=0,
        fetched_bytes=bill.fetched_bytes,
        format=kind,
    )


def is_device(path: str) -> bool:
    """Whether a block device is there."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
