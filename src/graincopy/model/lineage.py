"""Lineage: which restore point a disk's next one builds on, and which checkpoint tells what changed (stages 3 and 9).

A checkpoint is a base only when the point that it made is readable in *this* repository and names it. In any doubt the
answer is :class:`Compare`: reading more is slow, a wrong "clean" loses data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from graincopy.core.ids import DiskId, RepositoryId, WorkloadId
from graincopy.model.restore_point import DiskRecord, RestorePoint, order_key
from graincopy.model.snapshot import CheckpointDisk, Role, Target
from graincopy.model.volume import Claim, SourceVolume
from graincopy.model.workload import WorkloadFile


class Incremental(msgspec.Struct, frozen=True):
    """The driver can be asked what changed since ``checkpoint``, which shows the disk as ``point`` stored it."""

    point: RestorePoint
    disk_record: DiskRecord
    checkpoint: Target


class Compare(msgspec.Struct, frozen=True):
    """``point`` is the parent, but nobody can tell what changed since; every allocated grain is read and compared."""

    point: RestorePoint
    disk_record: DiskRecord
    reason: str  # one clause


class First(msgspec.Struct, frozen=True):
    """Nothing to build on; every allocated grain is read."""

    reason: str  # one clause


Lineage = Incremental | Compare | First


class Deletion(msgspec.Struct, frozen=True):
    """An old checkpoint of which every disk is served by the newer one."""

    target: Target


class Retag(msgspec.Struct, frozen=True):
    """An old checkpoint that goes on serving ``disks_left`` only."""

    target: Target
    disks_left: tuple[CheckpointDisk, ...]


def choose_base(
    points: Sequence[RestorePoint],
    workload: WorkloadId,
    file: WorkloadFile,
    volume: SourceVolume,
    claim: Claim,
    checkpoints: Sequence[Target],
    repository: RepositoryId,
    changes: bool = True,
    history: Sequence[tuple[RestorePoint, DiskRecord]] | None = None,
) -> Lineage:
    """What the next restore point of ``file`` builds on.

    ``points`` are those that can be read in the one repository ``repository``; ``volume`` and ``claim`` say where the
    file lies now; ``checkpoints`` are the targets that exist now, of any role and repository; ``changes`` tells whether
    the volume's driver has a change map at all. ``history`` is what :func:`histories` says of the file, where many are
    asked about.
    """
    found = histories(points, workload).get(file.disk, []) if history is None else history
    if not found:
        return First("first backup")
    alike = [
        (point, record)
        for point, record in found
        if record.representation == file.representation and record.format == file.format
    ]
    if not alike:
        return First("representation changed")
    point, record = alike[0]
    reason = "the driver keeps no change map" if not changes else _misplaced(record, file, volume, claim)
    if reason is not None:
        return Compare(point, record, reason)
    answer = _base(point, record, volume, checkpoints, repository)
    return answer if isinstance(answer, Compare) else Incremental(point, record, answer)


def superseded(checkpoints: Iterable[Target], newer: Target, repository: RepositoryId) -> tuple[Deletion | Retag, ...]:
    """What becomes of the older checkpoints of ``repository`` on the volume of ``newer``, just published.

    Only for a *complete* restore point: an incomplete one is never a base, so its targets supersede nothing.
    """
    served = set(newer.tag.disks)
    decided: list[Deletion | Retag] = []
    for target in checkpoints:
        if not _rivals(target, newer, repository):
            continue
        left = tuple(disk for disk in target.tag.disks if disk not in served)
        if not left:
            decided.append(Deletion(target))
        elif len(left) < len(target.tag.disks):
            decided.append(Retag(target, left))
    return tuple(decided)


def histories(
    points: Sequence[RestorePoint], workload: WorkloadId
) -> dict[DiskId, list[tuple[RestorePoint, DiskRecord]]]:
    """For each disk of ``workload`` the complete points that hold it, newest first.

    They are sorted here: a wrong order would be a wrong base.
    """
    mine = (point for point in points if point.workload == workload and not point.incomplete)
    found: dict[DiskId, list[tuple[RestorePoint, DiskRecord]]] = {}
    for point in sorted(mine, key=order_key, reverse=True):
        for record in point.disks:
            found.setdefault(record.id, []).append((point, record))
    return found


def _misplaced(record: DiskRecord, file: WorkloadFile, volume: SourceVolume, claim: Claim) -> str | None:
    """Why the disk is not where ``record`` saw it; None when it is.

    The file is looked up in the checkpoint by its path: under another path the checkpoint may show another file.
    """
    if not record.volume == volume.id == claim.volume:
        return "the file moved to another volume"
    if record.path != file.path:
        return "the file was renamed"
    if (record.inner_path, record.fs_offset) != (claim.inner_path, claim.fs_offset):
        return "the path leads to another file of the volume"
    if record.incarnation != volume.incarnation:
        return "the volume was recreated"
    return None


def _base(
    point: RestorePoint,
    record: DiskRecord,
    volume: SourceVolume,
    checkpoints: Sequence[Target],
    repository: RepositoryId,
) -> Target | Compare:
    """The checkpoint that ``record`` names, or why it cannot be used."""
    if record.checkpoint is None:
        return Compare(point, record, "no checkpoint was kept")
    named = [t for t in checkpoints if t.id == record.checkpoint and t.driver == record.driver and _held(t, point)]
    if not named:
        return Compare(point, record, "the checkpoint was deleted")
    target = named[0]
    reason = _unfit(target, CheckpointDisk(workload=point.workload, disk=record.tag_disk), volume, repository)
    return target if reason is None else Compare(point, record, reason)


def _held(target: Target, point: RestorePoint) -> bool:
    """A checkpoint; or a target that would be one had a crash not cut off its promotion after the publish."""
    return target.tag.role is Role.CHECKPOINT or (target.tag.role is Role.TARGET and target.tag.run == point.id)


def _unfit(target: Target, disk: CheckpointDisk, volume: SourceVolume, repository: RepositoryId) -> str | None:
    if target.tag.repository != repository:
        return "the checkpoint belongs to another repository"
    if disk not in target.tag.disks:
        return "the checkpoint no longer serves this disk"
    if target.volume != volume.id:
        return "the file moved to another volume"
    if target.incarnation != volume.incarnation:
        return "the volume was recreated"
    return None


def _rivals(target: Target, newer: Target, repository: RepositoryId) -> bool:
    """True for another checkpoint of the same repository on the same volume."""
    return (
        target.tag.role is Role.CHECKPOINT
        and target.tag.repository == repository == newer.tag.repository
        and (target.driver, target.volume) == (newer.driver, newer.volume)
        and target.id != newer.id
    )
