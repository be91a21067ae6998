"""Stage R for directories: what of a restore point belongs to which tree, and what the live tree has besides."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec

from graincopy.core.errors import ObjectDamaged
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.tree import Kind, Manifest, manifests
from graincopy.volumes.new_tree import finish_tree, make_folders
from graincopy.workloads.tree import names_below

_SHOWN = 3


class StoredTree(msgspec.Struct, frozen=True):
    """A directory of a restore point, and its files: (path in it, disk)."""

    manifest: Manifest
    files: tuple[tuple[str, DiskRecord], ...]
    lacking: tuple[str, ...]  # files that were there and are no disk of the point


def trees_of(point: RestorePoint, disks: Sequence[DiskRecord]) -> tuple[StoredTree, ...]:
    """The directories of ``point``; none unless all of its disks are wanted. Raises ObjectDamaged."""
    if len(disks) != len(point.disks):
        return ()
    by_id = {disk.id: disk for disk in disks}
    by_path = {disk.path: disk for disk in disks}
    try:
        found = manifests(point.definitions)
    except ValueError as error:
        raise ObjectDamaged(name=f"restore point {point.id}", reason=error) from error
    stored = []
    for manifest in found:
        files, lacking = [], []
        for path, entry in manifest.named(Kind.FILE):
            disk = (by_id.get(entry.disk) if entry.disk else None) or by_path.get(
                f"{manifest.where.rstrip('/')}/{path}"
            )
            if disk is None:
                lacking.append(path)
            else:
                files.append((path, disk))
        stored.append(StoredTree(manifest, tuple(files), tuple(lacking)))
    return tuple(stored)


def notes_about(tree: StoredTree) -> tuple[str, ...]:
    """What a person should hear about ``tree`` as it was stored."""
    if not tree.lacking:
        return ()
    return (f"{tree.manifest.name}: {len(tree.lacking)} files went while they were backed up: {_some(tree.lacking)}",)


def finish_live(trees: Sequence[StoredTree]) -> tuple[str, ...]:
    """Folders, links, owners and modes of the live trees, once their files are back; what could not be set, and what
    they hold that the point does not. Raises OutputUnfit.

    Nothing is ever deleted: docs/decisions/0007-trees-and-subsystems.md.
    """
    warnings: list[str] = []
    for tree in trees:
        warnings += notes_about(tree)
        make_folders(tree.manifest.where, tree.manifest)
        warnings += finish_tree(tree.manifest.where, tree.manifest)
        warnings += _besides(tree.manifest)
    return tuple(warnings)


def _besides(manifest: Manifest) -> tuple[str, ...]:
    known = {os.fsdecode(entry.path) for entry in manifest.entries}
    more = [path for path in names_below(manifest.where, manifest.exclude) if path not in known]
    if not more:
        return ()
    return (f"{manifest.where} holds {len(more)} entries that the restore point does not, left there: {_some(more)}",)


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + (", …" if len(paths) > _SHOWN else "")
