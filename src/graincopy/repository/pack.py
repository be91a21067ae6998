"""Packs: many sealed pieces in one object, written once, read in ranges.

A writer fills one buffer: pieces are sealed straight into it, and a full buffer is put as one object. Only when
the medium has it durably is the directory reported, so that nobody can refer to what may still be lost.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import zstandard

from graincopy.core.clock import Chance
from graincopy.core.errors import ObjectDamaged
from graincopy.core.extent import Array
from graincopy.core.ids import PieceId, new_id
from graincopy.core.units import MIB
from graincopy.media.base import Buffer, Medium
from graincopy.model.snapshot import Existing
from graincopy.repository import format, frame
from graincopy.repository.codec import ZSTD_LEVEL, Codec, PackOpener, PackSealer, compress
from graincopy.repository.format import Ids
from graincopy.repository.records import PackRef, PieceKind, pack_name

TARGET_SIZE = 16 * MIB
COALESCE_GAP = 64 * 1024  # bytes that are read for nothing rather than asking twice
READ_LIMIT = 8 * MIB  # bytes of one ranged get


class PackDirectory(msgspec.Struct, frozen=True, eq=False):
    """What one pack holds, in the order in which it lies there."""

    pack: PackRef
    ids: Ids
    offsets: Array
    lengths: Array  # sealed bytes


class Proof(msgspec.Struct, frozen=True, eq=False):
    """What came of reading all of a pack."""

    directory: PackDirectory
    bad: dict[bytes, ObjectDamaged]  # by piece id


OnPut = Callable[[PackDirectory], None]
Claim = Callable[[PieceId], bool]


class PackWriter:
    """Seals pieces of one kind into packs. One thread only: each worker owns its own."""

    def __init__(
        self,
        kind: PieceKind,
        codec: Codec,
        medium: Medium,
        chance: Chance,
        target_size: int = TARGET_SIZE,
        on_put: OnPut | None = None,
        claim: Claim | None = None,
    ) -> None:
        """``claim`` is asked before a piece is sealed; when it says no, somebody else stores that piece."""
        self.kind = kind
        self._codec, self._medium, self._chance = codec, medium, chance
        self._on_put, self._claim = on_put, claim
        self._target = max(target_size, format.PACK_HEADER_SIZE)
        self._zstd = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self._size = self._target + codec.limit(kind) + format.PIECE_OVERHEAD
        self._view = memoryview(b"")  # the buffer, while a pack is being filled
        self._sealer: PackSealer | None = None
        self._pack = ""
        self._used = 0
        self._ids: list[PieceId] = []
        self._lengths: list[int] = []

    def add(self, piece: PieceId, content: bytes | memoryview) -> int:
        """Store ``content``; bytes that it takes in the repository's packs, 0 when somebody else stores it.

        Raises ValueError for content beyond the limit of its kind, and whatever the medium raises when the pack is full
        and put; the writer is then of no more use.
        """
        if self._claim is not None and not self._claim(piece):
            return 0
        if len(content) > self._codec.limit(self.kind):
            raise ValueError(f"a {self.kind.name.lower()} of {len(content)} bytes is too large")
        sealer = self._sealer or self._begin()
        codec, body = compress(self._zstd, content)
        length, offset = len(body) + format.PIECE_OVERHEAD, self._used
        sealer.piece(codec, piece, body, offset, self._view[offset : offset + length])
        self._ids.append(piece)
        self._lengths.append(length)
        self._used += length
        if self._used + len(self._ids) * format.DIRECTORY_ENTRY_SIZE >= self._target:
            self._put(sealer)
        return length + format.DIRECTORY_ENTRY_SIZE

    def flush(self) -> None:
        """Put what is buffered, durably, and give the buffer back. Nothing buffered: nothing happens."""
        if self._sealer is not None:
            self._put(self._sealer)
        self.close()

    def _put(self, sealer: PackSealer) -> None:
        offset, count = self._used, len(self._ids)
        ids, lengths = b"".join(self._ids), np.array(self._lengths, np.int64)
        size = count * format.DIRECTORY_ENTRY_SIZE + format.TAG_SIZE
        trailer = format.encode_pack_trailer(format.PackTrailer(offset, size, count))
        directory = sealer.directory(format.encode_directory(ids, self._lengths), offset, trailer)
        name = pack_name(self.kind, self._pack)
        parts: list[Buffer] = [self._view[:offset], directory, trailer]
        if isinstance(self._medium.put(name, parts), Existing) and self._medium.get(name) != b"".join(parts):
            raise ObjectDamaged(name=name, reason="another pack already has this random name")
        pack = PackRef(self._pack, self.kind, offset + len(directory) + len(trailer))
        self._sealer = None
        if self._on_put is not None:
            table = np.frombuffer(ids, np.uint8).reshape(-1, 32)
            offsets = format.PACK_HEADER_SIZE + np.cumsum(lengths) - lengths
            self._on_put(PackDirectory(pack, table, offsets, lengths))

    def close(self) -> None:
        """Give the buffer back; what was not flushed is dropped. May be repeated."""
        self._sealer = None
        self._view = memoryview(b"")  # the mapping goes with its last view

    def _begin(self) -> PackSealer:
        self._pack = new_id(self._chance)  # never reused: not on resume, rerun or fork
        self._sealer = self._codec.pack_sealer(self.kind, pack_name(self.kind, self._pack))
        self._ids, self._lengths = [], []
        if not len(self._view):
            self._view = memoryview(mmap.mmap(-1, self._size))
        self._view[: format.PACK_HEADER_SIZE] = self._sealer.header
        self._used = format.PACK_HEADER_SIZE
        return self._sealer


class PackReader:
    """Reads pieces of packs. Holds nothing but the way there; safe to use from several threads."""

    def __init__(self, codec: Codec, medium: Medium) -> None:
        self._codec, self._medium = codec, medium

    def fetch(self, pack: PackRef, ids: Ids, offsets: Array, lengths: Array) -> tuple[list[bytes], int]:
        """Contents of pieces that lie in ``pack``, in the order asked for, and the bytes that were read.

        Neighbours are read together. Raises ObjectMissing or ObjectDamaged naming the pack.
        """
        opener = self._opener(pack)
        order = np.argsort(offsets, kind="stable")
        contents: list[bytes] = [b""] * len(order)
        read = 0
        for run in _coalesce(offsets[order], lengths[order]):
            members = order[run]
            start = int(offsets[members[0]])
            stop = int((offsets[members] + lengths[members]).max())
            block = memoryview(self._get(pack, start, stop - start))
            read += len(block)
            for member in members.tolist():
                at, length = int(offsets[member]) - start, int(lengths[member])
                contents[member] = opener.piece(PieceId(ids[member].tobytes()), block[at : at + length], start + at)
        return contents, read

    def directory(self, pack: PackRef) -> PackDirectory:
        """What ``pack`` says it holds. Raises ObjectMissing or ObjectDamaged."""
        opener = self._opener(pack, exact=True)
        try:
            if pack.size < format.PACK_HEADER_SIZE + format.TAG_SIZE + format.PACK_TRAILER_SIZE:
                raise frame.Malformed("it is truncated")
            tail = self._get(pack, pack.size - format.PACK_TRAILER_SIZE, format.PACK_TRAILER_SIZE)
            trailer = format.decode_pack_trailer(tail, pack.size)
            sealed = self._get(pack, trailer.offset, trailer.length)
            return PackDirectory(pack, *format.decode_directory(opener.directory(sealed, trailer), trailer))
        except frame.Malformed as error:
            raise ObjectDamaged(name=pack.name, reason=error) from error

    def prove(self, pack: PackRef) -> Proof:
        """Read every byte of ``pack`` and prove it. Raises ObjectMissing, or ObjectDamaged when it is as a whole."""
        directory = self.directory(pack)
        opener = self._opener(pack, exact=True)
        bad: dict[bytes, ObjectDamaged] = {}
        for run in _coalesce(directory.offsets, directory.lengths):
            start = int(directory.offsets[run[0]])
            block = memoryview(self._get(pack, start, int(directory.lengths[run].sum())))
            for member in run.tolist():
                piece, at = PieceId(directory.ids[member].tobytes()), int(directory.offsets[member]) - start
                try:
                    opener.piece(piece, block[at : at + int(directory.lengths[member])], start + at)
                except ObjectDamaged as error:
                    bad[piece] = error
        return Proof(directory, bad)

    def _opener(self, pack: PackRef, exact: bool = False) -> PackOpener:
        """Reads the header only where it matters: with one epoch there is only one header it can be."""
        if not exact and len(self._codec.epochs()) == 1:
            return self._codec.pack_opener(pack.kind, pack.name)
        return self._codec.pack_opener(pack.kind, pack.name, self._get(pack, 0, format.PACK_HEADER_SIZE))

    def _get(self, pack: PackRef, start: int, length: int) -> bytes:
        data = self._medium.get(pack.name, start, length)
        if len(data) != length:
            raise ObjectDamaged(name=pack.name, reason="it is truncated")
        return data


def _coalesce(offsets: Array, lengths: Array) -> Sequence[Array]:
    """Runs of ascending pieces that are worth one read each."""
    if not len(offsets):
        return []
    stops = np.maximum.accumulate(offsets + lengths)
    gap = offsets[1:] - stops[:-1] > COALESCE_GAP
    slices = offsets // READ_LIMIT  # a run ends where its first byte crosses into another slice
    breaks = np.flatnonzero(gap | (slices[1:] != slices[:-1])) + 1
    return np.split(np.arange(len(offsets)), breaks)


_PACK_NAME = re.compile(r"(data|node)/([0-9a-f]{2})/(\2[0-9a-f]{30})")


def is_pack_name(name: str) -> bool:
    """Whether ``name`` has the form of a pack's."""
    return _PACK_NAME.fullmatch(name) is not None


def list_packs(medium: Medium) -> tuple[PackRef, ...]:
    """Every pack on the medium, by object name."""
    found = []
    for kind in PieceKind:
        for entry in medium.list(kind.folder):
            match = _PACK_NAME.fullmatch(entry.name)
            if match is not None:
                found.append(PackRef(match[3], kind, entry.size))
    return tuple(sorted(found, key=lambda pack: pack.name))
