"""Repository format 1 (draft), its outermost layer: records as msgpack, and frames that are read without a key.

This, ``format`` and ``format_segment`` are the only modules that turn values into bytes and back
(docs/format/repository-1.md). It stands
apart because keys are unwrapped while everything else is still being imported: nothing heavy is imported here.

    frame      config, keys/<id>            magic, version, body, checksum: readable without any key
"""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgspec
from blake3 import blake3

VERSION = 1
T = TypeVar("T")


class Malformed(ValueError):
    """Bytes that are not what they should be; the text says in which way."""


class TooNew(Malformed):
    """Bytes of a later format version."""

    def __init__(self, found: int) -> None:
        super().__init__(f"format {found} is not known")
        self.found = found


# --- records: msgpack, with paths that are not UTF-8 ----------------------------------------------


def encode_record(record: msgspec.Struct) -> bytes:
    """A struct as msgpack. Surrogate-escaped text becomes NUL + its raw bytes as Latin-1."""
    return msgspec.msgpack.encode(_map_text(msgspec.to_builtins(record, builtin_types=(bytes,)), _escape))


def decode_record(data: bytes, kind: type[T]) -> T:
    """What :func:`encode_record` was given. Raises Malformed."""
    try:
        plain = _map_text(msgspec.msgpack.decode(data), _unescape)
        return msgspec.convert(plain, kind, builtin_types=(bytes,))
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Malformed(f"its record cannot be read ({error})") from error


def _escape(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "\0" + text.encode("utf-8", "surrogateescape").decode("latin-1")
    return "\0" + text.encode().decode("latin-1") if text.startswith("\0") else text


def _unescape(text: str) -> str:
    return text[1:].encode("latin-1").decode("utf-8", "surrogateescape") if text.startswith("\0") else text


def _map_text(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_text(key, change): _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(item, change) for item in value]
    return value


# --- frame: objects that are read without a key ---------------------------------------------------

CONFIG_MAGIC = b"GRAINCFG"
KEY_MAGIC = b"GRAINKEY"
_FRAME = struct.Struct("<8sHHI")  # magic, version, 0, length of the body
_CHECKSUM = 16


def encode_frame(magic: bytes, body: bytes) -> bytes:
    """Magic, version, body and 16 bytes of BLAKE3 over all of it."""
    framed = _FRAME.pack(magic, VERSION, 0, len(body)) + body
    return framed + blake3(framed).digest(length=_CHECKSUM)


def decode_frame(magic: bytes, data: bytes) -> bytes:
    """The body. Raises TooNew, or Malformed; the checksum stands at the same place in every version."""
    if len(data) < _FRAME.size + _CHECKSUM or not data.startswith(magic):
        raise Malformed("it does not begin as it should")
    if blake3(data[:-_CHECKSUM]).digest(length=_CHECKSUM) != data[-_CHECKSUM:]:
        raise Malformed("its checksum is wrong")
    _, version, _, length = _FRAME.unpack_from(data)
    if version != VERSION:
        raise TooNew(version)
    body = data[_FRAME.size : -_CHECKSUM]
    if len(body) != length:
        raise Malformed("it has the wrong length")
    return body
