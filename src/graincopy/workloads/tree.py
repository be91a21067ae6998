"""A directory as part of a workload: listed live (stage 2), and again in T or inside the quiesce (stage 5).

The listing goes by descriptors and follows no symbolic link. What vanishes while it is listed is left out: it was not
there at the instant either, or a later listing says so.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import msgspec
from msgspec.structs import replace

from graincopy.core.errors import PathMissing, PathUnfit, PathUnreadable
from graincopy.model.tree import Entry, Kind, Manifest, disk_of, file_name
from graincopy.model.workload import FileMetadata, Tree, WorkloadFile

OURS = ".graincopy"  # folders that volume drivers keep targets in
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER = _FILE | os.O_DIRECTORY

ReadMetadata = Callable[[int], FileMetadata]


class Listing(msgspec.Struct, frozen=True):
    """A tree as it is: manifest, its regular files, and what was left out, one clause each."""

    manifest: Manifest
    files: tuple[WorkloadFile, ...]
    notes: tuple[str, ...] = ()


class _Walk(msgspec.Struct):
    """One walk through a tree."""

    tree: Tree
    read_metadata: ReadMetadata
    mounts: Collection[str]
    entries: list[Entry] = msgspec.field(default_factory=list)
    files: list[WorkloadFile] = msgspec.field(default_factory=list)
    odd: list[str] = msgspec.field(default_factory=list)  # relative paths of sockets, FIFOs, devices
    mounted: list[str] = msgspec.field(default_factory=list)
    first_names: dict[tuple[int, int], bytes] = msgspec.field(default_factory=dict)

    def folder(self, fd: int, relative: str) -> None:
        """The folder open at ``fd`` and all below it."""
        self.entries.append(_entry(relative, Kind.FOLDER, self.read_metadata(fd)))
        for name in sorted(os.listdir(fd)):
            path = f"{relative}/{name}" if relative else name
            if left_out(path, self.tree.exclude):
                continue
            try:
                self._one(fd, name, path)
            except OSError as error:
                if error.errno not in _GONE:
                    raise PathUnreadable(path=self._absolute(path), reason=error.strerror) from error

    def _one(self, folder: int, name: str, path: str) -> None:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            with _opened(name, _FOLDER, folder) as fd:
                if self._absolute(path) in self.mounts:
                    self.mounted.append(path)
                    self.entries.append(_entry(path, Kind.FOLDER, self.read_metadata(fd)))
                else:
                    self.folder(fd, path)
        elif stat.S_ISREG(found.st_mode):
            self._file(folder, name, path)
        elif stat.S_ISLNK(found.st_mode):
            leads = os.fsencode(os.readlink(name, dir_fd=folder))
            self.entries.append(replace(_entry(path, Kind.LINK, _owner(found)), leads=leads))
        else:
            self.odd.append(path)

    def _file(self, folder: int, name: str, path: str) -> None:
        with _opened(name, _FILE, folder) as fd:
            found = os.fstat(fd)
            key = (found.st_dev, found.st_ino)
            if found.st_nlink > 1 and key in self.first_names:
                self.entries.append(Entry(path=os.fsencode(path), kind=Kind.SAME, leads=self.first_names[key]))
                return
            metadata = self.read_metadata(fd)
        self.first_names[key] = os.fsencode(path)
        whole = self._absolute(path)
        file = WorkloadFile(
            path=whole, name=file_name(self.tree, path), disk=disk_of(whole), metadata=metadata, tree=self.tree.path
        )
        self.files.append(file)
        self.entries.append(Entry(path=os.fsencode(path), kind=Kind.FILE, disk=file.disk))

    def _absolute(self, path: str) -> str:
        return f"{self.tree.path.rstrip('/')}/{path}"

    def listing(self) -> Listing:
        """What was found."""
        notes = []
        if self.odd:
            notes.append(f"{self.tree.path}: {len(self.odd)} sockets, FIFOs or devices are left out: {_some(self.odd)}")
        if self.mounted:
            notes.append(
                f"{self.tree.path}: other file systems are mounted at {_some(self.mounted)} and left out; name them too"
            )
        manifest = Manifest(
            path=os.fsencode(self.tree.path),
            name=self.tree.name,
            entries=tuple(self.entries),
            exclude=self.tree.exclude,
        )
        return Listing(manifest, tuple(self.files), tuple(notes))


def left_out(path: str, patterns: Collection[str]) -> bool:
    """Whether what lies at the relative ``path`` is none of the tree's."""
    return os.path.basename(path) == OURS or any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def names_below(root: str, patterns: Collection[str]) -> Iterator[str]:
    """Relative paths of everything below ``root`` that is not left out; nothing is opened."""
    for folder, folders, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        at = "" if inside == "." else f"{inside}/"
        folders[:] = sorted(name for name in folders if not left_out(at + name, patterns))
        yield from (at + name for name in folders)
        yield from (at + name for name in sorted(files) if not left_out(at + name, patterns))


def list_tree(tree: Tree, fd: int, read_metadata: ReadMetadata, mounts: Collection[str] = ()) -> Listing:
    """``tree`` as the folder open at ``fd`` shows it. Folders whose absolute path is in ``mounts`` are not entered.

    Raises PathUnreadable when something in it cannot be read.
    """
    walk = _Walk(tree, read_metadata, mounts)
    try:
        walk.folder(fd, "")
    except OSError as error:
        raise PathUnreadable(path=tree.path, reason=error.strerror) from error
    return walk.listing()


def list_live(tree: Tree, read_metadata: ReadMetadata, mounts: Collection[str] = ()) -> Listing:
    """``tree`` as it is now. Raises PathMissing, PathUnfit, PathUnreadable."""
    try:
        fd = os.open(tree.path, _FOLDER)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise PathMissing(path=tree.path) from error
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise PathUnfit(path=tree.path, what="no directory") from error
        raise PathUnreadable(path=tree.path, reason=error.strerror) from error
    try:
        return list_tree(tree, fd, read_metadata, mounts)
    finally:
        os.close(fd)


@contextmanager
def _opened(name: str, flags: int, folder: int) -> Iterator[int]:
    fd = os.open(name, flags, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def _entry(path: str, kind: Kind, metadata: FileMetadata) -> Entry:
    return Entry(
        path=os.fsencode(path),
        kind=kind,
        mode=metadata.mode,
        uid=metadata.uid,
        gid=metadata.gid,
        xattrs={os.fsencode(name): value for name, value in metadata.xattrs.items()},
    )


def _owner(found: os.stat_result) -> FileMetadata:
    return FileMetadata(mode=0o777, uid=found.st_uid, gid=found.st_gid)


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (", …" if len(paths) > 3 else "")


def differences(before: Collection[WorkloadFile], now: Collection[WorkloadFile]) -> Iterator[str]:
    """Notes about files that came or went between two listings."""
    earlier, later = {file.path for file in before}, {file.path for file in now}
    for what, paths in (("went", sorted(earlier - later)), ("came", sorted(later - earlier))):
        if paths:
            yield f"{len(paths)} files {what} before the instant: {_some(paths)}"
