"""Stage 6, its guard: re-read some of what the change map calls clean and compare it with the base."""

from __future__ import annotations

import numpy as np

from graincopy.core.extent import Extents
from graincopy.core.placement import Placement
from graincopy.model.audit import AuditAmount, bound, choose, full_cover_runs, rolling_share
from graincopy.model.change_map import DirtyGrains
from graincopy.model.restore_point import AuditResult, DiskRecord, MapRoot
from graincopy.transfer.pipeline import copy_grains, differ
from graincopy.transfer.progress import Meter, silent
from graincopy.volumes.base import Readable
from graincopy.workflow.context import Context


def audit_clean(
    context: Context,
    image: Readable,
    path: str,
    now: Placement,
    dirty: DirtyGrains,
    base: DiskRecord,
    amount: str,
    every: int = 1,
) -> AuditResult:
    """Look at some clean grains of ``image``: half beside dirty ranges and state boundaries, half by rolling cursor.

    ``every``: this disk is looked at in one of so many runs.
    """
    grain_size = context.repository.grain_size
    touched = dirty.read | dirty.zero
    clean = now.allocated().to_grains(grain_size) - touched
    boundaries = now.allocated().bounds // grain_size
    count = AuditAmount.parse(amount).grains(clean.total)
    choice = choose(clean, touched, boundaries, base.audit.cursor, count, context.chance.below)
    looked_at = choice.grains.total
    rolling = looked_at if looked_at == clean.total else rolling_share(looked_at)
    wrong = mismatches(context, image, path, choice.grains, base.root)
    return AuditResult(
        grains=looked_at,
        mismatches=wrong,
        cursor=choice.next_cursor,
        wrong_at_most=bound(clean.total, looked_at, wrong),
        full_cover_runs=full_cover_runs(clean.total, rolling, every),
    )


def mismatches(context: Context, image: Readable, path: str, grains: Extents, root: MapRoot) -> int:
    """How many of ``grains`` hold something else in ``image`` than the grain map ``root`` says."""
    meter = Meter("audit", 0, silent)
    seen = copy_grains(image, path, grains, context.repository, None, workers=1, meter=meter).entries
    return int(np.count_nonzero(differ(seen, context.repository.map.lookup(root, seen.grains))))


def distrust(disk: str, wrong: int, looked_at: int) -> str:
    """The loud part of a mismatch: ``wrong`` of ``looked_at`` audited grains."""
    return (
        f"{disk}: {wrong} of {looked_at} audited grains differ although the change map"
        " calls them unchanged; the disk was compared in full. Do not trust this volume's change map:"
        " run graincopy validate-volume on it"
    )
