"""What a view remembers of the medium: pieces, bounded in bytes, each fetched once however many ask at a time.

A piece is named by the hash of its content, so that what is remembered can never be out of date, and disks (and
restore points) that share content share it here too.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from graincopy.core.errors import GraincopyError

Key = TypeVar("Key")
Value = TypeVar("Value")
Outcome = bytes | GraincopyError
Load = Callable[[Sequence[bytes]], Mapping[bytes, Outcome]]

Also = Callable[[], Sequence[bytes]]

OVERHEAD = 200  # bytes that a remembered thing takes besides its content: key, entry, object headers


def _nothing() -> Sequence[bytes]:
    return ()


class Bounded(Generic[Key, Value]):
    """The values used last, ``limit`` bytes of them at most. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0  # taken now, overhead included

    def get(self, key: Key) -> Value | None:
        """The value, or None when it is not remembered (any more)."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Remember ``value`` of ``size`` bytes; what was not used longest is forgotten for it."""
        size += OVERHEAD
        if size > self._limit:
            return
        with self._lock:
            before = self._kept.pop(key, None)
            self._kept[key] = (value, size)
            self.bytes += size - (before[1] if before else 0)
            while self.bytes > self._limit:
                self.bytes -= self._kept.popitem(last=False)[1][1]

    def __len__(self) -> int:
        return len(self._kept)


class _Flight:
    """One fetch under way: whoever wants one of its pieces waits for it."""

    def __init__(self) -> None:
        self._landed = threading.Event()
        self._outcomes: Mapping[bytes, Outcome] = {}

    def land(self, outcomes: Mapping[bytes, Outcome]) -> None:
        self._outcomes = outcomes
        self._landed.set()

    def wait(self, piece: bytes) -> Outcome | None:
        """None when the fetch was broken off without a word about this piece."""
        self._landed.wait()
        return self._outcomes.get(piece)


class _Claimed(msgspec.Struct):
    """Pieces to fetch under one flight, pieces that other flights bring, pieces that have come in meanwhile."""

    flight: _Flight = msgspec.field(default_factory=_Flight)
    mine: list[bytes] = msgspec.field(default_factory=list)
    theirs: dict[bytes, _Flight] = msgspec.field(default_factory=dict)
    ready: dict[bytes, bytes] = msgspec.field(default_factory=dict)


class PieceCache:
    """Pieces by id, fetched through ``load`` when they are not remembered. Safe to use from several threads."""

    def __init__(self, limit: int, load: Load) -> None:
        """``load`` fetches what it is given in one go and answers with content or error for each piece."""
        self.kept: Bounded[bytes, bytes] = Bounded(limit)
        self._load = load
        self._flights: dict[bytes, _Flight] = {}
        self._lock = threading.Lock()

    def get(self, ids: Sequence[bytes], also: Also = _nothing) -> list[bytes]:
        """Contents in the order of ``ids``. ``also`` names what is fetched along with what is missing, if anything is.

        Raises the first error that any of ``ids`` met.
        """
        found: dict[bytes, bytes] = {}
        missing: list[bytes] = []
        for piece in ids:
            content = self.kept.get(piece)
            if content is None:
                missing.append(piece)
            else:
                found[piece] = content
        while missing:
            outcomes = self._fetch(missing, also)
            for piece, outcome in outcomes.items():
                if isinstance(outcome, GraincopyError):
                    raise type(outcome)(**outcome.facts)  # a fresh one: several threads may raise it
                found[piece] = outcome
            missing, also = [piece for piece in missing if piece not in found], _nothing
        return [found[piece] for piece in ids]

    def warm(self, ids: Sequence[bytes]) -> None:
        """Fetch what is neither remembered nor under way; errors are left to whoever reads it in earnest."""
        self._fly(ids, _nothing, _Claimed())

    def _fetch(self, missing: Sequence[bytes], also: Also) -> dict[bytes, Outcome]:
        """What became of ``missing``: those that nobody fetches yet are fetched here, the others waited for.

        A piece whose fetch was broken off is left out. Nobody waits before the own fetch is done: no deadlock.
        """
        claimed = _Claimed()
        landed = self._fly(missing, also, claimed)
        outcomes: dict[bytes, Outcome] = dict(claimed.ready)
        outcomes.update((piece, landed[piece]) for piece in missing if piece in landed)
        for piece, other in claimed.theirs.items():
            outcome = other.wait(piece)
            if outcome is not None:
                outcomes[piece] = outcome
        return outcomes

    def _fly(self, ids: Sequence[bytes], also: Also, claimed: _Claimed) -> Mapping[bytes, Outcome]:
        """Claim and fetch. Whatever is raised meanwhile (a signal, even), the flight lands: nobody waits for ever."""
        outcomes: Mapping[bytes, Outcome] = {}
        try:
            self._claim(ids, claimed)
            if claimed.mine:
                self._claim(also(), claimed)
                outcomes = self._load(claimed.mine)
            for piece, outcome in outcomes.items():
                if isinstance(outcome, bytes):
                    self.kept.put(piece, outcome, len(outcome))
        finally:
            if claimed.mine:
                self._land(claimed, outcomes)
        return outcomes

    def _claim(self, ids: Sequence[bytes], claimed: _Claimed) -> None:
        """Who brings what. A piece is remembered before its flight ends: looked up once more, none slips by."""
        with self._lock:
            for piece in ids:
                other = self._flights.get(piece)
                if other is claimed.flight:
                    continue
                content = self.kept.get(piece) if other is None else None
                if other is not None:
                    claimed.theirs[piece] = other
                elif content is not None:
                    claimed.ready[piece] = content
                else:
                    claimed.mine.append(piece)
                    self._flights[piece] = claimed.flight

    def _land(self, claimed: _Claimed, outcomes: Mapping[bytes, Outcome]) -> None:
        with self._lock:
            for piece in claimed.mine:
                if self._flights.get(piece) is claimed.flight:
                    del self._flights[piece]
        claimed.flight.land(outcomes)
