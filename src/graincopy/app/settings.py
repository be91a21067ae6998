"""What the command line, the environment and the configuration file say, and the key that takes long to derive.

Nothing heavy is imported here: Argon2id takes a tenth of a second on one core, numpy and the rest take as long to
import on another, so :func:`unlock_ahead` begins before they are. For that the medium has to be known here already.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping

import msgspec

from graincopy.app.config import Config, load
from graincopy.core.errors import GraincopyError, RepositoryMissing, UsageWrong
from graincopy.media.base import Medium
from graincopy.media.directory import DirectoryMedium
from graincopy.repository.unlock import find_master

MasterOf = Callable[[Medium], bytes]


class Settings(msgspec.Struct, frozen=True):
    """Everything that was said, before anything is done about it."""

    config: Config
    config_path: str | None
    environ: Mapping[str, str]
    url: str | None

    def repo_url(self) -> str:
        """--repo, else GRAINCOPY_REPO, else the configuration."""
        url = self.url or self.environ.get("GRAINCOPY_REPO") or self.config.repo
        if not url:
            raise UsageWrong(what="no repository is named; give --repo or set GRAINCOPY_REPO")
        return url

    def medium(self, url: str, *, create: bool = False) -> Medium:
        """The medium at ``url``: a path, or ``file://PATH``."""
        path = self.path_of(url)
        if create:
            return DirectoryMedium.create(path)
        if not os.path.isdir(path):
            raise RepositoryMissing(url=url, reason="it does not exist or is no directory")
        return DirectoryMedium(path)

    def path_of(self, url: str) -> str:
        """The directory that ``url`` means. Raises UsageWrong for a kind of medium that is not there."""
        scheme, separator, rest = url.partition("://")
        if separator and scheme != "file":
            raise UsageWrong(what=f"{scheme}:// is no kind of medium that this graincopy knows; name a directory")
        return os.path.abspath(rest if separator else url)

    def passphrase(self) -> bytes | None:
        """From the environment or the file it names; never asked for."""
        direct = self.environ.get("GRAINCOPY_PASSPHRASE")
        if direct is not None:
            return os.fsencode(direct)
        path = self.environ.get("GRAINCOPY_PASSPHRASE_FILE")
        return read_passphrase(path) if path else None


def read_settings(explicit_config: str | None, url: str | None) -> Settings:
    """Read the configuration and the environment. Raises ConfigWrong."""
    environ = dict(os.environ)
    config, path = load(explicit_config, environ)
    return Settings(config, path, environ, url)


def unlock_ahead(settings: Settings) -> MasterOf:
    """Begin to derive the master key, in a thread of its own; the answer is a ``master_of`` that waits for it.

    Whatever goes wrong is raised when the key is asked for. The thread ends with the process.
    """
    found: list[bytes | Exception] = []

    def derive() -> None:
        try:
            found.append(find_master(settings.medium(settings.repo_url()), settings.passphrase()))
        except (GraincopyError, OSError, MemoryError) as failure:
            found.append(failure)

    def master(_medium: Medium) -> bytes:
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    thread = threading.Thread(target=derive, name="unlock", daemon=True)
    thread.start()
    return master


def read_passphrase(path: str) -> bytes:
    """The first line of ``path``. Raises UsageWrong when it cannot be read or is empty."""
    try:
        with open(path, "rb") as file:
            line = file.readline().rstrip(b"\r\n")
    except OSError as failure:
        raise UsageWrong(what=f"passphrase file {path}: {failure.strerror}") from failure
    if not line:
        raise UsageWrong(what=f"passphrase file {path} is empty")
    return line
