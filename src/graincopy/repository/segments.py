"""Segments: the index as it lies on the medium.

A segment ``index/<owner>-<n>`` is put by the run ``owner`` every few packs, so that the pieces of a run that was
killed are found, or by collect (under an owner that is no run) when it replaces them all. Segments of a fenced run
are passed over: it may have put one after its packs were swept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import msgspec

from graincopy.core.clock import Chance
from graincopy.core.errors import ObjectDamaged, ObjectMissing
from graincopy.media.base import Medium
from graincopy.repository import format, format_segment, frame
from graincopy.repository.codec import Codec
from graincopy.repository.format_segment import Rows
from graincopy.repository.index import Index, merged_with
from graincopy.repository.index_cache import IndexCache
from graincopy.repository.records import ObjectKind

SEGMENT_ROWS = 1 << 18  # pieces of one segment that collect writes: 11 MiB
_AT_ONCE = 16  # segments that are read before they go to the cache: at most 4 million rows
_LISTINGS = 5  # how often a listing is repeated when collect replaces segments under our hands


class Loaded(msgspec.Struct, frozen=True, eq=False):
    """The index as it lies on the medium."""

    index: Index
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
    sealed = codec.objects.seal(
        ObjectKind.INDEX, name, format_segment.encode_segment(rows), chance.token(format.SALT_SIZE)
    )
    medium.put(name, [sealed])
    return len(sealed)


def read_segment(medium: Medium, codec: Codec, name: str) -> Rows:
    """Raises ObjectMissing or ObjectDamaged."""
    content = codec.objects.open(ObjectKind.INDEX, name, medium.get(name))
    try:
        return format_segment.decode_segment(content)
    except frame.Malformed as error:
        raise ObjectDamaged(name=name, reason=error) from error


def load(
    medium: Medium, codec: Codec, cache: IndexCache, fenced: Callable[[str], bool], *, whole: bool = False
) -> Loaded:
    """All segments but those of fenced runs. Damaged ones are reported; what they list can be read from packs.

    What the cache has is not read again. ``whole``: everything is, and is proven, before anything is decided by it.
    Raises ObjectMissing when segments go faster than they can be read.
    """
    for _ in range(_LISTINGS):
        names = list_segments(medium)
        passed = {owner for owner in {segment_owner(name) for name in names} if fenced(owner)}
        wanted = frozenset(name for name in names if segment_owner(name) not in passed)
        try:
            return _load_whole(medium, codec, wanted) if whole else _load_cached(medium, codec, cache, wanted)
        except ObjectMissing:
            continue  # collect has replaced it since the listing, and put the new ones before
    raise ObjectMissing(name="a segment of the index that is listed")


def _load_whole(medium: Medium, codec: Codec, names: frozenset[str]) -> Loaded:
    damaged: list[ObjectDamaged] = []
    return Loaded(Index.of(_read(medium, codec, names, damaged).values()), tuple(damaged))


def _load_cached(medium: Medium, codec: Codec, cache: IndexCache, names: frozenset[str]) -> Loaded:
    """What the cache does not have is read, goes there, and out of memory when it is much."""
    runs, damaged = list(cache.runs(names)), list[ObjectDamaged]()
    missing = sorted(names.difference(*(each.names for each in runs)))
    for start in range(0, len(missing), _AT_ONCE):
        rows = _read(medium, codec, missing[start : start + _AT_ONCE], damaged)
        if any(len(each) for each in rows.values()):
            left, fresh = merged_with([each.run for each in runs], list(rows.values()))
            covered = frozenset(rows).union(*(each.names for each in runs[len(left) :]))
            runs = [*runs[: len(left)], cache.put(covered, fresh)]
    return Loaded(Index(tuple(each.run for each in runs)), tuple(damaged))


def _read(medium: Medium, codec: Codec, names: Collection[str], damaged: list[ObjectDamaged]) -> dict[str, Rows]:
    """Rows of each segment; those that cannot be had are added to ``damaged``. Raises ObjectMissing."""
    rows: dict[str, Rows] = {}
    for name in sorted(names):
        try:
            rows[name] = read_segment(medium, codec, name)
        except ObjectDamaged as error:
            damaged.append(error)
    return rows
