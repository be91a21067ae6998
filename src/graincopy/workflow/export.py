"""The restore to a directory: every disk as a new sparse file DIR/NAME, there whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from graincopy.core.extent import Extents
from graincopy.core.units import ceil_div
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.transfer.progress import Meter
from graincopy.transfer.writer import write_grains
from graincopy.volumes.base import FileSink
from graincopy.workflow.context import Context
from graincopy.workflow.heart import Heart
from graincopy.workflow.restore import RestoredDisk


class Folder(Protocol):
    """Where restored disks go: new files that appear under their name when they are complete."""

    def refuse_existing(self, names: Sequence[str]) -> None:
        """Raises OutputExists for the first name that is taken, OutputUnfit when this is no directory."""

    def new_file(self, name: str, size: int, preallocate: bool) -> AbstractContextManager[FileSink]:
        """A file of ``size`` zero bytes that gets its name at the end of the block, durably; never when that fails."""

    def path_of(self, name: str) -> str:
        """Where the file will be."""


@dataclass(frozen=True, slots=True)
class ExportOutcome:
    """What was written, and what of the files' metadata could not be set."""

    point: RestorePoint
    disks: tuple[RestoredDisk, ...]
    warnings: tuple[str, ...] = ()


def restore_to(
    context: Context, point: RestorePoint, disks: Sequence[DiskRecord], folder: Folder, *, preallocate: bool = False
) -> ExportOutcome:
    """Write each of ``disks`` as a new file of ``folder``. Raises OutputExists, OutputUnfit, RestoreNoSpace."""
    folder.refuse_existing([disk.name for disk in disks])
    run = context.repository.open_run("export", point.workload, pins=(point.id,))  # keeps no backup from running
    try:
        heart = Heart(context.repository, run, context.clock, context.progress)
        restored = []
        warnings: list[str] = []
        for disk in disks:
            with folder.new_file(disk.name, disk.size, preallocate) as sink:
                sink.apply(disk.metadata)  # nodatacow can only be set before the first write
                grains = Extents.whole(ceil_div(disk.size, context.repository.grain_size))
                bill = write_grains(
                    context.repository,
                    disk.root,
                    grains,
                    sink,
                    disk.size,
                    fresh=True,
                    workers=context.limits.workers,
                    meter=Meter(disk.name, disk.allocated, heart),
                )
                warnings += (f"{disk.name}: {clause}" for clause in sink.apply(disk.metadata))
            path = folder.path_of(disk.name)
            done = (disk.size, bill.written_bytes, 0, bill.fetched_bytes)
            restored.append(RestoredDisk(disk.name, path, "new file", *done))
            context.step("written")
    finally:
        context.repository.close_run(run)
    return ExportOutcome(point, tuple(restored), tuple(warnings))
