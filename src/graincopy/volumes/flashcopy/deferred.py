"""What is known of every T beyond its name, durably: its tag, and whether it is to go (stages 4 and 9).

An array keeps no tags, so each T has a note in the state directory, written before the T is made. A T that is to be
deleted is first *doomed* here: from then on it is nobody's, and whatever refuses to let it go now (volume protection,
a lost connection, a member of its group still in use) is tried again by every later run, until the note can go too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import msgspec

from graincopy.model.snapshot import TargetTag
from graincopy.volumes.places import make_directory, sync_directory

_SUFFIX = ".json"


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """One T, under its name on the array. ``size`` in bytes; ``held``: why it could not go so far."""

    format: int = 1
    name: str
    volume: str
    size: int
    incarnation: str
    tag: TargetTag
    doomed: bool = False
    held: str = ""


class Notes:
    """The notes about the targets on one array: one file each in ``folder``, replaced whole."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def put(self, note: Note) -> Note:
        """Write or replace a note, durably on return. Raises OSError."""
        make_directory(self.folder)
        path = self._path(note.name)
        temporary = f"{path}.{os.getpid()}.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, msgspec.json.encode(note))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
        sync_directory(self.folder)
        return note

    def doom(self, name: str, held: str = "") -> None:
        """T is to go; ``held`` says why it is still there. Nothing for a T without a note. Raises OSError."""
        note = self.get(name)
        if note is not None and (not note.doomed or note.held != held):
            self.put(msgspec.structs.replace(note, doomed=True, held=held))

    def get(self, name: str) -> Note | None:
        """The note about ``name``; None when there is none that can be read."""
        try:
            with open(self._path(name), "rb") as file:
                note = msgspec.json.decode(file.read(), type=Note)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return note if note.format == 1 and note.name == name else None

    def doomed(self) -> tuple[Note, ...]:
        """Every T that is to go."""
        return tuple(note for note in self.all() if note.doomed)

    def all(self) -> Iterator[Note]:
        """Every note that can be read, by name."""
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return
        for name in names:
            note = self.get(name.removesuffix(_SUFFIX)) if name.endswith(_SUFFIX) else None
            if note is not None:
                yield note

    def forget(self, name: str) -> bool:
        """Remove the note, durably; False when there was none. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))
            sync_directory(self.folder)
            return True
        return False

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name + _SUFFIX)
