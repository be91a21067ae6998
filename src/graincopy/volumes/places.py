"""Durable memory of where drivers made targets (stages 4 and 9), so that none is missed when S is gone or renamed."""

from __future__ import annotations

import contextlib
import os
from typing import Protocol


class Places(Protocol):
    """Durable memory of the directories in which targets were made, for finding them when S is gone or renamed."""

    def note(self, directory: str) -> None:
        """Remember ``directory``, durably on return."""

    def all(self) -> tuple[str, ...]:
        """Every directory ever noted."""


class MemoryPlaces:
    """Places for one process: for tests, and for hosts that keep no state."""

    def __init__(self) -> None:
        self._noted: dict[str, None] = {}

    def note(self, directory: str) -> None:
        """Remember ``directory`` for as long as this object lives."""
        self._noted[directory] = None

    def all(self) -> tuple[str, ...]:
        """Every directory noted."""
        return tuple(self._noted)


class FilePlaces:
    """Places in one file: NUL-ended paths, appended with a single write and fsynced; duplicates do no harm.

    Nothing is ever forgotten: a directory that is not there now may be on a file system that is not mounted now.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)

    def note(self, directory: str) -> None:
        """Remember ``directory``, durably. Raises OSError."""
        if directory in self.all():
            return
        make_directory(os.path.dirname(self.path))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, b"\0" + os.fsencode(directory) + b"\0")  # the first NUL ends what a power cut left torn
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_directory(os.path.dirname(self.path))

    def all(self) -> tuple[str, ...]:
        """Every directory noted, once. Raises OSError when the file is there and cannot be read."""
        try:
            with open(self.path, "rb") as file:
                whole = file.read().split(b"\0")[:-1]
        except FileNotFoundError:
            return ()
        return tuple(dict.fromkeys(os.fsdecode(path) for path in whole if path))


def sync_directory(path: str) -> None:
    """Make the entries of the directory ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: str) -> None:
    """Make the directory ``path`` and its parents where they are missing, durably. Raises OSError."""
    if os.path.isdir(path):
        return
    make_directory(os.path.dirname(path))
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    sync_directory(os.path.dirname(path))
