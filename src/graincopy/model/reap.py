"""Reaping: which of graincopy's targets on storage nobody needs any more (``targets --reap``, and before each run).

The answer is sound only when the world was looked at in this order: list the targets; ask whether their owners live;
read the restore points and restore records. A dead owner publishes nothing afterwards, so what is not recorded by then
never will be. (Asked the other way round, a restore could put its record, write, and die in between, and its undo
target would go.) ``alive`` therefore looks answers up; it does not ask then.

In doubt a target stays, and ``report`` says that somebody has to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from graincopy.core.ids import DiskId, RepositoryId, WorkloadId
from graincopy.model.restore_point import RestorePoint, RestoreState, order_key
from graincopy.model.snapshot import Owner, Role, Target


class Keep(msgspec.Struct, frozen=True):
    """The target stays. ``report``: graincopy cannot tell whether it is still needed."""

    target: Target
    reason: str
    report: bool = False


class Delete(msgspec.Struct, frozen=True):
    """Nobody needs the target any more."""

    target: Target
    reason: str


class Promote(msgspec.Struct, frozen=True):
    """The target's run died between publishing its point and making this the checkpoint that the point names."""

    target: Target
    reason: str


Decision = Keep | Delete | Promote


class ReapLimits(msgspec.Struct, frozen=True):
    """When what is finished goes; what is in progress never does. Ages in seconds of wall clock, which are hints."""

    undo_max_age: float | None = None  # None: as each restore record says
    checkpoint_max_age: float | None = None  # None: no limit
    crowded: frozenset[str] = frozenset()  # ids of targets on storage that is fuller than the configuration allows


USUAL = ReapLimits()


class Situation(msgspec.Struct, frozen=True):
    """What is known while deciding. A repository that is in neither mapping cannot be read now."""

    points: Mapping[RepositoryId, Sequence[RestorePoint]]
    restores: Mapping[RepositoryId, Sequence[RestoreState]]
    alive: Callable[[Owner], bool | None]
    now: float
    limits: ReapLimits
    own_repository: RepositoryId | None


def decide(
    targets: Sequence[Target],
    points: Mapping[RepositoryId, Sequence[RestorePoint]],
    restores: Mapping[RepositoryId, Sequence[RestoreState]],
    alive: Callable[[Owner], bool | None],
    now: float,
    own_repository: RepositoryId | None,
    limits: ReapLimits = USUAL,
) -> tuple[Decision, ...]:
    """One decision for each target, in order.

    ``points`` and ``restores`` hold everything of the repositories that can be read; one with any unreadable record is
    left out of both, since a record that is not seen would be taken for one that never was. ``alive`` says None when
    it cannot tell (another host's owner that was not fenced); ``own_repository`` is the one in use.
    """
    situation = Situation(points, restores, alive, now, limits, own_repository)
    rules = {Role.TARGET: _of_run, Role.CHECKPOINT: _checkpoint, Role.UNDO: _undo, Role.VIEW: _view}
    return tuple(rules[target.tag.role](target, situation) for target in targets)


def _of_run(target: Target, known: Situation) -> Decision:
    """The target of a run: needed while its owner lives; afterwards only as the checkpoint that a point names."""
    held = _held_by_owner(target, known)
    if held is not None:
        return held
    if not target.tag.disks:
        return Delete(target, "its owner is gone and it serves no disk")
    points = known.points.get(target.tag.repository)
    if points is None:
        return Keep(target, "its owner is gone, but its repository cannot be read: it may be a checkpoint", report=True)
    if not any(point.id == target.tag.run for point in points):
        return Delete(target, "its run died and published nothing")
    if _serves(target, points):
        return Promote(target, "its run published, and died before it was made a checkpoint")
    return Delete(target, "its run is published and it is nobody's newest checkpoint")


def _checkpoint(target: Target, known: Situation) -> Decision:
    """A checkpoint is needed while the newest point of one of its disks names it."""
    if target.tag.repository != known.own_repository:
        return Keep(target, "checkpoint of another repository")
    points = known.points.get(target.tag.repository)
    if points is None:
        return Keep(target, "checkpoint of a repository that cannot be read", report=True)
    if not _serves(target, points):
        return Delete(target, "no disk's newest restore point names it")
    if _older(target.tag.created, known.limits.checkpoint_max_age, known.now):
        return Delete(target, "checkpoint past its age limit")
    if target.id in known.limits.crowded:
        return Delete(target, "its storage is nearly full; the next backup compares instead")
    return Keep(target, "checkpoint of the newest restore point")


def _undo(target: Target, known: Situation) -> Decision:
    """The state before a restore: needed until the restore is undone, or was done long enough ago."""
    held = _held_by_owner(target, known)
    if held is not None:
        return held
    restores = known.restores.get(target.tag.repository)
    if restores is None:
        return Keep(target, "its restore record cannot be read", report=True)
    states = [restore for restore in restores if restore.record.id == target.tag.run]
    if not states:
        return Delete(target, "its restore died before it wrote anything")
    return _undo_of(target, states[0], known)


def _undo_of(target: Target, restore: RestoreState, known: Situation) -> Decision:
    if restore.state == "undone":
        return Delete(target, "its restore was undone")
    if restore.state != "done":
        return Keep(target, f"restore {restore.record.id} was begun and not ended", report=True)
    expired = known.now >= restore.record.expires
    if expired or _older(restore.record.opened, known.limits.undo_max_age, known.now):
        return Delete(target, "its undo has expired")
    return Keep(target, f"undo of restore {restore.record.id}")


def _view(target: Target, known: Situation) -> Decision:
    """Held by a live view, and only as long as that lives."""
    return _held_by_owner(target, known) or Delete(target, "its view has ended")


def _held_by_owner(target: Target, known: Situation) -> Keep | None:
    """Keep while the owner lives or may live; None once it is known to be gone."""
    living = known.alive(target.tag.owner)
    if living is None:
        return Keep(target, f"nobody here can tell whether its owner lives ({target.tag.owner})", report=True)
    return Keep(target, f"in use by {target.tag.owner}") if living else None


def _serves(target: Target, points: Iterable[RestorePoint]) -> bool:
    """True when the newest complete point of at least one of the target's disks names it as checkpoint."""
    newest = newest_checkpoints(points)
    return any(newest.get((disk.workload, disk.disk)) == (target.driver, target.id) for disk in target.tag.disks)


def newest_checkpoints(
    points: Iterable[RestorePoint],
) -> dict[tuple[WorkloadId, DiskId], tuple[str, str | None]]:
    """For each disk the driver and checkpoint id that its newest complete point names."""
    newest: dict[tuple[WorkloadId, DiskId], tuple[str, str | None]] = {}
    for point in sorted(points, key=order_key):
        if not point.incomplete:
            newest.update({(point.workload, disk.tag_disk): (disk.driver, disk.checkpoint) for disk in point.disks})
    return newest


def _older(since: float, limit: float | None, now: float) -> bool:
    return limit is not None and now - since > limit
