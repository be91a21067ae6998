"""What one run stores: packs, index segments, grain maps, and how many bytes that is.

Worker threads each take a :meth:`Session.writer` and ask :meth:`Session.known` first. A pack is reported to the
session when it is durable; every few packs an index segment follows, so that the next run finds the pieces of a
run that was killed. :meth:`Session.finish` makes the rest durable: then, and only then, the run may publish.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from graincopy.core.extent import Mask
from graincopy.core.ids import PieceId
from graincopy.media.base import Buffer
from graincopy.model.restore_point import MapRoot, RunRecord
from graincopy.repository.entries import Entries
from graincopy.repository.format import DIRECTORY_ENTRY_SIZE, Ids
from graincopy.repository.grainmap import GrainMap
from graincopy.repository.index import Index, merge_rows, rows_of
from graincopy.repository.pack import TARGET_SIZE, PackDirectory, PackWriter
from graincopy.repository.records import PieceKind
from graincopy.repository.segments import put_segment, segment_name

if TYPE_CHECKING:
    from graincopy.repository.repository import Repository

SEGMENT_PACKS = 4  # packs to an index segment
_RECENT = 1 << 16  # claimed ids that are remembered one by one, twice over


class Session:
    """What ``run`` stores. Methods are safe to use from several threads, except ``finish`` and ``close``."""

    def __init__(
        self,
        repository: Repository,
        run: RunRecord,
        index: Index,
        target_size: int = TARGET_SIZE,
        lost: bool = False,
    ) -> None:
        """``index`` holds what may be reused: nothing condemned, nothing lost. ``lost``: some packs are."""
        self.run = run
        self.lost = lost
        self.data_bytes = 0  # sealed chunks and their directory entries, as PackWriter.add() counted them
        self._repository, self._index = repository, index
        self._target_size = target_size
        self._lock = threading.RLock()
        self._writers: list[PackWriter] = []
        self._shared: dict[PieceKind, PackWriter] = {}
        self._nodes: PackWriter | None = None
        self._unsaved: dict[PieceId, bytes] = {}  # nodes in the pack that is being filled
        self._stored = Index()
        self._unlisted: list[PackDirectory] = []
        self._segments = 0
        self._total = 0  # bytes of every object that was put
        self._claimed: tuple[set[bytes], set[bytes]] = (set(), set())

    def piece_id(self, kind: PieceKind, content: Buffer) -> PieceId:
        """Id of ``content``."""
        return self._repository.codec.piece_id(kind, content)

    def known(self, ids: Ids) -> Mask:
        """For each id whether its piece need not be stored: it is in a pack that stays, or this session has it."""
        mask = self._index.known(ids)
        left = np.flatnonzero(~mask)
        if len(left):
            with self._lock:
                stored, (young, old) = self._stored, self._claimed
                mask[left] = stored.known(ids[left])
                for at in left[~mask[left]].tolist():
                    piece = ids[at].tobytes()
                    mask[at] = piece in young or piece in old
        return mask

    def writer(self, kind: PieceKind) -> PackWriter:
        """A writer for the calling thread alone; ``finish`` flushes it."""
        repository = self._repository
        writer = PackWriter(
            kind, repository.codec, repository.medium, repository.chance, self._target_size, self._put, self._claim
        )
        with self._lock:
            self._writers.append(writer)
        return writer

    def shared_writer(self, kind: PieceKind) -> PackWriter:
        """One writer for the thread that owns the session: small disks fill a pack together, flushed by ``finish``."""
        if kind not in self._shared:
            self._shared[kind] = self.writer(kind)
        return self._shared[kind]

    def write_nodes(self, contents: Sequence[bytes]) -> Ids:
        """Store nodes unless they are known; their ids."""
        ids = self._repository.codec.piece_ids(PieceKind.NODE, contents)
        fresh = np.flatnonzero(~self.known(ids)).tolist()
        with self._lock:
            for at in fresh:
                self._add_node(PieceId(ids[at].tobytes()), contents[at])
        return ids

    def read_nodes(self, ids: Ids) -> list[bytes]:
        """Nodes of the repository, those that this session has not put yet included."""
        pieces = [PieceId(piece.tobytes()) for piece in ids]
        with self._lock:
            contents = [self._unsaved.get(piece) for piece in pieces]
            stored = self._stored
        left = [at for at, content in enumerate(contents) if content is None]
        fetched = self._repository.fetch(ids[left], stored).pieces if left else []
        for at, content in zip(left, fetched, strict=True):
            contents[at] = content
        return [content for content in contents if content is not None]

    def update_map(self, root: MapRoot, grain_count: int, entries: Entries) -> MapRoot:
        """The map with ``entries`` in it, its new nodes stored (durable after ``finish``)."""
        return GrainMap(self._repository.fan_out, self.read_nodes).update(root, grain_count, entries, self.write_nodes)

    def finish(self) -> None:
        """Put everything that is still buffered, and an index segment; all of it is durable on return."""
        for writer in self._writers:
            writer.flush()
        self._put_segment(self._take_unlisted(1))

    @property
    def metadata_bytes(self) -> int:
        """Bytes of everything that was put, without the sealed chunks of ``data_bytes``; exact after ``finish``."""
        with self._lock:
            return self._total - self.data_bytes

    def close(self) -> None:
        """Give the buffers back; what was not flushed is dropped. May be repeated."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_node(self, piece: PieceId, content: bytes) -> None:
        if piece in self._unsaved:
            return
        if self._nodes is None:
            self._nodes = self.writer(PieceKind.NODE)
        self._unsaved[piece] = content  # before add: when the pack is full, its report takes it out again
        if not self._nodes.add(piece, content):
            del self._unsaved[piece]  # stored a moment ago

    def _claim(self, piece: PieceId) -> bool:
        """True for the first who asks: nobody else stores ``piece`` then. Forgetful; storing twice is harmless."""
        with self._lock:
            young, old = self._claimed
            if piece in young or piece in old:
                return False
            young.add(piece)
            if len(young) >= _RECENT:
                self._claimed = (set(), young)
            return True

    def _put(self, directory: PackDirectory) -> None:
        """A pack is durable: count it, find its pieces from now on, list it when enough have come together."""
        with self._lock:
            self._total += directory.pack.size
            if directory.pack.kind is PieceKind.CHUNK:
                self.data_bytes += int(directory.lengths.sum()) + DIRECTORY_ENTRY_SIZE * len(directory.ids)
            else:
                for piece in directory.ids:
                    self._unsaved.pop(PieceId(piece.tobytes()), None)
            self._stored = self._stored.adding(rows_of(directory))
            self._unlisted.append(directory)
        self._put_segment(self._take_unlisted(SEGMENT_PACKS))

    def _take_unlisted(self, enough: int) -> tuple[str, list[PackDirectory]]:
        """A fresh segment name, and packs to list in it: none when there are fewer than ``enough``."""
        with self._lock:
            taken: list[PackDirectory] = []
            if len(self._unlisted) >= enough:
                taken, self._unlisted = self._unlisted, []
                self._segments += 1
            return segment_name(self.run.id, self._segments), taken

    def _put_segment(self, segment: tuple[str, list[PackDirectory]]) -> None:
        name, directories = segment
        if not directories:
            return
        rows = merge_rows([rows_of(directory) for directory in directories])
        repository = self._repository
        size = put_segment(repository.medium, repository.codec, repository.chance, name, rows)
        with self._lock:
            self._total += size
