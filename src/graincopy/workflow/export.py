"""The restore to a directory: every disk as a new sparse file DIR/NAME, there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from graincopy.core.extent import Extents
from graincopy.core.units import ceil_div
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.workload import Representation
from graincopy.transfer.progress import Meter
from graincopy.transfer.writer import Written, write_grains
from graincopy.volumes.base import FileSink
from graincopy.volumes.new_tree import finish_tree, make_folders
from graincopy.workflow.context import Context
from graincopy.workflow.heart import Heart
from graincopy.workflow.restore import RestoredDisk
from graincopy.workflow.restored_trees import notes_about, trees_of


class Folder(Protocol):
    """Where restored disks go: new files that appear under their name when they are complete."""

    def below(self, path: str) -> Folder:
        """The folder at ``path`` in this one."""

    def refuse_existing(self, names: Sequence[str]) -> None:
        """Raises OutputExists for the first name that is taken, OutputUnfit when this is no directory."""

    def new_file(self, name: str, size: int, preallocate: bool) -> AbstractContextManager[FileSink]:
        """A file of ``size`` zero bytes that gets its name at the end of the block, durably; never when that fails."""

    def new_image(self, name: str, size: int, format: str) -> AbstractContextManager[FileSink]:
        """The same, for what a guest sees: ``size`` bytes in a file of ``format``."""

    def path_of(self, name: str) -> str:
        """Where the file will be."""


class ExportOutcome(msgspec.Struct, frozen=True):
    """What was written, and what of the files' metadata could not be set."""

    point: RestorePoint
    disks: tuple[RestoredDisk, ...]
    warnings: tuple[str, ...] = ()


def restore_to(
    context: Context, point: RestorePoint, disks: Sequence[DiskRecord], folder: Folder, *, preallocate: bool = False
) -> ExportOutcome:
    """Write each of ``disks`` as a new file of ``folder``; directories come back whole, as folders of it.

    Raises OutputExists, OutputUnfit, RestoreNoSpace.
    """
    trees = trees_of(point, disks)
    inside = {disk.id: os.path.join(tree.manifest.name, path) for tree in trees for path, disk in tree.files}
    names = [disk.name for disk in disks if disk.id not in inside]
    folder.refuse_existing([*names, *(tree.manifest.name for tree in trees)])
    run = context.repository.open_run("export", point.workload, pins=(point.id,))  # keeps no backup from running
    try:
        heart = Heart(context.repository, run, context.clock, context.progress)
        restored = []
        warnings: list[str] = []
        for tree in trees:
            warnings += notes_about(tree)
            make_folders(folder.path_of(tree.manifest.name), tree.manifest)
        for disk in disks:
            head, name = os.path.split(inside.get(disk.id, disk.name))
            home = folder.below(head) if head else folder
            with _new(home, name, disk, preallocate) as sink:
                bill, lost = _fill(context, disk, sink, heart)
            warnings += (f"{disk.name}: {clause}" for clause in lost)
            done = (disk.size, bill.written_bytes, 0, bill.fetched_bytes)
            restored.append(RestoredDisk(disk.name, home.path_of(name), "new file", *done, format=disk.format))
            context.step("written")
        for tree in trees:
            warnings += finish_tree(folder.path_of(tree.manifest.name), tree.manifest)
    finally:
        context.repository.close_run(run)
    return ExportOutcome(point, tuple(restored), tuple(warnings))


def _fill(context: Context, disk: DiskRecord, sink: FileSink, heart: Heart) -> tuple[Written, tuple[str, ...]]:
    """Write all of ``disk`` to its new, empty file; the bill, and what of its metadata could not be set."""
    sink.apply(disk.metadata)  # nodatacow can only be set before the first write
    bill = write_grains(
        context.repository,
        disk.root,
        Extents.whole(ceil_div(disk.size, context.repository.grain_size)),
        sink,
        disk.size,
        fresh=True,
        workers=context.limits.workers,
        meter=Meter(disk.name, disk.allocated, heart),
    )
    return bill, sink.apply(disk.metadata)


def _new(home: Folder, name: str, disk: DiskRecord, preallocate: bool) -> AbstractContextManager[FileSink]:
    """A file for ``disk``: what was stored as a guest sees it gets its format back."""
    if disk.representation is Representation.GUEST and disk.format != "raw":
        return home.new_image(name, disk.size, disk.format)
    return home.new_file(name, disk.size, preallocate)
