"""Passphrase → master key → keyring. Everything else is sealed with keys that begin in the keyring.

    passphrase --Argon2id--> wraps the master key      one object keys/<id> for each passphrase
    master key ------------> seals keyring/<n>         put once; the highest n counts
    keyring: id key (permanent), numbered sealing epochs, a copy of the configuration

A generated passphrase holds 256 random bits and is known by its form. Nobody can guess it, so there is nothing to
stretch: BLAKE3 takes the place of Argon2id, and every command is done a tenth of a second sooner.

Without encryption the kdf is "none": the wrapping key is a published constant, so that whoever reads the repository
has the master key, and every other byte takes the one code path. It finds accidents, not attackers.

Argon2id: RFC 9106. AES-256-GCM: NIST SP 800-38D. Key derivation: BLAKE3 derive_key, BLAKE3 paper section 6.2.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from graincopy.core.clock import Chance, Clock
from graincopy.core.ids import new_id
from graincopy.repository import frame
from graincopy.repository.records import Config, Epoch, KeyInfo, KeyObject, Keyring

KEY_SIZE = 32
ARGON_MEMORY = 64 * 1024  # KiB
ARGON_ITERATIONS = 2
ARGON_LANES = 4
# A key object is read before anything is authenticated: what it asks for has bounds.
_MOST_MEMORY, _MOST_ITERATIONS, _MOST_LANES = 1024 * 1024, 64, 64
KDFS = ("none", "blake3", "argon2id")  # cheapest first
_GENERATED = b"graincopy-"  # how a generated passphrase begins; base32 of the secret and a checksum follows
_CHECKSUM = 3  # bytes; with them the base32 comes out even


def derive(context: str, *material: bytes) -> bytes:
    """32 bytes for one purpose. ``material`` is of fixed lengths, or only the last piece is not."""
    return blake3(b"".join(material), derive_key_context=f"graincopy repository 1: {context}").digest()


def make_keyring(config: Config, chance: Chance) -> Keyring:
    """Fresh keys for a new repository."""
    return Keyring(config=config, id_key=chance.token(KEY_SIZE), epochs=(Epoch(1, chance.token(KEY_SIZE)),))


def generate_passphrase(chance: Chance) -> bytes:
    """A passphrase that a host keeps in a file, 66 ASCII characters: nobody has to remember it, nobody can guess it."""
    secret = chance.token(KEY_SIZE)
    return _GENERATED + base64.b32encode(secret + _checksum(secret)).lower()


def secret_of(passphrase: bytes) -> bytes | None:
    """The 32 random bytes in a generated passphrase; None for one that somebody thought of, or mistyped."""
    try:
        held = base64.b32decode(passphrase.removeprefix(_GENERATED).upper())
    except binascii.Error:
        return None
    secret = held[:KEY_SIZE]
    if not passphrase.startswith(_GENERATED) or len(secret) != KEY_SIZE or held[KEY_SIZE:] != _checksum(secret):
        return None
    return secret


def _checksum(secret: bytes) -> bytes:
    return derive("checksum of a generated passphrase", secret)[:_CHECKSUM]


def wrap_master(master: bytes, passphrase: bytes | None, label: str, clock: Clock, chance: Chance) -> KeyObject:
    """A key object that gives ``master`` to whoever has ``passphrase`` (None: to everybody)."""
    kdf = _kdf_for(passphrase)
    stretches = kdf == "argon2id"
    plain = KeyObject(
        id=new_id(chance),
        label=label,
        created=clock.now(),
        kdf=kdf,
        memory=ARGON_MEMORY if stretches else 0,
        iterations=ARGON_ITERATIONS if stretches else 0,
        lanes=ARGON_LANES if stretches else 0,
        salt=chance.token(16),
        nonce=chance.token(12),
        wrapped=b"",
    )
    wrapping = _wrapping_key(plain, passphrase)
    assert wrapping is not None  # the kdf was chosen for this passphrase
    return _with_wrapped(plain, AESGCM(wrapping).encrypt(plain.nonce, master, _binding(plain)))


def unwrap_master(key: KeyObject, passphrase: bytes | None) -> bytes | None:
    """The master key, or None when ``passphrase`` is not the one. Raises Malformed."""
    wrapping = _wrapping_key(key, passphrase)
    if wrapping is None:
        return None
    try:
        return AESGCM(wrapping).decrypt(key.nonce, key.wrapped, _binding(key))
    except InvalidTag:
        return None


def encode_key(key: KeyObject) -> bytes:
    """As it lies on the medium."""
    return frame.encode_frame(frame.KEY_MAGIC, frame.encode_record(key))


def decode_key(data: bytes) -> KeyObject:
    """Raises TooNew or Malformed."""
    key = frame.decode_record(frame.decode_frame(frame.KEY_MAGIC, data), KeyObject)
    if key.kdf not in KDFS:
        raise frame.Malformed(f"key derivation {key.kdf} is not known")
    if key.memory > _MOST_MEMORY or key.iterations > _MOST_ITERATIONS or key.lanes > _MOST_LANES:
        raise frame.Malformed("its key derivation asks for too much")
    return key


def describe(keys: Iterable[KeyObject]) -> tuple[KeyInfo, ...]:
    """What people see, oldest first."""
    infos = (KeyInfo(id=key.id, label=key.label, created=key.created, kdf=key.kdf) for key in keys)
    return tuple(sorted(infos, key=lambda info: (info.created, info.id)))


def _kdf_for(passphrase: bytes | None) -> str:
    if passphrase is None:
        return "none"
    return "argon2id" if secret_of(passphrase) is None else "blake3"


def _wrapping_key(key: KeyObject, passphrase: bytes | None) -> bytes | None:
    """None: ``passphrase`` is not of the kind that ``key`` was made for."""
    if key.kdf == "none":
        return derive("published wrapping key")
    if key.kdf == "blake3":
        secret = secret_of(passphrase or b"")
        return None if secret is None else derive("wrapping key of a generated passphrase", secret, key.salt)
    try:
        kdf = Argon2id(
            salt=key.salt, length=KEY_SIZE, iterations=key.iterations, lanes=key.lanes, memory_cost=key.memory
        )
    except ValueError as error:
        raise frame.Malformed(f"its key derivation is impossible ({error})") from error
    return kdf.derive(passphrase or b"")


def _binding(key: KeyObject) -> bytes:
    """The whole object but the wrapped key: nothing of it can be exchanged."""
    return b"graincopy key\0" + frame.encode_record(_with_wrapped(key, b""))


def _with_wrapped(key: KeyObject, wrapped: bytes) -> KeyObject:
    return msgspec.structs.replace(key, wrapped=wrapped)
