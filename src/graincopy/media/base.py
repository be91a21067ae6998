"""The medium seam: named objects, each written once.

Contract (each law is a test in ``graincopy.testing.medium_suite``)
    * write-once       ``put`` of a name that exists changes nothing and answers ``Existing``
    * no partial       an object is listed and readable whole, or not at all, whatever crashed
    * read-after-write what ``put`` returned from is seen by every reader and every ``list`` from then on
    * complete list    ``list`` misses nothing that exists from its start to its end
    * exact ranges     ``get`` returns exactly the bytes asked for, or raises
    * idempotent delete, durability (``put`` and ``delete`` return when a power cut cannot undo them)
    * exclusive_create of two creators of one name exactly one gets ``Created``. A medium that does not declare it
      admits one writer at a time.

Names are relative, ``/``-separated, of ``[a-z0-9._-]``; no part begins with a dot. No rename, append or
compare-and-swap is asked of a medium.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import msgspec

from graincopy.model.snapshot import Absent, Created, Deleted, Existing

Buffer = bytes | bytearray | memoryview
_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]*(/[a-z0-9_-][a-z0-9._-]*)*")


class MediumCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """Powers of a medium."""

    exclusive_create: bool = False
    immutable: bool = False  # objects can be locked against deletion
    sequential: bool = False  # reading out of order is slow (tape)


class ObjectEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One object in a listing."""

    name: str
    size: int  # bytes


class Medium(ABC):
    """One place that keeps objects. Safe to use from several threads."""

    url: str

    @abstractmethod
    def capabilities(self) -> MediumCapabilities:
        """Declared powers."""

    @abstractmethod
    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        """Store the concatenation of ``parts`` under ``name``, durably, unless the name exists.

        Raises MediumFull, MediumReadOnly or MediumFailed; then the name does not exist.
        """

    @abstractmethod
    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``offset`` (to the end when None).

        Raises ObjectMissing; ObjectDamaged when the object is shorter than asked for; MediumFailed.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of the object, or None when it does not exist."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectEntry]:
        """Every object whose name begins with the folder ``prefix`` ("" for all), in no special order."""

    @abstractmethod
    def delete(self, name: str) -> Deleted | Absent:
        """Remove the object, durably."""


def check_name(name: str) -> str:
    """``name`` itself when it is a legal object name. Raises ValueError."""
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not an object name")
    return name
