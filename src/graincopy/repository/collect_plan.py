"""What a collect is going to do, and what it did: values, and the decisions about them. No effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from graincopy.core.ids import PointId
from graincopy.core.units import format_size
from graincopy.repository.index import Index
from graincopy.repository.mark import Marks
from graincopy.repository.records import PackRef

LIVE_SHARE = 0.5  # packs with less of their bytes live are repacked


class CollectPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a collect is going to do. Sizes in bytes."""

    packs: int
    stored_bytes: int
    sweep: tuple[PackRef, ...] = ()
    repack: tuple[PackRef, ...] = ()
    live_in_repack: int = 0

    @property
    def freed_bytes(self) -> int:
        """What there will be less, roughly: new packs have headers of their own."""
        return sum(pack.size for pack in (*self.sweep, *self.repack)) - self.live_in_repack

    def lines(self) -> tuple[str, ...]:
        """For people."""
        return (
            f"{self.packs} packs hold {format_size(self.stored_bytes)}",
            f"{len(self.sweep)} hold nothing that a restore point needs and go",
            f"{len(self.repack)} are mostly unneeded; {format_size(self.live_in_repack)} in them are stored anew",
            f"{format_size(max(0, self.freed_bytes))} come back",
        )


class CollectOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a collect did. Sizes in bytes."""

    swept: int  # packs that are gone
    repacked: int  # of these, packs of which something was stored anew
    freed_bytes: int
    fenced: tuple[PointId, ...] = ()
    kept_damaged: tuple[str, ...] = ()  # packs that were to be repacked and cannot be read


def plan_collect(packs: Sequence[PackRef], live: Mapping[str, int]) -> CollectPlan:
    """The plan for ``packs``, of which ``live`` bytes (by pack id) are needed."""
    sweep = tuple(pack for pack in packs if not live.get(pack.id))
    repack = tuple(pack for pack in packs if 0 < live.get(pack.id, 0) < LIVE_SHARE * pack.size)
    return CollectPlan(
        packs=len(packs),
        stored_bytes=sum(pack.size for pack in packs),
        sweep=sweep,
        repack=repack,
        live_in_repack=sum(live[pack.id] for pack in repack),
    )


def settle(plan: CollectPlan, index: Index, marks: Marks) -> tuple[tuple[PackRef, ...], tuple[PackRef, ...]]:
    """Packs of ``plan`` that go, and those of them that hold something live that must be moved first."""
    live = marks.live_bytes()
    known = set(index.packs)
    dead = tuple(pack for pack in (*plan.sweep, *plan.repack) if not live.get(pack.id))
    moving = tuple(pack for pack in plan.repack if live.get(pack.id) and pack in known)
    return (*dead, *moving), moving
