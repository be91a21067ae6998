"""The configuration file: TOML, every key with a default, unknown keys refused with their nearest neighbour."""

from __future__ import annotations

import difflib
import os
import tomllib

import msgspec

from graincopy.core.errors import ConfigWrong

SYSTEM_CONFIG = "/etc/graincopy/config.toml"


class Freeze(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[freeze]``: the window in which writers are held."""

    deadline: float = 10.0  # seconds after which the guard thaws whatever happens
    warn_ms: float = 1000.0  # a predicted or measured window longer than this is a warning


class Backup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[backup]``"""

    workers: int = 4  # threads that read, compress, seal and wait for the medium
    audit: str = "64"  # grains per disk and run: a number, a percentage, or all


class Restore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[restore]``"""

    undo_days: float = 7.0  # after that the undo of a restore expires


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[checkpoint]``: when a checkpoint is given up, so that the next backup compares."""

    max_days: float = 0.0  # 0: never for its age
    min_free_percent: float = 5.0  # of the storage it lies on


class Collect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[collect]``"""

    patience: float = 60.0  # seconds to wait for runs that are still open


class Notify(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[notify]``: apprise URLs that hear of backups."""

    urls: tuple[str, ...] = ()
    on: tuple[str, ...] = ("success", "warning", "failure")


class Paths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[paths]``: where local, disposable things lie; empty means the usual place."""

    state: str = ""
    cache: str = ""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    repo: str = ""
    freeze: Freeze = Freeze()
    backup: Backup = Backup()
    restore: Restore = Restore()
    checkpoint: Checkpoint = Checkpoint()
    collect: Collect = Collect()
    notify: Notify = Notify()
    paths: Paths = Paths()


def load(explicit: str | None, environ: dict[str, str]) -> tuple[Config, str | None]:
    """The configuration and the file it came from (None: defaults). Raises ConfigWrong."""
    path = explicit or _usual(environ)
    if path is None:
        return Config(), None
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as failure:
        raise ConfigWrong(path=path, reason=failure.strerror or str(failure)) from failure
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as failure:
        raise ConfigWrong(path=path, reason=str(failure)) from failure
    _refuse_unknown(path, table, Config)
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as failure:
        raise ConfigWrong(path=path, reason=str(failure)) from failure
    _refuse_values(path, config)
    return config, path


def _usual(environ: dict[str, str]) -> str | None:
    home = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "/"), ".config")
    for path in (os.path.join(home, "graincopy", "config.toml"), SYSTEM_CONFIG):
        if os.path.exists(path):
            return path
    return None


def _refuse_unknown(path: str, table: dict[str, object], shape: type[msgspec.Struct], where: str = "") -> None:
    known = {field.name: field.type for field in msgspec.structs.fields(shape)}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigWrong(
                path=path, reason=f"unknown key {where}{key}" + (f"; did you mean {near[0]}?" if near else "")
            )
        inner = known[key]
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _refuse_unknown(path, value, inner, f"{where}{key}.")


def _refuse_values(path: str, config: Config) -> None:
    from graincopy.model.audit import AuditAmount

    try:
        AuditAmount.parse(config.backup.audit)
    except ValueError as failure:
        raise ConfigWrong(path=path, reason=f"backup.audit: {failure}") from failure
    for name, value in (("freeze.deadline", config.freeze.deadline), ("backup.workers", config.backup.workers)):
        if value <= 0:
            raise ConfigWrong(path=path, reason=f"{name} must be more than 0")
    strange = set(config.notify.on) - {"success", "warning", "failure"}
    if strange:
        raise ConfigWrong(path=path, reason=f"notify.on knows success, warning and failure, not {min(strange)}")


def explain(config: Config, path: str | None) -> tuple[str, ...]:
    """Every setting in force, one a line, as TOML would say it."""
    lines = [f"# from {path}" if path else f"# defaults; no file at {SYSTEM_CONFIG} or in the user's configuration"]
    lines.append(f"repo = {config.repo!r}")
    for section in msgspec.structs.fields(config):
        value = getattr(config, section.name)
        if isinstance(value, msgspec.Struct):
            lines.append(f"[{section.name}]")
            lines += [f"{name} = {_toml(item)}" for name, item in msgspec.structs.asdict(value).items()]
    return tuple(lines)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
