"""What every workflow step is given: drivers, repository, clock, chance, limits. No step looks for these itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from graincopy.core.clock import Chance, Clock
from graincopy.core.errors import PathMissing, VolumeUnsupported
from graincopy.core.ids import VolumeId
from graincopy.model.planner import FreezeForecast
from graincopy.model.snapshot import Owner, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume
from graincopy.repository.repository import Repository
from graincopy.transfer.progress import ProgressSink
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.freeze_plan import FreezeLimits, file_system_at, plan_freeze, predict_ms
from graincopy.volumes.instant import Instant, Quiesce, WindowTerms, instant_of, take_instant


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Numbers that the configuration may set. Times in seconds."""

    workers: int = 4
    audit: str = "64"
    freeze_deadline_s: float = 10.0
    freeze_warn_ms: float = 1000.0
    undo_keep_s: float = 7 * 86400.0
    collect_patience_s: float = 60.0
    checkpoint_max_age_s: float | None = None
    checkpoint_min_free: float = 0.05  # share of the storage below which checkpoints are given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The workflow's hands. Drivers stand in order of preference."""

    repository: Repository
    drivers: Mapping[str, VolumeDriver]
    clock: Clock
    chance: Chance
    owner: Owner
    alive: Callable[[Owner], bool | None]  # None: of another host, unknown
    precious: Mapping[str, str]  # what → path that must not be frozen
    limits: Limits
    progress: ProgressSink
    step: Callable[[str], None]  # called with the name of each crash point, before it is passed

    def claim(self, path: str) -> Claim:
        """The best driver's claim on ``path``. Raises PathMissing, or VolumeUnsupported with every driver's reason."""
        answer = resolve(self.drivers, path)
        if isinstance(answer, Claim):
            return answer
        if all(one.missing for one in answer):
            raise PathMissing(path=path)
        raise VolumeUnsupported(path=path, reason="; ".join(f"{one.driver}: {one.reason}" for one in answer))

    def instant(self, claims: Sequence[Claim], tag: TargetTag, quiesce: Quiesce = nullcontext) -> Instant:
        """A target of every volume of ``claims`` at one instant, their file systems frozen where that is needed."""
        volumes: dict[str, dict[VolumeId, None]] = {}
        for claim in claims:
            volumes.setdefault(claim.driver, {})[claim.volume] = None
        return take_instant(
            [(self.drivers[name], tuple(members)) for name, members in volumes.items()],
            tag,
            self.freeze_mounts(claims),
            clock=self.clock,
            terms=WindowTerms(
                FreezeLimits(self.limits.freeze_deadline_s, self.limits.freeze_warn_ms), dict(self.precious)
            ),
            quiesce=quiesce,
            step=self.step,
        )

    def freeze_mounts(self, claims: Sequence[Claim]) -> tuple[str, ...]:
        """The mounted file systems that the freeze window has to hold still for ``claims``, each once."""
        return tuple(
            {
                claim.mount: None
                for claim in claims
                if claim.mount and not claim.identity and self.driver(claim).capabilities().freeze == "outside"
            }
        )

    def forecast(self, claims: Sequence[Claim], volumes: Sequence[SourceVolume]) -> FreezeForecast | None:
        """What would be frozen, in order, and for how long at most; None when nothing would be."""
        mounts = self.freeze_mounts(claims)
        if not mounts:
            return None
        frozen = plan_freeze([file_system_at(mount) for mount in mounts]).all
        predicted = predict_ms([volume.extents for volume in volumes], len(frozen))
        return FreezeForecast(mounts=tuple(one.point for one in frozen), predicted_ms=predicted)

    def instant_of(self, claims: Sequence[Claim]) -> str:
        """ "one" or "per file": whether targets of ``claims`` show one instant. Writers held off count as paused."""
        running = [claim for claim in claims if self.driver(claim).capabilities().snapshots]
        return instant_of(running, self.freeze_mounts(running))

    def driver(self, claim: Claim | Target) -> VolumeDriver:
        """The driver that made ``claim`` or ``target``."""
        return self.drivers[claim.driver]


def resolve(drivers: Mapping[str, VolumeDriver], path: str) -> Claim | tuple[Refusal, ...]:
    """The first claim on ``path`` in order of preference, or every driver's refusal."""
    refusals = []
    for driver in drivers.values():
        answer = driver.resolve(path)
        if isinstance(answer, Claim):
            return answer
        refusals.append(answer)
    return tuple(refusals)
