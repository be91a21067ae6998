"""Repository format 1, index segments: pack table and columns as bytes and back. The rest of it is in ``format``."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from graincopy.repository.format import Ids
from graincopy.repository.frame import Malformed, TooNew
from graincopy.repository.records import PackRef, PieceKind

_SEGMENT = struct.Struct("<IIQ")  # segment layout, packs, pieces
SEGMENT_LAYOUT = 1
PACK_ROW = np.dtype([("id", "V16"), ("kind", "u1"), ("size", "<u8")])


class PackTable(Sequence[PackRef]):
    """Packs as they lie in a segment, each made a value when it is asked for: there may be many thousands."""

    def __init__(self, rows: NDArray[np.void]) -> None:
        """``rows`` are of ``PACK_ROW``. Raises Malformed."""
        for kind in set(rows["kind"].tolist()):
            if kind not in PieceKind._value2member_map_:
                raise Malformed(f"packs of kind {kind} are not known")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, at: int) -> PackRef: ...
    @overload
    def __getitem__(self, at: slice) -> PackTable: ...
    def __getitem__(self, at: int | slice) -> PackRef | PackTable:
        if isinstance(at, slice):
            return PackTable(self._rows[at])
        name, kind, size = self._rows[at].item()
        return PackRef(bytes(name).hex(), PieceKind(kind), size)


class Rows(msgspec.Struct, frozen=True, eq=False):
    """Where pieces lie: columns of equal length. ``pack`` numbers the rows of ``packs``."""

    packs: Sequence[PackRef]
    ids: Ids
    pack: NDArray[np.uint32]
    offset: NDArray[np.uint32]
    length: NDArray[np.uint32]  # sealed bytes

    def __len__(self) -> int:
        return len(self.ids)


def encode_segment(rows: Rows) -> bytes:
    """Pack table, then the columns one after the other."""
    table = pack_rows(rows.packs)
    columns = (column.astype("<u4").tobytes() for column in (rows.pack, rows.offset, rows.length))
    head = _SEGMENT.pack(SEGMENT_LAYOUT, len(rows.packs), len(rows))
    return b"".join((head, table.tobytes(), rows.ids.tobytes(), *columns))


def decode_segment(data: bytes) -> Rows:
    """Raises TooNew or Malformed."""
    if len(data) < _SEGMENT.size:
        raise Malformed("it is truncated")
    layout, pack_count, count = _SEGMENT.unpack_from(data)
    if layout != SEGMENT_LAYOUT:
        raise TooNew(layout)
    if len(data) != _SEGMENT.size + pack_count * PACK_ROW.itemsize + count * 44:
        raise Malformed("it has the wrong length")
    table = PackTable(np.frombuffer(data, PACK_ROW, pack_count, _SEGMENT.size))
    start = _SEGMENT.size + pack_count * PACK_ROW.itemsize
    ids = np.frombuffer(data, np.uint8, count * 32, start).reshape(-1, 32)
    columns = np.frombuffer(data, "<u4", count * 3, start + ids.nbytes).reshape(3, count)
    if count and int(columns[0].max()) >= pack_count:
        raise Malformed("it names a pack that it does not list")
    return Rows(table, ids, columns[0], columns[1], columns[2])


def pack_rows(packs: Sequence[PackRef]) -> NDArray[np.void]:
    """``packs`` as rows of ``PACK_ROW``."""
    table = np.empty(len(packs), PACK_ROW)
    table["id"] = np.frombuffer(b"".join(bytes.fromhex(pack.id) for pack in packs), "V16")
    table["kind"] = [pack.kind for pack in packs]
    table["size"] = [pack.size for pack in packs]
    return table
