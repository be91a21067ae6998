"""Whether a restore point shows one instant (stages 1 and 9): decided once, for the plan and for what was done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from graincopy.model.volume import Claim


def instant_of(
    claims: Sequence[Claim],
    frozen_mounts: Collection[str] = (),
    *,
    paused: bool = False,
    together: Collection[str] = (),
) -> Literal["one", "per file"]:
    """Whether targets of ``claims`` show one instant, or each file its own, whatever drivers they are of.

    Claims of files that are held still are left out by the caller. One when the workload is paused or quiesced, or when
    at most one thing moves while the targets are taken: a volume, or a group of volumes of a driver in ``together``
    (those that snapshot a group at one instant). All the rest lies in file systems that are frozen around the
    snapshots: it looks the same in the whole window, and so as it did at the instant of the one that moves.
    """
    moving = {_act(claim, together) for claim in claims if claim.identity or claim.mount not in frozen_mounts}
    return "one" if paused or len(moving) <= 1 else "per file"


def _act(claim: Claim, together: Collection[str]) -> tuple[str, str, str]:
    """What is snapshotted in one act."""
    if claim.group and claim.driver in together:
        return claim.driver, "group", claim.group
    return claim.driver, "volume", claim.volume
