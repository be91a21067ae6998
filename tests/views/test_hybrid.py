"""Disks of which some grains come from T: always the restore point's bytes, whatever is presumed and whatever fails."""

from __future__ import annotations

import errno
import itertools
import os
import random
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, os.path.dirname(__file__))

from test_image import Stored, patchy
from view_world import GRAIN, noise, padded, read, read_in_pieces

from graincopy.core.errors import MediumFailed, TargetLost
from graincopy.core.extent import Extents
from graincopy.core.placement import Placement
from graincopy.media.memory import MemoryMedium
from graincopy.views import hybrid
from graincopy.views.disk import Finding, RestoredDisk
from graincopy.views.hybrid import Gate, LocalGrains
from graincopy.views.source import Span


class Near:
    """The file in T: bytes, and offsets at which reading fails."""

    def __init__(self, content: bytes, bad: set[int] = frozenset(), failure: BaseException | None = None) -> None:
        self.content, self.bad, self.failure = content, bad, failure or OSError(errno.EIO, "bad sector")
        self.size = len(content)
        self.reads: list[tuple[int, int]] = []
        self.before_read = lambda: None

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self.before_read()
        self.reads.append((offset, len(buffer)))
        touched = range(offset // GRAIN, -(-(offset + len(buffer)) // GRAIN))
        if self.bad.intersection(touched):
            buffer[:] = b"\xdd" * len(buffer)  # what a failed read leaves is anybody's guess
            raise self.failure
        buffer[:] = padded(self.content, offset, len(buffer))

    def placement(self) -> Placement:
        return Placement.identity(self.size)

    def verify(self) -> None: ...

    def close(self) -> None: ...


class Scene:
    """A stored disk, and what T holds of it."""

    def __init__(
        self, stored: Stored, near: Near, differing: Extents | None = None, trust: bool = False, limit: int = 1 << 20
    ) -> None:
        self.stored, self.near = stored, near
        self.told: list[Finding] = []
        self.hashed = 0
        self.clock = stored.world.clock
        self.image = stored.image(limit)
        self.disk = RestoredDisk("a", self.image, GRAIN, self.clock, self.told.append)
        self.local = LocalGrains(near, GRAIN, differing or Extents.empty(), self._hash, trust=trust)
        self.disk.attach(self.local)

    def _hash(self, content: memoryview) -> bytes:
        self.hashed += 1
        return self.stored.repository.chunk_id(content)

    def split(self) -> tuple[int, int, int]:
        split = self.disk.split
        return split.local_bytes, split.medium_bytes, split.zero_bytes


def changed(content: bytes, grains: set[int], seed: int = 5) -> bytes:
    """``content`` with a few other bytes in each of ``grains``."""
    data = bytearray(content)
    for grain in grains:
        at = grain * GRAIN + random.Random(seed + grain).randrange(GRAIN - 10)
        data[at : at + 3] = b"new" if data[at : at + 3] != b"new" else b"old"
    return bytes(data[: len(content)])


STORED = Stored(patchy(11, 60, 777))
GRAINS = 61


@pytest.fixture(scope="module", autouse=True)
def threads_share_reads() -> Iterator[None]:
    """As they do with grains of the usual size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hybrid, "SHARE_BYTES", 3 * GRAIN)
        yield


FAILURES = [OSError(errno.EIO, "bad"), OSError(errno.ENODEV, "gone"), TargetLost(target="t", reason="deleted")]
some_grains = st.sets(st.integers(0, GRAINS - 2), max_size=20)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.data(), some_grains, some_grains, some_grains, st.integers(-3 * GRAIN, 3 * GRAIN), st.sampled_from([0, 1 << 20])
)
def test_every_read_gives_the_stored_bytes_whatever_t_holds_and_whatever_is_presumed(
    data: st.DataObject, dirty: set[int], presumed: set[int], bad: set[int], longer: int, limit: int
) -> None:
    content = STORED.content
    now = changed(content, dirty)
    now = now[: len(now) + longer] if longer < 0 else now + noise(1, longer)
    failure = data.draw(st.sampled_from(FAILURES))
    differing = Extents.from_pairs((grain, grain + 1) for grain in presumed)
    scene = Scene(STORED, Near(now, bad, failure), differing, limit=limit)
    total = 0
    for _ in range(data.draw(st.integers(1, 8))):
        offset = data.draw(st.integers(0, len(content) + GRAIN))
        length = data.draw(st.one_of(st.integers(0, 3 * GRAIN), st.integers(0, len(content) + GRAIN)))
        assert read(scene.disk, offset, length) == padded(content, offset, length)
        total += max(0, min(offset + length, len(content)) - offset)
    assert sum(scene.split()) == total
    spans = scene.disk.extents(0, len(content))
    assert spans[0].start == 0
    assert spans[-1].stop == len(content)
    for one, two in itertools.pairwise(spans):
        assert one.stop == two.start
        assert (one.zero, one.local) != (two.zero, two.local)
    for span in spans:
        assert span.start < span.stop
        assert not (span.zero and (span.local or content[span.start : span.stop].strip(b"\0")))
    assert scene.told == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 62 * GRAIN), st.integers(0, 63 * GRAIN))
def test_extents_of_a_part_are_the_part_of_the_extents(offset: int, length: int) -> None:
    scene = Scene(STORED, Near(STORED.content), Extents.of((3, 9), (30, 40), (60, 61)))
    stop = min(offset + length, len(STORED.content))
    cut = [
        Span(max(span.start, offset), min(span.stop, stop), span.zero, span.local)
        for span in scene.disk.extents(0, len(STORED.content))
        if max(span.start, offset) < min(span.stop, stop)
    ]
    assert scene.disk.extents(offset, length) == cut


def test_a_grain_is_proved_the_first_time_and_then_read_as_it_is_asked_for() -> None:
    stored = Stored(noise(1, 8 * GRAIN))
    scene = Scene(stored, Near(stored.content))
    for _ in range(3):
        assert read(scene.disk, 100, 10) == stored.content[100:110]
    assert scene.near.reads == [(0, GRAIN), (100, 10), (100, 10)]
    assert scene.hashed == 1
    assert read(scene.disk) == stored.content
    assert scene.hashed == 8
    assert read(scene.disk, GRAIN - 5, 2 * GRAIN) == padded(stored.content, GRAIN - 5, 2 * GRAIN)
    assert scene.hashed == 8
    assert stored.gets("data") == 0
    assert scene.split() == (30 + 8 * GRAIN + 2 * GRAIN, 0, 0)


def test_a_wrong_presumption_costs_one_look_and_is_remembered() -> None:
    stored = Stored(noise(1, 8 * GRAIN))
    scene = Scene(stored, Near(changed(stored.content, {2, 3})))
    assert read(scene.disk) == stored.content
    reads = len(scene.near.reads)
    assert read(scene.disk, 2 * GRAIN, 2 * GRAIN) == stored.content[2 * GRAIN : 4 * GRAIN]
    assert len(scene.near.reads) == reads
    assert scene.local.mismatches == 2
    assert scene.split() == (6 * GRAIN, 4 * GRAIN, 0)
    assert [(span.start // GRAIN, span.local) for span in scene.disk.extents(0, 8 * GRAIN)] == [
        (0, True),
        (2, False),
        (4, True),
    ]


def test_a_large_read_is_shared_and_what_fails_in_one_share_costs_the_others_nothing() -> None:
    stored = Stored(noise(3, 64 * GRAIN))
    scene = Scene(stored, Near(changed(stored.content, {3, 40}), bad={50}))
    assert read(scene.disk) == stored.content
    assert sorted(scene.near.reads) == [(number * 16 * GRAIN, 16 * GRAIN) for number in range(4)]
    assert scene.split() == (46 * GRAIN, 18 * GRAIN, 0)  # the share with the bad sector, and two that differ
    assert scene.local.mismatches == 2
    scene.local.close()


def test_trusted_grains_are_not_hashed_and_zeros_are_read_from_nowhere() -> None:
    content = noise(1, 4 * GRAIN) + bytes(4 * GRAIN) + noise(2, 4 * GRAIN)
    stored = Stored(content)
    scene = Scene(stored, Near(content), Extents.of((0, 1)), trust=True)
    assert read(scene.disk) == content
    assert scene.hashed == 0
    assert scene.split() == (7 * GRAIN, GRAIN, 4 * GRAIN)
    assert all(not 4 * GRAIN <= offset < 8 * GRAIN for offset, _ in scene.near.reads)


@pytest.mark.parametrize("failure", FAILURES[1:])
def test_a_lost_snapshot_is_given_up_at_once_and_nobody_notices(failure: Exception) -> None:
    stored = Stored(noise(1, 8 * GRAIN))
    scene = Scene(stored, Near(stored.content, {5}, failure))
    assert read_in_pieces(scene.disk, GRAIN) == stored.content
    assert scene.local.lost is not None
    assert "cannot be read" in scene.local.lost
    assert scene.split() == (5 * GRAIN, 3 * GRAIN, 0)
    reads = len(scene.near.reads)
    assert read(scene.disk) == stored.content
    assert len(scene.near.reads) == reads
    assert [span.local for span in scene.disk.extents(0, 8 * GRAIN)] == [False]


def test_bad_sectors_of_the_snapshot_are_passed_over_until_there_are_too_many() -> None:
    stored = Stored(noise(1, 64 * GRAIN))
    scene = Scene(stored, Near(stored.content, set(range(0, 20, 2))))
    assert read_in_pieces(scene.disk, GRAIN) == stored.content
    assert scene.local.lost is None
    assert scene.split() == (54 * GRAIN, 10 * GRAIN, 0)
    scene = Scene(stored, Near(stored.content, set(range(0, 64, 2))))
    assert read_in_pieces(scene.disk, GRAIN) == stored.content
    assert scene.local.lost is not None


def test_a_sector_that_goes_bad_after_its_proof_is_not_tried_again() -> None:
    stored = Stored(noise(1, 8 * GRAIN))
    scene = Scene(stored, Near(stored.content))
    assert read(scene.disk) == stored.content
    scene.near.bad = {3}
    assert read(scene.disk, 3 * GRAIN, 10) == stored.content[3 * GRAIN : 3 * GRAIN + 10]
    reads = len(scene.near.reads)
    assert read(scene.disk, 3 * GRAIN, GRAIN) == stored.content[3 * GRAIN : 4 * GRAIN]
    assert len(scene.near.reads) == reads
    assert [span.local for span in scene.disk.extents(0, 8 * GRAIN)] == [True, False, True]


def test_presumptions_that_are_wrong_more_often_than_right_are_given_up() -> None:
    stored = Stored(noise(1, 600 * GRAIN))
    scene = Scene(stored, Near(noise(2, 600 * GRAIN)))
    assert read_in_pieces(scene.disk, GRAIN) == stored.content
    assert scene.local.lost is not None
    assert scene.local.mismatches == 256
    assert len(scene.near.reads) == 256
    scene = Scene(stored, Near(changed(stored.content, set(range(0, 600, 3)))))
    assert read(scene.disk) == stored.content
    assert scene.local.lost is None


def test_closing_waits_for_whoever_reads_and_lets_nobody_in() -> None:
    stored = Stored(noise(1, 8 * GRAIN))
    scene = Scene(stored, Near(stored.content))
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(30)

    scene.near.before_read = hold
    answers: list[bytes] = []
    reader = threading.Thread(target=lambda: answers.append(read(scene.disk, 0, GRAIN)))
    reader.start()
    assert inside.wait(30)
    closer = threading.Thread(target=scene.disk.detach)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    go_on.set()
    reader.join(30)
    closer.join(30)
    assert not closer.is_alive()
    assert answers == [stored.content[:GRAIN]]
    reads = len(scene.near.reads)
    assert read(scene.disk) == stored.content
    assert len(scene.near.reads) == reads


def test_a_shut_gate_stays_shut() -> None:
    gate = Gate()
    assert gate.enter()
    gate.leave()
    gate.shut()
    assert not gate.enter()
    gate.shut()


def test_eight_readers_while_presumptions_fail_and_the_snapshot_goes() -> None:
    scene = Scene(STORED, Near(changed(STORED.content, set(range(0, 60, 7)))), limit=8 * GRAIN)
    wrong = [0] * 8
    size = len(STORED.content)

    def work(number: int) -> None:
        chance = random.Random(number)
        for turn in range(200):
            offset, length = chance.randrange(size), chance.randrange(3 * GRAIN)
            wrong[number] += read(scene.disk, offset, length) != padded(STORED.content, offset, length)
            if number == 0 and turn == 100:
                scene.near.bad = set(range(GRAINS))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [0] * 8
    assert scene.local.lost is not None


# --- what cannot be had -----------------------------------------------------------------------------


def test_damage_is_eio_for_its_range_and_is_told_once() -> None:
    stored = Stored(noise(1, 64 * GRAIN))
    stored.damage("data", 20 * GRAIN)
    scene = Scene(stored, Near(b""), Extents.whole(64))
    bad = []
    for _ in range(2):
        for grain in range(64):
            try:
                assert read(scene.disk, grain * GRAIN, GRAIN) == stored.content[grain * GRAIN : (grain + 1) * GRAIN]
            except OSError as error:
                assert error.errno == errno.EIO
                bad.append(grain)
    assert len(bad) == 2
    assert [(one.start, one.stop) for one in scene.told] == [(bad[0] * GRAIN, (bad[0] + 1) * GRAIN)]
    assert stored.packs()[0] in str(scene.told[0])
    assert scene.disk.findings == scene.told
    assert scene.clock.slept == []


def test_a_medium_that_is_gone_is_waited_for_within_bounds_and_welcome_back() -> None:
    stored = Stored(noise(1, 64 * GRAIN))
    scene = Scene(stored, Near(stored.content), Extents.of((32, 64)))
    assert read(scene.disk, 0, 40 * GRAIN) == stored.content[: 40 * GRAIN]

    class Gone(MemoryMedium):
        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            raise MediumFailed(url="usb", reason="unplugged")

    there = stored.medium.inner
    stored.medium.inner = Gone(there.store)
    with pytest.raises(OSError, match="unplugged") as raised:
        read(scene.disk, 50 * GRAIN, 1)
    assert raised.value.errno == errno.EIO
    assert scene.clock.slept == [0.5, 1.0, 2.0]
    assert read(scene.disk, 0, 40 * GRAIN) == stored.content[: 40 * GRAIN]  # near, or remembered
    sleep, scene.clock.sleep = scene.clock.sleep, lambda seconds: setattr(stored.medium, "inner", there)
    assert read(scene.disk) == stored.content  # back while it was waited for
    scene.clock.sleep = sleep
    assert len(scene.told) == 1
    assert "unplugged" in str(scene.told[0])


def test_negative_offsets_and_empty_ranges() -> None:
    scene = Scene(STORED, Near(STORED.content))
    with pytest.raises(OSError, match="negative"):
        read(scene.disk, -1, 10)
    assert read(scene.disk, 5, 0) == b""
    assert scene.disk.extents(len(STORED.content), 10) == []
    assert scene.disk.extents(0, 0) == []
