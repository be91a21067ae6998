"""After a crash: what dead runs left on storage and in the repository is found and removed.

The world is looked at in one order, which is what makes the answer sound: list the targets, ask whether their
owners live, then read the restore points and records. A dead owner publishes nothing afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from graincopy.core.errors import GraincopyError
from graincopy.core.ids import VolumeId
from graincopy.model.reap import Decision, Delete, Promote, ReapLimits, decide
from graincopy.model.snapshot import Owner, Target
from graincopy.repository.repository import Repository
from graincopy.volumes.base import VolumeDriver
from graincopy.workflow.checkpoints import checkpoint_disks, delete_target, promote
from graincopy.workflow.context import Context, Limits


class Reaped(msgspec.Struct, frozen=True):
    """What was decided about every target found, what could not be done, and the dead runs that were closed."""

    decisions: tuple[Decision, ...]
    failures: tuple[str, ...] = ()
    closed_runs: tuple[str, ...] = ()


def all_targets(
    drivers: Mapping[str, VolumeDriver],
    volumes: Sequence[tuple[str, VolumeId]] = (),
    failures: list[str] | None = None,
) -> tuple[Target, ...]:
    """Every target of ours that the drivers know of; ``volumes`` are (driver, S) pairs known from restore points.

    Storage that does not answer is told to ``failures``, where there are any, so that the others can be looked at.
    """
    found: dict[tuple[str, str], Target] = {}
    for name, driver in drivers.items():
        on = tuple({volume: None for owner, volume in volumes if owner == name})
        try:
            listed = driver.list_targets(on)
        except GraincopyError as failure:
            if failures is None:
                raise
            failures.append(f"{name}: {failure}")
            continue
        found.update({(name, target.id): target for target in listed})
    return tuple(found.values())


def survey_targets(
    drivers: Mapping[str, VolumeDriver],
    repository: Repository | None,
    alive: Callable[[Owner], bool | None],
    now: float,
    limits: Limits,
    failures: list[str] | None = None,
) -> tuple[Decision, ...]:
    """What should become of every target. No effect; without a repository only the owners are known.

    A repository with a damaged restore point counts as unreadable: a point that is not seen would be taken for one
    that never was.
    """
    targets = all_targets(drivers, _known_volumes(repository), failures)
    living = {target.tag.owner: alive(target.tag.owner) for target in targets}
    readable = repository if repository and not repository.unreadable_points() else None
    points = {readable.id: readable.points()} if readable else {}
    restores = {readable.id: readable.restores()} if readable else {}
    ages = ReapLimits(
        checkpoint_max_age=limits.checkpoint_max_age_s, crowded=_crowded(drivers, targets, limits.checkpoint_min_free)
    )
    return decide(targets, points, restores, living.__getitem__, now, repository.id if repository else None, ages)


def _crowded(drivers: Mapping[str, VolumeDriver], targets: Sequence[Target], min_free: float) -> frozenset[str]:
    """Targets on storage with less than the share ``min_free`` left."""
    crowded: set[str] = set()
    for driver, volume in {(target.driver, target.volume) for target in targets}:
        try:
            source = drivers[driver].describe(volume)
        except GraincopyError:
            continue  # S is gone; its targets are judged by what names them
        if source.home_size and source.home_free < source.home_size * min_free:
            crowded |= {target.id for target in targets if target.volume == volume}
    return frozenset(crowded)


def reap(context: Context, silence: float | None = None) -> Reaped:
    """Close dead runs, promote what a crash left half promoted, delete what nobody owns. Failures are reported.

    With ``silence``, other hosts' runs whose heart does not beat for so many seconds are fenced as well.
    """
    closed = _close_dead_runs(context)
    if silence is not None:
        closed += _fence_silent_runs(context, silence)
    failures: list[str] = []
    decisions = survey_targets(
        context.drivers, context.repository, context.alive, context.clock.now(), context.limits, failures
    )
    for decision in decisions:
        try:
            if isinstance(decision, Delete):
                delete_target(context, decision.target)
            elif isinstance(decision, Promote):
                point = context.repository.point(decision.target.tag.run)
                promote(context, decision.target, checkpoint_disks(point, decision.target))
        except GraincopyError as failure:
            failures.append(f"{decision.target.id}: {failure}")
    if not failures:
        _forget_ended_restores(context)
    return Reaped(decisions, tuple(failures), closed)


def _forget_ended_restores(context: Context) -> None:
    """Records of restores whose undo has expired: the grains that they keep may be collected then."""
    for state in context.repository.restores():
        if state.state in ("done", "undone") and context.clock.now() >= state.record.expires:
            context.repository.forget_restore(state.record.id)


def _close_dead_runs(context: Context) -> tuple[str, ...]:
    """Take the runs whose owner is known to be dead off the list of open runs.

    They are not fenced: the dead publish nothing, and the index segments of a fenced run are passed over, so that what
    it had stored would not be found again.
    """
    closed = []
    for run in context.repository.open_runs():
        if context.alive(run.owner) is False:
            context.repository.close_run(run)
            closed.append(run.id)
    return tuple(closed)


def _fence_silent_runs(context: Context, silence: float) -> tuple[str, ...]:
    """Watch the runs that nobody here can judge, on our own clock alone; a fenced run that wakes up loses, cleanly."""
    repository, clock = context.repository, context.clock
    watched = [
        (run, repository.heartbeat(run.id)) for run in repository.open_runs() if context.alive(run.owner) is None
    ]
    until = clock.monotonic() + silence
    while watched and (left := until - clock.monotonic()) > 0:
        clock.sleep(min(left, 1.0))
        watched = [(run, beat) for run, beat in watched if repository.heartbeat(run.id) == beat]
    for run, _ in watched:
        repository.fence(run.id)
        repository.close_run(run)
    return tuple(run.id for run, _ in watched)


def _known_volumes(repository: Repository | None) -> tuple[tuple[str, VolumeId], ...]:
    if repository is None:
        return ()
    return tuple({(disk.driver, disk.volume): None for point in repository.points() for disk in point.disks})
