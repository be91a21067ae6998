"""Sealing: what goes in comes out; whatever else is on the medium is refused, and said to be what it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from shelves import FixedChance, FixedClock

from graincopy.core.errors import ObjectDamaged
from graincopy.core.ids import PieceId, PointId, RepositoryId
from graincopy.model.restore_point import RestoreRecord, RunRecord
from graincopy.model.snapshot import Owner
from graincopy.repository import format, frame, keys
from graincopy.repository.codec import Codec
from graincopy.repository.records import Config, Epoch, Keyring, ObjectKind, PieceKind

SALT = bytes(16)


def keyring(seed: str = "keys", **changes) -> Keyring:
    config = Config(repository=RepositoryId("ab" * 16), grain_size=4096, fan_out=8)
    made = keys.make_keyring(config, FixedChance(seed))
    return Keyring(**{"config": config, "id_key": made.id_key, "epochs": made.epochs} | changes)


CODEC = Codec(keyring())


@pytest.mark.parametrize("content", [b"", b"x", b"a" * 100_000, bytes(range(256)) * 17])
@pytest.mark.parametrize("shrink", [True, False])
def test_an_object_comes_back(content: bytes, shrink: bool) -> None:
    sealed = CODEC.objects.seal(ObjectKind.POINT, "points/a", content, SALT, shrink=shrink)
    assert CODEC.objects.open(ObjectKind.POINT, "points/a", sealed) == content
    assert content not in sealed or len(content) < 2


def test_every_flipped_bit_of_an_object_is_noticed() -> None:
    sealed = CODEC.objects.seal(ObjectKind.POINT, "points/a", b"content that matters", SALT)
    for at in range(len(sealed)):
        for bit in range(8):
            wounded = bytearray(sealed)
            wounded[at] ^= 1 << bit
            with pytest.raises(ObjectDamaged):
                CODEC.objects.open(ObjectKind.POINT, "points/a", bytes(wounded))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda sealed: sealed[:-1], "wrong length"),
        (lambda sealed: sealed + b"\0", "wrong length"),
        (lambda sealed: sealed[:20], "truncated"),
        (lambda sealed: b"", "truncated"),
        (lambda sealed: sealed[:8] + b"\x02\x00" + sealed[10:], "format 2 is not known"),
        (lambda sealed: sealed[:10] + b"\x63" + sealed[11:], "not known"),
        (lambda sealed: sealed[:12] + b"\x09" + sealed[13:], "epoch 9 is not known"),
    ],
)
def test_the_reason_is_told(change, reason: str) -> None:
    sealed = CODEC.objects.seal(ObjectKind.POINT, "points/a", b"content", SALT)
    with pytest.raises(ObjectDamaged, match=reason):
        CODEC.objects.open(ObjectKind.POINT, "points/a", change(sealed))


def test_an_object_is_bound_to_its_name_kind_and_repository() -> None:
    sealed = CODEC.objects.seal(ObjectKind.POINT, "points/a", b"content", SALT)
    with pytest.raises(ObjectDamaged, match="authentic"):
        CODEC.objects.open(ObjectKind.POINT, "points/b", sealed)
    with pytest.raises(ObjectDamaged, match="it is a point, not a tombstone"):
        CODEC.objects.open(ObjectKind.TOMBSTONE, "points/a", sealed)
    with pytest.raises(ObjectDamaged, match="authentic"):
        Codec(keyring("others")).objects.open(ObjectKind.POINT, "points/a", sealed)


def test_a_point_and_a_tombstone_at_one_name_share_no_key_even_with_one_salt() -> None:
    content = b"the same content"
    one = CODEC.objects.seal(ObjectKind.POINT, "points/a", content, SALT)
    other = CODEC.objects.seal(ObjectKind.TOMBSTONE, "points/a", content, SALT)
    assert one[format.ENVELOPE_SIZE :] != other[format.ENVELOPE_SIZE :]
    again = CODEC.objects.seal(ObjectKind.POINT, "points/a", content, b"1" * 16)
    assert one[format.ENVELOPE_SIZE :] != again[format.ENVELOPE_SIZE :]


def test_ids_depend_on_kind_and_repository() -> None:
    others = Codec(keyring("others"))
    ids = {codec.piece_id(kind, b"content") for codec in (CODEC, others) for kind in PieceKind}
    assert len(ids) == 4
    assert CODEC.piece_ids(PieceKind.NODE, [b"content"])[0].tobytes() == CODEC.piece_id(PieceKind.NODE, b"content")


def test_a_new_epoch_seals_and_the_old_one_still_opens() -> None:
    old = CODEC.objects.seal(ObjectKind.RUN, "runs/a", b"old", SALT)
    newer = Codec(keyring(epochs=(*keyring().epochs, Epoch(2, b"2" * 32))))
    new = newer.objects.seal(ObjectKind.RUN, "runs/a", b"new", SALT)
    assert newer.objects.open(ObjectKind.RUN, "runs/a", old) == b"old"
    assert newer.objects.open(ObjectKind.RUN, "runs/a", new) == b"new"
    with pytest.raises(ObjectDamaged, match="epoch 2"):
        CODEC.objects.open(ObjectKind.RUN, "runs/a", new)


def test_what_unpacks_to_more_than_it_may_is_refused_before_it_is_unpacked() -> None:
    big = Codec(keyring(config=Config(repository=RepositoryId("ab" * 16), grain_size=1 << 20, fan_out=8)))
    small = CODEC  # the same keys, 4 KiB grains
    bomb = bytes(1 << 20)
    piece = big.piece_id(PieceKind.CHUNK, bomb)
    sealer = big.pack_sealer(PieceKind.CHUNK, "data/aa/" + "a" * 32)
    import zstandard

    body = zstandard.compress(bomb, 1)
    out = memoryview(bytearray(len(body) + format.PIECE_OVERHEAD))
    sealer.piece(format.ZSTD, piece, body, 16, out)
    with pytest.raises(ObjectDamaged, match="larger than it may be"):
        small.pack_opener(PieceKind.CHUNK, "data/aa/" + "a" * 32).piece(PieceId(piece), out, 16)


# --- keys -----------------------------------------------------------------------------------------


def test_a_passphrase_unwraps_what_it_wrapped_and_no_other_does() -> None:
    key = keys.wrap_master(b"m" * 32, b"secret", "label", FixedClock(), FixedChance())
    again = keys.decode_key(keys.encode_key(key))
    assert again == key
    assert keys.unwrap_master(again, b"secret") == b"m" * 32
    assert keys.unwrap_master(again, b"Secret") is None
    assert keys.unwrap_master(again, None) is None
    assert b"m" * 32 not in keys.encode_key(key)
    assert b"secret" not in keys.encode_key(key)


def test_without_encryption_anybody_unwraps() -> None:
    key = keys.wrap_master(b"m" * 32, None, "", FixedClock(), FixedChance())
    assert (key.kdf, keys.unwrap_master(key, None), keys.unwrap_master(key, b"any")) == ("none", b"m" * 32, b"m" * 32)


def test_a_generated_passphrase_is_known_by_its_form_and_not_stretched() -> None:
    passphrase, other = keys.generate_passphrase(FixedChance("one")), keys.generate_passphrase(FixedChance("two"))
    assert len(passphrase) == 66 and passphrase.startswith(b"graincopy-") and passphrase != other
    key = keys.decode_key(keys.encode_key(keys.wrap_master(b"m" * 32, passphrase, "", FixedClock(), FixedChance())))
    assert (key.kdf, key.memory, key.iterations) == ("blake3", 0, 0)
    assert keys.unwrap_master(key, passphrase) == b"m" * 32
    for wrong in (other, b"secret", b"", None):
        assert keys.unwrap_master(key, wrong) is None
    assert keys.secret_of(passphrase) not in keys.encode_key(key)  # type: ignore[operator]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text + b"a",
        lambda text: text[:-1] + (b"a" if text[-1:] != b"a" else b"b"),
        lambda text: text[:20] + (b"a" if text[20:21] != b"a" else b"b") + text[21:],
        lambda text: text.removeprefix(b"graincopy-"),
        lambda text: b"graincopy-",
        lambda text: b"graincopy-" + b"a" * 56,
        lambda text: b"graincopy-\xff" + text[11:],
    ],
)
def test_what_only_looks_like_a_generated_passphrase_is_stretched(change: Callable[[bytes], bytes]) -> None:
    alike = change(keys.generate_passphrase(FixedChance()))
    key = keys.wrap_master(b"m" * 32, alike, "", FixedClock(), FixedChance())
    assert key.kdf == "argon2id"
    assert keys.unwrap_master(key, alike) == b"m" * 32


def test_every_flipped_bit_of_a_key_is_noticed() -> None:
    sealed = keys.encode_key(keys.wrap_master(b"m" * 32, None, "label", FixedClock(), FixedChance()))
    for at in range(len(sealed)):
        wounded = bytearray(sealed)
        wounded[at] ^= 1 << at % 8
        with pytest.raises(frame.Malformed):
            keys.decode_key(bytes(wounded))


def test_a_key_that_asks_for_too_much_memory_is_refused_without_trying() -> None:
    key = keys.wrap_master(b"m" * 32, b"secret", "", FixedClock(), FixedChance())
    greedy = keys.encode_key(type(key)(**{**{f: getattr(key, f) for f in key.__struct_fields__}, "memory": 1 << 31}))
    with pytest.raises(frame.Malformed, match="too much"):
        keys.decode_key(greedy)


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "plain", "\0nul first", "caf\xe9", "\udcff\udc80 raw", "a\nb", "\0\udcff", "😀"])
def test_any_path_survives_a_record(text: str) -> None:
    owner = Owner(host=text, boot="b", pid=1, started=2, hostname=text)
    run = RunRecord(id=PointId("a"), kind=text, workload=None, owner=owner, opened=1.5, pins=(PointId(text),))
    assert frame.decode_record(frame.encode_record(run), RunRecord) == run


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03", b"\xa1\xff"])
def test_a_record_that_is_none_is_malformed(data: bytes) -> None:
    with pytest.raises(frame.Malformed):
        frame.decode_record(data, RestoreRecord)
