"""The audit of a change map: which clean grains are read all the same, and what that proves (stage 8).

Half of them lie beside dirty ranges and state boundaries, where a wrong map is wrong first; the other half is taken by
a cursor that rolls over all clean grains and has seen the whole disk after :func:`full_cover_runs` runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from graincopy.core.extent import Array, Extents
from graincopy.core.ids import DiskId
from graincopy.core.units import ceil_div

NEAR = 2  # grains to each side that count as beside
DOUBT = 0.05  # the bound holds with 95 % confidence
_AMOUNT = re.compile(r"(\d+)|(\d+(?:\.\d+)?)%|(all)")


class AuditAmount(msgspec.Struct, frozen=True, kw_only=True):
    """How much is audited per disk and run: a number of grains, or a share of the clean ones."""

    count: int = 64  # grains
    percent: float | None = None  # of the clean grains; None: ``count`` says it

    @classmethod
    def parse(cls, text: str) -> AuditAmount:
        """From ``64``, ``5%``, ``all`` or ``0``. Raises ValueError."""
        match = _AMOUNT.fullmatch(text.strip())
        percent = 100.0 if match and match[3] else float(match[2]) if match and match[2] else None
        if match is None or (percent is not None and percent > 100):
            raise ValueError(f"{text!r} is no amount to audit; write a number of grains, a percentage, or all")
        return cls(count=int(match[1]) if match[1] else 0, percent=percent)

    def grains(self, clean_count: int) -> int:
        """How many of ``clean_count`` clean grains that is; a share is rounded up."""
        if self.percent is None:
            return min(self.count, clean_count)
        return min(math.ceil(clean_count * self.percent / 100), clean_count)

    def __str__(self) -> str:
        if self.percent is None:
            return "1 grain" if self.count == 1 else f"{self.count} grains"
        return "all" if self.percent == 100 else f"{self.percent:g}%"


class AuditChoice(msgspec.Struct, frozen=True):
    """The grains to audit now, and the cursor at which the next run's rolling half begins."""

    grains: Extents
    next_cursor: int


def choose(
    clean: Extents, dirty: Extents, boundaries: Array, cursor: int, count: int, below: Callable[[int], int]
) -> AuditChoice:
    """Choose ``count`` of the grains ``clean`` (all of them when there are no more); every unit is a grain number.

    ``clean`` are grains that are allocated and that the map calls clean, ``dirty`` those that it does not,
    ``boundaries`` those in which an allocation state begins or ends, in any order. ``cursor`` is what the last run
    gave, or 0. ``below`` is the source of chance.
    """
    clean = clean - dirty
    if count >= clean.total:
        return AuditChoice(clean, 0)
    rolling, next_cursor = _roll(clean, cursor, rolling_share(count))
    near = (_widen(dirty) | _beside(boundaries)) & clean
    beside = _sample(near - rolling, count - rolling.total, below)
    chosen = rolling | beside
    return AuditChoice(chosen | _sample(clean - chosen, count - chosen.total, below), next_cursor)


def rolling_share(count: int) -> int:
    """How many of ``count`` audited grains the cursor takes: half, rounded up, so that even one grain a run rolls."""
    return count - count // 2


class Turns(msgspec.Struct, frozen=True):
    """Which files are audited now, and in how many runs each has its turn once."""

    disks: frozenset[DiskId]
    every: int


def take_turns(waited: Mapping[DiskId, int], amount: AuditAmount) -> Turns:
    """The files of directories whose turn it is: those that waited longest, ``waited`` being in runs.

    A number of grains is meant for a disk. A directory of a thousand files that are hardly larger than a grain would
    be read as a whole by each audit, so that only as many of them are looked at as of a disk's grains.
    """
    if amount.percent is not None or amount.count == 0:
        return Turns(frozenset(waited), 1)
    longest = sorted(waited, key=lambda disk: (-waited[disk], disk))
    return Turns(frozenset(longest[: amount.count]), max(1, ceil_div(len(waited), amount.count)))


def bound(clean_count: int, audited: int, mismatches: int = 0) -> float | None:
    """Share of ``clean_count`` grains that may be wrong, at most, with 95 % confidence. None when nothing was audited.

    Without a mismatch 1 - 0.05^(1/audited); with some, the one-sided limit of Clopper and Pearson (Biometrika 26,
    1934). It takes the sample as drawn at random; one draw from each of equal strata is at least as sharp as that.
    """
    if clean_count <= audited:
        return mismatches / clean_count if clean_count else 0.0
    if audited <= 0:
        return None
    if mismatches >= audited:
        return 1.0
    return _limit(audited, mismatches) if mismatches else 1.0 - DOUBT ** (1.0 / audited)


def full_cover_runs(clean_count: int, rolling_count: int, every: int = 1) -> int | None:
    """After how many runs, of which one in ``every`` audits, the cursor has seen every clean grain. None: never."""
    if clean_count == 0:
        return 0
    return ceil_div(clean_count, rolling_count) * every if rolling_count > 0 else None


def _roll(clean: Extents, cursor: int, count: int) -> tuple[Extents, int]:
    """The next ``count`` (< total) clean grains from ``cursor`` on, wrapping, and the grain after the last."""
    if not count:
        return Extents.empty(), cursor
    first = _rank(clean, cursor)
    ranks = (first + np.array([0, count - 1], np.int64)) % clean.total
    start, last = (int(grain) for grain in _at(clean, ranks))
    if start <= last:
        return clean.clip(start, last + 1), last + 1
    return clean - Extents.of((last + 1, start)), last + 1


def _rank(grains: Extents, grain: int) -> int:
    """How many of ``grains`` lie before ``grain``."""
    return int(np.clip(grain - grains.starts, 0, grains.stops - grains.starts).sum())


def _at(grains: Extents, ranks: Array) -> Array:
    """The grains with these ranks (0: the first)."""
    lengths = grains.stops - grains.starts
    ends = np.cumsum(lengths)
    member = np.searchsorted(ends, ranks, side="right")
    found: Array = grains.starts[member] + ranks - (ends[member] - lengths[member])
    return found


def _widen(grains: Extents) -> Extents:
    return Extents.from_arrays(np.maximum(grains.starts - NEAR, 0), grains.stops + NEAR)


def _beside(boundaries: Array) -> Extents:
    return _widen(Extents.from_points(boundaries))


def _sample(grains: Extents, count: int, below: Callable[[int], int]) -> Extents:
    """``count`` of ``grains`` by chance (all when there are no more): one from each of ``count`` equal strata."""
    total = grains.total
    if count >= total:
        return grains
    if count <= 0:
        return Extents.empty()
    edges = np.arange(count + 1, dtype=np.int64) * total // count
    dice = np.random.Generator(np.random.PCG64(below(1 << 62)))  # seeded by the caller's chance, so still a pure choice
    return Extents.from_points(_at(grains, dice.integers(edges[:-1], edges[1:])))


def _limit(audited: int, mismatches: int) -> float:
    """The share at which ``mismatches`` or fewer among ``audited`` have probability DOUBT, by bisection."""
    low, high = mismatches / audited, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(mismatches, audited, middle) > DOUBT else (low, middle)
    return high


def _at_most(hits: int, draws: int, share: float) -> float:
    """Binomial probability of ``hits`` or fewer in ``draws``; in logarithms, since the terms are tiny."""
    if share >= 1.0:
        return 0.0
    first = draws * math.log1p(-share)
    number = np.arange(hits, dtype=np.float64)
    steps = np.log((draws - number) / (number + 1)) + math.log(share) - math.log1p(-share)
    return float(np.exp(first + np.append(0.0, np.cumsum(steps))).sum())
