"""Directories of ext2, ext3, ext4 and NTFS, a block at a time.

pytsk3 loads a directory whole, and for NTFS reads the whole MFT first, to find deleted files. Neither is wanted of a
stored disk: a listing must begin at once, and 10⁶ names must not be held.

ext4: Documentation/filesystems/ext4/directory.rst; the inner nodes of a hashed directory look like one empty record.
NTFS: the index $I30 of $FILE_NAME attributes; [MS-FSCC] for reparse points; layout.h of ntfs-3g for the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from graincopy.views.guest.tree import FAULTS

_EXT_RECORD = struct.Struct("<LHBB")
_INDEX_HEADER = struct.Struct("<LLLB")  # entries' offset, their length, allocated, flags; relative to itself
_INDEX_ENTRY = struct.Struct("<QHHH")  # file reference, length of the entry, of its key, flags
_LAST = 0x2
_FILE_NAME = 0x42  # bytes of $FILE_NAME before the name; its length and name space are the two bytes before
_DOS_ONLY = 2
_SECTOR = 512
_REFERENCE = (1 << 48) - 1
_SORTED = 1 << 16  # names of a directory that are held and sorted; twice as many each time
_SORTED_BYTES = 32 << 20  # that these may take, with what Python adds to each name
_NAME_OVERHEAD = 64
_RESERVED = 24  # MFT records that belong to the file system itself, the root (5) apart

Read = Callable[[int, int], bytes]  # offset, length


def in_disk_order(names: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """``names``, with their inodes' numbers, sorted by these, a bounded number of bytes at a time.

    Each stretch goes through all of the inodes once, so that they become longer: the first names come soon, and a
    directory ten times as large is not read ten times as often. A fault comes after what came before it.
    """
    most = _SORTED
    while True:
        stretch, fault = _stretch(names, most)
        stretch.sort()
        for one in stretch:
            yield int.from_bytes(one[:8], "big"), one[8:]
        if fault is not None:
            raise fault
        if not stretch:
            return
        most *= 2


def _stretch(names: Iterator[tuple[int, bytes]], most: int) -> tuple[list[bytes], Exception | None]:
    """Up to ``most`` numbers with their names, each as bytes that sort by number; and what came instead of the next."""
    stretch: list[bytes] = []
    taken = 0
    try:
        for number, name in names:
            stretch.append(number.to_bytes(8, "big") + name)
            taken += len(name) + _NAME_OVERHEAD
            if len(stretch) >= most or taken >= _SORTED_BYTES:
                break
    except FAULTS as fault:
        return stretch, fault
    return stretch, None


def ext_names(read: Read, size: int, block: int) -> Iterator[tuple[int, bytes]]:
    """Inode and name of every record of an ext directory of ``size`` bytes. Raises ValueError when it is broken."""
    for offset in range(0, size, block):
        yield from _ext_block(read(offset, block), block)


def ext_find(read: Read, size: int, block: int, name: bytes) -> int | None:
    """The inode that ``name`` has in an ext directory. Only blocks in which the name occurs are taken apart."""
    for offset in range(0, size, block):
        data = read(offset, block)
        if name in data:
            for inode, found in _ext_block(data, block):
                if found == name:
                    return inode
    return None


def _ext_block(data: bytes, block: int) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _EXT_RECORD.size <= len(data):
        inode, length, named, _kind = _EXT_RECORD.unpack_from(data, at)
        if block == 1 << 16 and length in (0, 0xFFFF):
            length = block
        if length < 8 or at + length > len(data) or 8 + named > length:
            raise ValueError("a broken directory block")
        name = data[at + 8 : at + 8 + named]
        if inode and name not in (b"", b".", b".."):
            yield inode, name
        at += length


def ntfs_root_names(data: bytes) -> tuple[int, Iterator[tuple[int, bytes]]]:
    """Bytes of an index record, and the names in $INDEX_ROOT itself. Raises ValueError."""
    if len(data) < 32:
        raise ValueError("a broken index root")
    (record,) = struct.unpack_from("<L", data, 8)
    if not 512 <= record <= 1 << 16 or record & (record - 1):
        raise ValueError("a broken index root")
    return record, _index_names(data, 16)


def ntfs_names(read: Read, size: int, record: int, bitmap: bytes) -> Iterator[tuple[int, bytes]]:
    """MFT number and name of every entry in $INDEX_ALLOCATION, whose records in use ``bitmap`` marks."""
    for number in range(min(size // record, len(bitmap) * 8)):
        if bitmap[number // 8] >> number % 8 & 1:
            yield from _index_names(_put_back(read(number * record, record)), 24)


def _put_back(data: bytes) -> bytes:
    """The last two bytes of every sector, which the update sequence array keeps."""
    if len(data) < 42 or data[:4] != b"INDX":
        raise ValueError("a broken index record")
    offset, count = struct.unpack_from("<HH", data, 4)
    if count != len(data) // _SECTOR + 1 or offset + 2 * count > len(data):
        raise ValueError("a broken index record")
    fixed, check = bytearray(data), data[offset : offset + 2]
    for sector in range(1, count):
        end = sector * _SECTOR
        if fixed[end - 2 : end] != check:
            raise ValueError("an index record that was written only in part")
        fixed[end - 2 : end] = data[offset + 2 * sector : offset + 2 * sector + 2]
    return bytes(fixed)


def _index_names(data: bytes, header: int) -> Iterator[tuple[int, bytes]]:
    first, total, _, _ = _INDEX_HEADER.unpack_from(data, header)
    at, stop = header + first, min(header + total, len(data))
    while at + 16 <= stop:
        reference, length, key, flags = _INDEX_ENTRY.unpack_from(data, at)
        if flags & _LAST:
            return
        if length < 16 or at + length > stop:
            raise ValueError("a broken index entry")
        if key >= _FILE_NAME and 16 + key <= length:
            number, name = reference & _REFERENCE, _file_name(data[at + 16 : at + 16 + key])
            if name is not None and number >= _RESERVED:
                yield number, name
        at += length


def _file_name(key: bytes) -> bytes | None:
    """The name as UTF-8 (lone surrogates as they are); None for the short name beside a long one."""
    units, space = key[_FILE_NAME - 2], key[_FILE_NAME - 1]
    if space == _DOS_ONLY or _FILE_NAME + 2 * units > len(key):
        return None
    name = key[_FILE_NAME : _FILE_NAME + 2 * units].decode("utf-16-le", "surrogatepass")
    return name.encode("utf-8", "surrogatepass") if name != "." else None


_REPARSE = struct.Struct("<LHH")
_SYMLINK, _MOUNT_POINT, _WSL_SYMLINK = 0xA000000C, 0xA0000003, 0xA000001D


def reparse_target(data: bytes) -> bytes | None:
    """Where a symbolic link, a junction or a WSL link leads, with / between names; None for other reparse points."""
    tag, length, _ = _REPARSE.unpack_from(data.ljust(8, b"\0"))
    body = data[8 : 8 + length]
    if tag == _WSL_SYMLINK:
        return body[4:]
    if tag not in (_SYMLINK, _MOUNT_POINT) or len(body) < 12:
        return None
    real_at, real_length, shown_at, shown_length = struct.unpack_from("<HHHH", body)
    names = body[12 if tag == _SYMLINK else 8 :]
    raw = names[shown_at : shown_at + shown_length] or names[real_at : real_at + real_length]
    text = raw.decode("utf-16-le", "surrogatepass").removeprefix("\\??\\")
    return text.replace("\\", "/").encode("utf-8", "surrogatepass")


def interix_target(data: bytes) -> bytes | None:
    """Where a link as ntfs-3g and Interix write it leads; None when the file is none."""
    if not data.startswith(b"IntxLNK\1"):
        return None
    return data[8:].decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")
