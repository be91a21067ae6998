"""Which blocks of an overlay are its own: a journal beside the overlay's file, for overlays that are kept.

Format, little-endian; ``docs/nbd.md`` says the same in prose:

    header     magic (8 bytes), length of the body (u32), body (msgpack: whose overlay it is), BLAKE3 of these (16)
    record     kind (u8), zeros (7 bytes), two numbers (u64 each), check (8 bytes): BLAKE3 of the header's hash, the
               record's number (u64) and its first 24 bytes
        EXTENT start, stop      these blocks are the overlay's own. Appended before the write is answered
        BOOT   two halves       of a hash of the boot id of the host under which the following records were appended
        FLUSH  count, 0         of the first ``count`` records the data was on stable storage before this was written

After a crash of the process, what the page cache has is what was written, so every record under the boot id of now
counts. After a crash of the host only what a FLUSH covers does: data may be missing behind later ones. A tail that does
not check is what a power failure leaves of unsynced appends; a record that does not check *before* a later FLUSH is
damage, and the overlay is refused.
"""

from __future__ import annotations

import contextlib
import os
import struct

import msgspec
from blake3 import blake3
from pyroaring import BitMap64, FrozenBitMap64  # type: ignore[import-not-found,unused-ignore]

from graincopy.core.bitmap import GrainBitmap
from graincopy.core.errors import OverlayUnfit
from graincopy.core.extent import Extents

MAGIC = b"GCOVRLY\x01"
HEADER = struct.Struct("<8sI")
RECORD = struct.Struct("<B7xQQ8s")
BODY_LIMIT = 64 << 10  # bytes; names are 4096 at most
HASH_SIZE, CHECK_SIZE = 16, 8
EXTENT, BOOT, FLUSH = 1, 2, 3
COMPACT_FROM = 1 << 16  # records (2 MiB): a smaller journal is not worth rewriting
COMPACT_WHEN = 4  # times as many records as extents


class Whose(msgspec.Struct, frozen=True):
    """What an overlay lies over. Sizes in bytes. Text that is not UTF-8 has been made so by its owner."""

    point: str  # an id: 128 random bits, so no other repository has it
    disk: str
    size: int
    block_size: int


class OverlayMap:
    """The journal at ``path``. Not thread-safe: the overlay's lock is held around every call."""

    def __init__(self, path: str, whose: Whose, boot: str) -> None:
        self._path, self._whose = path, whose
        halves = blake3(boot.encode("utf-8", "surrogateescape")).digest(length=16)
        self._boot = struct.unpack("<QQ", halves)
        self._fd = -1
        self._root = b""
        self._records = 0

    # --- opening ----------------------------------------------------------------------------------

    def load(self) -> Extents | None:
        """Blocks that are the overlay's own; None where there is no journal yet. Raises OverlayUnfit or OSError."""
        try:
            with open(self._path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        whose, root, at = self._header(data)
        if whose != self._whose:
            raise OverlayUnfit(path=self._path, reason=_difference(whose, self._whose))
        return self._replay(memoryview(data)[at:], root)

    def _header(self, data: bytes) -> tuple[Whose, bytes, int]:
        try:
            magic, length = HEADER.unpack_from(data)
        except struct.error:
            magic, length = b"", 0
        if magic != MAGIC or length > BODY_LIMIT:
            raise OverlayUnfit(path=self._path, reason="this is no map of an overlay that this graincopy knows")
        stop = HEADER.size + length
        root = blake3(data[:stop]).digest(length=HASH_SIZE)
        if data[stop : stop + HASH_SIZE] != root:
            raise OverlayUnfit(path=self._path, reason="its map is damaged")
        try:
            return msgspec.msgpack.decode(data[HEADER.size : stop], type=Whose), root, stop + HASH_SIZE
        except msgspec.MsgspecError as error:
            raise OverlayUnfit(path=self._path, reason=f"its map cannot be read ({error})") from error

    def _replay(self, data: memoryview, root: bytes) -> Extents:
        """What counts of the records: see the top of this module."""
        extents: list[tuple[int, int, int]] = []  # number, start, stop
        covered = here_from = bad_from = -1
        for number in range(len(data) // RECORD.size):
            raw = data[number * RECORD.size : (number + 1) * RECORD.size]
            kind, first, second, check = RECORD.unpack(raw)
            if check != _check(root, number, bytes(raw[: RECORD.size - CHECK_SIZE])):
                bad_from = number if bad_from < 0 else bad_from
            elif kind == FLUSH:
                if 0 <= bad_from < first:
                    raise OverlayUnfit(path=self._path, reason="its map is damaged")
                covered = max(covered, first)
            elif kind == BOOT and bad_from < 0:
                here_from = number if (first, second) == self._boot and here_from < 0 else here_from
            elif kind == EXTENT and bad_from < 0:
                extents.append((number, first, second))
        counted = [(start, stop) for number, start, stop in extents if number < covered or 0 <= here_from <= number]
        return Extents.from_pairs(counted)

    # --- writing ----------------------------------------------------------------------------------

    def rewrite(self, blocks: Extents) -> None:
        """Put a journal in place that says just ``blocks``, durably; their data is on stable storage already."""
        body = msgspec.msgpack.encode(self._whose)
        head = HEADER.pack(MAGIC, len(body)) + body
        self._root = blake3(head).digest(length=HASH_SIZE)
        self._records = 0
        content = [head, self._root, *(self._next(EXTENT, start, stop) for start, stop in blocks)]
        content += [self._next(FLUSH, self._records, 0), self._next(BOOT, *self._boot)]
        temporary = f"{self._path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_APPEND, 0o600)
        try:
            _write_all(fd, b"".join(content))
            os.fsync(fd)
            os.rename(temporary, self._path)
        except OSError:
            os.close(fd)
            raise
        self.close()
        self._fd = fd
        _sync_folder(self._path)

    def add(self, start: int, stop: int) -> None:
        """Blocks ``[start, stop)`` are the overlay's own from now on. Raises OSError."""
        self._append(EXTENT, start, stop)

    @property
    def count(self) -> int:
        """Records so far: what :meth:`flushed` wants to know as it was before the data was synced."""
        return self._records

    def flushed(self, count: int) -> None:
        """The data of the first ``count`` records is on stable storage; say so, durably. Raises OSError."""
        self._append(FLUSH, count, 0)
        os.fdatasync(self._fd)

    def bloated(self, blocks: BitMap64) -> bool:
        """Whether :meth:`rewrite` would make it much smaller."""
        if self._records < COMPACT_FROM:
            return False
        return self._records > COMPACT_WHEN * len(to_extents(blocks))

    def close(self) -> None:
        """Let the file go."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, kind: int, first: int, second: int) -> None:
        at = os.fstat(self._fd).st_size
        number = self._records
        try:
            _write_all(self._fd, self._next(kind, first, second))
        except OSError:
            self._records = number
            os.ftruncate(self._fd, at)  # half a record would hide all that follow
            raise

    def _next(self, kind: int, first: int, second: int) -> bytes:
        plain = RECORD.pack(kind, first, second, b"")[: RECORD.size - CHECK_SIZE]
        record = plain + _check(self._root, self._records, plain)
        self._records += 1
        return record


def to_extents(blocks: BitMap64) -> Extents:
    """A bitmap of blocks as extents of blocks."""
    return GrainBitmap(FrozenBitMap64(blocks)).to_extents()


def _check(root: bytes, number: int, plain: bytes) -> bytes:
    return blake3(root + number.to_bytes(8, "little") + plain).digest(length=CHECK_SIZE)


def _difference(found: Whose, wanted: Whose) -> str:
    if found.point != wanted.point:
        return f"it belongs to restore point {found.point[:12]}"
    if found.disk != wanted.disk:
        return f"it belongs to disk {found.disk}"
    return "it was made for another size"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_folder(path: str) -> None:
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
