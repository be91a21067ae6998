"""Guest file systems that pytsk3 (The Sleuth Kit) reads: ext2, ext3, ext4, NTFS, FAT and exFAT.

Runs in the locked-away process. Inodes and data come from pytsk3; directories, and what it does not tell, from
``directories`` and ``ext_inode``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cached_property

import pytsk3

from graincopy.views.guest import directories
from graincopy.views.guest.ext_blocks import BlockMap
from graincopy.views.guest.ext_inode import ENCRYPTED, EXTENTS, INLINE, Inodes, Raw
from graincopy.views.guest.tree import Node
from graincopy.views.guest.tsk_image import Image
from graincopy.views.guest.wire import Entry

_FOUND_KEPT = 64  # names that a path led over: it is walked again for the next request

_TYPES = {
    "ext4": pytsk3.TSK_FS_TYPE_EXT_DETECT,
    "ntfs": pytsk3.TSK_FS_TYPE_NTFS_DETECT,
    "fat": pytsk3.TSK_FS_TYPE_FAT_DETECT,
    "exfat": pytsk3.TSK_FS_TYPE_EXFAT,
}
_KINDS = {1: "file", 2: "directory", 3: "fifo", 4: "character", 5: "block", 6: "symlink", 8: "socket"}  # tsk_fs.h
_ALLOCATED = 0x01  # TSK_FS_META_FLAG_ALLOC
_COMPRESSED, _ENCRYPTED = 0x20, 0x10  # TSK_FS_ATTR_FLAG_ENUM
_SPARSE_OR_FILLER = 0x03  # TSK_FS_ATTR_RUN_FLAG_ENUM
_STANDARD, _DATA, _INDEX_ROOT, _INDEX_ALLOCATION, _BITMAP, _REPARSE = 0x10, 0x80, 0x90, 0xA0, 0xB0, 0xC0
_READ_ONLY, _SYSTEM, _REPARSE_POINT = 0x1, 0x4, 0x400
_LONGEST_LINK = 4096
_DEFAULT = (128, 1)  # types of the attribute that holds a file's bytes: NTFS, all others
_LONGEST_BITMAP = 1 << 20  # of a directory: 8 · 2²⁰ index records


class TskNode(Node):
    """An inode: of ext file systems as it lies on disk (``raw``), of others as pytsk3 opens it.

    Raises ValueError for one that is not in use, or of a strange kind.
    """

    def __init__(self, fs: pytsk3.FS_Info, number: int, raw: Raw | None) -> None:
        self._fs, self.identity, self.raw = fs, number, raw
        self.target = b""
        if raw is not None:
            self.kind, self.links, self.size = raw.kind, raw.links, raw.size
            return
        kind = _KINDS.get(int(self.meta.type))
        if kind is None or not int(self.meta.flags) & _ALLOCATED:
            raise ValueError("its inode is not in use")
        self.kind = kind
        self.links = int(self.meta.nlink)
        self.size = int(self.meta.size)
        self.target = bytes(self.meta.link or b"")

    @cached_property
    def file(self) -> pytsk3.File:
        """As pytsk3 opens it. Raises OSError."""
        return self._fs.open_meta(inode=self.identity)

    @cached_property
    def meta(self) -> pytsk3.TSK_FS_META:
        """What pytsk3 tells of it."""
        return self.file.info.meta

    def attribute(self, kind: int, name: bytes | None = None) -> pytsk3.Attribute | None:
        """The first attribute of a type, and of a name."""
        for one in self.file:
            if int(one.info.type) == kind and (name is None or (one.info.name or b"") == name):
                return one
        return None

    def content(self, kind: int, name: bytes | None = None, most: int = 1 << 20) -> bytes:
        """The bytes of an attribute, at most ``most``; none when it is not there."""
        one = self.attribute(kind, name)
        size = min(int(one.info.size), most) if one is not None else 0
        return self.part(one, 0, size) if size else b""

    def part(self, one: pytsk3.Attribute, offset: int, length: int) -> bytes:
        """A part of an attribute."""
        return bytes(self.file.read_random(offset, length, one.info.type, one.info.id))


class TskTree:
    """A file system that pytsk3 reads. ``read`` gives its bytes. Raises OSError when there is none of that type."""

    def __init__(self, fs_type: str, size: int, read: Callable[[int, int], bytes]) -> None:
        self._image = Image(size, read)
        self._fs = pytsk3.FS_Info(self._image, offset=0, type=_TYPES[fs_type])
        self._inodes = Inodes(self._image.read) if fs_type == "ext4" else None
        self._ntfs = fs_type == "ntfs"
        self._found: dict[tuple[int, bytes], int] = {}

    def root(self) -> TskNode:
        """The root directory."""
        return self._open(int(self._fs.info.root_inum))

    def _open(self, number: int) -> TskNode:
        node = TskNode(self._fs, number, self._inodes.find(number) if self._inodes else None)
        if self._ntfs and _dos_flags(node) & (_REPARSE_POINT | _SYSTEM):
            target = _link_target(node)
            if target is not None:
                node.kind, node.target = "symlink", target
        return node

    # --- directories ------------------------------------------------------------------------------

    def children(self, node: TskNode) -> Iterator[tuple[bytes, TskNode | str]]:
        """Stretch by stretch of the directory in the order of the inodes: by name or hash, each would be a read."""
        for number, name in directories.in_disk_order(self._names(node)):
            try:
                yield name, self._open(number)
            except (OSError, ValueError) as fault:
                yield name, str(fault).splitlines()[0] if str(fault) else "its inode cannot be read"

    def child(self, node: TskNode, name: bytes) -> TskNode | None:
        """The child called ``name``; on Windows' file systems also where only the case differs."""
        key = (node.identity, name)
        number = self._found.get(key)
        if number is None:
            ext = self._inodes is not None
            number = directories.ext_find(*self._ext_blocks(node), name) if ext else self._find_folded(node, name)
            if number is None:
                return None
            if len(self._found) >= _FOUND_KEPT:
                self._found.clear()
            self._found[key] = number
        return self._open(number)

    def _find_folded(self, node: TskNode, name: bytes) -> int | None:
        wanted = name.decode("utf-8", "surrogateescape").casefold()
        other: int | None = None
        for number, found in self._names(node):
            if found == name:
                return number
            if other is None and found.decode("utf-8", "replace").casefold() == wanted:
                other = number
        return other

    def _names(self, node: TskNode) -> Iterator[tuple[int, bytes]]:
        if self._inodes is not None:
            return directories.ext_names(*self._ext_blocks(node))
        return self._ntfs_names(node) if self._ntfs else self._other_names(node)

    def _ext_blocks(self, node: TskNode) -> tuple[directories.Read, int, int]:
        """How to read a directory, its size, and that of its blocks."""
        assert self._inodes is not None
        mapped = self._mapped(node)
        if mapped is not None:
            return mapped.read, node.size, self._inodes.block
        one = node.attribute(1)
        if one is None:
            raise ValueError("a directory without blocks")
        return (lambda offset, length: node.part(one, offset, length)), node.size, self._inodes.block

    def _ntfs_names(self, node: TskNode) -> Iterator[tuple[int, bytes]]:
        record, names = directories.ntfs_root_names(node.content(_INDEX_ROOT, b"$I30"))
        yield from names
        more = node.attribute(_INDEX_ALLOCATION, b"$I30")
        if more is not None:
            used = node.content(_BITMAP, b"$I30", _LONGEST_BITMAP)
            yield from directories.ntfs_names(
                lambda offset, length: node.part(more, offset, length), int(more.info.size), record, used
            )

    def _other_names(self, node: TskNode) -> Iterator[tuple[int, bytes]]:
        """FAT and exFAT, whose directories are small and have no order that matters."""
        for one in self._fs.open_dir(inode=node.identity):
            name = bytes(one.info.name.name)
            if int(one.info.name.flags) & 1 and not name.startswith(b"$") and name not in (b".", b".."):
                yield int(one.info.name.meta_addr), name

    # --- what is known of a node ------------------------------------------------------------------

    def entry(self, node: TskNode, path: bytes) -> Entry:
        """From the inode."""
        if node.raw is not None and self._inodes is not None:
            return self._ext_entry(node, node.raw, self._inodes.xattrs(node.raw), path)
        return Entry(
            path=path,
            kind=node.kind,
            mode=_mode(node, self._ntfs),
            size=node.size,
            mtime=_time(int(node.meta.mtime), int(node.meta.mtime_nano)),
            atime=_time(int(node.meta.atime), int(node.meta.atime_nano)),
            target=self._target(node),
        )

    def _ext_entry(self, node: TskNode, raw: Raw, xattrs: dict[bytes, bytes], path: bytes) -> Entry:
        uid, gid = raw.owners
        return Entry(
            path=path,
            kind=node.kind,
            mode=raw.mode,
            size=node.size,
            uid=uid,
            gid=gid,
            mtime=raw.mtime,
            atime=raw.atime,
            target=self._target(node),
            device=raw.device if node.kind in ("character", "block") else (0, 0),
            xattrs=xattrs,
        )

    @staticmethod
    def _target(node: TskNode) -> bytes:
        if node.kind != "symlink":
            return b""
        linked = node.target or bytes(node.meta.link or b"")
        return linked or bytes(node.file.read_random(0, min(node.size, _LONGEST_LINK)))

    # --- data -------------------------------------------------------------------------------------

    def data(self, node: TskNode) -> Iterator[tuple[int, int]]:
        """From the runs, where they say it all; compressed and resident data is one range."""
        self._refuse_wrong(node)
        mapped = self._mapped(node)
        if mapped is not None:
            yield from mapped.runs(node.size)
            return
        one = self._data_of(node)
        if one is None:
            return
        runs = [] if int(one.info.flags) & _COMPRESSED else list(one)
        if not runs:
            yield 0, node.size
            return
        block = int(self._fs.info.block_size)
        for run in runs:
            if not int(run.flags) & _SPARSE_OR_FILLER:
                yield int(run.offset) * block, (int(run.offset) + int(run.len)) * block

    def read(self, node: TskNode, offset: int, length: int) -> bytes:
        """Bytes of a file."""
        mapped = self._mapped(node)
        if mapped is not None:
            return mapped.read(offset, length)
        one = self._data_of(node)
        return node.part(one, offset, length) if one is not None else b""

    def _mapped(self, node: TskNode) -> BlockMap | None:
        """The blocks of an inode of the older kind of ext file systems."""
        if node.raw is None or self._inodes is None or node.raw.flags & EXTENTS:
            return None
        return BlockMap(self._image.read, node.raw.data, self._inodes.block)

    def _refuse_wrong(self, node: TskNode) -> None:
        """Raise ValueError for content that would come out wrong."""
        if self._ntfs and _dos_flags(node) & _REPARSE_POINT:
            raise ValueError(
                "its content lies elsewhere (a reparse point: compressed by Windows, deduplicated or remote)"
            )
        if node.raw and node.raw.flags & (INLINE | ENCRYPTED):
            raise ValueError("it is encrypted, or kept inside its inode")
        if node.raw and self._inodes and node.size > self._inodes.most(node.raw):
            raise ValueError("it says that it is larger than its file system lets any file be")

    def _data_of(self, node: TskNode) -> pytsk3.Attribute | None:
        """The attribute with the file's bytes. Raises ValueError when they are encrypted."""
        for kind in _DEFAULT:
            one = node.attribute(kind, b"") if kind == _DATA else node.attribute(kind)
            if one is not None:
                if int(one.info.flags) & _ENCRYPTED and self._ntfs:
                    raise ValueError("it is encrypted by Windows")
                return one
        return None


def _dos_flags(node: TskNode) -> int:
    data = node.content(_STANDARD, None, 64)
    return int(struct.unpack_from("<L", data, 32)[0]) if len(data) >= 36 else 0


def _link_target(node: TskNode) -> bytes | None:
    """Where a link on NTFS leads; None when it is none."""
    if _dos_flags(node) & _REPARSE_POINT:
        return directories.reparse_target(node.content(_REPARSE))
    if node.kind != "file" or not 8 < node.size <= 8 + 2 * _LONGEST_LINK:
        return None
    return directories.interix_target(node.content(_DATA, b""))


def _mode(node: TskNode, ntfs: bool) -> int:
    """Windows knows no mode; what a mount of it would show."""
    if node.kind == "directory":
        return 0o755
    return 0o444 if ntfs and _dos_flags(node) & _READ_ONLY else 0o644


def _time(seconds: int, nano: int) -> int:
    return seconds * 1_000_000_000 + (nano if 0 <= nano < 1_000_000_000 else 0)
