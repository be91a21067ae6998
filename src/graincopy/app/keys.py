"""The operation ``key``: the passphrases that open a repository."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import msgspec

from graincopy.app import host
from graincopy.app.answer import Answer, table
from graincopy.app.settings import read_passphrase
from graincopy.app.shown import when
from graincopy.app.wiring import Wiring
from graincopy.core.errors import OutputExists, OutputUnfit, UsageWrong, printable
from graincopy.repository.keys import generate_passphrase
from graincopy.volumes.places import sync_directory

Values = dict[str, Any]


def key(wiring: Wiring, values: Values) -> Answer:
    """Generate, add, list or remove passphrases."""
    verb = values["verb"]
    if verb == "generate":
        return _generate(_new_file(values, "key generate"))
    repository = wiring.repository()
    if verb == "add":
        added = repository.add_key(read_passphrase(_new_file(values, "key add")), values["label"] or "")
        return Answer({"key": added.id}, (f"added key {added.id}",))
    if verb == "remove":
        if not values["key"]:
            raise UsageWrong(what="key remove needs the KEY; graincopy key list shows them")
        repository.remove_key(values["key"])
        return Answer({"key": values["key"]}, (f"removed key {values['key']}",))
    keys = repository.keys()
    rows = [(one.id, when(one.created), one.kdf, printable(one.label)) for one in keys]
    return Answer([msgspec.to_builtins(one) for one in keys], table(("KEY", "CREATED", "KDF", "LABEL"), rows))


def _new_file(values: Values, verb: str) -> str:
    path: str | None = values["new_passphrase_file"]
    if not path:
        raise UsageWrong(what=f"{verb} needs --new-passphrase-file FILE")
    return os.path.abspath(path)


def _generate(path: str) -> Answer:
    """A new passphrase in a new file that only its owner can read, durable before anything is sealed with it."""
    try:
        _write_new(path, generate_passphrase(host.SystemChance()) + b"\n")
    except FileExistsError as failure:
        raise OutputExists(path=path) from failure
    except OSError as failure:
        raise OutputUnfit(path=path, reason=failure.strerror or str(failure)) from failure
    shown = printable(path)
    lines = (
        f"{shown} holds a new passphrase; keep a copy of it off this host: without it nothing can ever be read again",
        f"a new repository with it: GRAINCOPY_PASSPHRASE_FILE={shown} graincopy init",
        f"for one that is there: graincopy key add --new-passphrase-file {shown}",
    )
    return Answer({"file": path}, lines)


def _write_new(path: str, data: bytes) -> None:
    """Raises OSError; then nothing is there that was not there before."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
