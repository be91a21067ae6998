"""Opening a repository: from a medium and a passphrase to the keyring, each step with its own answer."""

from __future__ import annotations

from graincopy.core.errors import (
    ObjectDamaged,
    ObjectMissing,
    PassphraseMissing,
    PassphraseWrong,
    RepositoryExists,
    RepositoryMissing,
    RepositoryTooNew,
)
from graincopy.media.base import Medium
from graincopy.model.snapshot import Existing
from graincopy.repository import format, keys
from graincopy.repository.codec import master_sealer
from graincopy.repository.records import Config, KeyObject, Keyring, ObjectKind

CONFIG = "config"


def key_name(id: str) -> str:
    """Object name of a passphrase's key."""
    return f"keys/{id}"


def keyring_name(number: int) -> str:
    """Object name of keyring ``number``; the highest counts."""
    return f"keyring/{number:08d}"


def put_new(medium: Medium, name: str, data: bytes) -> None:
    """Put what must not be there yet. Raises RepositoryExists."""
    if isinstance(medium.put(name, [data]), Existing):
        raise RepositoryExists(url=medium.url)


def read_config(medium: Medium) -> Config:
    """Raises RepositoryMissing, RepositoryTooNew or ObjectDamaged."""
    try:
        data = medium.get(CONFIG)
    except ObjectMissing:
        raise RepositoryMissing(url=medium.url, reason="it has no config object") from None
    try:
        return format.decode_record(format.decode_frame(format.CONFIG_MAGIC, data), Config)
    except format.TooNew as error:
        raise RepositoryTooNew(url=medium.url, found=error.found, known=format.VERSION) from error
    except format.Malformed as error:
        raise ObjectDamaged(name=CONFIG, reason=error) from error


def read_key(medium: Medium, name: str) -> KeyObject:
    """Raises ObjectMissing or ObjectDamaged."""
    try:
        key = keys.decode_key(medium.get(name))
    except format.Malformed as error:
        raise ObjectDamaged(name=name, reason=error) from error
    if name != key_name(key.id):
        raise ObjectDamaged(name=name, reason="it is another key")
    return key


def find_master(medium: Medium, passphrase: bytes | None) -> bytes:
    """The master key. Raises PassphraseMissing, PassphraseWrong, ObjectMissing or ObjectDamaged."""
    found: list[KeyObject] = []
    damaged: ObjectDamaged | None = None
    for entry in sorted(medium.list("keys"), key=lambda entry: entry.name):
        try:
            found.append(read_key(medium, entry.name))
        except ObjectDamaged as error:
            damaged = error  # another key may open it all the same; check reports this one
        except ObjectMissing:
            continue  # removed at this moment
    found.sort(key=lambda key: key.kdf != "none")
    for key in found:
        if key.kdf == "none" or passphrase:
            master = keys.unwrap_master(key, passphrase)
            if master is not None:
                return master
    if damaged is not None:
        raise damaged
    if not found:
        raise ObjectMissing(name="every key")
    if not passphrase:
        raise PassphraseMissing(url=medium.url)
    raise PassphraseWrong(url=medium.url)


def read_keyring(medium: Medium, master: bytes) -> Keyring:
    """Raises ObjectMissing or ObjectDamaged."""
    names = sorted(entry.name for entry in medium.list("keyring"))
    if not names:
        raise ObjectMissing(name="the keyring")
    return unseal_keyring(medium, master, names[-1])


def unseal_keyring(medium: Medium, master: bytes, name: str) -> Keyring:
    """The keyring at ``name``. Raises ObjectMissing or ObjectDamaged."""
    content = master_sealer(master).open(ObjectKind.KEYRING, name, medium.get(name))
    try:
        return format.decode_record(content, Keyring)
    except format.Malformed as error:
        raise ObjectDamaged(name=name, reason=error) from error
