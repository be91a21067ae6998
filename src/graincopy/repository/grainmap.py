"""The grain map: a persistent radix tree from grain number to what the grain holds.

    level 1+  nodes: slot → id of the node below      level 0  leaves: slot → kind and id of the grain's content

Seen level by level the tree is a row of sorted sparse vectors: positions on level 0 are grain numbers, positions
on level n+1 are the numbers of the nodes that hold level n. Node k holds positions [k·fan-out, (k+1)·fan-out).
Every function works on such vectors, one batch of nodes at a time: nothing is per grain in Python.

Canonical: zero grains are not stored, empty nodes do not exist, the height follows from the number of grains.
So equal content has an equal root, and two maps differ exactly below the ids in which they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec
import numpy as np

from graincopy.core.errors import ObjectDamaged
from graincopy.core.extent import Array, Extents, Mask
from graincopy.core.ids import PieceId
from graincopy.model.restore_point import MapRoot
from graincopy.repository import format, frame
from graincopy.repository.entries import CHUNK, ZERO, Entries, between, check_changes, distinct_ids, unequal
from graincopy.repository.format import Ids

_NODE = 1  # kind of every entry above the leaves
_BATCH = 2048  # nodes in memory at a time
_MOST_GRAINS = 1 << 62

ReadNodes = Callable[[Ids], Sequence[bytes]]
WriteNodes = Callable[[Sequence[bytes]], Ids]
Marker = Callable[[Ids], Mask]


def height_for(grain_count: int, fan_out: int) -> int:
    """Height of the map of a disk of ``grain_count`` grains: a leaf alone has height 0."""
    height, reach = 0, fan_out
    while reach < grain_count:
        height, reach = height + 1, reach * fan_out
    return height


class GrainMap:
    """All operations on grain maps of one repository. Holds no map itself."""

    def __init__(self, fan_out: int, read_nodes: ReadNodes) -> None:
        """``read_nodes`` gives the contents of nodes in the order of their ids."""
        self.fan_out = fan_out
        self._read = read_nodes

    # --- reading ----------------------------------------------------------------------------------

    def lookup(self, root: MapRoot, grains: Array) -> Entries:
        """What each of ``grains`` holds, in the order asked for. Raises ObjectMissing or ObjectDamaged."""
        order = np.argsort(grains, kind="stable")
        wanted = grains[order]
        found = Entries(grains, np.zeros(len(grains), np.uint8), np.zeros((len(grains), 32), np.uint8))
        for leaf in self._leaves(root, lambda level: wanted // self.fan_out ** (level + 1)):
            first, last = np.searchsorted(wanted, [leaf.grains[0], leaf.grains[-1] + 1])
            at = np.searchsorted(leaf.grains, wanted[first:last])
            hit = leaf.grains[at] == wanted[first:last]
            place = order[first:last][hit]
            found.kinds[place], found.ids[place] = leaf.kinds[at[hit]], leaf.ids[at[hit]]
        return found

    def walk(self, root: MapRoot, within: Extents | None = None) -> Iterator[Entries]:
        """Everything that is not zero (inside the grain numbers ``within``), ascending, some leaves at a time."""
        if within is None:
            yield from self._leaves(root, None)
            return
        for leaf in self._leaves(root, lambda level: within.to_grains(self.fan_out ** (level + 1))):
            inside = leaf.pick(within.holds(leaf.grains))
            if len(inside):
                yield inside

    def allocated(self, root: MapRoot) -> Extents:
        """Numbers of the grains that are not zero."""
        parts = [Extents.from_points(leaf.grains).bounds.reshape(-1, 2) for leaf in self.walk(root)]
        pairs = np.concatenate(parts) if parts else np.empty((0, 2), np.int64)
        return Extents.from_arrays(pairs[:, 0], pairs[:, 1])

    def diff(self, one: MapRoot, other: MapRoot) -> Extents:
        """Numbers of the grains that differ, in O(differences). The heights may differ."""
        top = max(one.height, other.height) + 1
        left, right = self._hang(one, top), self._hang(other, top)
        for level in range(top - 1, 0, -1):
            left, right = unequal(left, right)
            left = Entries.join((self._children(level, left), self._hang(one, level)))
            right = Entries.join((self._children(level, right), self._hang(other, level)))
        left, right = unequal(left, right)
        return Extents.from_points(np.concatenate(list(self._differing_grains(left, right))))

    def reachable(self, roots: Iterable[MapRoot], mark: Marker) -> None:
        """Tell ``mark`` every node and chunk that ``roots`` reach; it answers which of these ids are new to it.

        What hangs below a node that is not new is passed over: it was told before.
        """
        by_height: dict[int, list[PieceId]] = {}
        for root in roots:
            if root.node is not None:
                by_height.setdefault(root.height, []).append(root.node)
        frontier = np.empty((0, 32), np.uint8)
        for level in range(max(by_height, default=-1), -1, -1):
            added = np.frombuffer(b"".join(by_height.get(level, [])), np.uint8).reshape(-1, 32)
            frontier = distinct_ids(np.concatenate((frontier, added)))
            frontier = frontier[mark(frontier)]
            below: list[Ids] = [np.empty((0, 32), np.uint8)]
            for start in range(0, len(frontier), _BATCH):
                ids = frontier[start : start + _BATCH]
                entries = self._decode(level, np.arange(len(ids)), ids)
                found = distinct_ids(entries.ids[entries.kinds == CHUNK])
                if level == 0:
                    mark(found)
                else:
                    below.append(found)
            frontier = np.concatenate(below)

    # --- writing ----------------------------------------------------------------------------------

    def update(self, root: MapRoot, grain_count: int, changes: Entries, write: WriteNodes) -> MapRoot:
        """The map with ``changes`` in it and nothing at or beyond ``grain_count``; ``root`` stays what it is.

        ``write`` stores node contents and gives their ids. Raises ValueError for a kind that is not known or a
        grain outside ``[0, grain_count)``.
        """
        changes = changes.settled()
        check_changes(changes, grain_count)
        height = height_for(grain_count, self.fan_out)
        if grain_count == 0:
            return MapRoot()
        old = self._descend_for_update(root, height, grain_count, changes.grains)
        for level in range(height + 1):
            limit = -(-grain_count // self.fan_out**level)
            hung = self._hang(root, level).grains  # a root that the map outgrew: what holds it must be built
            edge = np.append(hung, limit - 1)
            numbers = np.unique(np.concatenate((changes.grains, edge)) // self.fan_out)
            changes = self._rebuild(level, numbers, old[level], changes, limit, write)
        # One position is left on top. Untouched it is what it was, which is possible only above an old root.
        kept = bool(len(changes)) and int(changes.kinds[0]) != ZERO
        return MapRoot(node=PieceId(changes.ids[0].tobytes()) if kept else None, height=height)

    def _descend_for_update(self, root: MapRoot, height: int, grain_count: int, grains: Array) -> list[_Level]:
        """For each level up to ``height`` what is there already: nodes on the way to ``grains`` and to the end."""
        edge = np.append(grains, grain_count - 1)
        top = max(root.height, height)
        levels = [_Level(Entries.empty(), Entries.empty()) for _ in range(top + 1)]
        above = self._hang(root, top + 1)
        for level in range(top, -1, -1):
            touched = np.unique(edge // self.fan_out ** (level + 1))
            nodes = above.pick(np.isin(above.grains, touched))
            hung = self._hang(root, level)
            held = Entries.empty() if level == 0 else Entries.join((self._children(level, nodes), hung))
            levels[level] = _Level(nodes, held)
            above = held
        return levels

    def _rebuild(
        self, level: int, numbers: Array, old: _Level, changes: Entries, limit: int, write: WriteNodes
    ) -> Entries:
        """Nodes ``numbers`` of ``level`` made anew; what that changes one level up."""
        parts = []
        for start in range(0, len(numbers), _BATCH):
            batch = numbers[start : start + _BATCH]
            low, high = int(batch[0]), int(batch[-1]) + 1
            nodes = between(old.nodes, low, high)
            if level == 0:
                held = self._decode(0, nodes.grains, nodes.ids)
            else:
                held = between(old.held, low * self.fan_out, high * self.fan_out)
            fresh = between(changes, low * self.fan_out, high * self.fan_out)
            merged = Entries.join((held, fresh)).settled()
            merged = merged.pick((merged.kinds != ZERO) & (merged.grains < limit))
            full, contents = format.encode_nodes(level, self.fan_out, merged.grains, merged.kinds, merged.ids)
            ids = write(contents) if contents else np.empty((0, 32), np.uint8)
            emptied = np.setdiff1d(batch, full, assume_unique=True)
            written = Entries(full, np.full(len(full), _NODE, np.uint8), ids)
            parts.append(Entries.join((Entries.zeros(emptied), written)).settled())
        return Entries.join(parts)

    # --- levels -----------------------------------------------------------------------------------

    def _hang(self, root: MapRoot, level: int) -> Entries:
        """``root`` as what level ``root.height + 1`` holds at position 0; nothing on any other level."""
        if root.height < 0 or self.fan_out ** (root.height + 1) > _MOST_GRAINS:
            raise ObjectDamaged(name="a grain map", reason=f"its height is {root.height}")
        if root.node is None or level != root.height + 1:
            return Entries.empty()
        return Entries(np.zeros(1, np.int64), np.ones(1, np.uint8), np.frombuffer(root.node, np.uint8).reshape(1, 32))

    def _decode(self, level: int, numbers: Array, ids: Ids) -> Entries:
        if not len(ids):
            return Entries.empty()
        contents = self._read(ids)
        try:
            entries = Entries(*format.decode_nodes(level, self.fan_out, numbers, contents))
        except frame.Malformed as error:
            raise ObjectDamaged(name="a node of a grain map", reason=error) from error
        if bool((entries.kinds != CHUNK).any()):  # _NODE is the same number: above the leaves there is nothing else
            raise ObjectDamaged(name="a node of a grain map", reason="it holds entries of a kind that is not known")
        return entries

    def _children(self, level: int, nodes: Entries) -> Entries:
        """What ``nodes`` of ``level`` hold."""
        starts = range(0, len(nodes), _BATCH)
        batches = (nodes.pick(slice(start, start + _BATCH)) for start in starts)
        return Entries.join([self._decode(level, batch.grains, batch.ids) for batch in batches])

    def _leaves(self, root: MapRoot, touched: Callable[[int], Array | Extents] | None) -> Iterator[Entries]:
        """Contents of leaves, some at a time; only of nodes that ``touched(level)`` names."""
        nodes = self._hang(root, root.height + 1)
        for level in range(root.height, -1, -1):
            if touched is not None:
                wanted = touched(level)
                keep = wanted.holds(nodes.grains) if isinstance(wanted, Extents) else np.isin(nodes.grains, wanted)
                nodes = nodes.pick(keep)
            if level:
                nodes = self._children(level, nodes)
        for start in range(0, len(nodes), _BATCH):
            batch = nodes.pick(slice(start, start + _BATCH))
            yield self._decode(0, batch.grains, batch.ids)

    def _differing_grains(self, left: Entries, right: Entries) -> Iterator[Array]:
        """``left`` and ``right`` are leaves that differ."""
        yield np.empty(0, np.int64)
        numbers = np.union1d(left.grains, right.grains)
        for start in range(0, len(numbers), _BATCH):
            low, high = int(numbers[start]), int(numbers[min(start + _BATCH, len(numbers)) - 1]) + 1
            mine, theirs = between(left, low, high), between(right, low, high)
            mine, theirs = unequal(self._decode(0, mine.grains, mine.ids), self._decode(0, theirs.grains, theirs.ids))
            yield np.union1d(mine.grains, theirs.grains)


class _Level(msgspec.Struct, frozen=True, eq=False):
    """What an update found on one level: the touched nodes, and (above the leaves) everything they hold."""

    nodes: Entries
    held: Entries
