"""The golden repositories stay readable for ever, and byte for byte what docs/format/repository-1.md says."""

from __future__ import annotations

import os
import shutil
import struct
import sys

import numpy as np
import pytest
from shelves import FixedChance, FixedClock, content_of, objects

from graincopy.core.errors import ObjectDamaged, PassphraseMissing, PassphraseWrong
from graincopy.media.directory import DirectoryMedium
from graincopy.repository import format, format_segment, frame
from graincopy.repository.check import check
from graincopy.repository.collect import collect
from graincopy.repository.format_segment import Rows
from graincopy.repository.records import ObjectKind, PackRef, PieceKind
from graincopy.repository.repository import Repository

GOLDEN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "golden")
sys.path.insert(0, GOLDEN)
from make import text, trial  # noqa: E402

PASSPHRASES = [("format-1-encrypted", b"golden"), ("format-1-encrypted", b"deputy"), ("format-1-plain", None)]
GENERATED = b"graincopy-cg5nesbiwczxfjcwsnt3fn7jxlrah2fwwpzqyqryp2zhh2sxfchlmqcb"
FIRST = {at: text(at) for at in (0, 1, 7, 8, 63, 64, 99)}


@pytest.fixture
def golden(tmp_path):
    """Opens a copy: nothing may ever touch the golden ones."""

    def open_copy(name: str, passphrase: bytes | None) -> Repository:
        path = str(tmp_path / name)
        if not os.path.exists(path):
            shutil.copytree(os.path.join(GOLDEN, name), path)
        return Repository.open(
            DirectoryMedium(path), passphrase=passphrase, clock=FixedClock(), chance=FixedChance("reader")
        )

    return open_copy


@pytest.mark.parametrize(("name", "passphrase"), PASSPHRASES)
def test_all_of_it_is_read(golden, name: str, passphrase: bytes | None) -> None:
    repository = golden(name, passphrase)
    assert (repository.grain_size, repository.fan_out) == (4096, 8)
    second, first = repository.points()
    assert content_of(repository, first) == FIRST
    assert content_of(repository, second) == FIRST | {1: text(100), 64: text(0)}
    assert first.disks[0].path == "/ds/we\udcff b\n.raw"
    assert first.disks[0].metadata.xattrs == {"user.\udce9": b"\x00\xff"}
    assert repository.map.diff(first.disks[0].root, second.disks[0].root).points().tolist() == [1, 64]
    assert [state.state for state in repository.restores()] == ["done"]
    assert len(repository.tombstones()) == len(repository.condemned()) == len(repository.open_runs()) == 1
    assert repository.heartbeat(repository.open_runs()[0].id) == 1
    assert check(repository, data=True) == ()


def test_what_was_added_later_is_read(golden) -> None:
    repository = golden("format-1-additions", b"golden")
    (point,) = repository.points()
    assert content_of(repository, point) == {at: text(at) for at in (0, 3, 70)}
    runs = [one.id for one in repository.history.of(point.id)]
    assert repository.history.of(point.id) == tuple(
        trial(run, point.id, at, alive) for at, (run, alive) in enumerate(zip(runs, (True, False), strict=True))
    )
    assert [(state.state, state.resumed) for state in repository.restores()] == [("done", True)]
    (suspect,) = repository.suspects()
    assert suspect.pack.startswith("node/")
    assert check(repository, data=True) == ()
    assert repository.open_runs() == ()
    repository.forget_restore(repository.restores()[0].record.id)
    repository.delete_point(point.id)
    assert [name for name in objects(repository) if name.startswith(("history", "restores", "points"))] == []


@pytest.mark.parametrize("passphrase", [GENERATED, b"deputy"])
def test_a_generated_passphrase_stays_what_it_was(golden, passphrase: bytes) -> None:
    repository = golden("format-1-generated", passphrase)
    kdfs = {key.kdf for key in repository.keys()}  # noqa: SIM118 (no mapping)
    assert kdfs == {"blake3", "argon2id"}
    assert content_of(repository, repository.points()[0]) == {at: text(at) for at in (0, 3, 70)}
    assert check(repository, data=True) == ()


def test_it_is_opened_by_nothing_else(golden) -> None:
    with pytest.raises(PassphraseWrong):
        golden("format-1-generated", GENERATED[:-1] + b"z")
    with pytest.raises(PassphraseMissing):
        golden("format-1-encrypted", None)
    with pytest.raises(PassphraseWrong):
        golden("format-1-encrypted", b"Golden")


def test_it_can_be_written_on(golden) -> None:
    repository = golden("format-1-encrypted", b"golden")
    outcome = collect(repository, alive=lambda owner: False, clock=FixedClock(), patience=0)
    assert outcome.swept >= 1
    again = golden("format-1-encrypted", b"golden")
    assert content_of(again, again.find_point("latest~1")) == FIRST
    assert check(again, data=True) == ()


def test_no_clear_text_lies_in_the_encrypted_one(golden) -> None:
    repository = golden("format-1-encrypted", b"golden")
    whole = b"".join(repository.medium.get(name) for name in objects(repository))
    for secret in (b"golden", b"web.raw", b"grain 7", b"here", b"user."):
        assert secret not in whole


@pytest.mark.parametrize("folder", ["points", "data", "node", "index", "keys", "keyring", "restores", "condemned"])
def test_objects_of_the_two_cannot_be_exchanged(golden, folder: str) -> None:
    """Swapped: a whole object of another repository, at a name that is expected here."""
    plain, other = golden("format-1-plain", None), golden("format-1-encrypted", b"golden")
    mine = [name for name in objects(plain) if name.startswith(f"{folder}/")]
    theirs = [name for name in objects(other) if name.startswith(f"{folder}/")]
    plain.medium.delete(mine[0])
    plain.medium.put(mine[0], [other.medium.get(theirs[0])])
    assert mine[0] in [finding.name for finding in check(plain, data=True)]


# --- the bytes ------------------------------------------------------------------------------------


def test_an_envelope_header_byte_by_byte() -> None:
    header = format.EnvelopeHeader(ObjectKind.POINT, format.ZSTD, 7, 300, bytes(range(16)))
    data = format.encode_envelope_header(header)
    assert data == b"GRAINOBJ" + b"\x01\x00" + b"\x03" + b"\x01" + b"\x07\0\0\0" + b"\x2c\x01" + bytes(6) + bytes(
        range(16)
    )
    assert format.decode_envelope_header(data) == header
    assert len(data) == format.ENVELOPE_SIZE == 40


def test_a_pack_byte_by_byte() -> None:
    header = format.encode_pack_header(format.PackHeader(PieceKind.NODE, 5))
    assert header == b"GRAINPAK" + b"\x01\x00" + b"\x02\x00" + b"\x05\0\0\0"
    trailer = format.PackTrailer(100, 2 * 36 + 16, 2)
    data = format.encode_pack_trailer(trailer)
    assert data == struct.pack("<QII", 100, 88, 2) + b"GRAINEND"
    assert format.decode_pack_trailer(data, 100 + 88 + 24) == trailer
    directory = format.encode_directory(b"a" * 32 + b"b" * 32, [40, 44])
    assert directory == b"a" * 32 + b"\x28\0\0\0" + b"b" * 32 + b"\x2c\0\0\0"
    ids, offsets, lengths = format.decode_directory(directory, trailer)
    assert (ids[1].tobytes(), offsets.tolist(), lengths.tolist()) == (b"b" * 32, [16, 56], [40, 44])


@pytest.mark.parametrize(("size", "count"), [(211, 2), (213, 2), (212, 3)])
def test_a_trailer_that_does_not_fit_its_pack_is_malformed(size: int, count: int) -> None:
    data = format.encode_pack_trailer(format.PackTrailer(100, 88, count))
    with pytest.raises(frame.Malformed):
        format.decode_pack_trailer(data, size)


def test_a_directory_with_a_gap_is_malformed() -> None:
    directory = format.encode_directory(b"a" * 64, [40, 43])
    with pytest.raises(frame.Malformed, match="fill"):
        format.decode_directory(directory, format.PackTrailer(100, 88, 2))


def test_a_node_byte_by_byte() -> None:
    ids = np.frombuffer(b"a" * 32 + b"b" * 32 + b"c" * 32, np.uint8).reshape(-1, 32)
    numbers, contents = format.encode_nodes(0, 8, np.array([17, 23, 40]), np.ones(3, np.uint8), ids)
    assert numbers.tolist() == [2, 5]
    assert contents == [
        b"\x01\x00\x08\x00" + b"\x82" + b"a" * 32 + b"b" * 32 + b"\x01\x01",
        b"\x01\x00\x08\x00" + b"\x01" + b"c" * 32 + b"\x01",
    ]
    positions, kinds, again = format.decode_nodes(0, 8, numbers, contents)
    assert (positions.tolist(), kinds.tolist(), again.tolist()) == ([17, 23, 40], [1, 1, 1], ids.tolist())


def test_a_segment_byte_by_byte() -> None:
    ids = np.frombuffer(b"i" * 32, np.uint8).reshape(1, 32)
    column = [np.array([value], np.uint32) for value in (0, 16, 77)]
    rows = Rows((PackRef("ab" * 16, PieceKind.CHUNK, 1000),), ids, *column)
    data = format_segment.encode_segment(rows)
    assert data == struct.pack("<IIQ", 1, 1, 1) + b"\xab" * 16 + b"\x01" + struct.pack(
        "<Q", 1000
    ) + b"i" * 32 + struct.pack("<III", 0, 16, 77)
    for wrong in (b"", data[:-1], data + b"\0", data[:16] + b"\xab" * 16 + b"\x09" + data[33:]):
        with pytest.raises(frame.Malformed):
            format_segment.decode_segment(wrong)


def test_a_frame_byte_by_byte() -> None:
    data = frame.encode_frame(frame.CONFIG_MAGIC, b"body")
    assert data[:-16] == b"GRAINCFG" + b"\x01\x00" + b"\x00\x00" + b"\x04\0\0\0" + b"body"


def test_a_wound_names_the_object(golden) -> None:
    repository = golden("format-1-plain", None)
    (point, *_) = repository.points()
    name = f"points/{point.id}"
    whole = bytearray(repository.medium.get(name))
    whole[60] ^= 1
    repository.medium.delete(name)
    repository.medium.put(name, [whole])
    with pytest.raises(ObjectDamaged, match=name):
        golden("format-1-plain", None).find_point(point.id)
