"""Stored images, what they remember, and reading ahead."""

from __future__ import annotations

import itertools
import os
import random
import sys
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, os.path.dirname(__file__))

from view_world import GRAIN, Counted, World, noise, padded, read_in_pieces

from graincopy.core.errors import MediumFailed, ObjectDamaged, ObjectMissing
from graincopy.media.memory import MemoryMedium
from graincopy.views.cache import OVERHEAD, Bounded, PieceCache
from graincopy.views.image import StoredImage
from graincopy.views.memory import ViewMemory
from graincopy.views.readahead import Trail
from graincopy.volumes.memory import MemoryDriver
from graincopy.volumes.memory_storage import MemoryStorage


class Stored:
    """A disk of known content in a repository."""

    def __init__(self, content: bytes) -> None:
        storage = MemoryStorage()
        storage.create("a", len(content)).write(0, content)
        self.content = content
        self.world = World([MemoryDriver(storage)])
        self.point = self.world.backup("/dev/memory/a")
        self.medium: Counted = self.world.medium
        self.medium.gets.clear()
        self.repository = self.world.open()

    def image(self, limit: int = 1 << 20, ahead: bool = False) -> StoredImage:
        record = self.point.disks[0]
        memory = ViewMemory(self.repository, limit, ahead=ahead)
        return StoredImage(self.repository, record.root, record.size, memory)

    def packs(self, kind: str = "data") -> list[str]:
        return [entry.name for entry in self.medium.list(kind)]

    def gets(self, kind: str = "data") -> int:
        return sum(name.startswith(kind) for name, _, _ in self.medium.gets)

    def damage(self, kind: str, grain_offset: int) -> bytes:
        """Flip a byte of the only pack of ``kind``; what it was before."""
        (name,) = self.packs(kind)
        objects = self.medium.inner.store.objects
        before = objects[name]
        broken = bytearray(before)
        broken[grain_offset] ^= 1
        objects[name] = bytes(broken)
        return before


def get(image: StoredImage, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xaa" * length)
    image.readinto(offset, memoryview(buffer))
    return bytes(buffer)


def patchy(seed: int, grains: int, tail: int = 0) -> bytes:
    """Grains of noise, of text and of zeros, some equal to others, and ``tail`` bytes more."""
    chance = random.Random(seed)
    kinds = [bytes(GRAIN), noise(seed, GRAIN), b"text " * (GRAIN // 5) + b"\n"]
    parts = [chance.choice([*kinds, chance.randbytes(GRAIN)])[:GRAIN].ljust(GRAIN, b"\0") for _ in range(grains)]
    return b"".join(parts) + chance.randbytes(tail)


PATCHY = [Stored(patchy(1, 40, 777)), Stored(patchy(2, 700)), Stored(bytes(100_000)), Stored(noise(3, 5))]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_read_gives_what_was_stored(data: st.DataObject) -> None:
    stored = data.draw(st.sampled_from(PATCHY))
    image = stored.image(data.draw(st.sampled_from([0, 3 * GRAIN, 1 << 20])), data.draw(st.booleans()))
    size = len(stored.content)
    try:
        for _ in range(data.draw(st.integers(1, 6))):
            offset = data.draw(st.integers(0, size + 2 * GRAIN))
            length = data.draw(st.one_of(st.integers(0, 3 * GRAIN), st.integers(0, size + GRAIN)))
            assert get(image, offset, length) == padded(stored.content, offset, length)
    finally:
        image.memory.close()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(PATCHY), st.integers(0, 800), st.integers(1, 900))
def test_chunks_are_the_grains_that_hold_something(stored: Stored, first: int, count: int) -> None:
    grains = -(-len(stored.content) // GRAIN)
    first, stop = min(first, grains), min(first + count, grains)
    expected = [n for n in range(first, stop) if stored.content[n * GRAIN : (n + 1) * GRAIN].strip(b"\0")]
    assert stored.image().chunks(first, stop).points().tolist() == expected


def test_chunks_of_a_long_range_are_found_by_walking_the_map() -> None:
    stored = Stored(patchy(5, 3000))
    expected = [n for n in range(3000) if stored.content[n * GRAIN : (n + 1) * GRAIN].strip(b"\0")]
    assert stored.image().chunks(0, 3000).points().tolist() == expected
    assert stored.image().chunks(7, 2900).points().tolist() == [n for n in expected if 7 <= n < 2900]


# --- fetching ---------------------------------------------------------------------------------------


def test_neighbours_in_a_pack_are_fetched_by_one_read() -> None:
    stored = Stored(noise(1, 256 * GRAIN))
    assert get(stored.image(), 0, 256 * GRAIN) == stored.content
    assert (stored.gets("data"), stored.gets("node")) == (1, 3)  # 256 grains at fan-out 8 are three levels


def test_what_was_read_is_remembered_and_shared_by_disks_of_one_memory() -> None:
    stored = Stored(noise(1, 64 * GRAIN))
    image = stored.image()
    get(image, 0, 64 * GRAIN)
    stored.medium.gets.clear()
    other = StoredImage(stored.repository, stored.point.disks[0].root, image.size, image.memory)
    assert get(other, 100, 50 * GRAIN) == stored.content[100 : 100 + 50 * GRAIN]
    assert stored.medium.gets == []


def test_memory_stays_below_its_limit_whatever_is_read() -> None:
    stored = Stored(noise(1, 900 * GRAIN))
    image = stored.image(limit=100 * GRAIN)
    seen = []
    for offset in random.Random(1).sample(range(0, len(stored.content), GRAIN), 600):
        get(image, offset, 5000)
        seen.append(image.memory.pieces.kept.bytes)
    assert max(seen) <= 100 * GRAIN
    assert max(seen) >= 90 * GRAIN
    assert len(image.memory.pieces.kept) <= 100


def test_the_longest_unused_is_forgotten_first() -> None:
    kept: Bounded[str, int] = Bounded(3 * (10 + OVERHEAD))
    for name in "abc":
        kept.put(name, 1, 10)
    kept.get("a")
    kept.put("d", 1, 10)
    assert [kept.get(name) for name in "abcd"] == [1, None, 1, 1]
    kept.put("huge", 1, 10_000)
    assert kept.get("huge") is None
    kept.put("a", 2, 20)  # in place of the old one, at the cost of the longest unused
    assert (kept.get("a"), kept.get("c"), kept.bytes) == (2, None, 20 + 10 + 2 * OVERHEAD)


def read_twice(medium: Counted) -> bool:
    """Whether any byte of a pack was read more than once."""
    spans = sorted((name, offset, offset + size) for name, offset, size in medium.gets if name.startswith("data"))
    return any(one[0] == two[0] and two[1] < one[2] for one, two in itertools.pairwise(spans))


def together(count: int, work: Callable[[int], None]) -> None:
    """``work(number)`` in ``count`` threads at once; all of them come to their end."""
    done: list[int] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait(30)
        work(number)
        done.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(count))


def test_a_grain_that_many_want_at_a_time_is_fetched_once() -> None:
    stored = Stored(noise(1, 64 * GRAIN))
    image = stored.image()
    get(image, 63 * GRAIN, 1)  # the map is known from here on
    stored.medium.gets.clear()
    wrong = [0] * 8

    def work(number: int) -> None:
        for grain in range(40):
            wrong[number] += get(image, grain * GRAIN, GRAIN) != stored.content[grain * GRAIN : (grain + 1) * GRAIN]

    together(8, work)
    assert wrong == [0] * 8
    assert stored.gets() == len(stored.medium.gets) == 40
    assert not read_twice(stored.medium)


def test_eight_readers_at_random_places_all_see_the_right_bytes() -> None:
    stored = Stored(patchy(9, 600, 123))
    image = stored.image(limit=64 * GRAIN, ahead=True)
    wrong = [0] * 8

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(150):
            offset, length = chance.randrange(len(stored.content)), chance.randrange(3 * GRAIN)
            wrong[number] += get(image, offset, length) != padded(stored.content, offset, length)

    try:
        together(8, work)
    finally:
        image.memory.close()
    assert wrong == [0] * 8


def test_who_waits_for_a_fetch_that_is_broken_off_fetches_by_himself() -> None:
    flying, calls = threading.Event(), []

    def load(ids):  # type: ignore[no-untyped-def]
        calls.append(threading.current_thread().name)
        if len(calls) == 1:
            flying.set()
            while len(cache._flights) and not waiting.is_set():
                waiting.wait(0.01)
            raise SystemExit("killed in the middle")
        return {piece: piece.upper() for piece in ids}

    waiting = threading.Event()
    cache = PieceCache(1 << 20, load)
    answers: list[object] = []

    def first() -> None:
        try:
            cache.get([b"a", b"b"])
        except SystemExit as error:
            answers.append(str(error))

    one = threading.Thread(target=first)
    one.start()
    assert flying.wait(30)
    two = threading.Thread(target=lambda: answers.append(cache.get([b"b", b"c"])))
    two.start()
    while len(calls) < 2:  # the second has fetched "c" and goes on to wait for "b"
        two.join(0.001)
    waiting.set()
    one.join(30)
    two.join(30)
    assert sorted(map(str, answers)) == ["[b'B', b'C']", "killed in the middle"]
    assert cache._flights == {}


# --- damage -----------------------------------------------------------------------------------------


def test_a_damaged_chunk_spoils_its_own_grain_only_and_is_not_looked_for_all_the_time() -> None:
    stored = Stored(noise(1, 64 * GRAIN))
    mended = stored.damage("data", 20 * GRAIN)
    image = stored.image()
    bad = []
    for grain in range(64):
        try:
            assert get(image, grain * GRAIN, GRAIN) == stored.content[grain * GRAIN : (grain + 1) * GRAIN]
        except ObjectDamaged as error:
            bad.append(grain)
            assert "is not authentic" in str(error)
    assert len(bad) == 1
    with pytest.raises(ObjectDamaged):
        get(image, (bad[0] - 3) * GRAIN, 8 * GRAIN)
    stored.medium.gets.clear()
    for _ in range(5):
        with pytest.raises(ObjectDamaged):
            get(image, bad[0] * GRAIN, GRAIN)
    assert stored.medium.gets == []
    stored.medium.inner.store.objects[stored.packs()[0]] = mended
    stored.world.clock.sleep(11)
    assert get(image, 0, 64 * GRAIN) == stored.content


def test_damage_in_a_large_read_leaves_its_neighbours_readable() -> None:
    stored = Stored(noise(1, 64 * GRAIN))
    stored.damage("data", 20 * GRAIN)
    image = stored.image()
    with pytest.raises(ObjectDamaged):
        get(image, 0, 64 * GRAIN)
    stored.medium.gets.clear()
    assert get(image, 0, 10 * GRAIN) == stored.content[: 10 * GRAIN]
    assert stored.medium.gets == []  # they were remembered when each was fetched alone


def test_a_damaged_leaf_of_the_map_spoils_its_own_grains_only() -> None:
    stored = Stored(noise(1, 512 * GRAIN))
    (name,) = stored.packs("node")
    stored.damage("node", 400)  # the second sealed leaf or so: leaves come first in the pack
    bad = []
    image = stored.image()
    for grain in range(512):
        try:
            assert get(image, grain * GRAIN, GRAIN) == stored.content[grain * GRAIN : (grain + 1) * GRAIN]
        except ObjectDamaged as error:
            bad.append(grain)
            assert name in str(error)
    assert len(bad) == 8  # one leaf
    assert bad == list(range(bad[0], bad[0] + 8))


def test_what_is_gone_and_what_fails_are_told_apart() -> None:
    stored = Stored(noise(1, 8 * GRAIN))
    objects = stored.medium.inner.store.objects
    image = stored.image()
    get(image, 0, 1)
    kept = {name: objects.pop(name) for name in stored.packs()}
    image = stored.image()
    with pytest.raises(ObjectMissing):
        get(image, 5 * GRAIN, 1)
    objects.update(kept)

    class Gone(MemoryMedium):
        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            raise MediumFailed(url=self.url, reason="unplugged")

    stored.medium.inner = Gone(stored.medium.inner.store)
    with pytest.raises(MediumFailed):
        get(image, 2 * GRAIN, 1)
    stored.medium.inner = MemoryMedium(stored.medium.inner.store)
    assert get(image, 2 * GRAIN, GRAIN) == stored.content[2 * GRAIN : 3 * GRAIN]  # at once: no waiting period


# --- reading ahead ----------------------------------------------------------------------------------


class Whole:
    """An image as a disk, for read_in_pieces."""

    def __init__(self, image: StoredImage) -> None:
        self.size, self.readinto = image.size, image.readinto


def test_reading_in_sequence_fetches_ahead_in_few_reads() -> None:
    stored = Stored(noise(1, 1536 * GRAIN))  # six stretches
    image = stored.image(limit=64 << 20, ahead=True)
    assert read_in_pieces(Whole(image), 1000) == stored.content
    image.memory.close()
    reads = stored.gets("data")
    assert reads < 256 + 16, "the first stretch may go grain by grain, the rest must not"
    assert not read_twice(stored.medium)


def test_reading_at_random_fetches_nothing_ahead() -> None:
    stored = Stored(noise(1, 4096 * GRAIN))
    image = stored.image(limit=64 << 20, ahead=True)
    grains = random.Random(4).sample(range(100, 4096, 512), 8)  # in every other stretch
    for grain in grains:
        get(image, grain * GRAIN + 5, 10)
    image.memory.close()
    sizes = [size for name, _, size in stored.medium.gets if name.startswith("data")]
    assert len(sizes) == 8
    assert max(sizes) < 2 * GRAIN


def test_what_is_not_wanted_is_not_fetched_ahead() -> None:
    stored = Stored(noise(1, 1024 * GRAIN))
    image = stored.image(limit=64 << 20, ahead=True)
    image.wanted = lambda first, stop: first % 64 == 0
    for grain in range(0, 1024, 64):
        get(image, grain * GRAIN, GRAIN)
    image.memory.close()
    fetched = sum(size for name, _, size in stored.medium.gets if name.startswith("data"))
    assert fetched < 18 * (GRAIN + 100)


def test_a_trail_knows_sequence_from_chance_also_out_of_order() -> None:
    def everything(_first: int, _stop: int) -> bool:
        return True

    trail = Trail(GRAIN)
    assert trail.grains == 256
    assert [trail.touch(at, at + 64) for at in (0, 64, 192, 128)] == [0, 0, 0, 0]
    assert [trail.touch(at, at + 64) for at in (256, 384, 320)] == [1, 1, 1]
    assert trail.touch(512, 576) == 2
    assert trail.order(2, 2, everything) == [3]
    assert trail.order(2, 2, everything) == []
    assert trail.order(3, 9, everything) == [4, 5, 6, 7]
    assert trail.touch(90 * 256, 90 * 256 + 1) == 0
    assert trail.touch(91 * 256 + 200, 91 * 256 + 201) == 0  # into the middle of the next: chance
    assert trail.touch(10_000, 10_000 + 1024) == 4  # one long read over five stretches
    for other in range(200, 300, 2):
        trail.touch(other * 256, other * 256 + 1)
    assert trail.touch(512, 513) == 0  # forgotten


def test_where_little_is_wanted_it_is_fetched_from_afar() -> None:
    grains = [5 * 256, 9 * 256 + 255, 30 * 256, 31 * 256, 50 * 256, 90 * 256]

    def wanted(first: int, stop: int) -> bool:
        return any(first <= grain < stop for grain in grains)

    trail = Trail(GRAIN)
    assert trail.order(3, 9, wanted) == [5, 9, 30, 31]
    assert trail.order(4, 9, wanted) == []
    assert trail.order(5, 9, wanted) == [50]
    assert trail.order(6, 3, wanted) == []  # who has just begun is not believed that far
    assert trail.order(90, 9, wanted) == []
