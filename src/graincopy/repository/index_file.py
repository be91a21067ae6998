"""A sorted run of the index in a file of this host, of which only the blocks are read that are asked about.

    head, names of the segments that the run covers, pack table, block table, filter, a checksum of all this
    rows, sorted; some 256 of them are a block

The filter has a bit for each value of the keys' last bits, eight times as many as rows: of an id that is new, as most
are that a backup asks about, it tells so seven times out of eight without a block being read.

Not a part of the repository's format: a file of another layout is made anew.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection

import msgspec
import numpy as np
from blake3 import blake3

from graincopy.core.extent import Mask
from graincopy.repository.format import Ids
from graincopy.repository.format_segment import PACK_ROW, PackTable, Rows, pack_rows
from graincopy.repository.frame import Malformed
from graincopy.repository.index_run import Hits, Keys, MemoryRun, Run, keys_of

BLOCK = 256  # rows, 11 KiB; more where so many share a key
IN_MEMORY = 1 << 18  # rows up to which a run is read as a whole when it is opened: a few milliseconds
_MAGIC = b"GRAINRUN"
_LAYOUT = 2
_HEAD = struct.Struct("<8sIIQQQQ")  # magic, layout, bytes of names, packs, blocks, bytes of the filter, rows
_BLOCK_ROW = np.dtype([("key", "<u8"), ("first", "<u8"), ("sum", "V16")])  # key and number of its first row
_SUM, _HEAD_SUM = 16, 32  # bytes
_ROW = np.dtype([("id", "V32"), ("pack", "<u4"), ("offset", "<u4"), ("length", "<u4")])
_PLACE = struct.Struct("<III")  # what follows the id in a row
_HELD = 1024  # blocks of one run that stay in memory: 13 MiB


class CachedRun(msgspec.Struct, frozen=True, eq=False):
    """A run, and the object names of the segments whose rows it has."""

    names: frozenset[str]
    run: Run


def encode_run(names: Collection[str], run: MemoryRun) -> tuple[bytes, memoryview]:
    """The file of ``run``, which covers the segments ``names``."""
    rows, starts = run.rows(), _block_starts(run.keys)
    blocks = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True)]
    packed = np.empty(len(rows), _ROW)
    packed["id"] = np.ascontiguousarray(rows.ids).view("V32").reshape(-1)
    packed["pack"], packed["offset"], packed["length"] = rows.pack, rows.offset, rows.length
    table = np.empty(len(blocks), _BLOCK_ROW)
    table["key"], table["first"] = run.keys[starts], starts
    table["sum"] = np.frombuffer(b"".join(_sum(packed[block].tobytes()) for block in blocks), f"V{_SUM}")
    joined = "\n".join(sorted(names)).encode()
    marks = _filter(run.keys)
    head = _HEAD.pack(_MAGIC, _LAYOUT, len(joined), len(rows.packs), len(blocks), len(marks), len(rows))
    front = b"".join((head, joined, pack_rows(rows.packs).tobytes(), table.tobytes(), marks))
    return front + blake3(front).digest(), packed.view(np.uint8).data


def open_run(path: str) -> CachedRun:
    """The run in the file at ``path``: a short one is read, a long one stays there. Raises OSError, Malformed."""
    opened = FileRun(path)
    if len(opened) > IN_MEMORY:
        return CachedRun(opened.names, opened)
    rows = opened.rows()
    if rows is None:
        raise Malformed("it is damaged")
    return CachedRun(opened.names, MemoryRun(keys_of(rows.ids), rows))


class FileRun:
    """A run that stays in its file. Each block is proven when it is read; of one that is damaged nothing is known.

    The file goes then, so that the next reader of the index asks the medium. Safe to use from several threads.
    """

    def __init__(self, path: str) -> None:
        """Raises OSError, or Malformed: it is cut off, of another layout, or its head is damaged."""
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        head = os.pread(self._fd, _HEAD.size, 0)
        if len(head) != _HEAD.size or head[: len(_MAGIC)] != _MAGIC:
            raise Malformed("it is no run of an index")
        layout, names, packs, blocks, marks, count = _HEAD.unpack(head)[1:]
        table_at = _HEAD.size + names + packs * PACK_ROW.itemsize
        size = table_at + blocks * _BLOCK_ROW.itemsize + marks
        self._start = size + _HEAD_SUM
        if layout != _LAYOUT or not count or os.fstat(self._fd).st_size != self._start + count * _ROW.itemsize:
            raise Malformed("it is cut off, or of another layout")
        front = os.pread(self._fd, self._start, 0)
        if blake3(front[:size]).digest() != front[size:]:
            raise Malformed("its head is damaged")
        self.names = frozenset(front[_HEAD.size : _HEAD.size + names].decode().split("\n"))
        self.packs = PackTable(np.frombuffer(front, PACK_ROW, packs, _HEAD.size + names))
        table = np.frombuffer(front, _BLOCK_ROW, blocks, table_at)
        self._filter = np.frombuffer(front, np.uint8, marks, size - marks)
        self._keys, self._sums = np.ascontiguousarray(table["key"]), table["sum"]
        self._firsts: list[int] = [*table["first"].tolist(), count]
        self._held: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._firsts[-1]

    def find(self, keys: Keys, ids: Ids, usable: Mask | None) -> Hits:
        """See :class:`~graincopy.repository.index_run.Run`."""
        hits = Hits.none(len(keys))
        blocks = np.searchsorted(self._keys, keys, side="right") - 1  # -1: before the first key
        bits = (keys & np.uint64(8 * len(self._filter) - 1)).astype(np.int64)
        blocks[self._filter[bits >> 3] >> (7 - (bits & 7)) & 1 == 0] = -1
        for place, block in enumerate(blocks.tolist()):
            row = self._find_in(block, ids[place].tobytes(), usable) if block >= 0 else None
            if row is not None:
                hits.row[place], hits.pack[place], hits.offset[place], hits.length[place] = row
        return hits

    def _find_in(self, block: int, piece: bytes, usable: Mask | None) -> tuple[int, int, int, int] | None:
        data = self._block(block)
        at = data.find(piece)
        while at >= 0:
            row, within = divmod(at, _ROW.itemsize)
            if not within:  # else it is the end of one thing and the beginning of another
                pack, offset, length = _PLACE.unpack_from(data, at + len(piece))
                if usable is None or usable[pack]:
                    return self._firsts[block] + row, pack, offset, length
            at = data.find(piece, at + 1)
        return None

    def rows(self) -> Rows | None:
        """See :class:`~graincopy.repository.index_run.Run`."""
        blocks = [self._read(block) for block in range(len(self._keys))]
        if not all(blocks):
            return None
        packed = np.frombuffer(b"".join(blocks), _ROW)
        ids = np.ascontiguousarray(packed["id"]).view(np.uint8).reshape(-1, 32)
        return Rows(self.packs, ids, *(np.ascontiguousarray(packed[name]) for name in ("pack", "offset", "length")))

    def _block(self, block: int) -> bytes:
        with self._lock:
            held = self._held.get(block)
            if held is not None:
                self._held.move_to_end(block)
                return held
        data = self._read(block)
        with self._lock:
            self._held[block] = data
            if len(self._held) > _HELD:
                self._held.popitem(last=False)
        return data

    def _read(self, block: int) -> bytes:
        """The rows of one block; nothing when they are not what was written."""
        first, stop = self._firsts[block], self._firsts[block + 1]
        try:
            data = os.pread(self._fd, (stop - first) * _ROW.itemsize, self._start + first * _ROW.itemsize)
        except OSError:
            data = b""
        if _sum(data) == self._sums[block].tobytes():
            return data
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        return b""


def _block_starts(keys: Keys) -> list[int]:
    """Numbers of the rows that blocks begin with: every so many, and never between rows of one key."""
    return sorted(set(np.searchsorted(keys, keys[::BLOCK]).tolist()))


def _filter(keys: Keys) -> bytes:
    bits = max(8, 1 << (8 * len(keys) - 1).bit_length())
    marked = np.zeros(bits, np.bool_)
    marked[(keys & np.uint64(bits - 1)).astype(np.int64)] = True
    return np.packbits(marked).tobytes()


def _sum(data: bytes) -> bytes:
    return blake3(data).digest(_SUM)
