"""Device-mapper asked directly (stages 4-8): status, table, messages, and read-only devices that udev does not see.

linux/dm-ioctl.h: one structure for every command, with target specifications behind it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

CONTROL = "/dev/mapper/control"
_HEADER = struct.Struct("=5IIiIIIQ128s129s7s")  # struct dm_ioctl
_SPEC = struct.Struct("=QQiI16s")  # struct dm_target_spec
_VERSION = (4, 0, 0)
_DEV_CREATE, _DEV_REMOVE, _DEV_SUSPEND, _DEV_STATUS, _TABLE_LOAD, _TABLE_STATUS, _TARGET_MSG = 3, 4, 6, 7, 9, 12, 14
_READONLY, _STATUS_TABLE, _NOFLUSH = 1, 1 << 4, 1 << 11
# DM_UDEV_* of libdevmapper.h, as the upper half of the event number: no rules, no links, no probing, no fallback
_UNSEEN = (0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40) << 16
_ROOM = 16384  # bytes; far more than a line of status


def status(name: str) -> str:
    """What ``dmsetup status NAME`` prints, of the device's first target. Raises OSError.

    Nothing is committed for it: the numbers of a pool may be a second old.
    """
    return _line(name, _NOFLUSH)


def table(name: str) -> str:
    """What ``dmsetup table NAME`` prints, of the device's first target. Raises OSError."""
    return _line(name, _STATUS_TABLE)


def message(name: str, text: str) -> None:
    """``dmsetup message NAME 0 TEXT``. Raises OSError."""
    _call(_TARGET_MSG, name, 0, struct.pack("=Q", 0) + text.encode() + b"\0")


def create_unseen(name: str, uuid: str, sectors: int, kind: str, words: str) -> str:
    """A read-only device of one target, or the one that has the name; path of the kernel's own node.

    udev is told to look away from its very first event: the device makes no link, and nothing on it is assembled.
    Raises OSError.
    """
    try:
        _call(_DEV_CREATE, name, _READONLY, b"", uuid=uuid)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        if not _HEADER.unpack_from(_call(_DEV_STATUS, name, 0, b""))[5]:  # a crash left it without its table
            remove_unseen(name)
            return create_unseen(name, uuid, sectors, kind, words)
    else:
        try:
            _load(name, sectors, kind, words)
        except BaseException:
            remove_unseen(name)
            raise
    return f"/dev/dm-{os.minor(_HEADER.unpack_from(_call(_DEV_STATUS, name, 0, b''))[10])}"


def _load(name: str, sectors: int, kind: str, words: str) -> None:
    text = words.encode() + b"\0"
    text += bytes(-len(text) % 8)
    spec = _SPEC.pack(0, sectors, 0, _SPEC.size + len(text), kind.encode())
    _call(_TABLE_LOAD, name, _READONLY, spec + text, targets=1)
    _call(_DEV_SUSPEND, name, 0, b"", event=_UNSEEN)  # without the suspend flag: resume


def remove_unseen(name: str) -> bool:
    """Remove the device; False when there is none. Raises OSError; EBUSY while it is open."""
    try:
        _call(_DEV_REMOVE, name, 0, b"", event=_UNSEEN)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    return True


def _line(name: str, flags: int) -> str:
    answer = _call(_TABLE_STATUS, name, flags, b"")
    start, count = _HEADER.unpack_from(answer)[4:6]
    if not count:
        raise OSError(f"device-mapper device {name} has no table")
    first, length, _, _, kind = _SPEC.unpack_from(answer, start)
    words = answer[start + _SPEC.size :].split(b"\0", 1)[0]
    return f"{first} {length} {os.fsdecode(kind.rstrip(bytes(1)))} {os.fsdecode(words)}"


def _call(number: int, name: str, flags: int, data: bytes, targets: int = 0, event: int = 0, uuid: str = "") -> bytes:
    """_IOWR(0xfd, ``number``, struct dm_ioctl). Raises OSError."""
    size = _HEADER.size + max(len(data), _ROOM)
    header = _HEADER.pack(
        *_VERSION, size, _HEADER.size, targets, 0, flags, event, 0, 0, os.fsencode(name), uuid.encode(), b""
    )
    buffer = bytearray((header + data).ljust(size, b"\0"))
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | number, buffer, True)
    finally:
        os.close(fd)
    return bytes(buffer)
