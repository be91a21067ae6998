"""The bytes of NBD: numbers, headers and replies. Nothing here knows a state, a disk or a socket.

Source of every number and layout: the NBD protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md;
its names are kept, without the ``NBD_`` in front. Everything is big-endian.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag

# --- negotiation ----------------------------------------------------------------------------------

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 0b11)  # FIXED_NEWSTYLE, NO_ZEROES
OPTION_MAGIC = b"IHAVEOPT"
FLAG_C_FIXED_NEWSTYLE, FLAG_C_NO_ZEROES = 1, 2
OPTION = struct.Struct(">8sII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, type, length
OPTION_REPLY_MAGIC = 0x0003E889045565A9
NAME_LIMIT = 4096  # bytes of any string of the protocol, says the specification


class Opt(IntEnum):
    """Options that a client may send."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    """Types of replies to options."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_TOO_BIG = 1 << 31 | 9


class Info(IntEnum):
    """What INFO and GO tell of an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Flag(IntFlag):
    """Transmission flags: what an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10


def option_reply(option: int, kind: Rep, data: bytes = b"") -> bytes:
    """One reply to ``option``."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def counted(text: bytes) -> bytes:
    """A string with its length (32 bits) before it."""
    return struct.pack(">I", len(text)) + text


def info_export(size: int, flags: int) -> bytes:
    """Data of REP_INFO about size (bytes) and transmission flags."""
    return struct.pack(">HQH", Info.EXPORT, size, flags)


def info_text(kind: Info, text: bytes) -> bytes:
    """Data of REP_INFO about a name or a description."""
    return struct.pack(">H", kind) + text


def info_block_size(smallest: int, preferred: int, largest: int) -> bytes:
    """Data of REP_INFO about sizes of requests, in bytes."""
    return struct.pack(">HIII", Info.BLOCK_SIZE, smallest, preferred, largest)


def end_of_export_name(size: int, flags: int, no_zeroes: bool) -> bytes:
    """The answer to EXPORT_NAME, which is no option reply."""
    return struct.pack(">QH", size, flags) + (b"" if no_zeroes else bytes(124))


# --- transmission ---------------------------------------------------------------------------------

REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, handle, offset, length
REQUEST_MAGIC = 0x25609513
SIMPLE = struct.Struct(">IIQ")  # magic, error, handle
SIMPLE_MAGIC = 0x67446698
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, handle, length
CHUNK_MAGIC = 0x668E33EF
DATA_CHUNK = struct.Struct(">IHHQIQ")  # a chunk header and the offset of its data
STATE_HOLE, STATE_ZERO = 1, 2  # flags of base:allocation
_DONE = 1


class Cmd(IntEnum):
    """Commands that a client may send."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


FUA, NO_HOLE, DF, REQ_ONE = 1, 1 << 1, 1 << 2, 1 << 3  # command flags


class Chunk(IntEnum):
    """Types of structured reply chunks."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1


_ERRORS = {errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, errno.ESHUTDOWN}
_ALIKE = {errno.EDQUOT: errno.ENOSPC, errno.EFBIG: errno.ENOSPC, errno.EROFS: errno.EPERM, errno.EACCES: errno.EPERM}


def wire_error(number: int | None) -> int:
    """``number`` as one of the errors that the protocol knows; EIO for all it does not."""
    if number is None:
        return errno.EIO
    number = _ALIKE.get(number, number)
    return number if number in _ERRORS else errno.EIO


def simple(handle: int, error: int = 0) -> bytes:
    """A simple reply; the data of a READ follows it."""
    return SIMPLE.pack(SIMPLE_MAGIC, error, handle)


def data_chunk(handle: int, offset: int, length: int, done: bool) -> bytes:
    """What stands before ``length`` bytes of data that lie at ``offset``."""
    return DATA_CHUNK.pack(CHUNK_MAGIC, _DONE if done else 0, Chunk.OFFSET_DATA, handle, length + 8, offset)


def hole_chunk(handle: int, offset: int, length: int, done: bool) -> bytes:
    """``length`` bytes at ``offset`` read as zeros."""
    return _chunk(handle, Chunk.OFFSET_HOLE, struct.pack(">QI", offset, length), done)


def status_chunk(handle: int, context: int, states: Sequence[tuple[int, int]], done: bool) -> bytes:
    """Descriptors ``(length, flags)`` of neighbouring ranges in one metadata context."""
    flat = [number for state in states for number in state]
    return _chunk(handle, Chunk.BLOCK_STATUS, struct.pack(f">I{len(flat)}I", context, *flat), done)


def error_chunk(handle: int, error: int, text: str) -> bytes:
    """A request failed; the text is for people."""
    message = text.encode("ascii", "backslashreplace")[:NAME_LIMIT]
    return _chunk(handle, Chunk.ERROR, struct.pack(">IH", error, len(message)) + message, True)


def failure(structured: bool, handle: int, error: int, text: str) -> bytes:
    """The reply that a request failed, in the form that was agreed on."""
    return error_chunk(handle, error, text) if structured else simple(handle, error)


def _chunk(handle: int, kind: Chunk, payload: bytes, done: bool) -> bytes:
    return CHUNK.pack(CHUNK_MAGIC, _DONE if done else 0, kind, handle, len(payload)) + payload
