"""What the process that reads guest file systems and its keeper say to each other: small frames over one socket.

A frame is a kind (one byte), a length (u32, little endian) and that many bytes. Neither side believes the other more
than it must: lengths are bounded, messages are checked against their types, names against what a name can be.

    keeper → reader   q Request    b bytes of the disk    e errno (u32) instead of them
    reader → keeper   r offset (u64), length (u32): wants bytes of the disk
                      m Message    d bytes of the file begun by the last Entry    h length (u64) of a hole in it
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

PIECE = 1 << 20  # most bytes of a disk or a file in one frame
MESSAGE = 1 << 20  # most bytes of one message
DEPTH = 256  # directories below each other; deeper ones are reported and left out
HEADER = struct.Struct("<BL")
WANTED = struct.Struct("<QL")
LENGTH = struct.Struct("<Q")
ERRNO = struct.Struct("<L")

REQUEST, BYTES, FAILED = b"q"[0], b"b"[0], b"e"[0]
WANT, SAID, DATA, HOLE = b"r"[0], b"m"[0], b"d"[0], b"h"[0]

KINDS = ("file", "directory", "symlink", "fifo", "socket", "character", "block")


class WireBroken(Exception):
    """The other side said something that it must not say, or went away in the middle."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """First request: which file system. ``mount_fd``: it is mounted there; -1: read it from ``offset`` on."""

    fs_type: str
    offset: int
    size: int
    mount_fd: int = -1


class Look(msgspec.Struct, frozen=True, tag=True):
    """Is there something at ``path``? Answered by Entry or Missing, then End."""

    path: bytes


class List(msgspec.Struct, frozen=True, tag=True):
    """The directory at ``path``, one level, or the file there. Links on the way and at its end are followed."""

    path: bytes


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """What lies at ``path`` with everything below and all data. ``follow``: a link at its end too."""

    path: bytes
    follow: bool = False


Request = Begin | Look | List | Fetch


class Entry(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One file, directory, link … ``path`` is relative to what was asked for, empty for that itself.

    Sizes are bytes, times nanoseconds since the epoch. ``uid`` and ``gid`` are -1 where the file system has no such
    owners. ``same_as``: another name of the file that came before under this path; no data follows.
    """

    path: bytes
    kind: str
    mode: int  # permission bits, with setuid, setgid and sticky
    size: int = 0
    uid: int = -1
    gid: int = -1
    mtime: int = 0
    atime: int = 0
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = {}
    same_as: bytes | None = None


class FileEnd(msgspec.Struct, frozen=True, tag=True):
    """The data of the last file entry is complete, or not: then ``problem`` says why."""

    problem: str = ""


class Problem(msgspec.Struct, frozen=True, tag=True):
    """Something at ``path`` that could not be read, in words; the rest goes on."""

    path: bytes
    reason: str


class Missing(msgspec.Struct, frozen=True, tag=True):
    """There is no such path: how far it exists, and names like the next one."""

    exists: bytes
    near: tuple[bytes, ...]


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The request failed as a whole."""

    reason: str


class End(msgspec.Struct, frozen=True, tag=True):
    """The request is answered."""


Message = Entry | FileEnd | Problem | Missing | Broken | End


class Data(msgspec.Struct, frozen=True):
    """Bytes of the file begun by the last Entry, in order."""

    data: bytes


class Hole(msgspec.Struct, frozen=True):
    """So many zeros, that take no place."""

    length: int


Answer = Message | Data | Hole

Read = Callable[[int], bytes]  # up to that many bytes; b"" at the end
Write = Callable[[memoryview], int]


def send(write: Write, kind: int, *parts: bytes | memoryview) -> None:
    """Send one frame."""
    total = sum(len(part) for part in parts)
    send_all(write, HEADER.pack(kind, total))
    for part in parts:
        send_all(write, part)


def send_all(write: Write, data: bytes | bytearray | memoryview) -> None:
    """All of ``data``, in as many steps as it takes."""
    view = memoryview(data)
    while view:
        view = view[write(view) :]


def receive(read: Read, most: int) -> tuple[int, bytes]:
    """The next frame. Raises WireBroken when it is longer than ``most`` bytes, or the other side went away."""
    kind, length = HEADER.unpack(_receive_all(read, HEADER.size))
    if length > most:
        raise WireBroken(f"a frame of {length} bytes")
    return kind, _receive_all(read, length)


def _receive_all(read: Read, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        part = read(length)
        if not part:
            raise WireBroken("it ended")
        parts.append(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def checked(entry: Entry) -> Entry:
    """``entry``, as long as a file system could hold it. Raises WireBroken."""
    parts = entry.path.split(b"/") if entry.path else []
    if len(parts) > DEPTH + 1 or any(not is_name(part) for part in parts):
        raise WireBroken("an impossible path")
    if entry.kind not in KINDS or not 0 <= entry.mode <= 0o7777 or not 0 <= entry.size < 1 << 63:
        raise WireBroken("an impossible entry")
    if b"\0" in entry.target or len(entry.target) > 4096:
        raise WireBroken("an impossible link")
    numbers = (entry.uid + 1, entry.gid + 1, *entry.device)
    if min(numbers) < 0 or max(numbers) >= 1 << 32 or max(abs(entry.mtime), abs(entry.atime)) >= 1 << 64:
        raise WireBroken("an impossible owner, device or time")
    return entry


def is_name(name: bytes) -> bool:
    """Whether ``name`` can be the name of something in a directory."""
    return bool(name) and name not in (b".", b"..") and b"/" not in name and b"\0" not in name
