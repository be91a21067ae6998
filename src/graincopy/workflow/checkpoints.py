"""Stage 9, on storage: promote T to checkpoint where the driver needs one, delete every other T of ours."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from graincopy.core.errors import GraincopyError
from graincopy.core.ids import WorkloadId
from graincopy.model.lineage import Deletion, superseded
from graincopy.model.restore_point import DiskRecord, RestorePoint
from graincopy.model.snapshot import CheckpointDisk, Role, Target
from graincopy.model.volume import Claim
from graincopy.model.workload import WorkloadFile
from graincopy.volumes.instant import Instant
from graincopy.workflow.context import Context
from graincopy.workflow.survey import Survey


def may_checkpoint(context: Context, claim: Claim) -> bool:
    """Whether a target of this claim's driver is worth keeping to compute the next changes from."""
    powers = context.driver(claim).capabilities()
    return powers.checkpoints and powers.change_map if claim.tracked is None else claim.tracked


def keep_checkpoints(
    context: Context, found: Survey, instant: Instant, point: RestorePoint
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Promote the targets that ``point`` names, retire older checkpoints, delete the rest.

    The point is published: nothing here can fail it. What goes wrong comes back as warnings, and stays tagged.
    """
    kept: list[Target] = []
    warnings: list[str] = []
    for target in instant.targets.values():
        try:
            disks = checkpoint_disks(point, target)
            if disks:
                kept.append(promote(context, target, disks))
            else:
                delete_target(context, target)
        except GraincopyError as failure:
            warnings.append(f"{target.id}: {failure}")
    context.step("promoted")
    for newer in kept:
        try:
            retire_older(context, found.targets, newer)
        except GraincopyError as failure:
            warnings.append(f"{newer.volume}: {failure}")
    context.step("superseded")
    return tuple(kept), tuple(warnings)


def checkpoint_disks(point: RestorePoint, target: Target) -> tuple[CheckpointDisk, ...]:
    """The disks of ``point`` whose checkpoint ``target`` is."""
    return tag_disks(point.workload, (disk for disk in point.disks if disk.checkpoint == target.id))


def tag_disks(workload: WorkloadId, disks: Iterable[WorkloadFile | DiskRecord]) -> tuple[CheckpointDisk, ...]:
    """What the tag of a target that serves ``disks`` says; all files of a tree are one entry."""
    return tuple(CheckpointDisk(workload=workload, disk=disk) for disk in dict.fromkeys(one.tag_disk for one in disks))


def promote(context: Context, target: Target, disks: tuple[CheckpointDisk, ...]) -> Target:
    """Make T a checkpoint for ``disks``. Idempotent."""
    tag = msgspec.structs.replace(target.tag, role=Role.CHECKPOINT, disks=disks)
    return context.driver(target).retag(target, tag)


def retire_older(context: Context, targets: Iterable[Target], newer: Target) -> None:
    """Delete the checkpoints whose disks are all served by ``newer``; take its disks off the others."""
    older = [one for one in targets if one.volume == newer.volume and one.tag.role == Role.CHECKPOINT]
    for move in superseded(older, newer, context.repository.id):
        if isinstance(move, Deletion):
            delete_target(context, move.target)
        else:
            tag = msgspec.structs.replace(move.target.tag, disks=move.disks_left)
            context.driver(move.target).retag(move.target, tag)


def delete_target(context: Context, target: Target) -> None:
    """Remove T through its driver."""
    context.driver(target).delete(target)
