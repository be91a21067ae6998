"""The reference medium: objects in a dictionary. The smallest medium there is; read it first.

It is the oracle of the medium laws. Two :class:`MemoryMedium` over one :class:`MemoryStore` see each other's
objects, as two processes on one directory would. ``limit`` makes it run full; nothing outlives the process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import msgspec

from graincopy.core.errors import MediumFull, ObjectDamaged, ObjectMissing
from graincopy.media.base import Buffer, Medium, MediumCapabilities, ObjectEntry, check_name
from graincopy.model.snapshot import Absent, Created, Deleted, Existing


class MemoryStore(msgspec.Struct):
    """What several :class:`MemoryMedium` share: the objects, and how many bytes they may take (None: any)."""

    objects: dict[str, bytes] = msgspec.field(default_factory=dict)
    limit: int | None = None
    lock: threading.Lock = msgspec.field(default_factory=threading.Lock)

    @property
    def used(self) -> int:
        """Bytes of all objects."""
        return sum(map(len, self.objects.values()))


class MemoryMedium(Medium):
    """A :class:`MemoryStore` as a medium."""

    def __init__(self, store: MemoryStore | None = None, url: str = "memory:") -> None:
        self.store = MemoryStore() if store is None else store
        self.url = url

    def capabilities(self) -> MediumCapabilities:
        return MediumCapabilities(exclusive_create=True)

    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        content = b"".join(parts)
        with self.store.lock:
            if check_name(name) in self.store.objects:
                return Existing()
            if self.store.limit is not None and self.store.used + len(content) > self.store.limit:
                raise MediumFull(url=self.url)
            self.store.objects[name] = content
            return Created()

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        check_range(offset, length)
        try:
            content = self.store.objects[check_name(name)]
        except KeyError:
            raise ObjectMissing(name=name) from None
        stop = max(offset, len(content)) if length is None else offset + length
        if stop > len(content):
            raise ObjectDamaged(name=name, reason=f"it has {len(content)} bytes, {stop} were expected")
        return content[offset:stop]

    def size(self, name: str) -> int | None:
        content = self.store.objects.get(check_name(name))
        return None if content is None else len(content)

    def list(self, prefix: str) -> Iterator[ObjectEntry]:
        folder = f"{check_name(prefix)}/" if prefix else ""
        with self.store.lock:
            found = [(name, len(content)) for name, content in self.store.objects.items()]
        return (ObjectEntry(name=name, size=size) for name, size in found if name.startswith(folder))

    def delete(self, name: str) -> Deleted | Absent:
        with self.store.lock:
            return Absent() if self.store.objects.pop(check_name(name), None) is None else Deleted()


def check_range(offset: int, length: int | None) -> None:
    """Raise ValueError for a negative ``offset`` or ``length``."""
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"no bytes can lie at {offset}, {length} long")
