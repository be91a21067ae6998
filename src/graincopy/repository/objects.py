"""Small sealed objects by name: what points, runs, restore records and condemned packs are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from graincopy.core.clock import Chance
from graincopy.core.errors import ObjectDamaged, ObjectMissing
from graincopy.media.base import Medium
from graincopy.model.snapshot import Created, Existing
from graincopy.repository import format, frame
from graincopy.repository.codec import Codec
from graincopy.repository.records import ObjectKind

T = TypeVar("T", bound=msgspec.Struct)


class Objects:
    """Records on a medium, each in its envelope. Safe to use from several threads."""

    def __init__(self, medium: Medium, codec: Codec, chance: Chance) -> None:
        self.medium, self.codec, self.chance = medium, codec, chance

    def seal(self, kind: ObjectKind, name: str, record: msgspec.Struct, *, shrink: bool = True) -> bytes:
        """The bytes that :meth:`put` would store."""
        salt = self.chance.token(format.SALT_SIZE)
        return self.codec.objects.seal(kind, name, frame.encode_record(record), salt, shrink=shrink)

    def put(self, kind: ObjectKind, name: str, record: msgspec.Struct) -> Created | Existing:
        """Store ``record`` unless ``name`` exists; durable on return."""
        return self.medium.put(name, [self.seal(kind, name, record)])

    def get(self, kind: ObjectKind, name: str, record: type[T]) -> T:
        """Raises ObjectMissing or ObjectDamaged."""
        return self.unseal(kind, name, self.medium.get(name), record)

    def unseal(self, kind: ObjectKind, name: str, sealed: bytes, record: type[T]) -> T:
        """The record in ``sealed``. Raises ObjectDamaged."""
        content = self.codec.objects.open(kind, name, sealed)
        try:
            return frame.decode_record(content, record)
        except frame.Malformed as error:
            raise ObjectDamaged(name=name, reason=error) from error

    def kind_of(self, name: str, sealed: bytes) -> ObjectKind:
        """What ``sealed`` says it is; proven only when it is opened. Raises ObjectDamaged."""
        try:
            return format.decode_envelope_header(sealed).kind
        except frame.Malformed as error:
            raise ObjectDamaged(name=name, reason=error) from error

    def all(self, kind: ObjectKind, folder: str, record: type[T]) -> Iterator[tuple[str, T]]:
        """Name and record of every object directly in ``folder``; what vanishes meanwhile is left out."""
        for name in self.names(folder):
            try:
                yield name, self.get(kind, name, record)
            except ObjectMissing:
                continue

    def names(self, folder: str) -> tuple[str, ...]:
        """Names of all objects under ``folder``, sorted."""
        return tuple(sorted(entry.name for entry in self.medium.list(folder)))
