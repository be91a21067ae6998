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
) -> AuditResult:
    """Look at some clean grains of ``image``: half beside dirty ranges and state boundaries, half by rolling cursor."""
    grain_size = context.repository.grain_size
    touched = dirty.read | dirty.zero
    clean = now.allocated().to_grains(grain_size) - touched
    boundaries = now.allocated().bounds // grain_size
    count = AuditAmount.parse(amount).grains(clean.total)
    choice = choose(clean, touched, boundaries, base.audit.cursor, count, context.chance.below)
    wrong = mismatches(context, image, path, choice.grains, base.root)
    return AuditResult(
        grains=choice.grains.total,
        mismatches=wrong,
        cursor=choice.next_cursor,
        wrong_at_most=bound(clean.total, choice.grains.total, wrong),
        full_cover_runs=full_cover_runs(clean.total, rolling_share(choice.grains.total)),
    )


def mismatches(context: Context, image: Readable, path: str, grains: Extents, root: MapRoot) -> int:
    """How many of ``grains`` hold something else in ``image`` than the grain map ``root`` says."""
    meter = Meter("audit", 0, silent)
    seen = copy_grains(image, path, grains, context.repository, None, workers=1, meter=meter).entries
    return int(np.count_nonzero(differ(seen, context.repository.map.lookup(root, seen.grains))))
