"""Where the file systems of a guest's disk lie: MBR and GPT partitions, or the disk as a whole, and what is in each.

UEFI Specification 2.10, chapter 5 (GPT, and the protective MBR); the chain of extended partitions as Linux reads it
(block/partitions/msdos.c). Tables are hostile input: every count is bounded and every range is cut to the disk.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

SECTOR = 512
_SECTORS = (512, 4096)
_GPT_HEADER = struct.Struct("<8sLLLLQQQQ16sQLLL")
_MOST_ENTRIES, _LONGEST_ENTRY = 1024, 4096
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_MOST_LOGICAL = 128

# What pytsk3 reads right: filetype, recover, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir
_EXT_KNOWN = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000
_EXT_RECOVER = 0x4

Read = Callable[[int, int], bytes]  # offset and length; shorter at the end of the disk


@dataclass(frozen=True, slots=True)
class Partition:
    """A range of a disk, in bytes. ``number`` 0 is the whole disk; ``reader`` "tsk", "kernel" or "" (nobody)."""

    number: int
    start: int
    size: int
    name: str = ""
    fs_type: str = ""
    reader: str = ""
    note: str = ""  # what people should know of it


def find_partitions(read: Read, size: int) -> tuple[Partition, ...]:
    """Every partition of a disk of ``size`` bytes; without a table the whole disk as the only one. Raises OSError."""
    first = read(0, SECTOR)
    whole = Partition(0, 0, size)
    if _boot_sector(first):
        return (look_at(read, whole),)
    found = _gpt(read, size) or _mbr(read, first, size)
    return tuple(look_at(read, one) for one in found) or (look_at(read, whole),)


# --- tables ---------------------------------------------------------------------------------------


def _gpt(read: Read, size: int) -> list[Partition]:
    """From the table at the beginning; when that is broken, from the one at the end."""
    for sector in _SECTORS:
        for at in (sector, size // sector * sector - sector):
            found = _gpt_at(read, at, sector, size)
            if found is not None:
                return found
    return []


def _gpt_at(read: Read, at: int, sector: int, size: int) -> list[Partition] | None:
    header = read(at, SECTOR) if at > 0 else b""
    if len(header) < _GPT_HEADER.size or not header.startswith(b"EFI PART"):
        return None
    fields = _GPT_HEADER.unpack_from(header)
    length, check, entries, count, entry, table_check = fields[2], fields[3], *fields[10:14]
    if not _GPT_HEADER.size <= length <= SECTOR or zlib.crc32(_without_check(header[:length])) != check:
        return None
    if count > _MOST_ENTRIES or not 128 <= entry <= _LONGEST_ENTRY:
        return None
    table = read(entries * sector, count * entry) if entries * sector < size else b""
    if zlib.crc32(table) != table_check:
        return None
    each = (table[number * entry : (number + 1) * entry] for number in range(count))
    return [one for number, data in enumerate(each, 1) for one in _gpt_entry(number, data, sector, size)]


def _without_check(header: bytes) -> bytes:
    return header[:16] + bytes(4) + header[20:]


def _gpt_entry(number: int, data: bytes, sector: int, size: int) -> Iterator[Partition]:
    first, last = struct.unpack_from("<QQ", data, 32)
    start, stop = first * sector, min((last + 1) * sector, size)
    if any(data[:16]) and 0 < start < stop:
        name = data[56:128].decode("utf-16-le", "replace").partition("\0")[0]
        yield Partition(number, start, stop - start, name)


def _mbr(read: Read, first: bytes, size: int) -> list[Partition]:
    found: list[Partition] = []
    for number, (kind, start, count) in enumerate(_mbr_entries(first), 1):
        if kind in _EXTENDED:
            found += _logical(read, start * SECTOR, size)
        elif kind and kind != _PROTECTIVE:
            found += _cut(number, start * SECTOR, count * SECTOR, size)
    return sorted(found, key=lambda one: one.number)


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int]]:
    """Type, first sector and number of sectors of the four entries; none when this is no table."""
    if len(sector) < SECTOR or sector[510:512] != b"\x55\xaa" or any(sector[446 + 16 * n] & 0x7F for n in range(4)):
        return []
    return [(sector[at + 4], *struct.unpack_from("<LL", sector, at + 8)) for at in range(446, 510, 16)]


def _logical(read: Read, base: int, size: int) -> Iterator[Partition]:
    """The chain of an extended partition that begins at byte ``base``: each link has one partition and the next."""
    at, seen = base, set[int]()
    for number in range(5, 5 + _MOST_LOGICAL):
        if at in seen or not 0 < at < size:
            return
        seen.add(at)
        entries = _mbr_entries(read(at, SECTOR))
        if not entries:
            return
        kind, start, count = entries[0]
        if kind and kind not in _EXTENDED:
            yield from _cut(number, at + start * SECTOR, count * SECTOR, size)
        kind, start, _ = entries[1]
        if kind not in _EXTENDED:
            return
        at = base + start * SECTOR


def _cut(number: int, start: int, length: int, size: int) -> Iterator[Partition]:
    if 0 < start < size and length:
        yield Partition(number, start, min(length, size - start))


# --- what is in them ------------------------------------------------------------------------------


def look_at(read: Read, partition: Partition) -> Partition:
    """``partition`` with the file system that lies on it, and who can read it."""
    head = read(partition.start, min(4096, partition.size))
    boot = _boot_sector(head[:SECTOR])
    if boot:
        return replace(partition, fs_type=boot, reader="" if boot == "bitlocker" else "tsk")
    if head[:4] == b"XFSB":
        return replace(partition, fs_type="xfs", reader="kernel")
    if head[0x438:0x43A] == b"\x53\xef":
        return _ext(head, partition)
    if partition.size > 0x10048 and read(partition.start + 0x10040, 8) == b"_BHRfS_M":
        return replace(partition, fs_type="btrfs", reader="kernel")
    return replace(partition, fs_type=_other(head))


def _boot_sector(data: bytes) -> str:
    """FAT, exFAT, NTFS or BitLocker; "" for none of them."""
    known = {b"NTFS    ": "ntfs", b"EXFAT   ": "exfat", b"-FVE-FS-": "bitlocker"}
    if data[3:11] in known:
        return known[data[3:11]]
    is_fat = data[54:57] == b"FAT" or data[82:87] == b"FAT32"
    return "fat" if is_fat and data[510:512] == b"\x55\xaa" and data[:1] in (b"\xeb", b"\xe9") else ""


def _ext(head: bytes, partition: Partition) -> Partition:
    (incompatible,) = struct.unpack_from("<L", head, 0x460)
    note = "its journal was not empty; what the guest wrote last may be missing" if incompatible & _EXT_RECOVER else ""
    return replace(partition, fs_type="ext4", reader="kernel" if incompatible & ~_EXT_KNOWN else "tsk", note=note)


def _other(head: bytes) -> str:
    """What else is known by name alone."""
    if head[:6] in (b"LUKS\xba\xbe", b"SKUL\xba\xbe"):
        return "luks"
    if any(head[at : at + 8] == b"LABELONE" and head[at + 24 : at + 28] == b"LVM2" for at in range(0, 2048, SECTOR)):
        return "lvm"
    return {b"SWAPSPACE2": "swap", b"SWAP-SPACE": "swap"}.get(head[4086:4096], "")
