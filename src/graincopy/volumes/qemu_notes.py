"""Durable notes on the targets of the ``qemu`` driver (stages 4 and 9): nothing on the storage can carry their tags.

A bitmap has a name and no room for more, and a snapshot node ends with its QEMU. So one file for each target, written
before anything is made, and removed when all of it is gone.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import Generic, Protocol, TypeVar

import msgspec

from graincopy.core.ids import digest_id
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.volumes.places import make_directory, sync_directory

LIVE, REST, CHECKPOINT = "live", "rest", "checkpoint"


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed to find a target and everything made for it again."""

    target: Target
    path: str
    format: str
    mode: str  # LIVE: nodes in a running QEMU; REST: a target of another driver; CHECKPOINT: nothing but the bitmap
    bitmap: str | None = None  # tracks what changes after this target
    why: str = ""  # there is no bitmap, one clause
    monitor: str = ""  # LIVE: of the QEMU
    disk: str = ""  # LIVE: the node that bitmaps are kept on
    anchor: str = ""  # LIVE: the node whose child is exchanged
    nbd: str = ""  # LIVE: socket of its NBD server
    scratch: str = ""  # LIVE: file that takes what S is about to overwrite
    inner: Target | None = None  # REST
    inner_claim: Claim | None = None

    @property
    def key(self) -> str:
        """Short, for names of nodes and exports, which have at most 31 characters."""
        return key_of(self.target.id)


def key_of(target: str) -> str:
    """The short name of the target with this id."""
    return "gc-" + digest_id("qemu", [target])[:20]


class _Note(Protocol):
    @property
    def target(self) -> Target: ...


N = TypeVar("N", bound=_Note)


class Notes(Generic[N]):
    """The notes of type ``kind`` in ``folder``, which is made when the first one is."""

    def __init__(self, folder: str, kind: type[N]) -> None:
        self.folder = os.path.abspath(folder)
        self._kind = kind

    def put(self, note: N) -> N:
        """Write ``note`` in place of what was known of its target; durable on return. Raises OSError."""
        make_directory(self.folder)
        fd, part = tempfile.mkstemp(dir=self.folder, prefix=".part-")
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(note))
                file.flush()
                os.fsync(file.fileno())
            os.rename(part, self._path(note.target.id))
        except BaseException:
            os.unlink(part)
            raise
        sync_directory(self.folder)
        return note

    def find(self, target: str) -> N | None:
        """What is known of the target with this id."""
        return self._read(self._path(target))

    def all(self) -> tuple[N, ...]:
        """Every note. Raises OSError when there are some that cannot be read."""
        try:
            names = sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return ()
        found = (self._read(os.path.join(self.folder, name)) for name in names if name.endswith(".note"))
        return tuple(note for note in found if note is not None)

    def forget(self, target: str) -> None:
        """Everything of the target is gone; durable on return."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(target))
            sync_directory(self.folder)

    def _path(self, target: str) -> str:
        return os.path.join(self.folder, f"{key_of(target)}.note")

    def _read(self, path: str) -> N | None:
        try:
            with open(path, "rb") as file:
                return msgspec.json.decode(file.read(), type=self._kind)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise OSError(f"the note {path} is damaged: {error}") from error
