"""What the super blocks on T say: the file system's kind, and whether it was frozen (or unmounted) cleanly (stage 7).

ext4: Documentation/filesystems/ext4/super.rst (little endian, at byte 1024); a freeze empties the journal and takes
the recovery flag away. XFS: XFS Algorithms & Data Structures, 3rd ed., "Superblocks" and "Journaling Log" (big
endian); a freeze writes all metadata to its place and then leaves one transaction of the super block in the log (so
that a crash while frozen still visits the unlinked inodes). XFS is therefore clean when the head is an unmount record,
or is about the super block alone and nothing from the log's tail on is older than the one record before it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import msgspec

_EXT4_MAGIC = 0xEF53
_HAS_JOURNAL = 0x4  # compatible
_RECOVER = 0x4  # incompatible: the journal holds what is not in place yet

_XFS_MAGIC = b"XFSB"
_RECORD_MAGIC = 0xFEEDBABE
_BLOCK = 512  # a "basic block", in which the log counts
_NEAR = 4096  # basic blocks: a frozen log's tail and head are closer than this, log stripes included
_FEW = 8  # records
_CYCLES_PER_HEADER = 64  # basic blocks of data whose first words one header block keeps
_OP_START, _OP_COMMIT, _OP_UNMOUNT = 0x01, 0x02, 0x20
_TRANSACTION, _BUFFER = 0x5452414E, 0x123C  # written in the byte order of the host


class Ext4(msgspec.Struct, frozen=True):
    """Fields of an ext4 super block."""

    needs_recovery: bool
    external_journal: bool


class Xfs(msgspec.Struct, frozen=True):
    """Fields of an XFS super block. The log lies ``log_start`` bytes into the file system."""

    log_start: int
    log_blocks: int  # basic blocks
    external_log: bool
    realtime: bool


def unclean(fd: int, fs_type: str, offset: int) -> str | None:
    """Why the ``fs_type`` that begins ``offset`` bytes into ``fd`` cannot be read as it lies there; None when it can.

    Raises OSError.
    """
    return _ext4_trouble(read_ext4(fd, offset)) if fs_type == "ext4" else _xfs_trouble(fd, read_xfs(fd, offset), offset)


def _ext4_trouble(found: Ext4 | None) -> str | None:
    if found is None:
        return "there is no ext4 file system"
    if found.external_journal:
        return "its ext4 journal lies on another device"
    return "its ext4 journal was not emptied by a freeze" if found.needs_recovery else None


def _xfs_trouble(fd: int, found: Xfs | None, offset: int) -> str | None:
    if found is None:
        return "there is no XFS file system"
    if found.external_log or found.realtime:
        return "its XFS log or file data lies on another device"
    return None if _log_is_clean(_Log(fd, offset + found.log_start, found.log_blocks)) else "its XFS was not frozen"


def read_ext4(fd: int, offset: int) -> Ext4 | None:
    """Super block of the ext4 that begins ``offset`` bytes into ``fd``; None when there is none. Raises OSError."""
    block = os.pread(fd, 1024, offset + 1024)
    if len(block) < 1024 or struct.unpack_from("<H", block, 0x38)[0] != _EXT4_MAGIC:
        return None
    compatible, incompatible = struct.unpack_from("<LL", block, 0x5C)
    inode, device = struct.unpack_from("<LL", block, 0xE0)
    return Ext4(
        needs_recovery=bool(incompatible & _RECOVER),
        external_journal=bool(compatible & _HAS_JOURNAL) and not inode and bool(device or any(block[0xD0:0xE0])),
    )


def read_xfs(fd: int, offset: int) -> Xfs | None:
    """Super block of the XFS that begins ``offset`` bytes into ``fd``; None when there is none. Raises OSError."""
    block = os.pread(fd, 512, offset)
    if len(block) < 512 or block[:4] != _XFS_MAGIC:
        return None
    (block_size,) = struct.unpack_from(">L", block, 4)
    realtime, log_start = struct.unpack_from(">Q", block, 16)[0], struct.unpack_from(">Q", block, 48)[0]
    group_blocks, log_blocks = struct.unpack_from(">L", block, 84)[0], struct.unpack_from(">L", block, 96)[0]
    group, within = log_start >> block[124], log_start & ((1 << block[124]) - 1)
    return Xfs(
        log_start=(group * group_blocks + within) * block_size,
        log_blocks=log_blocks * block_size // _BLOCK,
        external_log=log_start == 0,
        realtime=realtime > 0,
    )


class _Log(msgspec.Struct, frozen=True):
    """The ring of basic blocks that is the log."""

    fd: int
    start: int  # bytes
    blocks: int

    def read(self, block: int, count: int) -> bytes:
        """``count`` blocks from ``block``, around the ring."""
        block %= self.blocks
        first = min(count, self.blocks - block)
        data = os.pread(self.fd, first * _BLOCK, self.start + block * _BLOCK)
        return data if first == count else data + self.read(0, count - first)

    def cycle(self, block: int) -> int:
        """How often the ring had been gone round when ``block`` was written: its first word, or a header's second."""
        magic, cycle = struct.unpack_from(">LL", self.read(block, 1))
        return int(cycle if magic == _RECORD_MAGIC else magic)

    def head(self) -> int:
        """Block after the last one written: the first with an older cycle than block 0, by bisection."""
        newest, low, high = self.cycle(0), 0, self.blocks
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.cycle(middle) == newest else (low, middle)
        return high


class _Record(msgspec.Struct, frozen=True):
    """One log record: the block of its header, the block of the log's tail at that time, its operations."""

    block: int
    tail: int
    operations: int
    data: bytes


def _log_is_clean(log: _Log) -> bool:
    near = min(_NEAR, log.blocks)
    head = log.head()
    records = list(_records(log.read(head - near, near), (head - near) % log.blocks, log.blocks))
    if not records:
        return False
    last = records[-1]
    if _is_unmount(last):
        return True
    blocks = [record.block for record in records]
    if last.tail not in blocks:
        return False
    live = records[blocks.index(last.tail) :]
    if len(live) > 2:  # with everything in place the tail is the last record before, whatever that one was about
        return len(live) <= _FEW and all(_is_super_block(record) for record in live)
    return _is_super_block(last)


def _records(window: bytes, first: int, ring: int) -> Iterator[_Record]:
    """Records whose headers lie in ``window``, which begins at block ``first``."""
    for at in range(0, len(window), _BLOCK):
        magic, cycle, _, length = struct.unpack_from(">LLLL", window, at)
        if magic != _RECORD_MAGIC or not length:
            continue
        lsn, tail = struct.unpack_from(">QQ", window, at + 16)
        block = (first + at // _BLOCK) % ring
        if lsn != cycle << 32 | block:
            continue
        (operations,) = struct.unpack_from(">L", window, at + 40)
        yield _Record(block, tail & 0xFFFFFFFF, operations, _record_data(window, at, length))


def _record_data(window: bytes, at: int, length: int) -> bytes:
    """The record's first bytes (a log stripe pads it), with the first word of each block put back from the header."""
    length = min(length, _CYCLES_PER_HEADER * _BLOCK)
    (room,) = struct.unpack_from(">L", window, at + 320)  # h_size decides how many header blocks there are
    body = at + _BLOCK * max(1, -(-room // 32768))
    data = bytearray(window[body : body + length])
    for block in range(0, len(data), _BLOCK):
        word = at + 44 + block // _BLOCK * 4
        data[block : block + 4] = window[word : word + 4]
    return bytes(data)


def _is_unmount(record: _Record) -> bool:
    return record.operations == 1 and len(record.data) >= 12 and bool(record.data[9] & _OP_UNMOUNT)


def _is_super_block(record: _Record) -> bool:
    """Whether all its transactions log buffers at block 0 only, each whole inside this record."""
    at, payload = 0, 0
    for _ in range(record.operations):
        if at + 12 > len(record.data):
            return False
        length, flags = struct.unpack_from(">L", record.data, at + 4)[0], record.data[at + 9]
        body = record.data[at + 12 : at + 12 + length]
        at += 12 + length
        if flags & ~(_OP_START | _OP_COMMIT):
            return False
        if payload or not length:
            payload = max(0, payload - 1)
        else:
            payload = _regions_after(body)
            if payload < 0:
                return False
    return payload == 0


def _regions_after(body: bytes) -> int:
    """How many data regions follow this one: none after a transaction's header; -1 when it is not about block 0."""
    if len(body) >= 16 and struct.unpack_from("=L", body)[0] == _TRANSACTION:
        return 0
    if len(body) < 24:
        return -1
    kind, regions, _, length, block = struct.unpack_from("=HHHHq", body)
    return regions - 1 if kind == _BUFFER and block == 0 and length == 1 else -1
