"""The passphrases of a repository: each one key object that wraps the same master key."""

from __future__ import annotations

from graincopy.core.clock import Chance, Clock
from graincopy.core.errors import KeyUnknown, LastKey, PassphraseMissing
from graincopy.media.base import Medium
from graincopy.repository import keys, opening, unlock
from graincopy.repository.records import KeyInfo, Keyring


class Passphrases:
    """Those of one repository that is open."""

    def __init__(self, medium: Medium, master: bytes, clock: Clock, chance: Chance) -> None:
        self._medium, self._master, self._clock, self._chance = medium, master, clock, chance

    def keys(self) -> tuple[KeyInfo, ...]:
        """All keys, oldest first. Raises ObjectDamaged."""
        return keys.describe(unlock.read_key(self._medium, name) for name in self._names())

    def add(self, passphrase: bytes, label: str) -> KeyInfo:
        """Another passphrase that opens this repository."""
        if not passphrase:
            raise PassphraseMissing(url=self._medium.url)
        key = keys.wrap_master(self._master, passphrase, label, self._clock, self._chance)
        opening.put_new(self._medium, unlock.key_name(key.id), keys.encode_key(key))
        return keys.describe([key])[0]

    def remove(self, id: str) -> None:
        """Forget the passphrase of key ``id``. Raises KeyUnknown or LastKey.

        Whoever had the passphrase *and* a copy of the key object can still get at the master key.
        """
        names, name = self._names(), unlock.key_name(id)
        if name not in names:
            raise KeyUnknown(key=id)
        if len(names) == 1:
            raise LastKey(key=id)
        kept = self._medium.get(name)
        self._medium.delete(name)
        if not self._names():  # somebody removed the other one at the same time
            self._medium.put(name, [kept])
            raise LastKey(key=id)

    def read_keyring(self, name: str) -> Keyring:
        """One keyring, the current one or an older one. Raises ObjectMissing or ObjectDamaged."""
        return opening.unseal_keyring(self._medium, self._master, name)

    def _names(self) -> list[str]:
        return sorted(entry.name for entry in self._medium.list("keys"))
