"""Inodes of ext2, ext3 and ext4 as they lie on disk. pytsk3 tells no flags, device numbers and extended attributes, and
takes longer to open one than all the rest of a listing.

Documentation/filesystems/ext4: super.rst, group_descr.rst, inodes.rst, attributes.rst. Access control lists have a
form of their own on disk (fs/ext4/acl.h) and are given as getxattr(2) gives them (linux/posix_acl_xattr.h).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_ENTRY = struct.Struct("<BBHLLL")  # name length, prefix, value offset, value inode, value size, hash
_MAGIC = 0xEA020000
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_ACLS = (2, 3)
_NAMED_TAGS = (0x02, 0x08)  # ACL_USER, ACL_GROUP: entries with an id
_NOBODY = 0xFFFFFFFF
INLINE, ENCRYPTED, EXTENTS = 0x10000000, 0x800, 0x80000  # i_flags
_KINDS = {1: "fifo", 2: "character", 4: "directory", 6: "block", 8: "file", 10: "symlink", 12: "socket"}  # of i_mode
_EXTRA_END = 0x90  # of the fields with more of the times
_64BIT = 0x80
_INODES_UNUSED = 0x1  # EXT4_BG_INODE_UNINIT

Read = Callable[[int, int], bytes]  # offset in the file system, length


@dataclass(frozen=True, slots=True)
class Raw:
    """An inode as it lies on disk."""

    data: bytes

    @property
    def kind(self) -> str:
        """As in ``wire.KINDS``. Raises ValueError for none of these."""
        kind = _KINDS.get(self.data[1] >> 4)
        if kind is None:
            raise ValueError("its inode is not in use")
        return kind

    @property
    def size(self) -> int:
        """Bytes."""
        (low,) = struct.unpack_from("<L", self.data, 4)
        high = struct.unpack_from("<L", self.data, 0x6C)[0] if self.kind == "file" else 0  # once something else there
        return int(high << 32 | low)

    @property
    def links(self) -> int:
        """How many names it has."""
        return int(struct.unpack_from("<H", self.data, 0x1A)[0])

    @property
    def mode(self) -> int:
        """Permission bits, with setuid, setgid and sticky."""
        return (self.data[1] << 8 | self.data[0]) & 0o7777

    @property
    def owners(self) -> tuple[int, int]:
        """User and group; -1 for nobody, which is no number that a file could be given."""
        uid, gid = struct.unpack_from("<H", self.data, 2)[0], struct.unpack_from("<H", self.data, 0x18)[0]
        uid_high, gid_high = struct.unpack_from("<HH", self.data, 0x78)
        numbers = uid_high << 16 | uid, gid_high << 16 | gid
        return -1 if numbers[0] == _NOBODY else numbers[0], -1 if numbers[1] == _NOBODY else numbers[1]

    def time(self, at: int, more_at: int) -> int:
        """The time at byte ``at`` in nanoseconds since the epoch; at ``more_at`` are its fraction and upper bits."""
        seconds = int(struct.unpack_from("<l", self.data, at)[0])
        if len(self.data) < _EXTRA_END or struct.unpack_from("<H", self.data, 0x80)[0] < more_at + 4 - 0x80:
            return seconds * 1_000_000_000
        more = int(struct.unpack_from("<L", self.data, more_at)[0])
        nano = more >> 2
        return (seconds + ((more & 3) << 32)) * 1_000_000_000 + (nano if nano < 1_000_000_000 else 0)

    @property
    def mtime(self) -> int:
        """Nanoseconds since the epoch."""
        return self.time(0x10, 0x88)

    @property
    def atime(self) -> int:
        """Nanoseconds since the epoch."""
        return self.time(0x08, 0x8C)

    @property
    def flags(self) -> int:
        """EXT4_*_FL."""
        return int(struct.unpack_from("<L", self.data, 0x20)[0])

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor number of a device node."""
        old, new = struct.unpack_from("<LL", self.data, 0x28)
        if old:
            return old >> 8 & 0xFF, old & 0xFF
        return new >> 8 & 0xFFF, (new & 0xFF) | (new >> 12 & 0xFFF00)

    @property
    def attribute_block(self) -> int:
        """Number of the block with further extended attributes; 0: none."""
        low, high = struct.unpack_from("<L", self.data, 0x68)[0], struct.unpack_from("<H", self.data, 0x76)[0]
        return int(high << 32 | low)


class Inodes:
    """Finds inodes of one file system. Raises ValueError when its super block makes no sense."""

    def __init__(self, read: Read) -> None:
        self._read = read
        block = read(1024, 1024)
        self.first_data, log = struct.unpack_from("<LL", block, 0x14)
        self.per_group, self.size = struct.unpack_from("<L", block, 0x28)[0], struct.unpack_from("<H", block, 0x58)[0]
        revision = struct.unpack_from("<L", block, 0x4C)[0]
        self.size = self.size if revision else 128
        wide = struct.unpack_from("<L", block, 0x60)[0] & _64BIT
        self.descriptor = struct.unpack_from("<H", block, 0xFE)[0] if wide else 32
        if log > 6 or not self.per_group or not 128 <= self.size <= 4096 or not 32 <= self.descriptor <= 1024:
            raise ValueError("a broken super block")
        self.block = 1024 << log
        (self.count,) = struct.unpack_from("<L", block)

    def find(self, number: int) -> Raw:
        """The inode ``number``. Raises ValueError for one that is not in use."""
        if not 1 <= number <= self.count:
            raise ValueError("its inode is not in use")
        group, index = divmod(number - 1, self.per_group)
        at = (self.first_data + 1) * self.block + group * self.descriptor
        found = self._whole(at, self.descriptor)
        bitmap, table = struct.unpack_from("<LL", found, 4)
        if self.descriptor >= 64:
            bitmap_high, table_high = struct.unpack_from("<LL", found, 0x24)
            bitmap, table = bitmap_high << 32 | bitmap, table_high << 32 | table
        used = self._whole(bitmap * self.block + index // 8, 1)[0] >> index % 8 & 1
        if not used or found[0x12] & _INODES_UNUSED:
            raise ValueError("its inode is not in use")
        return Raw(self._whole(table * self.block + index * self.size, self.size))

    def most(self, raw: Raw) -> int:
        """Bytes that a file can have; the kernel refuses larger ones too."""
        pointers, blocks = self.block // 4, 1 << 32
        if not raw.flags & EXTENTS:
            blocks = min(blocks, 12 + pointers + pointers**2 + pointers**3)
        return int(blocks * self.block)

    def _whole(self, offset: int, length: int) -> bytes:
        data = self._read(offset, length)
        if len(data) < length:
            raise ValueError("its inode lies beyond the end")
        return data

    def xattrs(self, raw: Raw) -> dict[bytes, bytes]:
        """Extended attributes in the inode and in its block. Broken ones are left out."""
        found: dict[bytes, bytes] = {}
        if len(raw.data) > 132:
            start = 128 + struct.unpack_from("<H", raw.data, 128)[0]
            if start + 4 <= len(raw.data) and struct.unpack_from("<L", raw.data, start)[0] == _MAGIC:
                found |= _attributes(raw.data[start + 4 :], 0)
        if raw.attribute_block:
            block = self._read(raw.attribute_block * self.block, self.block)
            if len(block) == self.block and struct.unpack_from("<L", block)[0] == _MAGIC:
                found |= _attributes(block, 32)
        return found


def _attributes(data: bytes, at: int) -> dict[bytes, bytes]:
    """Value offsets count from the start of ``data``, entries begin at ``at``."""
    return {
        name: data[offset : offset + size] if prefix not in _ACLS else b"".join(_acl(data[offset : offset + size]))
        for prefix, name, offset, size in _entries(data, at)
    }


def _entries(data: bytes, at: int) -> Iterator[tuple[int, bytes, int, int]]:
    while at + 16 <= len(data) and data[at : at + 4] != b"\0\0\0\0":
        length, prefix, offset, inode, size, _ = _ENTRY.unpack_from(data, at)
        name = data[at + 16 : at + 16 + length]
        at += (16 + length + 3) & ~3
        if prefix in _PREFIXES and not inode and offset + size <= len(data) and b"\0" not in name:
            yield prefix, _PREFIXES[prefix] + name, offset, size


def _acl(data: bytes) -> Iterator[bytes]:
    """From the form on disk (version 1) to the one of getxattr (version 2)."""
    yield struct.pack("<L", 2)
    at = 4
    while at + 4 <= len(data):
        tag, permissions = struct.unpack_from("<HH", data, at)
        named = tag in _NAMED_TAGS and at + 8 <= len(data)
        owner = struct.unpack_from("<L", data, at + 4)[0] if named else _NOBODY
        yield struct.pack("<HHL", tag, permissions, owner)
        at += 8 if named else 4
