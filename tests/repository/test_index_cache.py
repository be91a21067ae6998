"""The cache of the index: it answers as memory does, is proven where it is used, and is not missed when it is gone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shelves import back_up, content_of, grain, objects, reopen
from test_pack_and_index import rows

from graincopy.media.memory import MemoryMedium
from graincopy.repository import index_file
from graincopy.repository.collect import collect
from graincopy.repository.format_segment import Rows
from graincopy.repository.frame import Malformed
from graincopy.repository.index import Index, merge_rows
from graincopy.repository.index_cache import IndexCache
from graincopy.repository.index_file import FileRun, encode_run, open_run
from graincopy.repository.index_run import MemoryRun
from graincopy.repository.records import PackRef, PieceKind


class Counting(MemoryMedium):
    """The same objects, and a note of every read of a segment."""

    def __init__(self, medium: MemoryMedium) -> None:
        super().__init__(medium.store)
        self.segments: list[str] = []

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name.startswith("index/"):
            self.segments.append(name)
        return super().get(name, offset, length)


def many(count: int, seed: int = 1) -> Rows:
    """So many pieces of random ids in five packs."""
    dice = np.random.default_rng(seed)
    return Rows(
        tuple(PackRef(f"{pack + 16 * seed:032x}", PieceKind(pack % 2 + 1), 1 << 20) for pack in range(5)),
        dice.integers(0, 256, (count, 32), dtype=np.uint8),
        dice.integers(0, 5, count).astype(np.uint32),
        np.arange(count, dtype=np.uint32) * 10,
        np.full(count, 10, np.uint32),
    )


def files(folder: str) -> list[str]:
    return sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)


def kept(folder: Path, run: MemoryRun, names: set[str]) -> str:
    IndexCache(str(folder)).put(names, run)
    (path,) = files(str(folder))
    return path


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=12),
    st.sets(st.integers(0, 11)),
    st.integers(1, 9),
)
def test_a_run_in_a_file_answers_as_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory, packs: list[list[int]], without: set[int], block: int
) -> None:
    """Of ids of which many share their first eight bytes, so that blocks end in the midst of them or do not."""
    merged = merge_rows([rows(pack, numbers) for pack, numbers in enumerate(packs)])
    run = MemoryRun.of(merged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_file, "BLOCK", block)
        again = FileRun(kept(tmp_path_factory.mktemp("cache"), run, {"index/a-1", "index/b-1"}))
    assert again.names == {"index/a-1", "index/b-1"}
    assert (len(again), list(again.packs)) == (len(run), list(run.packs))
    avoid = frozenset(pack.name for at, pack in enumerate(merged.packs) if at in without)
    asked = rows(99, list(range(40))).ids
    mine, theirs = Index((run,)).locate(asked, avoid), Index((again,)).locate(asked, avoid)
    for column in ("row", "pack", "offset", "length"):
        assert getattr(mine, column).tolist() == getattr(theirs, column).tolist()
    assert Index((again,), avoid).known(asked).tolist() == (mine.row >= 0).tolist()
    whole = again.rows()
    assert whole is not None
    for column in ("ids", "pack", "offset", "length"):
        assert getattr(whole, column).tolist() == getattr(run.rows(), column).tolist()


def test_every_byte_of_it_is_proven_before_it_is_believed(tmp_path: Path) -> None:
    """A flipped bit anywhere: nothing that was not there is known, nothing lies where it does not."""
    run = MemoryRun.of(many(1500))
    path = kept(tmp_path, run, {"index/a-1"})
    whole = Path(path).read_bytes()
    truth = Index((run,)).locate(run.rows().ids)
    stranger = many(500, seed=2).ids
    for at in [*range(0, 700, 3), *range(700, len(whole), 97)]:
        wounded = bytearray(whole)
        wounded[at] ^= 1 << at % 8
        Path(path).write_bytes(wounded)
        try:
            index = Index((FileRun(path),))
        except Malformed:
            continue
        answer = index.locate(run.rows().ids)
        known = answer.row >= 0
        assert not known.all()
        assert not os.path.exists(path), "it goes when it is found out"
        for column in ("row", "pack", "offset", "length"):
            assert (getattr(answer, column)[known] == getattr(truth, column)[known]).all()
        assert not index.known(stranger).any()
        Path(path).write_bytes(wounded)
        with pytest.raises(Malformed):
            open_run(path)


def test_few_blocks_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "_HELD", 3)
    run = MemoryRun.of(many(5000))
    opened = FileRun(kept(tmp_path, run, {"index/a-1"}))
    for start in [*range(0, 5000, 50), *range(5000, 0, -50)]:
        assert Index((opened,)).known(run.rows().ids[start : start + 50]).all()
        assert len(opened._held) <= 3


@pytest.mark.parametrize("size", [0, 7, 60, 4096, -1])
def test_what_is_cut_off_is_removed(tmp_path: Path, size: int) -> None:
    path = kept(tmp_path, MemoryRun.of(many(100)), {"index/a-1"})
    os.truncate(path, size if size >= 0 else os.path.getsize(path) - 1)
    Path(tmp_path, "something else").write_bytes(b"of an older graincopy")
    assert IndexCache(str(tmp_path)).runs({"index/a-1"}) == ()
    assert files(str(tmp_path)) == []


def test_only_runs_of_nothing_but_wanted_segments_are_used(tmp_path: Path) -> None:
    cache = IndexCache(str(tmp_path))
    cache.put({"index/a-1", "index/b-1"}, MemoryRun.of(many(50)))
    cache.put({"index/b-1"}, MemoryRun.of(many(20, 2)))
    cache.put({"index/c-1"}, MemoryRun.of(many(30, 3)))
    cache.put({"index/d-1", "index/gone-1"}, MemoryRun.of(many(40, 4)))
    found = cache.runs({"index/a-1", "index/b-1", "index/c-1", "index/d-1"})
    assert [sorted(each.names) for each in found] == [["index/a-1", "index/b-1"], ["index/c-1"]]
    assert len(files(str(tmp_path))) == 2


def test_segments_that_come_one_by_one_make_few_runs(repository, tmp_path: Path) -> None:
    folder = str(tmp_path / "a cache")
    points = []
    for number in range(40):
        points.append(back_up(repository, {at: grain(f"{number} {at}") for at in (1, 9, 70)}))
        read = Counting(repository.medium)
        reopen(repository, medium=read, cache_dir=folder).load_index()
        assert len(read.segments) == 1, "only the new one"
        assert len(files(folder)) <= 6
    opened = reopen(repository, cache_dir=folder)
    for number, point in enumerate(points):
        assert content_of(opened, point) == {at: grain(f"{number} {at}") for at in (1, 9, 70)}


def test_it_is_private_used_and_disposable(repository, tmp_path: Path) -> None:
    point = back_up(repository, {1: grain(1), 70: grain(2)})
    folder = str(tmp_path / "a cache")
    assert content_of(reopen(repository, cache_dir=folder), point) == {1: grain(1), 70: grain(2)}
    (path,) = files(folder)
    assert os.stat(path).st_mode & 0o077 == os.stat(os.path.dirname(path)).st_mode & 0o077 == 0
    read = Counting(repository.medium)
    assert content_of(reopen(repository, medium=read, cache_dir=folder), point)[1] == grain(1)
    assert not read.segments
    IndexCache("/proc/no such place").put({"index/a-1"}, MemoryRun.of(many(3)))
    assert IndexCache("/proc/no such place").runs({"index/a-1"}) == ()


def test_a_reader_that_finds_it_damaged_reads_the_medium(
    repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "IN_MEMORY", 0)
    point = back_up(repository, {at: grain(at) for at in range(64)})
    folder = str(tmp_path / "a cache")
    reopen(repository, cache_dir=folder).load_index()
    (path,) = files(folder)
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff\xff")
    read = Counting(repository.medium)
    opened = reopen(repository, medium=read, cache_dir=folder)
    opened.load_index()
    assert not read.segments
    assert content_of(opened, point) == {at: grain(at) for at in range(64)}
    assert read.segments


def test_a_cache_that_says_something_else_than_the_medium_is_not_believed_for_long(repository, tmp_path: Path) -> None:
    """Whole and proven, and wrong all the same: as a graincopy with a fault may have left it."""
    folder = str(tmp_path / "a cache")
    point = back_up(repository, {1: grain(1)})
    reopen(repository, cache_dir=folder).load_index()
    (path,) = files(folder)
    names = [name for name in objects(repository) if name.startswith("index/")]
    Path(path).write_bytes(b"".join(encode_run(names, MemoryRun.of(many(1)))))
    assert content_of(reopen(repository, cache_dir=folder), point) == {1: grain(1)}
    assert files(folder) == []


def test_what_is_decided_for_good_is_decided_by_the_medium(repository, tmp_path: Path) -> None:
    """A collect that believed a cache could sweep what is needed."""
    folder = str(tmp_path / "a cache")
    point = back_up(repository, {1: grain(1)})
    reopen(repository, cache_dir=folder).load_index()
    (path,) = files(folder)
    names = [name for name in objects(repository) if name.startswith("index/")]
    Path(path).write_bytes(b"".join(encode_run(names, MemoryRun.of(many(1)))))
    read = Counting(repository.medium)
    opened = reopen(repository, medium=read, cache_dir=folder)
    collect(opened, alive=lambda owner: False, clock=opened.clock, patience=0)
    assert read.segments
    assert content_of(reopen(repository), point) == {1: grain(1)}
