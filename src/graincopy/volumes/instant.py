"""One common instant over all source volumes, whatever drivers hold them (stage 5: prepare, freeze, snapshot, thaw).

Everything that can be decided is decided, and everything that takes time is done, before the first file system is
frozen. Whatever goes wrong: first the thaw, then the targets are deleted, then the error goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import msgspec

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError
from graincopy.core.ids import VolumeId
from graincopy.model.snapshot import Target, TargetTag
from graincopy.model.volume import SourceVolume
from graincopy.volumes.base import PreparedGroup, VolumeDriver
from graincopy.volumes.freeze import FreezeGuard
from graincopy.volumes.freeze_plan import (
    FreezeLimits,
    FreezePlan,
    FreezeReport,
    check_prediction,
    devices_under,
    file_system_at,
    own_precious,
    plan_freeze,
    predict_ms,
    refuse,
)

Group = tuple[VolumeDriver, Sequence[VolumeId]]
Prepared = list[tuple[VolumeDriver, PreparedGroup]]
Quiesce = Callable[[], AbstractContextManager[object]]
STEPS = ("prepared", "frozen", "snapshotted", "thawed", "settled")


class Instant(msgspec.Struct, frozen=True):
    """What was taken: a target for each (driver name, volume), and how the window was; None when nothing was frozen."""

    targets: Mapping[tuple[str, VolumeId], Target]
    freeze: FreezeReport | None = None

    @property
    def held_ms(self) -> float | None:
        """The longest that writers of one S were held, by the window or by the snapshot itself; None: none was."""
        own = [one.held_ms for one in self.targets.values() if one.held_ms is not None]
        return max([*own, self.freeze.freeze_ms] if self.freeze else own, default=None)


class WindowTerms(msgspec.Struct, frozen=True):
    """What the window is held to. ``precious``: what → path of things that must not lie on a frozen file system."""

    limits: FreezeLimits = msgspec.field(default_factory=FreezeLimits)
    precious: Mapping[str, str] = msgspec.field(default_factory=dict)


class Revision(msgspec.Struct, frozen=True):
    """What turned out when the workload stood still: volumes that are gone, and volumes that came. By driver name."""

    gone: frozenset[tuple[str, VolumeId]] = frozenset()
    came: tuple[Group, ...] = ()


Revise = Callable[[], Revision]


class _Decided(msgspec.Struct, frozen=True):
    plan: FreezePlan
    predicted_ms: float
    warnings: tuple[str, ...]


def take_instant(
    groups: Sequence[Group],
    tag: TargetTag,
    freeze_mounts: Sequence[str] = (),
    *,
    clock: Clock,
    terms: WindowTerms | None = None,
    quiesce: Quiesce = nullcontext,
    revise: Revise = Revision,
    step: Callable[[str], None] = lambda name: None,
) -> Instant:
    """Targets of all volumes of all ``groups`` at one instant, settled, with ``freeze_mounts`` frozen around it.

    ``quiesce`` is entered when everything is prepared and left as soon as all is thawed: the workload's own part.
    ``revise`` is asked right after that, before anything is frozen; volumes that came must not need the freeze.
    ``step`` is told each of :data:`STEPS` when it is reached. Raises FreezeRefused before any effect, FreezeTooLong
    before anything is frozen; what the drivers raise; FrozenElsewhere, FreezeBroken. Then nothing is frozen, and no
    target is left that could be deleted; a deletion that failed is added to the error as a note.
    """
    terms = terms or WindowTerms()
    plan, sources = _plan(groups, freeze_mounts, terms)
    prepared: Prepared = []

    @contextmanager
    def standing() -> Iterator[None]:
        with quiesce():
            _revise(prepared, revise(), tag)
            yield

    try:
        for driver, volumes in groups:
            prepared.append((driver, driver.prepare(volumes, tag)))
        step("prepared")
        if plan.waves:
            decided = _predict(plan, prepared, sources, terms.limits)
            taken, report = _take_frozen(prepared, decided, terms.limits.deadline_s, clock, standing, step)
        else:
            taken, report = _take_running(prepared, standing, step), None
        step("thawed")
        settled = [driver.settle(targets) for (driver, _), targets in zip(prepared, taken, strict=True)]
        step("settled")
    except BaseException as error:
        _discard(prepared, error)
        raise
    return Instant({(one.driver, one.volume): one for targets in settled for one in targets}, report)


def _revise(prepared: Prepared, revision: Revision, tag: TargetTag) -> None:
    """Take the targets of volumes that are gone out of ``prepared``, and put those in that came."""
    for at, (driver, group) in enumerate(prepared):
        gone = tuple(target for target in group.targets if (driver.name, target.volume) in revision.gone)
        for target in gone:
            driver.delete(target)
        if gone:
            left = tuple(target for target in group.targets if target not in gone)
            prepared[at] = (driver, msgspec.structs.replace(group, targets=left))
    for driver, volumes in revision.came:
        prepared.append((driver, driver.prepare(volumes, tag)))


def _plan(
    groups: Sequence[Group], freeze_mounts: Sequence[str], terms: WindowTerms
) -> tuple[FreezePlan, Mapping[VolumeId, SourceVolume]]:
    """What to freeze, or a refusal. Without mounts there is nothing to decide."""
    if not freeze_mounts:
        return FreezePlan(()), {}
    sources = {volume: driver.describe(volume) for driver, volumes in groups for volume in volumes}
    plan = plan_freeze([file_system_at(point) for point in freeze_mounts])
    homes = {f"the target of {one.id}": one.home for one in sources.values() if one.home}
    refuse(plan, {**own_precious(), **terms.precious, **homes}, devices_under)
    return plan, sources


def _predict(
    plan: FreezePlan, prepared: Prepared, sources: Mapping[VolumeId, SourceVolume], limits: FreezeLimits
) -> _Decided:
    """How long the window will be. Raises FreezeTooLong."""
    told = [group.predicted_ms for _, group in prepared if group.predicted_ms is not None]
    untold = [
        sources[one.volume].extents for _, group in prepared if group.predicted_ms is None for one in group.targets
    ]
    predicted = predict_ms(untold, len(plan.all), told)
    extents = [one.extents for one in sources.values()]
    return _Decided(plan, predicted, check_prediction(predicted, extents, limits))


def _take_frozen(
    prepared: Prepared,
    decided: _Decided,
    deadline_s: float,
    clock: Clock,
    quiesce: Quiesce,
    step: Callable[[str], None],
) -> tuple[list[tuple[Target, ...]], FreezeReport]:
    with FreezeGuard(decided.plan, deadline_s, clock) as guard:
        guard.sync()
        # The pool is the outer one: whatever happens, the thaw comes before waiting for clones that still run.
        with quiesce(), ThreadPoolExecutor(max_workers=max(1, len(prepared))) as pool, guard.window() as window:
            step("frozen")
            taken = _snapshot_all(pool, prepared)
            step("snapshotted")
    assert window.report is not None
    return taken, msgspec.structs.replace(window.report, predicted_ms=decided.predicted_ms, warnings=decided.warnings)


def _take_running(prepared: Prepared, quiesce: Quiesce, step: Callable[[str], None]) -> list[tuple[Target, ...]]:
    with quiesce(), ThreadPoolExecutor(max_workers=max(1, len(prepared))) as pool:
        step("frozen")
        taken = _snapshot_all(pool, prepared)
        step("snapshotted")
    return taken


def _snapshot_all(pool: ThreadPoolExecutor, prepared: Prepared) -> list[tuple[Target, ...]]:
    running = [pool.submit(driver.snapshot, group) for driver, group in prepared]
    return [one.result() for one in running]


def _discard(prepared: Prepared, error: BaseException) -> None:
    """Delete every prepared target; what cannot be deleted is noted on ``error``, and is tagged for the reaper."""
    for driver, group in prepared:
        for target in group.targets:
            try:
                driver.delete(target)
            except (GraincopyError, OSError) as problem:
                error.add_note(f"target {target.id} could not be deleted: {problem}")
