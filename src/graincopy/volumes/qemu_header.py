"""What the header of a qcow2 file says of it: all that the driver needs of an image whose machine is off.

Format: docs/interop/qcow2.txt of QEMU. Nothing is probed: the caller states that the file is qcow2, and a file that is
none is refused.
"""

from __future__ import annotations

import os
import struct

import msgspec

_MAGIC = 0x514649FB
_BACKING_FORMAT = 0xE2792ACA
_EXTERNAL_DATA = 1 << 2  # incompatible feature: the data lies in another file
_CORRUPT = 1 << 1


class HeaderUnfit(Exception):
    """The file is no qcow2 that can be shown; the text is one clause."""


class Header(msgspec.Struct, frozen=True):
    """``size`` is what the guest sees, in bytes; ``backing`` the backing file as written there, ``None`` without."""

    size: int
    version: int
    backing: str | None = None
    backing_format: str | None = None

    @property
    def identity(self) -> str:
        """Part of the disk's incarnation: another backing file shows the guest other bytes."""
        return f"qcow2:{self.backing or ''}"


def read_header(fd: int) -> Header:
    """The header of the qcow2 file ``fd``. Raises HeaderUnfit, OSError."""
    head = os.pread(fd, 1 << 16, 0)
    if len(head) < 72:
        raise HeaderUnfit("it is too short to be qcow2")
    magic, version, name_at, name_length, _, size, encryption = struct.unpack_from(">IIQIIQI", head)
    if magic != _MAGIC or version not in (2, 3):
        raise HeaderUnfit("it is not qcow2")
    if encryption == 1:
        raise HeaderUnfit("it is encrypted in the old way of qcow2")
    if encryption:
        raise HeaderUnfit("it is encrypted inside qcow2, and its key is not known here")
    if version == 3:
        _refuse_features(struct.unpack_from(">Q", head, 72)[0])
    backing = os.fsdecode(os.pread(fd, name_length, name_at)) if name_at else None
    return Header(size, version, backing, _backing_format(head, version))


def _refuse_features(incompatible: int) -> None:
    if incompatible & _EXTERNAL_DATA:
        raise HeaderUnfit("its data lies in another file")
    if incompatible & _CORRUPT:
        raise HeaderUnfit("QEMU marked it as corrupt; qemu-img check -r all repairs it")


def _backing_format(head: bytes, version: int) -> str | None:
    at = struct.unpack_from(">I", head, 100)[0] if version == 3 else 72
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            return None
        if kind == _BACKING_FORMAT:
            return head[at + 8 : at + 8 + length].decode(errors="replace")
        at += 8 + -(-length // 8) * 8
    return None
