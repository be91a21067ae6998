"""Option haggling of NBD: what each option of a client is answered with. Bytes in, bytes out; no socket, no disk.

:class:`Haggling` is what was agreed so far; ``OPTIONS`` is the table of options that are understood. The framing
(magic, option, length) is :mod:`graincopy.views.nbd_protocol`'s business.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import Enum

import msgspec

from graincopy.views import nbd_wire as wire
from graincopy.views.nbd_wire import Flag, Info, Opt, Rep

ALLOCATION, SOURCE = "base:allocation", "graincopy:source"
CONTEXTS = (ALLOCATION, SOURCE)  # the id of a context on the wire is its place here, from 1
QUERY_LIMIT = 64  # queries in one option; there are two contexts
PREFERRED_BLOCK = 65536  # bytes: the default grain
REQUEST_LIMIT = 32 << 20  # bytes of one request: what qemu, nbdkit and libnbd agree on, and what one reply may hold


class Export(msgspec.Struct, frozen=True):
    """What clients are told of a disk before they may read it. ``size`` in bytes."""

    name: str  # as people know it: the disk's NAME
    size: int
    writable: bool
    description: str = ""

    @property
    def wire_name(self) -> bytes:
        """The name in UTF-8, which the protocol wants; bytes of a path that are not become ``\\xNN``."""
        plain = self.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return plain.encode()

    def flags(self, structured: bool) -> int:
        """Transmission flags. One cache is shared by all connections, so MULTI_CONN holds, writable or not."""
        flags = Flag.HAS_FLAGS | Flag.CAN_MULTI_CONN | Flag.SEND_CACHE | Flag.SEND_FLUSH | Flag.SEND_FUA
        if structured:
            flags |= Flag.SEND_DF
        return int(flags | (Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES if self.writable else Flag.READ_ONLY))


class Tls(Enum):
    """How a connection stands to TLS."""

    NONE = "none"  # there are no certificates
    REQUIRED = "required"  # nothing is said before it
    ON = "on"


class Next(Enum):
    """What comes after an option."""

    OPTION = "option"
    TRANSMISSION = "transmission"
    TLS = "tls"
    CLOSE = "close"


class Haggling(msgspec.Struct):
    """What the two sides agreed on so far. ``contexts`` belong to the export called ``contexts_of``."""

    exports: Sequence[Export]
    tls: Tls = Tls.NONE
    fixed: bool = False
    no_zeroes: bool = False
    structured: bool = False
    contexts: tuple[str, ...] = ()
    contexts_of: Export | None = None
    chosen: Export | None = msgspec.field(default=None)

    def find(self, name: bytes) -> Export | None:
        """The export with this name; the empty name is the only one."""
        if not name:
            return self.exports[0] if len(self.exports) == 1 else None
        return next((export for export in self.exports if export.wire_name == name), None)

    def choose(self, export: Export) -> None:
        """End of haggling. Contexts that were agreed on for another export are void."""
        self.chosen = export
        if self.contexts_of is not export:
            self.contexts = ()


Outcome = tuple[bytes, Next]
_UNKNOWN = b"there is no such export; LIST shows them"


def answer(haggling: Haggling, option: int, data: bytes) -> Outcome:
    """The replies to ``option`` and what comes next. Changes ``haggling``; never raises."""
    understood = OPTIONS.get(option)
    if not haggling.fixed and option != Opt.EXPORT_NAME:
        return b"", Next.CLOSE  # newstyle that is not fixed has no form for a reply
    if haggling.tls is Tls.REQUIRED and option not in (Opt.STARTTLS, Opt.ABORT):
        if option == Opt.EXPORT_NAME:
            return b"", Next.CLOSE  # it cannot be told
        return wire.option_reply(option, Rep.ERR_TLS_REQD, b"this server speaks TLS only"), Next.OPTION
    if understood is None:
        return wire.option_reply(option, Rep.ERR_UNSUP), Next.OPTION
    try:
        return understood(haggling, option, data)
    except _Malformed as failure:
        return wire.option_reply(option, Rep.ERR_INVALID, str(failure).encode()), Next.OPTION


# --- the options ----------------------------------------------------------------------------------


def _export_name(haggling: Haggling, _option: int, data: bytes) -> Outcome:
    export = haggling.find(data)
    if export is None:
        return b"", Next.CLOSE
    haggling.choose(export)
    flags = export.flags(haggling.structured)
    return wire.end_of_export_name(export.size, flags, haggling.no_zeroes), Next.TRANSMISSION


def _abort(_haggling: Haggling, option: int, _data: bytes) -> Outcome:
    return wire.option_reply(option, Rep.ACK), Next.CLOSE


def _list(haggling: Haggling, option: int, data: bytes) -> Outcome:
    _no_data(data)
    replies = [
        wire.option_reply(option, Rep.SERVER, wire.counted(export.wire_name) + export.description.encode())
        for export in haggling.exports
    ]
    return b"".join(replies) + wire.option_reply(option, Rep.ACK), Next.OPTION


def _start_tls(haggling: Haggling, option: int, data: bytes) -> Outcome:
    _no_data(data)
    if haggling.tls is Tls.NONE:
        return wire.option_reply(option, Rep.ERR_POLICY, b"this server has no certificates"), Next.OPTION
    if haggling.tls is Tls.ON:
        raise _Malformed("TLS is on already")
    return wire.option_reply(option, Rep.ACK), Next.TLS


def _structured_reply(haggling: Haggling, option: int, data: bytes) -> Outcome:
    _no_data(data)
    haggling.structured = True
    return wire.option_reply(option, Rep.ACK), Next.OPTION


def _info(haggling: Haggling, option: int, data: bytes) -> Outcome:
    """INFO tells of an export; GO also begins the transmission."""
    reader = _Reader(data)
    name = reader.text()
    wanted = {reader.number(">H") for _ in range(reader.number(">H"))}
    reader.end()
    export = haggling.find(name)
    if export is None:
        return wire.option_reply(option, Rep.ERR_UNKNOWN, _UNKNOWN), Next.OPTION
    facts = [wire.info_export(export.size, export.flags(haggling.structured))]
    facts.append(wire.info_block_size(1, PREFERRED_BLOCK, REQUEST_LIMIT))
    if Info.NAME in wanted:
        facts.append(wire.info_text(Info.NAME, export.wire_name))
    if Info.DESCRIPTION in wanted and export.description:
        facts.append(wire.info_text(Info.DESCRIPTION, export.description.encode()))
    replies = b"".join(wire.option_reply(option, Rep.INFO, fact) for fact in facts)
    replies += wire.option_reply(option, Rep.ACK)
    if option == Opt.INFO:
        return replies, Next.OPTION
    haggling.choose(export)
    return replies, Next.TRANSMISSION


def _meta_context(haggling: Haggling, option: int, data: bytes) -> Outcome:
    """LIST knows ``base:`` and ``graincopy:`` as "all of these"; SET wants whole names and replaces earlier choices."""
    if not haggling.structured:
        raise _Malformed("structured replies come first")
    setting = option == Opt.SET_META_CONTEXT
    if setting:
        haggling.contexts, haggling.contexts_of = (), None
    reader = _Reader(data)
    export = haggling.find(reader.text())
    count = reader.number(">I")
    if count > QUERY_LIMIT:
        return wire.option_reply(option, Rep.ERR_TOO_BIG, b"too many queries"), Next.OPTION
    queries = [reader.text().decode("utf-8", "replace") for _ in range(count)]
    reader.end()
    if export is None:
        return wire.option_reply(option, Rep.ERR_UNKNOWN, _UNKNOWN), Next.OPTION
    found = tuple(context for context in CONTEXTS if _asked_for(context, queries, setting))
    if setting:
        haggling.contexts, haggling.contexts_of = found, export
    replies = [
        wire.option_reply(option, Rep.META_CONTEXT, struct.pack(">I", context_id(context) if setting else 0) + text)
        for context in found
        for text in [context.encode()]
    ]
    return b"".join(replies) + wire.option_reply(option, Rep.ACK), Next.OPTION


def context_id(context: str) -> int:
    """How a context is called in the transmission."""
    return CONTEXTS.index(context) + 1


def _asked_for(context: str, queries: list[str], setting: bool) -> bool:
    if setting:
        return context in queries
    return not queries or any(query in (context, context.partition(":")[0] + ":") for query in queries)


OPTIONS: dict[int, Callable[[Haggling, int, bytes], Outcome]] = {
    Opt.EXPORT_NAME: _export_name,
    Opt.ABORT: _abort,
    Opt.LIST: _list,
    Opt.STARTTLS: _start_tls,
    Opt.INFO: _info,
    Opt.GO: _info,
    Opt.STRUCTURED_REPLY: _structured_reply,
    Opt.LIST_META_CONTEXT: _meta_context,
    Opt.SET_META_CONTEXT: _meta_context,
}


# --- reading the data of options ------------------------------------------------------------------


class _Malformed(ValueError):
    """The data of an option is not what the protocol says."""


def _no_data(data: bytes) -> None:
    if data:
        raise _Malformed("this option has no data")


class _Reader:
    """Numbers and strings of an option's data, front to back. Raises _Malformed at the first that is not whole."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, form: str) -> int:
        try:
            (value,) = struct.unpack_from(form, self._data, self._at)
        except struct.error as error:
            raise _Malformed("the option ends too soon") from error
        self._at += struct.calcsize(form)
        return int(value)

    def text(self) -> bytes:
        length = self.number(">I")
        if length > wire.NAME_LIMIT:
            raise _Malformed("a string is too long")
        if length > len(self._data) - self._at:
            raise _Malformed("a string is longer than its option")
        self._at += length
        return self._data[self._at - length : self._at]

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Malformed("there is something after the end of the option")
