"""A directory inside a disk as text or JSON: sorted while it is short, given out as it comes when it is long."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterable

from graincopy.app.answer import Answer, decodable
from graincopy.app.shown import when
from graincopy.core.errors import DONE, WARNED, GuestPathMissing, printable
from graincopy.core.ids import PointId
from graincopy.views.guest import wire
from graincopy.views.guest.locate import Located

SORTED = 100_000  # entries; longer listings come as the file system has them, and are not held
_KINDS = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
    "character": stat.S_IFCHR,
    "block": stat.S_IFBLK,
}


def listing_answer(point: PointId, disk: str, found: Located, *, as_json: bool, limit: int = SORTED) -> Answer:
    """What lies in the directory ``found`` of ``disk``. Raises GuestPathMissing.

    Beyond ``limit`` entries the answer is printed while it is read, and has no document of its own.
    """
    head = {"restore_point": point, "disk": disk, "partition": found.partition.number, "path": os.fsdecode(found.path)}
    out = _JsonOut(head, found.path) if as_json else _TextOut(found.path)
    entries: list[wire.Entry] = []
    problems: list[wire.Problem] = []
    for one in found.reader.list(found.path):
        if isinstance(one, wire.Missing):  # a link that leads nowhere
            raise GuestPathMissing(disk=disk, path=os.fsdecode(found.path), reason="it is a link to nothing")
        if isinstance(one, wire.Problem):
            problems.append(one)
        elif isinstance(one, wire.Entry):
            entries.append(one)
            if len(entries) > limit:
                out.print(entries)
                entries.clear()
    entries.sort(key=lambda entry: entry.path)
    notes = (found.partition.note,) if found.partition.note else ()
    warnings = tuple(f"{_shown(one.path or found.path)}: {one.reason}" for one in problems)
    return out.answer(entries, notes, warnings)


class _TextOut:
    """Lines for people."""

    def __init__(self, path: bytes) -> None:
        self._path = path

    def print(self, entries: Iterable[wire.Entry]) -> None:
        """Give out what has come so far."""
        sys.stdout.writelines(f"{printable(_line(entry, self._path))}\n" for entry in entries)

    def answer(self, entries: Iterable[wire.Entry], notes: tuple[str, ...], warnings: tuple[str, ...]) -> Answer:
        """The rest."""
        lines = (*(_line(entry, self._path) for entry in entries), *(f"note: {note}" for note in notes))
        return Answer(None, lines, WARNED if warnings else DONE, warnings)


class _JsonOut:
    """One document: whole, or begun on stdout and ended there."""

    def __init__(self, head: dict[str, object], path: bytes) -> None:
        self._head, self._path, self._begun = head, path, False

    def print(self, entries: Iterable[wire.Entry]) -> None:
        """Give out what has come so far, inside the document's list of entries."""
        for entry in entries:
            sys.stdout.write(",\n" if self._begun else f'{_json(self._head)[:-1]}, "entries": [\n')
            self._begun = True
            sys.stdout.write(_json(_document(entry, self._path)))

    def answer(self, entries: Iterable[wire.Entry], notes: tuple[str, ...], warnings: tuple[str, ...]) -> Answer:
        """The rest, or the whole document when nothing was printed."""
        tail = {"notes": list(notes), "warnings": list(warnings)}
        code = WARNED if warnings else DONE
        if self._begun:
            self.print(entries)
            sys.stdout.write(f"\n], {_json(tail)[1:]}\n")
            return Answer(None, (), code, warnings)
        whole = {**self._head, "entries": [_document(entry, self._path) for entry in entries], **tail}
        return Answer(whole, (), code, warnings)


def _json(value: object) -> str:
    return json.dumps(decodable(value), ensure_ascii=False)


def _line(entry: wire.Entry, path: bytes) -> str:
    name = _shown(entry.path or path.rpartition(b"/")[2])
    link = f" -> {_shown(entry.target)}" if entry.kind == "symlink" else ""
    mode = stat.filemode(_KINDS[entry.kind] | entry.mode)
    return f"{mode} {_owner(entry):>11} {entry.size:>14} {_when(entry.mtime):>19} {name}{link}"


def _when(nanoseconds: int) -> str:
    """A time that a hostile file system may have made up."""
    try:
        return when(nanoseconds / 1e9)
    except (ValueError, OverflowError, OSError):
        return "?"


def _owner(entry: wire.Entry) -> str:
    return f"{entry.uid}:{entry.gid}" if entry.uid >= 0 else "-"


def _document(entry: wire.Entry, path: bytes) -> dict[str, object]:
    return {
        "name": os.fsdecode(entry.path or path.rpartition(b"/")[2]),
        "type": entry.kind,
        "mode": f"{entry.mode:04o}",
        "size": entry.size,
        "uid": entry.uid if entry.uid >= 0 else None,
        "gid": entry.gid if entry.gid >= 0 else None,
        "mtime": entry.mtime / 1e9,
        "target": os.fsdecode(entry.target) if entry.kind == "symlink" else None,
    }


def _shown(name: bytes) -> str:
    return printable(os.fsdecode(name))
