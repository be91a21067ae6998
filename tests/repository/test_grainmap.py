"""The grain map against a dict, and its promises: canonical roots, copy on write, work in proportion to change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graincopy.core.errors import ObjectDamaged
from graincopy.core.extent import Extents
from graincopy.model.restore_point import MapRoot
from graincopy.repository.entries import CHUNK, ZERO, Entries
from graincopy.repository.grainmap import GrainMap, height_for

COUNTS = st.integers(0, 5000)
CHANGES = st.dictionaries(st.integers(0, 4999), st.integers(0, 3), max_size=60)


class Nodes:
    """Nodes in a dict, counting what is asked."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}
        self.reads = self.writes = 0

    def read(self, ids: np.ndarray) -> list[bytes]:
        self.reads += len(ids)
        return [self.held[piece.tobytes()] for piece in ids]

    def write(self, contents: Sequence[bytes]) -> np.ndarray:
        self.writes += len(contents)
        ids = [hashlib.blake2b(content, digest_size=32).digest() for content in contents]
        self.held.update(zip(ids, contents, strict=True))
        return np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32)


def piece(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=32).digest()


def entries(changes: dict[int, int]) -> Entries:
    """Grain → number of its chunk, 0 for zero; in no order."""
    ids = b"".join(piece(number) if number else bytes(32) for number in changes.values())
    kinds = [CHUNK if number else ZERO for number in changes.values()]
    table = np.frombuffer(ids, np.uint8).reshape(-1, 32)
    return Entries(np.array(list(changes), np.int64), np.array(kinds, np.uint8), table)


def as_dict(found: Entries) -> dict[int, bytes]:
    return {int(at): ids.tobytes() for at, kind, ids in zip(found.grains, found.kinds, found.ids, strict=True) if kind}


def everything(tree: GrainMap, root: MapRoot) -> dict[int, bytes]:
    parts = list(tree.walk(root))
    grains = np.concatenate([part.grains for part in parts]) if parts else np.empty(0, np.int64)
    assert bool((grains[1:] > grains[:-1]).all())
    return {at: ids for part in parts for at, ids in as_dict(part).items()}


@settings(max_examples=120, deadline=None)
@given(st.sampled_from((8, 64)), st.lists(st.tuples(COUNTS, CHANGES), min_size=1, max_size=5))
def test_updates_agree_with_a_dict_and_roots_are_canonical(fan_out: int, steps: list) -> None:
    nodes = Nodes()
    tree = GrainMap(fan_out, nodes.read)
    root, oracle, history = MapRoot(), {}, []
    for count, changes in steps:
        inside = {at: number for at, number in changes.items() if at < count}
        root = tree.update(root, count, entries(inside), nodes.write)
        oracle = {at: number for at, number in oracle.items() if at < count} | inside
        oracle = {at: number for at, number in oracle.items() if number}
        history.append((root, dict(oracle)))
        assert everything(tree, root) == {at: piece(number) for at, number in oracle.items()}
        assert root == tree.update(MapRoot(), count, entries(oracle), nodes.write), "another way to the same content"
        assert root.height == height_for(count, fan_out)
        assert tree.allocated(root) == Extents.from_points(np.array(sorted(oracle), np.int64))
        asked = np.array([4999, *sorted(changes, reverse=True), 0], np.int64)
        assert as_dict(tree.lookup(root, asked)) == {at: piece(oracle[at]) for at in asked.tolist() if at in oracle}
    for one, mine in history:
        assert everything(tree, one) == {at: piece(number) for at, number in mine.items()}, "an old root changed"
        for other, theirs in history:
            unequal = sorted(at for at in mine.keys() | theirs.keys() if mine.get(at) != theirs.get(at))
            assert tree.diff(one, other) == Extents.from_points(np.array(unequal, np.int64))


def test_nothing_is_no_node() -> None:
    nodes = Nodes()
    tree = GrainMap(64, nodes.read)
    full = tree.update(MapRoot(), 10_000, entries({5: 1, 9_999: 2}), nodes.write)
    assert full.node is not None
    assert tree.update(full, 10_000, entries({5: 0, 9_999: 0}), nodes.write) == MapRoot(height=2)
    assert tree.update(full, 0, Entries.empty(), nodes.write) == MapRoot()


def test_equal_subtrees_are_not_read_by_diff() -> None:
    nodes = Nodes()
    tree = GrainMap(64, nodes.read)
    big = tree.update(MapRoot(), 262_144, entries({at: 1 + at % 3 for at in range(0, 262_144, 7)}), nodes.write)
    other = tree.update(big, 262_144, entries({70_000: 9}), nodes.write)
    nodes.reads = 0
    assert tree.diff(big, other) == Extents.of((70_000, 70_001))
    assert nodes.reads == 2 * 3  # one path in each tree
    assert tree.diff(big, big) == Extents.empty()
    assert nodes.reads == 2 * 3


def test_an_update_writes_only_the_paths_that_change() -> None:
    nodes = Nodes()
    tree = GrainMap(64, nodes.read)
    big = tree.update(MapRoot(), 262_144, entries(dict.fromkeys(range(0, 262144, 3), 1)), nodes.write)
    before = len(nodes.held)
    tree.update(big, 262_144, entries({1: 5, 200_000: 6}), nodes.write)
    assert len(nodes.held) - before == 5  # two leaves, two nodes above them, one root


def test_walk_reads_only_what_lies_within() -> None:
    nodes = Nodes()
    tree = GrainMap(64, nodes.read)
    big = tree.update(MapRoot(), 262_144, entries(dict.fromkeys(range(0, 262144, 3), 1)), nodes.write)
    nodes.reads = 0
    within = Extents.of((63, 66), (100_000, 100_001))
    found = [int(at) for part in tree.walk(big, within) for at in part.grains]
    assert found == [63, *(at for at in (64, 65, 100_000) if at % 3 == 0)]
    assert nodes.reads == 1 + 2 + 3


def test_reachable_tells_each_shared_node_once() -> None:
    nodes = Nodes()
    tree = GrainMap(8, nodes.read)
    one = tree.update(MapRoot(), 4096, entries({at: at % 50 + 1 for at in range(4096)}), nodes.write)
    other = tree.update(one, 4096, entries({17: 60}), nodes.write)
    small = tree.update(one, 8, entries({}), nodes.write)
    seen: set[bytes] = set()
    told: list[bytes] = []

    def mark(ids: np.ndarray) -> np.ndarray:
        fresh = [row.tobytes() not in seen for row in ids]
        told.extend(row.tobytes() for row in ids)
        seen.update(row.tobytes() for row in ids)
        return np.array(fresh, np.bool_)

    nodes.reads = 0
    tree.reachable([one, other, small, MapRoot(height=3)], mark)
    assert nodes.reads == len(seen & nodes.held.keys())
    chunks = {piece(number) for number in [*range(1, 51), 60]}
    assert seen - nodes.held.keys() == chunks
    assert {one.node, other.node, small.node} <= seen


@pytest.mark.parametrize("bad", [{-1: 1}, {100: 1}, {5: 1, 101: 0}])
def test_a_change_outside_the_disk_is_refused(bad: dict[int, int]) -> None:
    nodes = Nodes()
    with pytest.raises(ValueError, match="outside"):
        GrainMap(8, nodes.read).update(MapRoot(), 100, entries(bad), nodes.write)
    assert nodes.writes == 0


def test_kinds_that_are_not_known_are_refused_both_ways() -> None:
    nodes = Nodes()
    tree = GrainMap(8, nodes.read)
    strange = Entries(np.array([1], np.int64), np.array([7], np.uint8), np.ones((1, 32), np.uint8))
    with pytest.raises(ValueError, match="kind"):
        tree.update(MapRoot(), 8, strange, nodes.write)
    root = tree.update(MapRoot(), 8, entries({1: 1}), nodes.write)
    content = bytearray(nodes.held[root.node])
    content[-1] = 7
    nodes.held[root.node] = bytes(content)
    with pytest.raises(ObjectDamaged, match="kind that is not known"):
        tree.lookup(root, np.array([1]))


@pytest.mark.parametrize(
    ("wound", "reason"),
    [
        (lambda node: node[:-1], "no node"),
        (lambda node: node[:1] + b"\x01" + node[2:], "no node"),  # of another level
        (lambda node: node[:4] + b"\xff" + node[5:], "bitmap"),
        (lambda node: b"", "no node"),
    ],
)
def test_a_node_that_is_no_node_is_damage(wound, reason: str) -> None:
    nodes = Nodes()
    tree = GrainMap(8, nodes.read)
    root = tree.update(MapRoot(), 8, entries({1: 1, 2: 2}), nodes.write)
    nodes.held[root.node] = wound(nodes.held[root.node])
    with pytest.raises(ObjectDamaged, match=reason):
        list(tree.walk(root))


def test_an_impossible_height_is_damage_not_an_endless_walk() -> None:
    nodes = Nodes()
    with pytest.raises(ObjectDamaged, match="height"):
        GrainMap(64, nodes.read).allocated(MapRoot(node=piece(1), height=10**6))


def test_the_last_word_about_a_grain_counts() -> None:
    twice = Entries.join((entries({3: 1, 1: 2}), entries({3: 2, 1: 0})))
    assert as_dict(twice.settled()) == {3: piece(2)}
    assert twice.settled().grains.tolist() == [1, 3]
