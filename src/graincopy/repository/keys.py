"""Passphrase → master key → keyring. Everything else is sealed with keys that begin in the keyring.

    passphrase --Argon2id--> wraps the master key      one object keys/<id> for each passphrase
    master key ------------> seals keyring/<n>         put once; the highest n counts
    keyring: id key (permanent), numbered sealing epochs, a copy of the configuration

Without encryption the kdf is "none": the wrapping key is a published constant, so that whoever reads the
repository has the master key, and every other byte takes the one code path. It finds accidents, not attackers.

Argon2id: RFC 9106. AES-256-GCM: NIST SP 800-38D. Key derivation: BLAKE3 derive_key, BLAKE3 paper section 6.2.
"""

from __future__ import annotations

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


def derive(context: str, *material: bytes) -> bytes:
    """32 bytes for one purpose. ``material`` is of fixed lengths, or only the last piece is not."""
    return blake3(b"".join(material), derive_key_context=f"graincopy repository 1: {context}").digest()


def make_keyring(config: Config, chance: Chance) -> Keyring:
    """Fresh keys for a new repository."""
    return Keyring(config=config, id_key=chance.token(KEY_SIZE), epochs=(Epoch(1, chance.token(KEY_SIZE)),))


def wrap_master(master: bytes, passphrase: bytes | None, label: str, clock: Clock, chance: Chance) -> KeyObject:
    """A key object that gives ``master`` to whoever has ``passphrase`` (None: to everybody)."""
    plain = KeyObject(
        id=new_id(chance),
        label=label,
        created=clock.now(),
        kdf="none" if passphrase is None else "argon2id",
        memory=0 if passphrase is None else ARGON_MEMORY,
        iterations=0 if passphrase is None else ARGON_ITERATIONS,
        lanes=0 if passphrase is None else ARGON_LANES,
        salt=chance.token(16),
        nonce=chance.token(12),
        wrapped=b"",
    )
    wrapped = AESGCM(_wrapping_key(plain, passphrase)).encrypt(plain.nonce, master, _binding(plain))
    return _with_wrapped(plain, wrapped)


def unwrap_master(key: KeyObject, passphrase: bytes | None) -> bytes | None:
    """The master key, or None when ``passphrase`` is not the one. Raises Malformed."""
    try:
        return AESGCM(_wrapping_key(key, passphrase)).decrypt(key.nonce, key.wrapped, _binding(key))
    except InvalidTag:
        return None


def encode_key(key: KeyObject) -> bytes:
    """As it lies on the medium."""
    return frame.encode_frame(frame.KEY_MAGIC, frame.encode_record(key))


def decode_key(data: bytes) -> KeyObject:
    """Raises TooNew or Malformed."""
    key = frame.decode_record(frame.decode_frame(frame.KEY_MAGIC, data), KeyObject)
    if key.kdf not in ("argon2id", "none"):
        raise frame.Malformed(f"key derivation {key.kdf} is not known")
    if key.memory > _MOST_MEMORY or key.iterations > _MOST_ITERATIONS or key.lanes > _MOST_LANES:
        raise frame.Malformed("its key derivation asks for too much")
    return key


def describe(keys: Iterable[KeyObject]) -> tuple[KeyInfo, ...]:
    """What people see, oldest first."""
    infos = (KeyInfo(id=key.id, label=key.label, created=key.created, kdf=key.kdf) for key in keys)
    return tuple(sorted(infos, key=lambda info: (info.created, info.id)))


def _wrapping_key(key: KeyObject, passphrase: bytes | None) -> bytes:
    if key.kdf == "none":
        return derive("published wrapping key")
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
