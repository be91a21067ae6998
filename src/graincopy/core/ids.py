"""Names of things. Every id that graincopy makes up is 128 random bits in lower-case hex."""

import hashlib
import re
from collections.abc import Iterable
from typing import NewType

from graincopy.core.clock import Chance

RepositoryId = NewType("RepositoryId", str)
PointId = NewType("PointId", str)  # also the id of the run that made the restore point
WorkloadId = NewType("WorkloadId", str)
DiskId = NewType("DiskId", str)  # stable within its workload
VolumeId = NewType("VolumeId", str)  # "<driver>:<place>", stable for as long as S exists
PieceId = NewType("PieceId", bytes)  # keyed BLAKE3 of a chunk or map node, PIECE_ID_SIZE bytes

PIECE_ID_SIZE = 32
_HEX = re.compile(r"[0-9a-f]{32}")


def new_id(chance: Chance) -> str:
    """128 random bits as 32 hex digits."""
    return chance.token(16).hex()


def is_id(text: str) -> bool:
    """True when ``text`` has the form that :func:`new_id` gives."""
    return _HEX.fullmatch(text) is not None


def digest_id(kind: str, parts: Iterable[str]) -> str:
    """A name derived from ``parts`` in order: the same parts give the same name on every host."""
    state = hashlib.sha256(kind.encode())
    for part in parts:
        state.update(b"\0" + part.encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:24]
