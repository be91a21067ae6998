"""What a backed-up directory looks like besides its files' bytes: the manifest that brings it back whole (stages 2, R).

Every regular file is a disk of the restore point; the manifest says where each belongs, and holds what has no bytes:
folders, symbolic links, further names of one file, modes, owners, extended attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from graincopy.core.ids import DiskId, digest_id
from graincopy.model.workload import FileMetadata, Tree

PREFIX = "tree/"  # definitions with such names are manifests
LONGEST_NAME = 255  # bytes: a disk's NAME becomes a file name


class Kind(StrEnum):
    """What an entry is."""

    FOLDER = "folder"
    FILE = "file"
    LINK = "link"  # symbolic
    SAME = "same"  # another name of a file of this tree


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing in a tree. ``path`` is relative to it; the tree itself is the entry with the empty path."""

    path: bytes
    kind: Kind
    disk: DiskId | None = None  # of a file
    leads: bytes = b""  # what a symbolic link holds; path of the first name of the same file
    mode: int = 0o700
    uid: int = 0
    gid: int = 0
    xattrs: dict[bytes, bytes] = {}

    @property
    def metadata(self) -> FileMetadata:
        """Of a folder or link, as it is applied."""
        names = {_text(name): value for name, value in self.xattrs.items()}
        return FileMetadata(mode=self.mode, uid=self.uid, gid=self.gid, xattrs=names)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A tree as it was at the instant, parents before what is in them."""

    format: int = 1
    path: bytes  # absolute, where it was
    name: str  # folder that a restore to a directory makes
    entries: tuple[Entry, ...]
    exclude: tuple[str, ...] = ()  # patterns of what was left out

    @property
    def where(self) -> str:
        """``path`` as text."""
        return _text(self.path)

    def named(self, *kinds: Kind) -> tuple[tuple[str, Entry], ...]:
        """(relative path as text, entry) of these kinds, in order."""
        return tuple((_text(entry.path), entry) for entry in self.entries if entry.kind in kinds)


def encode(manifest: Manifest) -> bytes:
    """As it lies in a restore point's definitions."""
    return msgspec.msgpack.encode(manifest)


def manifests(definitions: Mapping[str, bytes]) -> tuple[Manifest, ...]:
    """All manifests of a restore point. Raises ValueError for one that is damaged, of another format, or leads out."""
    found = []
    for name, data in sorted(definitions.items()):
        if name.startswith(PREFIX):
            manifest = msgspec.msgpack.decode(data, type=Manifest)
            if manifest.format != 1:
                raise ValueError(f"{name} has the unknown format {manifest.format}")
            _refuse_leading_out(manifest)
            found.append(manifest)
    return tuple(found)


def _refuse_leading_out(manifest: Manifest) -> None:
    """Every entry lies below folders of the same tree: no ``..``, no absolute path, nothing behind a link."""
    if manifest.name in ("", ".", "..") or "/" in manifest.name or "\0" in manifest.name:
        raise ValueError(f"a tree has the impossible name {manifest.name!r}")
    folders = {entry.path for entry in manifest.entries if entry.kind is Kind.FOLDER}
    for entry in manifest.entries:
        head, _, last = entry.path.rpartition(b"/")
        odd = last in (b"", b".", b"..") or entry.path.startswith(b"/") or b"\0" in entry.path
        if entry.path and (odd or head not in folders):
            raise ValueError(f"the tree {manifest.name} holds the impossible path {_text(entry.path)!r}")


def definition_of(manifest: Manifest) -> tuple[str, bytes]:
    """Name and content of the definition that holds ``manifest``."""
    return PREFIX + manifest.name, encode(manifest)


def disk_of(path: str) -> DiskId:
    """The stable id of the file at the absolute ``path``."""
    return DiskId(digest_id("path", [path]))


def tree_disk_of(tree: str) -> DiskId:
    """What stands for all files of the tree at the path ``tree`` in the tags of targets."""
    return DiskId(digest_id("tree", [tree]))


def file_name(tree: Tree, relative: str) -> str:
    """NAME of a file of ``tree``: its path with ``/`` as ``%2F`` and ``%`` as ``%25``, the same whatever else is there.

    One too long for a file name keeps its end, behind a digest of the whole.
    """
    whole = "/".join((tree.name, relative)).replace("%", "%25").replace("/", "%2F")
    raw = whole.encode("utf-8", "surrogateescape")
    if len(raw) <= LONGEST_NAME:
        return whole
    head = digest_id("path", [whole])[:16].encode() + b"-"
    return _text(head + raw[-(LONGEST_NAME - len(head)) :])


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
