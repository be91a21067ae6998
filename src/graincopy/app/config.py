"""The configuration file: TOML, every key with a default, unknown keys refused with their nearest neighbour."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import typing

import msgspec

from graincopy.core.errors import ConfigWrong
from graincopy.model.subsystem import Subsystem, wrong

SYSTEM_CONFIG = "/etc/graincopy/config.toml"


class Freeze(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[freeze]``: the window in which writers are held."""

    deadline: float = 10.0  # seconds after which the guard thaws whatever happens
    warn_ms: float = 1000.0  # a predicted or measured window longer than this is a warning


class Backup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[backup]``"""

    workers: int = 3  # threads that read, compress, seal and wait for the medium
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


class FlashCopyArray(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[flashcopy.NAME]``: an IBM Storage Virtualize array. A key or a password, each from a file."""

    host: str  # its address
    user: str
    host_name: str  # what the array calls this host: targets are mapped to it
    port: int = 22
    key_file: str = ""
    password_file: str = ""
    known_hosts: str = ""  # empty: ~/.ssh/known_hosts
    pool: str = ""  # where targets are made; empty: in the source's own pool
    wait: float = 0.0  # seconds to wait for another target of the same volume before giving up
    connect_timeout: float = 15.0  # seconds
    command_timeout: float = 60.0  # seconds
    devices: str = "/dev/disk/by-id"  # where LUNs appear by their WWN


class Rbd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[rbd]``: how Ceph is reached, and where its images are looked for. Empty: as Ceph's own configuration says."""

    conf: str = ""  # path of ceph.conf; empty: CEPH_CONF, or /etc/ceph/ceph.conf where that exists
    id: str = "admin"  # cephx user, without "client."
    keyring: str = ""
    timeout: float = 30.0  # seconds after which a cluster that does not answer is given up
    pools: tuple[str, ...] = ()  # POOL or POOL/NAMESPACE: where targets are looked for besides the known places
    fuse: tuple[str, ...] = ()  # FOLDER=POOL: rbd-fuse shows the images of POOL there
    groups: bool = True  # several images are snapshotted as one group, at one instant
    whole_objects: bool = False  # take whole objects as changed, not the bytes in them


class Btrfs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[btrfs]``: which disks on Btrfs are snapshotted with their whole subvolume."""

    in_place: bool = (
        False  # disk files too, not LUN images only: a checkpoint then keeps what their neighbours overwrite
    )


class Qemu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[qemu]``: running QEMUs that libvirt does not manage, and room for what they are about to overwrite."""

    monitors: tuple[str, ...] = ()  # QMP sockets
    nbd: tuple[str, ...] = ()  # MONITOR=SOCKET: where the NBD server of that QEMU listens, if it has one already
    scratch: str = ""  # folder for scratch files; empty: in the state folder
    timeout: float = 30.0  # seconds after which a QEMU that does not answer is given up


class MemberSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[set.NAME]``: what ``set:NAME`` backs up at one instant; the name is its identity, members may change."""

    members: tuple[str, ...]  # each as on the command line: vm:NAME, subsystem:NAME, set:NAME, an absolute PATH


class Vm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[vm]``: virtual machines, through libvirt."""

    uri: str = "qemu:///system"
    exclude: tuple[str, ...] = ()  # disks to leave out: "vdb", "web:vdb", a NAME or a path
    application: tuple[str, ...] = ()  # machines whose guest hooks quiesce their applications


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
    flashcopy: dict[str, FlashCopyArray] = {}
    rbd: Rbd = Rbd()
    vm: Vm = Vm()
    qemu: Qemu = Qemu()
    btrfs: Btrfs = Btrfs()
    set: dict[str, MemberSet] = {}
    subsystem: dict[str, Subsystem] = {}


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
        elif isinstance(value, dict):
            _refuse_unknown_in(path, value, inner, f"{where}{key}.")


def _refuse_unknown_in(path: str, tables: dict[str, object], kind: object, where: str) -> None:
    """The same for tables that have names, as in ``[set.NAME]``."""
    shape = typing.get_args(kind)[-1:]
    for name, table in tables.items():
        if shape and isinstance(table, dict) and issubclass(shape[0], msgspec.Struct):
            _refuse_unknown(path, table, shape[0], f"{where}{name}.")


def _refuse_values(path: str, config: Config) -> None:
    from graincopy.model.audit import AuditAmount

    try:
        AuditAmount.parse(config.backup.audit)
    except ValueError as failure:
        raise ConfigWrong(path=path, reason=f"backup.audit: {failure}") from failure
    for name, value in (("freeze.deadline", config.freeze.deadline), ("backup.workers", config.backup.workers)):
        if value <= 0:
            raise ConfigWrong(path=path, reason=f"{name} must be more than 0")
    if config.rbd.timeout < 1:
        raise ConfigWrong(path=path, reason="rbd.timeout must be at least 1")
    for entry in config.rbd.fuse:
        if not re.fullmatch(r"/.*=[^=]+", entry):
            raise ConfigWrong(path=path, reason=f"rbd.fuse: {entry} is not FOLDER=POOL")
    if config.qemu.timeout <= 0:
        raise ConfigWrong(path=path, reason="qemu.timeout must be more than 0")
    for entry in config.qemu.nbd:
        if entry.partition("=")[0] not in config.qemu.monitors or not entry.partition("=")[2].startswith("/"):
            raise ConfigWrong(path=path, reason=f"qemu.nbd: {entry} is not MONITOR=SOCKET with one of qemu.monitors")
    for name in config.flashcopy:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ConfigWrong(path=path, reason=f"flashcopy.{name}: the name of an array has letters, digits and _.-")
    _refuse_members(path, config)
    strange = {*config.notify.on} - {"success", "warning", "failure"}
    if strange:
        raise ConfigWrong(path=path, reason=f"notify.on knows success, warning and failure, not {min(strange)}")


def _refuse_members(path: str, config: Config) -> None:
    for name, subsystem in config.subsystem.items():
        trouble = wrong(subsystem)
        if trouble:
            raise ConfigWrong(path=path, reason=f"subsystem.{name}: {trouble}")
    for name, found in config.set.items():
        if not found.members:
            raise ConfigWrong(path=path, reason=f"set.{name}: members is empty")
        for member in found.members:
            if not re.match(r"(vm|set|subsystem|rbd):.|(files:)?/", member):
                kinds = "vm:NAME, subsystem:NAME, set:NAME, rbd:POOL/IMAGE and absolute paths"
                raise ConfigWrong(path=path, reason=f"set.{name}: members are {kinds}, not {member}")
            if member.startswith("set:") and member[4:] not in config.set:
                near = difflib.get_close_matches(member[4:], config.set, 1)
                hint = f"; did you mean set:{near[0]}?" if near else ""
                raise ConfigWrong(path=path, reason=f"set.{name}: there is no {member}{hint}")


def explain(config: Config, path: str | None) -> tuple[str, ...]:
    """Every setting in force, one a line, as TOML would say it."""
    lines = [f"# from {path}" if path else f"# defaults; no file at {SYSTEM_CONFIG} or in the user's configuration"]
    lines.append(f"repo = {config.repo!r}")
    for section in msgspec.structs.fields(config):
        value = getattr(config, section.name)
        if isinstance(value, msgspec.Struct):
            lines.append(f"[{section.name}]")
            lines += [f"{name} = {_toml(item)}" for name, item in msgspec.structs.asdict(value).items()]
        elif isinstance(value, dict):
            for name, settings in value.items():
                lines.append(f"[{section.name}.{name}]")
                lines += [f"{key} = {_toml(item)}" for key, item in msgspec.structs.asdict(settings).items()]
    return tuple(lines)


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
