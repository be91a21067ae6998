"""What is durable before what: looked at from the medium, at the very moment when the decisive object appears on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hands import DRIVERS, GRAIN, Hands

from graincopy.media.base import Buffer
from graincopy.media.memory import MemoryMedium, MemoryStore
from graincopy.model.snapshot import Created, Existing
from graincopy.repository.check import check


class Watched(MemoryMedium):
    """Calls ``look`` with the name of every object that has just appeared."""

    def __init__(self, store: MemoryStore, look: Callable[[str], None]) -> None:
        super().__init__(store)
        self._look = look

    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        answer = super().put(name, parts)
        self._look(name)
        return answer


@pytest.fixture
def hands() -> Hands:
    made = Hands()
    made.new_repository()
    return made


def watch(hands: Hands, monkeypatch: pytest.MonkeyPatch, folder: str, look: Callable[[str], None]) -> None:
    """``look`` at every object that appears in ``folder`` from now on; not at what the looking itself does."""
    looking: list[str] = []

    def once(name: str) -> None:
        if name.startswith(folder) and not looking:
            looking.append(name)
            look(name)
            looking.clear()

    monkeypatch.setattr("hands.MemoryMedium", lambda store: Watched(store, once))


def test_when_a_point_appears_all_that_it_needs_is_there(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that opens the repository right then restores the disk; so does whoever comes after a kill."""
    claim = hands.lab.make(40 * GRAIN)
    hands.lab.write(claim, 0, b"first" * 7000)
    workload = hands.workload("w", [claim])
    seen: list[bytes] = []

    def look(name: str) -> None:
        repository = hands.context().repository
        (newest, *_) = repository.points()
        assert name == f"points/{newest.id}"
        assert check(repository, data=True) == ()
        seen.append(hands.content(newest.disks[0]))

    watch(hands, monkeypatch, "points/", look)
    for at in (0, 9 * GRAIN, 30 * GRAIN):
        hands.lab.write(claim, at, bytes([65 + at // GRAIN]) * 5000)
        hands.backup(workload)
        assert seen[-1] == hands.lab.read(claim)
    assert len(seen) == 3


@pytest.mark.parametrize("driver", ["reference", "no snapshots"])
def test_when_a_restore_is_recorded_nothing_is_written_and_its_undo_is_whole(
    monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    hands = Hands(DRIVERS[driver])
    hands.new_repository()
    claim = hands.lab.make(40 * GRAIN)
    hands.lab.write(claim, 0, b"first" * 7000)
    workload = hands.workload("w", [claim])
    point = hands.backup(workload).point
    hands.lab.write(claim, GRAIN, b"second" * 3000)
    before = hands.lab.read(claim)
    seen: list[str] = []

    def look(name: str) -> None:
        if name.endswith("/opened"):
            assert hands.lab.read(claim) == before
            repository = hands.context().repository
            assert check(repository, data=True) == ()
            assert bool(repository.undo_roots()) == (driver == "no snapshots")
            seen.append(name)

    watch(hands, monkeypatch, "restores/", look)
    restored = hands.restore(point)
    assert len(seen) == 1
    assert hands.lab.read(claim) != before
    hands.undo(restored.restore)
    assert hands.lab.read(claim) == before
