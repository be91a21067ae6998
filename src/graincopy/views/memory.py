"""What the disks of one view share: remembered pieces, nodes and stretches of grain maps, and the way to the medium."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from graincopy.core.errors import GraincopyError, ObjectDamaged, ObjectMissing
from graincopy.core.units import MIB
from graincopy.model.restore_point import MapRoot
from graincopy.repository.format import Ids
from graincopy.repository.grainmap import GrainMap
from graincopy.repository.repository import Repository
from graincopy.views.cache import Bounded, Outcome, PieceCache
from graincopy.views.readahead import Scouts

CACHE_BYTES = 64 * MIB
_NODE_BYTES = 4 * MIB
_RUN_BYTES = 16 * MIB
RUN_GRAINS = 512  # what is looked up in a grain map at a time: some leaves that lie side by side, one fetch
_BAD_SECONDS = 10.0  # a piece that failed is not looked for again so soon: each time the whole index is read anew
_MOST_BAD = 4096


class Run(msgspec.Struct, frozen=True, eq=False):
    """RUN_GRAINS entries of a grain map: for each the kind, and the id (none at all when every grain is zero)."""

    kinds: bytes
    ids: bytes

    def id_at(self, at: int) -> bytes | None:
        """Id of the chunk; None for a grain that is zero."""
        return self.ids[at * 32 : at * 32 + 32] if self.kinds[at] else None


_ZEROS = Run(bytes(RUN_GRAINS), b"")


class ViewMemory:
    """Bounded, whatever is read. Safe to use from several threads."""

    def __init__(self, repository: Repository, limit: int = CACHE_BYTES, *, ahead: bool = False) -> None:
        """``limit`` bytes of pieces; ``ahead`` allows fetching ahead, by threads that :meth:`close` ends."""
        self.repository = repository
        self.limit = limit
        self._loader = _Loader(repository)
        self.pieces = PieceCache(limit, self._loader)
        self.scouts = Scouts() if ahead else None
        self._nodes = PieceCache(_NODE_BYTES, self._loader)
        self._runs: Bounded[tuple[bytes | None, int], Run] = Bounded(_RUN_BYTES)
        self.map = GrainMap(repository.fan_out, self._read_nodes)

    @property
    def fetched_bytes(self) -> int:
        """Bytes read from packs so far."""
        return self._loader.fetched_bytes

    def ids(self, root: MapRoot, first: int, stop: int) -> list[bytes | None]:
        """The chunk of each grain of ``[first, stop)``; None where it is zero. Raises as GrainMap.lookup does."""
        found: list[bytes | None] = []
        while first < stop:
            number, at = divmod(first, RUN_GRAINS)
            until = min(stop, (number + 1) * RUN_GRAINS)
            try:
                run = self.run(root, number)
            except (ObjectDamaged, ObjectMissing):
                found += self._ids_alone(root, first, until)  # a neighbour's leaf may be the damaged one
            else:
                found += [run.id_at(place) for place in range(at, at + until - first)]
            first = until
        return found

    def run(self, root: MapRoot, number: int) -> Run:
        """Grains ``[number · RUN_GRAINS, (number + 1) · RUN_GRAINS)``."""
        key = (root.node, number)
        run = self._runs.get(key)
        if run is None:
            first = number * RUN_GRAINS
            entries = self.map.lookup(root, np.arange(first, first + RUN_GRAINS))
            held = bool(entries.kinds.any())
            run = Run(entries.kinds.tobytes(), entries.ids.tobytes()) if held else _ZEROS
            self._runs.put(key, run, len(run.kinds) + len(run.ids) if held else 0)
        return run

    def _ids_alone(self, root: MapRoot, first: int, stop: int) -> list[bytes | None]:
        entries = self.map.lookup(root, np.arange(first, stop))
        return [piece.tobytes() if kind else None for kind, piece in zip(entries.kinds, entries.ids, strict=True)]

    def _read_nodes(self, ids: Ids) -> list[bytes]:
        return self._nodes.get([piece.tobytes() for piece in ids])

    def close(self) -> None:
        """End the threads. May be repeated; reading goes on to work, without fetching ahead."""
        if self.scouts is not None:
            self.scouts.close()


class _Loader:
    """Fetches pieces together, so that neighbours cost one read; where one fails, each by itself."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._bad: dict[bytes, tuple[float, GraincopyError]] = {}
        self._lock = threading.Lock()
        self.fetched_bytes = 0

    def __call__(self, ids: Sequence[bytes]) -> Mapping[bytes, Outcome]:
        outcomes: dict[bytes, Outcome] = dict(self._known_bad(ids))
        left = [piece for piece in ids if piece not in outcomes]
        try:
            outcomes.update(zip(left, self._fetch(left), strict=True))
        except (ObjectDamaged, ObjectMissing):
            outcomes.update((piece, self._alone(piece)) for piece in left)
        except GraincopyError as failure:
            outcomes.update((piece, failure) for piece in left)
        return outcomes

    def _alone(self, piece: bytes) -> Outcome:
        try:
            return self._fetch([piece])[0]
        except (ObjectDamaged, ObjectMissing) as failure:
            with self._lock:
                if len(self._bad) >= _MOST_BAD:
                    self._bad.clear()
                self._bad[piece] = (self._repository.clock.monotonic() + _BAD_SECONDS, failure)
            return failure
        except GraincopyError as failure:
            return failure

    def _known_bad(self, ids: Sequence[bytes]) -> list[tuple[bytes, GraincopyError]]:
        if not self._bad:
            return []
        now = self._repository.clock.monotonic()
        with self._lock:
            found = [(piece, self._bad[piece]) for piece in ids if piece in self._bad]
        return [(piece, failure) for piece, (until, failure) in found if now < until]

    def _fetch(self, ids: Sequence[bytes]) -> list[bytes]:
        if not ids:
            return []
        fetched = self._repository.fetch(np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32))
        with self._lock:
            self.fetched_bytes += fetched.fetched_bytes
        return fetched.pieces
