"""Which bytes of a thin volume changed, and which it has at all (stage 6): from thin_delta, once per pair of targets.

Targets are read-only and never change, so neither does an answer about two of them: it is kept for as long as the
driver object lives, since a backup of forty files on one volume asks forty times.
"""

from __future__ import annotations

from threading import Lock

import numpy as np

from graincopy.core.errors import ToolMissing
from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State
from graincopy.model.change_map import Changed, ChangeMap, Unknown
from graincopy.volumes.lvm_thin_delta import Delta, Garbled, distrusted, parse_delta
from graincopy.volumes.lvm_thin_report import LogicalVolume
from graincopy.volumes.lvm_thin_slot import SlotTaken, metadata_snapshot
from graincopy.volumes.lvm_thin_tools import Lvm, ToolFailed

_KEPT = 8  # answers


class Maps:
    """What thin_delta said. Safe to use from several threads."""

    def __init__(self, lvm: Lvm) -> None:
        self._lvm = lvm
        self._deltas: dict[tuple[str, str], Delta] = {}
        self._lock = Lock()

    def changed(self, base: LogicalVolume, now: LogicalVolume, pool: LogicalVolume | None) -> ChangeMap:
        """Ranges of the volume that may differ, a grown tail included; or why that is unknown."""
        delta = self._delta(base, now, pool)
        if isinstance(delta, str):
            return Unknown(delta)
        tail = Extents.of((base.size, now.size))
        return Changed(delta.changed.clip(0, now.size) | tail, "thin_delta")

    def placement(self, made: LogicalVolume, pool: LogicalVolume | None, external: bool) -> Placement:
        """T as a file that is the volume. Where its blocks do not tell, all of it counts as written."""
        whole = Placement.identity(made.size)
        if external:
            return whole
        delta = self._of(made) or self._delta(made, made, pool)
        if isinstance(delta, str):
            return whole
        mapped = delta.mapped_right if delta.right == made.thin_id else delta.mapped_left
        mapped = mapped.clip(0, made.size)
        states = np.full(len(mapped), State.WRITTEN, np.uint8)
        return Placement(made.size, mapped.starts, mapped.stops, mapped.starts, states)

    def _of(self, made: LogicalVolume) -> Delta | None:
        """Any answer in which ``made`` takes part."""
        with self._lock:
            return next((delta for pair, delta in self._deltas.items() if made.uuid in pair), None)

    def _delta(self, left: LogicalVolume, right: LogicalVolume, pool: LogicalVolume | None) -> Delta | str:
        """The answer, or in words why there is none."""
        key = (left.uuid, right.uuid)
        with self._lock:
            if key in self._deltas:
                return self._deltas[key]
            answer = self._ask(left, right, pool)
            if isinstance(answer, Delta):
                self._deltas[key] = answer
                for oldest in list(self._deltas)[:-_KEPT]:
                    del self._deltas[oldest]
            return answer

    def _ask(self, left: LogicalVolume, right: LogicalVolume, pool: LogicalVolume | None) -> Delta | str:
        if pool is None:
            return "the thin pool is gone"
        try:
            doubt = distrusted(self._lvm.delta_version())
            if doubt is not None:
                return f"thin_delta is not to be trusted: {doubt}"
            with metadata_snapshot(self._lvm, pool) as metadata:
                delta = self._lvm.delta(metadata, left.thin_id, right.thin_id, parse_delta)
        except SlotTaken as taken:
            return str(taken)
        except Garbled as garbled:
            return f"thin_delta cannot be understood: {garbled}"
        except (ToolFailed, ToolMissing) as failure:
            return f"thin_delta gave no answer: {failure}"
        except OSError as failure:
            return f"the metadata of the thin pool cannot be read: {failure.strerror}"
        if (delta.left, delta.right) != (left.thin_id, right.thin_id):
            return f"thin_delta answered about {delta.left} and {delta.right} instead"
        if pool.block and delta.block != pool.block:
            return f"thin_delta tells of blocks of {delta.block} bytes, LVM of {pool.block}"
        return delta
