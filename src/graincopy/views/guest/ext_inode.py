"""What pytsk3 does not tell about ext inodes: flags, device numbers, extended attributes.

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
INLINE, ENCRYPTED = 0x10000000, 0x800  # i_flags
_64BIT = 0x80

Read = Callable[[int, int], bytes]  # offset in the file system, length


@dataclass(frozen=True, slots=True)
class Raw:
    """An inode as it lies on disk."""

    data: bytes

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

    def find(self, number: int) -> Raw:
        """The inode ``number``."""
        group, index = divmod(number - 1, self.per_group)
        found = self._read((self.first_data + 1) * self.block + group * self.descriptor, self.descriptor)
        (low,) = struct.unpack_from("<L", found, 8)
        high = struct.unpack_from("<L", found, 0x28)[0] if self.descriptor >= 64 else 0
        return Raw(self._read((high << 32 | low) * self.block + index * self.size, self.size))

    def xattrs(self, raw: Raw) -> dict[bytes, bytes]:
        """Extended attributes in the inode and in its block. Broken ones are left out."""
        found: dict[bytes, bytes] = {}
        if len(raw.data) > 132:
            start = 128 + struct.unpack_from("<H", raw.data, 128)[0]
            if start + 4 <= len(raw.data) and struct.unpack_from("<L", raw.data, start)[0] == _MAGIC:
                found |= _attributes(raw.data[start + 4 :], 0)
        if raw.attribute_block:
            block = self._read(raw.attribute_block * self.block, self.block)
            if struct.unpack_from("<L", block)[0] == _MAGIC:
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
