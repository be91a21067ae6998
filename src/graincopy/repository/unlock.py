"""From a medium and a passphrase to the master key. Nothing heavy is imported here: Argon2id runs while that is."""

from __future__ import annotations

from graincopy.core.errors import ObjectDamaged, ObjectMissing, PassphraseMissing, PassphraseWrong
from graincopy.media.base import Medium
from graincopy.repository import frame, keys
from graincopy.repository.records import KeyObject


def key_name(id: str) -> str:
    """Object name of a passphrase's key."""
    return f"keys/{id}"


def read_key(medium: Medium, name: str) -> KeyObject:
    """Raises ObjectMissing or ObjectDamaged."""
    try:
        key = keys.decode_key(medium.get(name))
    except frame.Malformed as error:
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
    found.sort(key=lambda key: keys.KDFS.index(key.kdf))
    for key in found:
        if key.kdf == "none" or passphrase:
            try:
                master = keys.unwrap_master(key, passphrase)
            except frame.Malformed as error:
                damaged = ObjectDamaged(name=key_name(key.id), reason=error)
                continue
            if master is not None:
                return master
    if damaged is not None:
        raise damaged
    if not found:
        raise ObjectMissing(name="every key")
    if not passphrase:
        raise PassphraseMissing(url=medium.url)
    raise PassphraseWrong(url=medium.url)
