"""What grains hold, as columns: one level of a grain map or a part of it. ``grainmap`` computes with these."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from graincopy.core.extent import Array, Mask
from graincopy.repository.format import Ids

ZERO = 0  # every byte of the grain is zero; never stored
CHUNK = 1  # the grain is the chunk of that id
_KINDS = (ZERO, CHUNK)


class Entries(msgspec.Struct, frozen=True, eq=False):
    """What some grains hold: grain numbers, kinds (ZERO, CHUNK) and ids (all zero for ZERO)."""

    grains: Array
    kinds: NDArray[np.uint8]
    ids: Ids

    def __len__(self) -> int:
        return len(self.grains)

    @classmethod
    def empty(cls) -> Entries:
        """No entries."""
        return cls(np.empty(0, np.int64), np.empty(0, np.uint8), np.empty((0, 32), np.uint8))

    @classmethod
    def zeros(cls, grains: Array) -> Entries:
        """``grains`` are zero."""
        return cls(grains, np.zeros(len(grains), np.uint8), np.zeros((len(grains), 32), np.uint8))

    @classmethod
    def chunks(cls, grains: Array, ids: Ids) -> Entries:
        """``grains`` are the chunks ``ids``."""
        return cls(grains, np.full(len(grains), CHUNK, np.uint8), ids)

    @classmethod
    def join(cls, parts: Sequence[Entries]) -> Entries:
        """One after the other."""
        if not parts:
            return cls.empty()
        return cls(
            np.concatenate([part.grains for part in parts]),
            np.concatenate([part.kinds for part in parts]),
            np.concatenate([part.ids for part in parts]),
        )

    def pick(self, which: NDArray[np.bool_] | Array | slice) -> Entries:
        """Some of them."""
        return Entries(self.grains[which], self.kinds[which], self.ids[which])

    def settled(self) -> Entries:
        """Ascending, each grain once: the last word about a grain counts."""
        if len(self) < 2 or bool((self.grains[1:] > self.grains[:-1]).all()):
            return self
        order = np.argsort(self.grains, kind="stable")
        last = np.append(self.grains[order][1:] != self.grains[order][:-1], True)
        return self.pick(order[last])


def check_changes(changes: Entries, grain_count: int) -> None:
    """Raises ValueError for a kind that is not known or a grain outside ``[0, grain_count)``."""
    if not bool(np.isin(changes.kinds, _KINDS).all()):
        raise ValueError("a change is of a kind that is not known")
    if len(changes) and (int(changes.grains[0]) < 0 or int(changes.grains[-1]) >= grain_count):
        raise ValueError(f"a change lies outside the {grain_count} grains of the disk")


def between(entries: Entries, low: int, high: int) -> Entries:
    """Those at positions ``[low, high)`` of ascending ``entries``."""
    first, last = np.searchsorted(entries.grains, [low, high])
    return entries.pick(slice(int(first), int(last)))


def unequal(left: Entries, right: Entries) -> tuple[Entries, Entries]:
    """Both without the positions at which they hold the same. Both ascend."""
    _, mine, theirs = np.intersect1d(left.grains, right.grains, assume_unique=True, return_indices=True)
    same = (left.kinds[mine] == right.kinds[theirs]) & (left.ids[mine] == right.ids[theirs]).all(axis=1)
    keep_left, keep_right = np.ones(len(left), np.bool_), np.ones(len(right), np.bool_)
    keep_left[mine[same]] = False
    keep_right[theirs[same]] = False
    return left.pick(keep_left), right.pick(keep_right)


def distinct_ids(ids: Ids) -> Ids:
    """Each id once. Ids have equal length, so that NumPy's padding of S32 cannot confuse two of them."""
    if len(ids) < 2:
        return ids
    flat = np.ascontiguousarray(ids).view("S32").ravel()
    order = np.argsort(flat, kind="stable")
    fresh: Mask = np.append(True, flat[order][1:] != flat[order][:-1])
    distinct: Ids = ids[order[fresh]]
    return distinct
