"""Sealing: content → keyed BLAKE3 id → zstd → AES-256-GCM, and back with every step proven.

A pack has its own key, from the epoch key, its kind and its name, and uses a piece's offset as nonce: pack names
are 128 random bits and an offset is written once. Every other object is one envelope with a key of its own, from
the epoch key, its kind, a random salt and its name, so that two objects put at one name in turn (a tombstone and
a restore point, say) never share key and nonce.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from graincopy.core.errors import ObjectDamaged
from graincopy.core.ids import PieceId
from graincopy.repository import format, frame
from graincopy.repository.format import Ids
from graincopy.repository.keys import derive
from graincopy.repository.records import Keyring, ObjectKind, PieceKind

ZSTD_LEVEL = 1
OBJECT_LIMIT = 1 << 30  # bytes; no object but a pack is larger
MASTER_EPOCH = 0
_ENVELOPE_NONCE = bytes(12)  # each envelope has a key of its own


class Sealer:
    """Seals and opens single objects, each in its own envelope. Safe to use from several threads."""

    def __init__(self, epochs: dict[int, bytes], current: int) -> None:
        self._epochs = epochs
        self.epoch = current

    def seal(self, kind: ObjectKind, name: str, content: bytes, salt: bytes, *, shrink: bool = True) -> bytes:
        """The object that is put under ``name``. ``salt`` is 16 fresh random bytes."""
        codec, body = compress(zstandard.ZstdCompressor(level=ZSTD_LEVEL), content) if shrink else (format.RAW, content)
        header = format.encode_envelope_header(
            format.EnvelopeHeader(kind, codec, self.epoch, len(body) + format.TAG_SIZE, salt)
        )
        cipher = AESGCM(self._key(self.epoch, kind, salt, name))
        return header + cipher.encrypt(_ENVELOPE_NONCE, body, format.envelope_binding(header, name))

    def open(self, kind: ObjectKind, name: str, sealed: bytes) -> bytes:
        """The content of the object found under ``name``. Raises ObjectDamaged."""
        try:
            header = format.decode_envelope_header(sealed)
            if header.kind is not kind:
                raise frame.Malformed(f"it is a {header.kind.name.lower()}, not a {kind.name.lower()}")
            if len(sealed) != format.ENVELOPE_SIZE + header.length:
                raise frame.Malformed("it has the wrong length")
            if header.epoch not in self._epochs:
                raise frame.Malformed(f"sealing epoch {header.epoch} is not known")
            cipher = AESGCM(self._key(header.epoch, kind, header.salt, name))
            binding = format.envelope_binding(sealed[: format.ENVELOPE_SIZE], name)
            body = cipher.decrypt(_ENVELOPE_NONCE, memoryview(sealed)[format.ENVELOPE_SIZE :], binding)
            return decompress(zstandard.ZstdDecompressor(), header.codec, body, OBJECT_LIMIT)
        except InvalidTag:
            raise ObjectDamaged(name=name, reason="its content is not authentic") from None
        except frame.Malformed as error:
            raise ObjectDamaged(name=name, reason=error) from error

    def _key(self, epoch: int, kind: ObjectKind, salt: bytes, name: str) -> bytes:
        return derive("object key", self._epochs[epoch], bytes((kind,)), salt, name.encode())


def master_sealer(master: bytes) -> Sealer:
    """The sealer of the keyring itself."""
    return Sealer({MASTER_EPOCH: master}, MASTER_EPOCH)


class Codec:
    """All sealing of one repository. Safe to use from several threads."""

    def __init__(self, keyring: Keyring) -> None:
        self._local = threading.local()
        epochs = {epoch.number: epoch.key for epoch in keyring.epochs}
        self.epoch = max(epochs)
        self.objects = Sealer(epochs, self.epoch)
        self._epochs = epochs
        self._id_keys = {kind: derive("piece id", keyring.id_key, bytes((kind,))) for kind in PieceKind}
        self._limits = {
            PieceKind.CHUNK: keyring.config.grain_size,
            PieceKind.NODE: format.node_size_limit(keyring.config.fan_out),
        }

    def limit(self, kind: PieceKind) -> int:
        """Bytes of the largest content of this kind."""
        return self._limits[kind]

    def piece_id(self, kind: PieceKind, content: bytes | bytearray | memoryview) -> PieceId:
        """Keyed BLAKE3: equal content in two repositories, or of two kinds, has unequal ids."""
        return PieceId(blake3(content, key=self._id_keys[kind]).digest())

    def piece_ids(self, kind: PieceKind, contents: Iterable[bytes]) -> Ids:
        """:meth:`piece_id` of each, as an ``(n, 32)`` array."""
        key = self._id_keys[kind]
        joined = b"".join([blake3(content, key=key).digest() for content in contents])
        return np.frombuffer(joined, np.uint8).reshape(-1, 32)

    def pack_sealer(self, kind: PieceKind, name: str) -> PackSealer:
        """For a new pack ``name``."""
        header = format.encode_pack_header(format.PackHeader(kind, self.epoch))
        return PackSealer(self._pack_cipher(kind, self.epoch, name), header, name)

    def pack_opener(self, kind: PieceKind, name: str, header: bytes | None = None) -> PackOpener:
        """For the pack found under ``name``. Raises ObjectDamaged when ``header`` is not one of this kind."""
        if header is None:
            header = format.encode_pack_header(format.PackHeader(kind, self.epoch))
        try:
            found = format.decode_pack_header(header)
            if found.kind is not kind:
                raise frame.Malformed(f"it holds {found.kind.name.lower()}s, not {kind.name.lower()}s")
            if found.epoch not in self._epochs:
                raise frame.Malformed(f"sealing epoch {found.epoch} is not known")
        except frame.Malformed as error:
            raise ObjectDamaged(name=name, reason=error) from error
        return PackOpener(self, self._pack_cipher(kind, found.epoch, name), kind, header, name)

    def decompressor(self) -> zstandard.ZstdDecompressor:
        """One for each thread: making one costs as much as opening a grain."""
        zstd: zstandard.ZstdDecompressor | None = getattr(self._local, "zstd", None)
        if zstd is None:
            zstd = self._local.zstd = zstandard.ZstdDecompressor()
        return zstd

    def epochs(self) -> tuple[int, ...]:
        """Numbers of all sealing epochs, newest first."""
        return tuple(sorted(self._epochs, reverse=True))

    def _pack_cipher(self, kind: PieceKind, epoch: int, name: str) -> AESGCM:
        return AESGCM(derive("pack key", self._epochs[epoch], bytes((kind,)), name.encode()))


class PackSealer:
    """Seals the pieces of one new pack. One thread at a time."""

    def __init__(self, cipher: AESGCM, header: bytes, name: str) -> None:
        self.header = header
        self._cipher = cipher
        self._binding = format.pack_binding(header, name)

    def piece(self, codec: int, piece: PieceId, body: bytes | memoryview, offset: int, out: memoryview) -> None:
        """Seal ``body`` into ``out``, which begins at ``offset`` of the pack and is of exactly the right length."""
        out[0] = codec
        binding = format.piece_binding(self._binding, offset, piece, codec)
        self._cipher.encrypt_into(format.position_nonce(offset), body, binding, out[1:])

    def directory(self, content: bytes, offset: int, trailer: bytes) -> bytes:
        """The sealed directory, which begins at ``offset``."""
        binding = format.directory_binding(self._binding, offset, trailer)
        return self._cipher.encrypt(format.position_nonce(offset), content, binding)


class PackOpener:
    """Opens pieces of one pack. One thread at a time."""

    def __init__(self, codec: Codec, cipher: AESGCM, kind: PieceKind, header: bytes, name: str) -> None:
        self._codec, self._cipher, self._kind, self._name = codec, cipher, kind, name
        self._binding = format.pack_binding(header, name)
        self._zstd = codec.decompressor()

    def piece(self, piece: PieceId, sealed: memoryview, offset: int) -> bytes:
        """Content of the piece that lies at ``offset``. Raises ObjectDamaged."""
        if len(sealed) < format.PIECE_OVERHEAD:
            raise self._damaged(offset, "is too short")
        codec = sealed[0]
        try:
            binding = format.piece_binding(self._binding, offset, piece, codec)
            body = self._cipher.decrypt(format.position_nonce(offset), sealed[1:], binding)
            content = decompress(self._zstd, codec, body, self._codec.limit(self._kind))
        except InvalidTag:
            raise self._damaged(offset, "is not authentic") from None
        except frame.Malformed as error:
            raise self._damaged(offset, f"cannot be read: {error}") from error
        if self._codec.piece_id(self._kind, content) != piece:
            raise self._damaged(offset, "is not what its id says")
        return content

    def directory(self, sealed: bytes, trailer: format.PackTrailer) -> bytes:
        """The directory in clear. Raises ObjectDamaged."""
        binding = format.directory_binding(self._binding, trailer.offset, format.encode_pack_trailer(trailer))
        try:
            return self._cipher.decrypt(format.position_nonce(trailer.offset), sealed, binding)
        except InvalidTag:
            raise ObjectDamaged(name=self._name, reason="its directory is not authentic") from None

    def _damaged(self, offset: int, what: str) -> ObjectDamaged:
        return ObjectDamaged(name=self._name, reason=f"the {self._kind.name.lower()} at byte {offset} {what}")


def compress(zstd: zstandard.ZstdCompressor, content: bytes | memoryview) -> tuple[int, bytes | memoryview]:
    """Codec and body: compressed only where that is shorter."""
    packed = zstd.compress(content)
    return (format.ZSTD, packed) if len(packed) < len(content) else (format.RAW, content)


def decompress(zstd: zstandard.ZstdDecompressor, codec: int, body: bytes, limit: int) -> bytes:
    """The content, which is at most ``limit`` bytes. Raises Malformed."""
    if codec == format.RAW:
        if len(body) > limit:
            raise frame.Malformed("it is larger than it may be")
        return body
    if codec != format.ZSTD:
        raise frame.Malformed(f"codec {codec} is not known")
    try:
        if not 0 <= zstandard.frame_content_size(body) <= limit:  # asked first: it is what would be allocated
            raise frame.Malformed("it is larger than it may be")
        return zstd.decompress(body)
    except zstandard.ZstdError as error:
        raise frame.Malformed(f"it cannot be decompressed ({error})") from error
