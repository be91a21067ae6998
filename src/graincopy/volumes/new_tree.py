"""Stage R, for directories: folders, symbolic links and further names of files, made and given their owners and modes.

Folders are made before the files that go into them, and get their modes and owners after: one that nobody may write to
could not take them. Nothing goes through a symbolic link: every name is made by the descriptor of its folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from graincopy.core.errors import OutputUnfit
from graincopy.model.tree import Entry, Kind, Manifest
from graincopy.volumes.metadata import apply_metadata
from graincopy.volumes.mounts import open_beneath
from graincopy.volumes.places import make_directory

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make_folders(root: str, manifest: Manifest) -> tuple[str, ...]:
    """Make ``root`` and the folders of ``manifest`` below it where they are missing, mode 0700; those that were made.

    Raises OutputUnfit when something else has the name of one.
    """
    made = []
    with _translated(root):
        if not os.path.isdir(root):
            make_directory(root)
            made.append("")
        with _opened(root) as base:
            for path, _ in manifest.named(Kind.FOLDER):
                if path and _make(base, path):
                    made.append(path)
    return tuple(made)


def _make(base: int, path: str) -> bool:
    head, _, name = path.rpartition("/")
    with _beneath(base, head) as parent:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            os.close(os.open(name, _FOLDER, dir_fd=parent))  # a link, or a file: NotADirectoryError
            return False
        return True


def finish_tree(root: str, manifest: Manifest) -> tuple[str, ...]:
    """Links and further names where they are missing, then owners, modes and attributes of the folders, durably.

    A name that leads elsewhere now is left as it is and answered, like what cannot be set: one clause each.
    """
    failed: list[str] = []
    with _translated(root), _opened(root) as base:
        for path, entry in manifest.named(Kind.LINK, Kind.SAME):
            failed += _name(base, path, entry)
        for path, entry in reversed(manifest.named(Kind.FOLDER)):
            with _beneath(base, path) as fd:
                failed += (f"{os.path.join(root, path)}: {clause}" for clause in apply_metadata(fd, entry.metadata))
                os.fsync(fd)
    return tuple(failed)


def _name(base: int, path: str, entry: Entry) -> Sequence[str]:
    head, _, name = path.rpartition("/")
    leads = os.fsdecode(entry.leads)
    with _beneath(base, head) as parent:
        try:
            if entry.kind is Kind.LINK:
                os.symlink(leads, name, dir_fd=parent)
                os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
            else:
                first, _, last = leads.rpartition("/")
                with _beneath(base, first) as folder:
                    os.link(last, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            return _same(base, parent, name, path, entry)
        except OSError as error:
            return [f"{path} could not be made: {error.strerror}"]
    return ()


def _same(base: int, parent: int, name: str, path: str, entry: Entry) -> Sequence[str]:
    """Nothing when what has the name is what it should be."""
    found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    leads = os.fsdecode(entry.leads)
    if entry.kind is Kind.LINK:
        same = stat.S_ISLNK(found.st_mode) and os.readlink(name, dir_fd=parent) == leads
    else:
        head, _, last = leads.rpartition("/")
        with _beneath(base, head) as folder:
            first = os.stat(last, dir_fd=folder, follow_symlinks=False)
        same = os.path.samestat(found, first)
    return () if same else [f"{path} is something else now and was left as it is"]


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _beneath(base: int, path: str) -> Iterator[int]:
    fd = open_beneath(base, path or ".", _FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise OutputUnfit(path=path, reason=failure.strerror) from failure
