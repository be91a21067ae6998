"""Walking a guest's file system, whatever reads it: paths with their links, listings, whole trees with their data.

Runs in the locked-away process. A hostile tree can be endless, cyclic and deep: every directory is gone into once,
and of entries nothing is kept but the paths of files with several names, and of these a bounded number.
"""

from __future__ import annotations

import difflib
import errno
import os
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

from graincopy.views.guest.wire import (
    DEPTH,
    PIECE,
    Answer,
    Data,
    Entry,
    FileEnd,
    Hole,
    Missing,
    Problem,
    WireBroken,
    checked,
    is_name,
)

LINKS = 40  # followed on one path, as Linux does
_NAMES_KEPT = 100_000  # files with several names whose first path is remembered
_LOOKED_AT = 20_000  # names of a directory that are compared with one that is missing
FAULTS = (
    OSError,
    ValueError,
    LookupError,
    OverflowError,
    RuntimeError,
    struct.error,
)  # what readers of broken structures raise


class Node:
    """One inode. ``identity`` is the same under every name of it; ``links`` counts these."""

    kind: str
    identity: int
    links: int


N = TypeVar("N", bound=Node)


class Tree(Protocol[N]):
    """A file system. Everything may raise one of FAULTS for what is broken in it."""

    def root(self) -> N:
        """Its root directory."""

    def entry(self, node: N, path: bytes) -> Entry:
        """What is known of ``node``, under ``path``."""

    def children(self, node: N) -> Iterator[tuple[bytes, N | str]]:
        """Names of a directory in whatever order, without . and .., each with its node or why it has none."""

    def child(self, node: N, name: bytes) -> N | None:
        """The child called ``name``."""

    def data(self, node: N) -> Iterator[tuple[int, int]]:
        """Ranges of a file that are no holes, ascending."""

    def read(self, node: N, offset: int, length: int) -> bytes:
        """Bytes of a file; fewer only at its end."""


@dataclass(frozen=True, slots=True)
class Found(Generic[N]):
    """Where a path leads."""

    node: N
    path: bytes


def find(tree: Tree[N], path: bytes, follow: bool) -> Found[N] | Missing:
    """What lies at ``path``. Links lead where they would inside the guest; ``follow``: the last one too."""
    above: list[tuple[N, bytes]] = [(tree.root(), b"")]
    parts, links = deque(path.split(b"/")), 0
    follow = follow or path.endswith(b"/")
    while parts:
        part = parts.popleft()
        here = above[-1][0]
        if part in (b"", b"."):
            continue
        if part == b"..":
            above = above[:-1] or above
            continue
        node = tree.child(here, part) if here.kind == "directory" else None
        if node is None:
            return Missing(b"/".join(name for _, name in above) or b"/", _near(tree, here, part))
        if node.kind != "symlink" or not (follow or any(parts)):
            above.append((node, part))
            continue
        links += 1
        target = tree.entry(node, part).target
        if links > LINKS or not target:
            raise OSError(errno.ELOOP, f"{os.fsdecode(part)} leads over too many links")
        above = above[:1] if target.startswith(b"/") else above
        parts.extendleft(reversed(target.split(b"/")))
    return Found(above[-1][0], b"/".join(name for _, name in above) or b"/")


def _near(tree: Tree[N], node: N, name: bytes) -> tuple[bytes, ...]:
    """Names of the directory ``node`` that look like ``name``, best first."""
    if node.kind != "directory":
        return ()
    try:
        names = {os.fsdecode(one): one for one, _ in islice(tree.children(node), _LOOKED_AT)}
    except FAULTS:
        return ()
    folded = {text.casefold(): one for text, one in names.items()}
    wanted = os.fsdecode(name).casefold()
    return tuple(folded[text] for text in difflib.get_close_matches(wanted, folded, n=3, cutoff=0.6))


def listing(tree: Tree[N], node: N) -> Iterator[Answer]:
    """The entries of a directory, or the one entry of anything else."""
    if node.kind != "directory":
        yield described(tree, node)
        return
    for name, child in tree.children(node):
        if isinstance(child, str) or not is_name(name):
            yield Problem(name, _unusable(child))
        else:
            yield _entry(tree, child, name)


def _unusable(child: Node | str) -> str:
    return child if isinstance(child, str) else "no file can have this name"


def described(tree: Tree[N], node: N, path: bytes = b"") -> Entry:
    """What is known of ``node``. Raises one of FAULTS, also for what the keeper would not believe."""
    try:
        return checked(tree.entry(node, path))
    except WireBroken as impossible:
        raise ValueError(str(impossible)) from impossible


def _entry(tree: Tree[N], child: N, path: bytes) -> Entry | Problem:
    try:
        return described(tree, child, path)
    except FAULTS as fault:
        return Problem(path, reason(fault))


def reason(fault: BaseException) -> str:
    """Why, in one line of bounded length."""
    text = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault) or type(fault).__name__
    return " ".join(text.split())[:300]


class Walk(Generic[N]):
    """One whole tree: every entry before what is below it, files followed by their data."""

    def __init__(self, tree: Tree[N]) -> None:
        self._tree = tree
        self._entered: set[int] = set()
        self._named: dict[int, bytes] = {}

    def run(self, node: N) -> Iterator[Answer]:
        """From ``node`` down."""
        yield from self._one(b"", node)
        stack = self._enter(node)
        while stack:
            path, children = stack[-1]
            try:
                name, child = next(children)
            except StopIteration:
                stack.pop()
                continue
            except FAULTS as fault:
                yield Problem(path, reason(fault))
                stack.pop()
                continue
            full = b"/".join(filter(None, (path, name)))
            if isinstance(child, str) or not is_name(name):
                yield Problem(full, _unusable(child))
            elif self._again(child):
                yield Problem(full, "the same directory is found at several places, or inside itself")
            elif child.kind == "directory" and len(stack) >= DEPTH:
                yield Problem(full, f"it lies deeper than {DEPTH} directories")
            else:
                yield from self._one(full, child)
                stack += self._enter(child, full)

    def _again(self, node: N) -> bool:
        return node.kind == "directory" and node.identity in self._entered

    def _enter(self, node: N, path: bytes = b"") -> list[tuple[bytes, Iterator[tuple[bytes, N | str]]]]:
        if node.kind != "directory":
            return []
        self._entered.add(node.identity)
        return [(path, iter(self._tree.children(node)))]

    def _one(self, path: bytes, node: N) -> Iterator[Answer]:
        """The entry, and a file's data. Of a file with several names the others are told as such."""
        entry = _entry(self._tree, node, path)
        if isinstance(entry, Problem):
            yield entry
            return
        first = self._named.get(node.identity) if node.kind == "file" else None
        if first is not None:
            yield Entry(path=path, kind="file", mode=entry.mode, size=entry.size, same_as=first)
            return
        if node.kind == "file" and node.links > 1 and len(self._named) < _NAMES_KEPT:
            self._named[node.identity] = path
        yield entry
        if node.kind == "file":
            yield from content(self._tree, node, entry.size)


def content(tree: Tree[N], node: N, size: int) -> Iterator[Answer]:
    """The data of a file of ``size`` bytes, with its holes, and how that ended."""
    at = 0
    try:
        for start, stop in tree.data(node):
            start, stop = max(start, at), min(stop, size)
            if stop <= start:
                continue
            if start > at:
                yield Hole(start - at)
            at = start
            while at < stop:
                piece = tree.read(node, at, min(PIECE, stop - at))
                if not piece:
                    raise OSError(errno.EIO, f"it ends after {at} of {size} bytes")
                at += len(piece)
                yield Data(piece)
    except FAULTS as fault:
        yield FileEnd(reason(fault) or "it cannot be read")
        return
    if at < size:
        yield Hole(size - at)
    yield FileEnd()
