"""Names of things. Every id that graincopy makes up is 128 random bits in lower-case hex."""

import hashlib
from collections.abc import Iterable
from typing import NewType

from graincopy.core.clock import Chance

RepositoryId = NewType("RepositoryId", str)
PointId = NewType("PointId", str)  # also the id of the run that made the restore point
WorkloadId = NewType("WorkloadId", str)
DiskId = NewType("DiskId", str)  # stable within its workload
VolumeId = NewType("VolumeId", str)  # "<driver>:<place>", stable for as long as S exists
PieceId = NewType("PieceId", bytes)  # keyed BLAKE3 of a chunk or map node: 32 bytes


def new_id(chance: Chance) -> str:
    """128 random bits as 32 hex digits."""
    return chance.token(16).hex()


def digest_id(kind: str, parts: Iterable[str]) -> str:
    """A name derived from ``parts`` in order: the same parts give the same name on every host."""
    state = hashlib.sha256(kind.encode())
    for part in parts:
        state.update(b"\0" + part.encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:24]
