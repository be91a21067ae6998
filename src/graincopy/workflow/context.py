"""What every workflow step is given: drivers, repository, clock, chance, limits. No step looks for these itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import msgspec

from graincopy.core.clock import Chance, Clock
from graincopy.core.errors import PathMissing, VolumeUnsupported
from graincopy.core.ids import VolumeId
from graincopy.model.instant import instant_of
from graincopy.model.planner import FreezeForecast
from graincopy.model.restore_point import DiskRecord
from graincopy.model.snapshot import Owner, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume
from graincopy.model.workload import Representation, WorkloadFile
from graincopy.repository.repository import Repository
from graincopy.transfer.progress import ProgressSink
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.freeze_plan import FreezeLimits, file_system_at, plan_freeze, predict_ms
from graincopy.volumes.instant import Instant, Quiesce, Revise, Revision, WindowTerms, take_instant


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers that the configuration may set. Times in seconds."""

    workers: int = 3
    audit: str = "64"
    freeze_deadline_s: float = 10.0
    freeze_warn_ms: float = 1000.0
    undo_keep_s: float = 7 * 86400.0
    collect_patience_s: float = 60.0
    checkpoint_max_age_s: float | None = None
    checkpoint_min_free: float = 0.05  # share of the storage below which checkpoints are given up


class Context(msgspec.Struct, frozen=True, kw_only=True):
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

    def claim(self, file: WorkloadFile | DiskRecord) -> Claim:
        """The best driver's claim on ``file``, in its representation and through its stated format.

        Raises PathMissing, or VolumeUnsupported with every driver's reason.
        """
        path = file.path
        answer = resolve(
            self._drivers_for(file), path, file.format if file.representation is Representation.GUEST else None
        )
        if isinstance(answer, Claim):
            return answer
        # a driver of other things than files (rbd, qemu) refuses a missing file for a reason of its own
        if path.startswith("/") and any(one.missing for one in answer):
            raise PathMissing(path=path)
        raise VolumeUnsupported(path=path, reason="; ".join(f"{one.driver}: {one.reason}" for one in answer))

    def _drivers_for(self, file: WorkloadFile | DiskRecord) -> dict[str, VolumeDriver]:
        """Drivers that may take ``file``: whole copies only of a machine's state, which never waits for its writer."""
        state = isinstance(file, WorkloadFile) and file.state
        powers = {name: driver.capabilities() for name, driver in self.drivers.items()}
        return {
            name: driver
            for name, driver in self.drivers.items()
            if (powers[name].snapshots if state else not powers[name].copies)
        }

    def instant(
        self, claims: Sequence[Claim], tag: TargetTag, quiesce: Quiesce = nullcontext, revise: Revise = Revision
    ) -> Instant:
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
            revise=revise,
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

    def instant_of(self, claims: Sequence[Claim], paused: bool = False) -> str:
        """ "one" or "per file": whether targets of ``claims`` show one instant. Writers held off count as paused."""
        running = [claim for claim in claims if self.snapshots(claim)]
        together = {claim.driver for claim in running if self.driver(claim).capabilities().group_instant}
        return instant_of(running, self.freeze_mounts(running), paused=paused, together=together)

    def snapshots(self, claim: Claim) -> bool:
        """Whether a target of ``claim`` outlives a write to S: only then is it an undo, or something to view."""
        return self.driver(claim).capabilities().snapshots and not claim.still

    def has_change_map(self, claim: Claim) -> bool:
        """Whether the driver of ``claim`` can tell what changed: of this file, or else at all."""
        return self.driver(claim).capabilities().change_map if claim.tracked is None else claim.tracked

    def driver(self, claim: Claim | Target) -> VolumeDriver:
        """The driver that made ``claim`` or ``target``."""
        return self.drivers[claim.driver]


def resolve(drivers: Mapping[str, VolumeDriver], path: str, guest: str | None = None) -> Claim | tuple[Refusal, ...]:
    """The first claim on ``path`` in order of preference, or every driver's refusal.

    ``guest`` is the format through which a guest sees the file, where that view is wanted and not the file's bytes.
    """
    refusals = []
    for driver in drivers.values():
        answer = driver.resolve(path) if guest is None else driver.resolve_guest(path, guest)
        if isinstance(answer, Claim):
            return answer
        refusals.append(answer)
    return tuple(refusals)
