"""Opening a repository: from a medium and a passphrase to the keyring, each step with its own answer."""

from __future__ import annotations

from graincopy.core.errors import (
    ObjectDamaged,
    ObjectMissing,
    RepositoryExists,
    RepositoryMissing,
    RepositoryTooNew,
)
from graincopy.media.base import Medium
from graincopy.model.snapshot import Existing
from graincopy.repository import frame
from graincopy.repository.codec import master_sealer
from graincopy.repository.records import Config, Keyring, ObjectKind

CONFIG = "config"


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
        return frame.decode_record(frame.decode_frame(frame.CONFIG_MAGIC, data), Config)
    except frame.TooNew as error:
        raise RepositoryTooNew(url=medium.url, found=error.found, known=frame.VERSION) from error
    except frame.Malformed as error:
        raise ObjectDamaged(name=CONFIG, reason=error) from error


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
        return frame.decode_record(content, Keyring)
    except frame.Malformed as error:
        raise ObjectDamaged(name=name, reason=error) from error
