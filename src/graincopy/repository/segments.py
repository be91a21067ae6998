"""Segments: the index as it lies on the medium, and a local cache of it.

A segment ``index/<owner>-<n>`` is put by the run ``owner`` every few packs, so that the pieces of a run that was
killed are found, or by collect (under an owner that is no run) when it replaces them all. Segments of a fenced run
are passed over: it may have put one after its packs were swept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

import msgspec
from blake3 import blake3

from graincopy.core.clock import Chance
from graincopy.core.errors import ObjectDamaged, ObjectMissing
from graincopy.media.base import Medium
from graincopy.repository import format, frame
from graincopy.repository.codec import Codec
from graincopy.repository.format import Rows
from graincopy.repository.index import Index
from graincopy.repository.records import ObjectKind

SEGMENT_ROWS = 1 << 18  # pieces of one segment that collect writes: 11 MiB
_LISTINGS = 5  # how often a listing is repeated when collect replaces segments under our hands


class SegmentCache:
    """Decrypted segments in a local folder: disposable, proven by checksum, never trusted further than that."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder

    def load(self, name: str) -> bytes | None:
        """The segment, or None when it is not there or not whole."""
        if self._folder is None:
            return None
        try:
            with open(self._path(name), "rb") as file:
                data = file.read()
        except OSError:
            return None
        content = data[:-32]
        return content if blake3(content + name.encode()).digest() == data[-32:] else None

    def store(self, name: str, content: bytes) -> None:
        """Keep it if that is possible; a cache that cannot be written is no cache, and no error."""
        if self._folder is None:
            return
        path = self._path(name)
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            descriptor = os.open(f"{path}.{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(content + blake3(content + name.encode()).digest())
            os.replace(f"{path}.{os.getpid()}", path)
        except OSError:
            return

    def keep_only(self, names: Collection[str]) -> None:
        """Forget segments that are no more."""
        if self._folder is None:
            return
        wanted = {os.path.basename(self._path(name)) for name in names}
        try:
            for found in set(os.listdir(self._folder)) - wanted:
                os.unlink(os.path.join(self._folder, found))
        except OSError:
            return

    def _path(self, name: str) -> str:
        return os.path.join(self._folder or "", name.replace("/", "-"))


class Loaded(msgspec.Struct, frozen=True, eq=False):
    """The index as it lies on the medium."""

    index: Index
    segments: tuple[str, ...]  # object names that were read, and those that were passed over
    damaged: tuple[ObjectDamaged, ...]


def segment_name(owner: str, number: int) -> str:
    """Object name of segment ``number`` of the run (or collection) ``owner``."""
    return f"index/{owner}-{number:08d}"


def segment_owner(name: str) -> str:
    """Who put the segment ``name``."""
    return name.removeprefix("index/").partition("-")[0]


def list_segments(medium: Medium) -> tuple[str, ...]:
    """Names of all segments, sorted."""
    return tuple(sorted(entry.name for entry in medium.list("index")))


def put_segment(medium: Medium, codec: Codec, chance: Chance, name: str, rows: Rows) -> int:
    """Store ``rows``; the bytes that it takes."""
    sealed = codec.objects.seal(ObjectKind.INDEX, name, format.encode_segment(rows), chance.token(format.SALT_SIZE))
    medium.put(name, [sealed])
    return len(sealed)


def read_segment(medium: Medium, codec: Codec, cache: SegmentCache, name: str) -> Rows:
    """Raises ObjectMissing or ObjectDamaged."""
    content = cache.load(name)
    if content is not None:
        try:
            return format.decode_segment(content)
        except frame.Malformed:
            content = None  # the cache is of another version: read afresh
    content = codec.objects.open(ObjectKind.INDEX, name, medium.get(name))
    try:
        rows = format.decode_segment(content)
    except frame.Malformed as error:
        raise ObjectDamaged(name=name, reason=error) from error
    cache.store(name, content)
    return rows


def load(medium: Medium, codec: Codec, cache: SegmentCache, fenced: Callable[[str], bool]) -> Loaded:
    """All segments but those of fenced runs. Damaged ones are reported; what they list can be read from packs."""
    for _ in range(_LISTINGS):
        names = list_segments(medium)
        passed = {owner for owner in {segment_owner(name) for name in names} if fenced(owner)}
        rows: list[Rows] = []
        damaged: list[ObjectDamaged] = []
        try:
            for name in names:
                if segment_owner(name) in passed:
                    continue
                try:
                    rows.append(read_segment(medium, codec, cache, name))
                except ObjectDamaged as error:
                    damaged.append(error)
        except ObjectMissing:
            continue  # collect has replaced it since the listing, and put the new ones before
        cache.keep_only(names)
        return Loaded(Index.of(rows), names, tuple(damaged))
    raise ObjectMissing(name="a segment of the index that is listed")
