"""Packs and the index: what was put is found, near or far, moved or stored twice; wounds are named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shelves import FixedChance, back_up, content_of, grain, make, objects, reopen, store_grains

from graincopy.core.errors import ObjectDamaged, ObjectMissing
from graincopy.core.ids import PieceId, WorkloadId
from graincopy.repository import format, format_segment
from graincopy.repository.format_segment import Rows
from graincopy.repository.index import Index, merge_rows
from graincopy.repository.pack import PackReader, PackWriter, list_packs
from graincopy.repository.records import PackRef, PieceKind


def write(repository, contents, **wishes):
    put = []
    writer = PackWriter(
        PieceKind.CHUNK, repository.codec, repository.medium, FixedChance("w"), on_put=put.append, **wishes
    )
    sizes = [writer.add(repository.chunk_id(content), content) for content in contents]
    writer.flush()
    return put, sizes


def test_pieces_come_back_from_one_read_or_several(repository) -> None:
    contents = [grain(number) for number in range(200)]
    put, sizes = write(repository, contents, target_size=1 << 30)
    (directory,) = put
    assert sum(sizes) + 16 + 24 + 16 == directory.pack.size  # header, trailer, tag of the directory
    reader = PackReader(repository.codec, repository.medium)
    pick = np.array([199, 3, 0, 3, 4, 120])
    got, read = reader.fetch(directory.pack, directory.ids[pick], directory.offsets[pick], directory.lengths[pick])
    assert got == [contents[at] for at in pick]
    assert read == 7 * (4096 + 17), "0 to 4 in one go, 120 and 199 by themselves"
    again = reader.directory(directory.pack)
    assert again.ids.tolist() == directory.ids.tolist()
    assert again.offsets.tolist() == directory.offsets.tolist()


def test_a_full_pack_is_put_before_it_is_reported(repository) -> None:
    def on_put(directory) -> None:
        assert repository.medium.size(directory.pack.name) == directory.pack.size

    names = set()
    writer = PackWriter(PieceKind.CHUNK, repository.codec, repository.medium, FixedChance("w"), 20_000, on_put)
    for number in range(30):
        writer.add(repository.chunk_id(grain(number)), grain(number))
    writer.flush()
    writer.flush()
    names = {pack.name for pack in list_packs(repository.medium)}
    assert len(names) == 6
    assert all(pack.size < 20_000 + 4200 for pack in list_packs(repository.medium))


def test_what_shrinks_is_stored_shrunk_and_what_does_not_is_not(repository) -> None:
    _, sizes = write(repository, [bytes(4095) + b"x", grain(1)])
    assert sizes[0] < 100
    assert sizes[1] == 4096 + format.PIECE_OVERHEAD + format.DIRECTORY_ENTRY_SIZE


def test_a_piece_that_is_too_large_is_refused(repository) -> None:
    with pytest.raises(ValueError, match="too large"):
        write(repository, [bytes(4097)])


def test_every_flipped_byte_of_a_pack_is_noticed_by_proof() -> None:
    repository = make()
    (directory,), _ = write(repository, [grain(1)[:50], grain(2)[:20]])
    name, whole = directory.pack.name, repository.medium.get(directory.pack.name)
    for at in range(len(whole)):
        wounded = bytearray(whole)
        wounded[at] ^= 0x10
        repository.medium.delete(name)
        repository.medium.put(name, [wounded])
        try:
            proof = repository.reader.prove(directory.pack)
        except ObjectDamaged as error:
            assert error.facts["name"] == name
            continue
        assert len(proof.bad) >= 1, f"byte {at} is not proven"


@pytest.mark.parametrize("cut", [1, 24, 30, 4000])
def test_a_truncated_pack_is_damaged(repository, cut: int) -> None:
    (directory,), _ = write(repository, [grain(1), grain(2)])
    whole = repository.medium.get(directory.pack.name)
    repository.medium.delete(directory.pack.name)
    repository.medium.put(directory.pack.name, [whole[:-cut]])
    with pytest.raises(ObjectDamaged):
        repository.reader.prove(PackRef(directory.pack.id, PieceKind.CHUNK, len(whole) - cut))
    with pytest.raises(ObjectDamaged):
        repository.reader.directory(directory.pack)


def test_two_packs_exchanged_are_noticed_though_each_is_whole(repository) -> None:
    (first,), _ = write(repository, [grain(1)])
    second = PackWriter(PieceKind.CHUNK, repository.codec, repository.medium, FixedChance("v"), on_put=None)
    second.add(repository.chunk_id(grain(2)), grain(2))
    second.flush()
    one, two = list_packs(repository.medium)
    bytes_of = {pack.name: repository.medium.get(pack.name) for pack in (one, two)}
    for mine, theirs in ((one, two), (two, one)):
        repository.medium.delete(mine.name)
        repository.medium.put(mine.name, [bytes_of[theirs.name]])
    with pytest.raises(ObjectDamaged, match="authentic"):
        repository.reader.fetch(first.pack, first.ids, first.offsets, first.lengths)


# --- index ----------------------------------------------------------------------------------------

NUMBERS = st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=12)


def rows(pack: int, numbers: list[int]) -> Rows:
    """A pack that holds pieces of which many share the first eight bytes."""
    ids = [(number % 5).to_bytes(8, "big") + number.to_bytes(24, "big") for number in numbers]
    return Rows(
        (PackRef(f"{pack:032x}", PieceKind.CHUNK, 1000 + pack),),
        np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32),
        np.zeros(len(numbers), np.uint32),
        np.arange(len(numbers), dtype=np.uint32) * 10 + 16,
        np.full(len(numbers), 10, np.uint32),
    )


@settings(max_examples=200, deadline=None)
@given(NUMBERS, st.sets(st.integers(0, 11)), st.booleans())
def test_the_index_finds_what_a_dict_finds(packs: list[list[int]], without: set[int], at_once: bool) -> None:
    parts = [rows(pack, numbers) for pack, numbers in enumerate(packs)]
    if at_once:
        index = Index.of(parts)
    else:
        index = Index()
        for part in parts:
            index = index.adding(part)
    avoid = frozenset(part.packs[0].name for pack, part in enumerate(parts) if pack in without)
    asked = rows(99, list(range(31))).ids
    found = index.locate(asked, avoid)
    for number in range(31):
        homes = {pack for pack, numbers in enumerate(packs) if number in numbers and pack not in without}
        if not homes:
            assert found.pack[number] == -1
            continue
        pack = int(found.pack_ref(int(found.pack[number])).id, 16)
        assert pack in homes
        assert packs[pack][(found.offset[number] - 16) // 10] == number
        assert index.rows().ids[found.row[number]].tobytes() == asked[number].tobytes()
    assert index.excluding(avoid).known(asked).tolist() == (found.pack >= 0).tolist()


@settings(max_examples=50, deadline=None)
@given(NUMBERS)
def test_a_segment_comes_back(packs: list[list[int]]) -> None:
    merged = merge_rows([rows(pack, numbers) for pack, numbers in enumerate(packs)])
    again = format_segment.decode_segment(format_segment.encode_segment(merged))
    assert list(again.packs) == list(merged.packs)
    for name in ("ids", "pack", "offset", "length"):
        assert getattr(again, name).tolist() == getattr(merged, name).tolist()


@pytest.mark.parametrize("wound", ["missing", "flipped", "truncated"])
def test_without_its_segments_a_repository_is_read_from_its_packs(repository, wound: str) -> None:
    point = back_up(repository, {1: grain(1), 70: grain(2)})
    for name in [name for name in objects(repository) if name.startswith("index/")]:
        whole = bytearray(repository.medium.get(name))
        repository.medium.delete(name)
        whole[-3] ^= 1
        if wound != "missing":
            repository.medium.put(name, [whole[: -10 if wound == "truncated" else None]])
    assert content_of(reopen(repository), point) == {1: grain(1), 70: grain(2)}


def test_a_piece_that_is_nowhere_is_missing(repository) -> None:
    back_up(repository, {1: grain(1)})
    with pytest.raises(ObjectMissing, match="piece"):
        repository.fetch(np.ones((1, 32), np.uint8))


def test_where_one_pack_fails_another_that_has_the_piece_will_do(repository) -> None:
    point = back_up(repository, {1: grain(1)})
    damaged = [pack for pack in list_packs(repository.medium) if pack.kind is PieceKind.CHUNK]
    write(repository, [grain(1)])
    for pack in damaged:
        whole = bytearray(repository.medium.get(pack.name))
        whole[100] ^= 1
        repository.medium.delete(pack.name)
        repository.medium.put(pack.name, [whole])
    assert content_of(reopen(repository), point) == {1: grain(1)}


# --- session --------------------------------------------------------------------------------------


def test_what_a_run_adds_is_what_it_says_it_added() -> None:
    repository = make()
    before = sum(objects(repository).values())
    run = repository.open_run("backup", WorkloadId("w"))
    session = repository.session(run, target_size=20_000)
    writer, added = session.writer(PieceKind.CHUNK), 0
    for number in range(50):
        added += writer.add(session.piece_id(PieceKind.CHUNK, grain(number)), grain(number))
    assert writer.add(session.piece_id(PieceKind.CHUNK, grain(3)), grain(3)) == 0
    for node in range(500):
        session.write_nodes([grain(node)[:200]])
    session.finish()
    repository.close_run(run)
    assert session.data_bytes == added
    assert sum(objects(repository).values()) - before == added + session.metadata_bytes
    assert len([name for name in objects(repository) if name.startswith("index/")]) > 2


def test_a_killed_run_leaves_its_chunks_to_be_found() -> None:
    repository = make()
    run = repository.open_run("backup", WorkloadId("w"))
    session = repository.session(run, target_size=20_000)
    store_grains(session, {number: grain(number) for number in range(50)})  # never finished, never closed
    later = reopen(repository)
    session = later.session(later.open_run("backup", WorkloadId("w")))
    ids = later.codec.piece_ids(PieceKind.CHUNK, [grain(number) for number in range(50)])
    assert 40 <= session.known(ids).sum() < 50


def test_a_session_knows_what_it_buffers_and_reads_its_own_nodes(repository) -> None:
    session = repository.session(repository.open_run("backup", None))
    piece = session.piece_id(PieceKind.CHUNK, grain(1))
    table = np.frombuffer(piece, np.uint8).reshape(1, 32)
    assert not session.known(table).any()
    session.writer(PieceKind.CHUNK).add(PieceId(piece), grain(1))
    assert session.known(table).all()
    node = session.write_nodes([b"a node"])
    assert session.read_nodes(node) == [b"a node"]
    session.finish()
    assert session.read_nodes(node) == [b"a node"]


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_what_was_in_a_lost_pack_is_stored_anew(repository, how: str) -> None:
    back_up(repository, {1: grain(1), 2: grain(2)})
    for pack in list_packs(repository.medium):
        whole = repository.medium.get(pack.name)
        repository.medium.delete(pack.name)
        if how == "truncated":
            repository.medium.put(pack.name, [whole[:-5]])
    later = reopen(repository)
    point = back_up(later, {1: grain(1), 2: grain(2)})
    assert content_of(reopen(repository), point) == {1: grain(1), 2: grain(2)}
