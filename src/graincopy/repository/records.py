"""Values that only the repository keeps: its configuration, its keys, tombstones, condemned packs."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from graincopy.core.ids import PointId, RepositoryId
from graincopy.model.snapshot import Owner


class ObjectKind(IntEnum):
    """What a sealed object is. The number is on the medium: never reuse one."""

    KEYRING = 1
    INDEX = 2
    POINT = 3
    TOMBSTONE = 4
    RUN = 5
    BEAT = 6
    RESTORE = 7
    CONDEMNED = 8
    SUSPECT = 9
    TRIAL = 10


class PieceKind(IntEnum):
    """What a sealed piece in a pack is; a pack holds one kind only. The number is on the medium."""

    CHUNK = 1
    NODE = 2

    @property
    def folder(self) -> str:
        """First part of the names of the packs that hold this kind."""
        return "data" if self is PieceKind.CHUNK else "node"


class PackRef(msgspec.Struct, frozen=True, order=True):
    """One pack: 32 hex digits, what it holds, its size in bytes."""

    id: str
    kind: PieceKind
    size: int

    @property
    def name(self) -> str:
        """Name of its object on the medium."""
        return pack_name(self.kind, self.id)


def pack_name(kind: PieceKind, pack: str) -> str:
    """Object name of pack ``pack``."""
    return f"{kind.folder}/{pack[:2]}/{pack}"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What must be known before anything can be read; sealed a second time inside the keyring."""

    repository: RepositoryId
    grain_size: int  # bytes
    fan_out: int  # children of a grain-map node
    created: float = 0.0  # wall clock, a hint


class Epoch(msgspec.Struct, frozen=True):
    """One sealing epoch: what is written under ``number`` is sealed with keys derived from ``key``."""

    number: int
    key: bytes


class Keyring(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the master key protects. The id key is permanent; epochs are only ever added."""

    config: Config
    id_key: bytes
    epochs: tuple[Epoch, ...]


class KeyObject(msgspec.Struct, frozen=True, kw_only=True):
    """One passphrase: how a key is made of it, and the master key wrapped with that."""

    id: str
    label: str
    created: float  # wall clock, a hint
    kdf: str  # one of keys.KDFS; the three numbers are of "argon2id"
    memory: int = 0  # KiB
    iterations: int = 0
    lanes: int = 0
    salt: bytes = b""
    nonce: bytes
    wrapped: bytes


class KeyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What people see of a key."""

    id: str
    label: str
    created: float  # wall clock
    kdf: str


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """Lies where a run's restore point would: the run is fenced and can never publish."""

    run: PointId
    owner: Owner | None  # of the fenced run; None when its record was gone already
    fenced: float  # wall clock, a hint


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """A sign of life. Only its number, in its name, matters."""

    time: float


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """A pack in which a check of the data found damage: nothing in it is reused, so that it is stored anew."""

    pack: str  # object name


class Condemned(msgspec.Struct, frozen=True, kw_only=True):
    """Packs that a collect is about to remove: runs that open from now on must not reuse what is in them."""

    collect: PointId  # the run that condemned them
    packs: tuple[str, ...]  # object names
