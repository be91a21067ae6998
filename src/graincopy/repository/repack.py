"""Collect's effects on what stays: live pieces of sparse packs stored anew, and an index without the packs that go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from graincopy.core.errors import ObjectDamaged, ObjectMissing
from graincopy.core.extent import Mask
from graincopy.core.ids import PieceId, new_id
from graincopy.repository import segments
from graincopy.repository.format_segment import Rows
from graincopy.repository.index import Index, keep_rows, merge_rows, rows_of
from graincopy.repository.pack import PackDirectory, PackWriter, list_packs
from graincopy.repository.records import PackRef, PieceKind
from graincopy.repository.repository import Repository

_BATCH = 256  # pieces in memory at a time

Step = Callable[[str], None]


def repack(
    repository: Repository, index: Index, live: Mask, moving: Sequence[PackRef], step: Step
) -> tuple[list[PackDirectory], tuple[PackRef, ...]]:
    """Store the pieces of ``moving`` that are ``live`` anew: new packs, and those of ``moving`` that cannot be read."""
    moved: list[PackDirectory] = []
    unreadable: list[PackRef] = []
    for kind in PieceKind:
        writer = PackWriter(kind, repository.codec, repository.medium, repository.chance, on_put=moved.append)
        for pack in (pack for pack in moving if pack.kind is kind):
            step("repack")
            try:
                _move(repository, index.rows(), live, pack, writer)
            except (ObjectDamaged, ObjectMissing):
                unreadable.append(pack)
        writer.flush()
    return moved, tuple(unreadable)


def _move(repository: Repository, rows: Rows, live: Mask, pack: PackRef, writer: PackWriter) -> None:
    here = np.flatnonzero(live & (rows.pack == rows.packs.index(pack)))
    for start in range(0, len(here), _BATCH):
        batch = here[start : start + _BATCH]
        offsets, lengths = rows.offset[batch].astype(np.int64), rows.length[batch].astype(np.int64)
        contents, _ = repository.reader.fetch(pack, rows.ids[batch], offsets, lengths)
        for piece, content in zip(rows.ids[batch], contents, strict=True):
            writer.add(PieceId(piece.tobytes()), content)


def rewrite_index(
    repository: Repository,
    index: Index,
    doomed: Sequence[PackRef],
    moved: Sequence[PackDirectory],
    old_segments: Sequence[str],
    step: Step,
) -> None:
    """New segments without ``doomed`` and without packs that are not there; then the old ones go."""
    rows = index.rows()
    there = set(list_packs(repository.medium)) - set(doomed)
    stays = np.array([pack in there for pack in rows.packs], np.bool_)
    if bool(stays.all()) and not moved and len(old_segments) <= 1:
        return
    kept = merge_rows([keep_rows(rows, stays[rows.pack]), *(rows_of(directory) for directory in moved)])
    owner = new_id(repository.chance)  # no run: nobody can fence it
    for number, start in enumerate(range(0, len(kept), segments.SEGMENT_ROWS)):
        part = np.zeros(len(kept), np.bool_)
        part[start : start + segments.SEGMENT_ROWS] = True
        step("index")
        name = segments.segment_name(owner, number)
        segments.put_segment(repository.medium, repository.codec, repository.chance, name, keep_rows(kept, part))
    for name in old_segments:
        step("unindex")
        repository.medium.delete(name)
