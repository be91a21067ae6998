"""Repository format 1 (draft): with ``frame`` and ``format_segment`` all that turns values into bytes and back.

Everything is little-endian. ``docs/format/repository-1.md`` says the same in prose; the golden repositories
under ``tests/golden`` hold both to it. Nothing here knows keys, names on a medium, or the medium.

    envelope   every other small object     header, sealed body
    pack       data/…, node/…               header, pieces, sealed directory, trailer
    node       a piece of a node pack       header, bitmap of slots, ids, kinds
    segment    inside an index envelope     in ``format_segment``
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from graincopy.core.extent import Array
from graincopy.repository.frame import VERSION, Malformed, TooNew
from graincopy.repository.records import ObjectKind, PieceKind

Ids = NDArray[np.uint8]  # (n, 32)


# --- envelope: one sealed object ------------------------------------------------------------------

SALT_SIZE = 16
RAW, ZSTD = 0, 1  # how content is stored
_ENVELOPE = struct.Struct("<8sHBBIQ16s")  # magic, version, kind, codec, epoch, sealed length, salt
_ENVELOPE_MAGIC = b"GRAINOBJ"
ENVELOPE_SIZE = _ENVELOPE.size


class EnvelopeHeader(msgspec.Struct, frozen=True):
    """What stands in clear before a sealed body; all of it is authenticated."""

    kind: ObjectKind
    codec: int
    epoch: int  # 0: sealed with the master key
    length: int  # bytes of the sealed body, tag included
    salt: bytes


def encode_envelope_header(header: EnvelopeHeader) -> bytes:
    """40 bytes."""
    return _ENVELOPE.pack(_ENVELOPE_MAGIC, VERSION, header.kind, header.codec, header.epoch, header.length, header.salt)


def decode_envelope_header(data: bytes) -> EnvelopeHeader:
    """The header at the beginning of ``data``. Raises TooNew or Malformed."""
    if len(data) < ENVELOPE_SIZE:
        raise Malformed("it is truncated")
    magic, version, kind, codec, epoch, length, salt = _ENVELOPE.unpack_from(data)
    _check_head(magic, _ENVELOPE_MAGIC, version)
    if kind not in ObjectKind._value2member_map_ or codec not in (RAW, ZSTD):
        raise Malformed(f"kind {kind} or codec {codec} is not known")
    return EnvelopeHeader(ObjectKind(kind), codec, epoch, length, salt)


def _check_head(magic: bytes, wanted: bytes, version: int) -> None:
    if magic != wanted:
        raise Malformed("it does not begin as it should")
    if version != VERSION:
        raise TooNew(version)


# --- pack -----------------------------------------------------------------------------------------

_PACK_MAGIC = b"GRAINPAK"
_PACK_END = b"GRAINEND"
_PACK_HEADER = struct.Struct("<8sHBBI")  # magic, version, kind, 0, epoch
_PACK_TRAILER = struct.Struct("<QII8s")  # directory offset, its sealed length, entries, magic
_DIRECTORY = np.dtype([("id", "V32"), ("length", "<u4")])
PACK_HEADER_SIZE = _PACK_HEADER.size
PACK_TRAILER_SIZE = _PACK_TRAILER.size
DIRECTORY_ENTRY_SIZE = _DIRECTORY.itemsize
TAG_SIZE = 16
PIECE_OVERHEAD = 1 + TAG_SIZE  # codec byte before the sealed content, tag after it
NO_ID = bytes(32)  # stands for the piece id when the directory is sealed


class PackHeader(msgspec.Struct, frozen=True):
    """The first 16 bytes of a pack, authenticated with every piece."""

    kind: PieceKind
    epoch: int


class PackTrailer(msgspec.Struct, frozen=True):
    """The last 24 bytes of a pack, authenticated with the directory."""

    offset: int  # of the sealed directory
    length: int  # of the sealed directory
    count: int  # pieces


def encode_pack_header(header: PackHeader) -> bytes:
    """16 bytes."""
    return _PACK_HEADER.pack(_PACK_MAGIC, VERSION, header.kind, 0, header.epoch)


def decode_pack_header(data: bytes) -> PackHeader:
    """Raises TooNew or Malformed."""
    if len(data) < PACK_HEADER_SIZE:
        raise Malformed("it is truncated")
    magic, version, kind, _, epoch = _PACK_HEADER.unpack_from(data)
    _check_head(magic, _PACK_MAGIC, version)
    if kind not in PieceKind._value2member_map_:
        raise Malformed(f"packs of kind {kind} are not known")
    return PackHeader(PieceKind(kind), epoch)


def encode_pack_trailer(trailer: PackTrailer) -> bytes:
    """24 bytes."""
    return _PACK_TRAILER.pack(trailer.offset, trailer.length, trailer.count, _PACK_END)


def decode_pack_trailer(data: bytes, size: int) -> PackTrailer:
    """From the last bytes of a pack of ``size`` bytes. Raises Malformed."""
    if len(data) < PACK_TRAILER_SIZE:
        raise Malformed("it is truncated")
    offset, length, count, magic = _PACK_TRAILER.unpack(data[-PACK_TRAILER_SIZE:])
    if magic != _PACK_END:
        raise Malformed("it does not end as it should")
    if offset < PACK_HEADER_SIZE or offset + length + PACK_TRAILER_SIZE != size:
        raise Malformed("its directory is not where it should be")
    if length != count * DIRECTORY_ENTRY_SIZE + TAG_SIZE:
        raise Malformed("its directory has the wrong length")
    return PackTrailer(offset, length, count)


def encode_directory(ids: bytes, lengths: Sequence[int]) -> bytes:
    """Pieces in the order in which they lie in the pack, without gaps."""
    table = np.empty(len(lengths), _DIRECTORY)
    table["id"] = np.frombuffer(ids, "V32")
    table["length"] = lengths
    return table.tobytes()


def decode_directory(data: bytes, trailer: PackTrailer) -> tuple[Ids, Array, Array]:
    """Ids, offsets and sealed lengths. Raises Malformed when the pieces do not fill the pack exactly."""
    if len(data) != trailer.count * DIRECTORY_ENTRY_SIZE:
        raise Malformed("its directory has the wrong length")
    table = np.frombuffer(data, _DIRECTORY)
    ids = np.frombuffer(table["id"].tobytes(), np.uint8).reshape(-1, 32)
    lengths = table["length"].astype(np.int64)
    stops = PACK_HEADER_SIZE + np.cumsum(lengths)
    end = int(stops[-1]) if len(stops) else PACK_HEADER_SIZE
    if end != trailer.offset or bool((lengths < PIECE_OVERHEAD).any()):
        raise Malformed("its pieces do not fill it")
    return ids, stops - lengths, lengths


# --- associated data and nonces -------------------------------------------------------------------

_PIECE = struct.Struct("<Q32s")
_NONCE = struct.Struct("<Q4x")


def pack_binding(header: bytes, name: str) -> bytes:
    """What every seal in one pack is bound to: format, kind and epoch (the header as it lies there), and name."""
    return b"graincopy pack\0" + header + name.encode() + b"\0"


def piece_binding(pack: bytes, offset: int, piece: bytes, codec: int) -> bytes:
    """What one piece is bound to besides its pack: position, id and codec."""
    return pack + _PIECE.pack(offset, piece) + bytes((codec,))


def directory_binding(pack: bytes, offset: int, trailer: bytes) -> bytes:
    """What the directory is bound to besides its pack."""
    return pack + _PIECE.pack(offset, NO_ID) + trailer


def envelope_binding(header: bytes, name: str) -> bytes:
    """What an envelope is bound to: its header as it lies there, and its name."""
    return b"graincopy object\0" + header + name.encode()


def position_nonce(offset: int) -> bytes:
    """The nonce at byte ``offset`` of a pack: a counter, as no two seals of a pack begin at one offset."""
    return _NONCE.pack(offset)


# --- grain-map nodes ------------------------------------------------------------------------------

_NODE = struct.Struct("<BBH")  # node layout 1, level (0 = leaf), fan-out
NODE_LAYOUT = 1


def node_size_limit(fan_out: int) -> int:
    """Bytes of the largest node."""
    return _NODE.size + fan_out // 8 + fan_out * 33


def encode_nodes(
    level: int, fan_out: int, positions: Array, kinds: NDArray[np.uint8], ids: Ids
) -> tuple[Array, list[bytes]]:
    """Nodes that hold the ascending ``positions``: their numbers, and the content of each."""
    if not len(positions):
        return positions, []
    numbers, starts = _groups(positions // fan_out)
    stops = np.append(starts[1:], len(positions))
    slots = np.zeros((len(numbers), fan_out), np.uint8)
    slots[np.repeat(np.arange(len(numbers)), stops - starts), positions % fan_out] = 1
    bitmaps = np.packbits(slots, axis=1, bitorder="little")
    head, width, id_bytes, kind_bytes = (
        _NODE.pack(NODE_LAYOUT, level, fan_out),
        fan_out // 8,
        ids.tobytes(),
        kinds.tobytes(),
    )
    map_bytes = bitmaps.tobytes()
    contents = [
        b"".join((head, map_bytes[k * width : (k + 1) * width], id_bytes[32 * a : 32 * b], kind_bytes[a:b]))
        for k, (a, b) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True))
    ]
    return numbers, contents


def decode_nodes(
    level: int, fan_out: int, numbers: Array, contents: Sequence[bytes]
) -> tuple[Array, NDArray[np.uint8], Ids]:
    """Positions (ascending when ``numbers`` are), kinds and ids in nodes ``numbers``. Raises Malformed."""
    head, width = _NODE.pack(NODE_LAYOUT, level, fan_out), fan_out // 8
    start = len(head) + width
    counts = np.fromiter((len(content) - start for content in contents), np.int64, len(contents))
    if bool((counts < 33).any()) or bool((counts % 33).any()) or not all(c.startswith(head) for c in contents):
        raise Malformed(f"it is no node of level {level} and fan-out {fan_out}")
    counts //= 33
    bitmaps = np.frombuffer(b"".join(content[len(head) : start] for content in contents), np.uint8)
    slots = np.unpackbits(bitmaps.reshape(-1, width), axis=1, bitorder="little")
    node, slot = np.nonzero(slots)
    if not np.array_equal(np.bincount(node, minlength=len(contents)), counts):
        raise Malformed("its bitmap does not fit its length")
    sizes = counts.tolist()
    ids = b"".join(c[start : start + 32 * n] for c, n in zip(contents, sizes, strict=True))
    kinds = b"".join(c[start + 32 * n :] for c, n in zip(contents, sizes, strict=True))
    positions = numbers[node] * fan_out + slot
    return positions, np.frombuffer(kinds, np.uint8), np.frombuffer(ids, np.uint8).reshape(-1, 32)


def _groups(values: Array) -> tuple[Array, Array]:
    """Distinct values of an ascending array that is not empty, and where each begins."""
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    return values[starts], starts
