"""Subsystems that need no configuration: what belongs to libvirt and to PostgreSQL (stage 2). See docs/subsystems.md.

PostgreSQL is backed up as its manual says for snapshots ("File System Level Backup"): all of the data directory, the
write-ahead log and the tablespaces at *one* instant, as after a power cut; starting the copy replays the log.
CHECKPOINT before it only makes that quick. ``pg_backup_start`` would make a copy at several instants sound only with
the log written up to ``pg_backup_stop``, which is after the instant: docs/decisions/0007-trees-and-subsystems.md.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Callable, Sequence

import msgspec

from graincopy.core.errors import SubsystemFailed, ToolMissing
from graincopy.model.subsystem import Subsystem
from graincopy.model.workload import Consistency

BUILT_IN = {"libvirt": Subsystem(kind="libvirt"), "postgresql": Subsystem(kind="postgresql")}

_LIBVIRT = ("/etc/libvirt", "/var/lib/libvirt/qemu/snapshot", "/var/lib/libvirt/qemu/checkpoint")
_LIBVIRT_NOT = ("*.sock", "*.pid", "*.lock", "*.log")
# The pid file would stop the restored server from starting while any process has that number.
_POSTGRES_NOT = ("postmaster.pid", "*pgsql_tmp*")
_TOOL_TIME = 30.0  # seconds

Run = Callable[[Sequence[str]], str]  # a tool's output; raises OSError and subprocess.SubprocessError


class Resolved(msgspec.Struct, frozen=True):
    """A subsystem with everything known that has to be known before it is quiesced."""

    name: str
    spec: Subsystem
    quiesce: tuple[tuple[str, ...], ...]  # several programs, one after the other
    one_instant: bool
    consistency: Consistency


def resolve(name: str, spec: Subsystem, run: Run | None = None) -> Resolved:
    """What ``spec`` means now. No effect. Raises SubsystemFailed and ToolMissing."""
    quiesce = (spec.quiesce,) if spec.quiesce else ()
    plain = Resolved(name, spec, quiesce, spec.one_instant, spec.consistency if quiesce else Consistency.CRASH)
    if spec.kind == "libvirt":
        return _libvirt(plain)
    if spec.kind == "postgresql":
        return _postgresql(plain, run or run_tool)
    return plain


def run_tool(argv: Sequence[str]) -> str:
    """Output of a tool that looks and changes nothing."""
    done = subprocess.run(argv, capture_output=True, timeout=_TOOL_TIME, check=True, stdin=subprocess.DEVNULL, cwd="/")
    return os.fsdecode(done.stdout)


# --- libvirt --------------------------------------------------------------------------------------


def _libvirt(plain: Resolved) -> Resolved:
    """Definitions only: disks, firmware variables and TPM state belong to the machines (``vm:NAME``)."""
    folders = plain.spec.directories or tuple(path for path in _LIBVIRT if os.path.isdir(path))
    if not folders:
        raise SubsystemFailed(subsystem=plain.name, reason=f"there is no {_LIBVIRT[0]}; libvirt is not installed here")
    return _with(plain, folders, _LIBVIRT_NOT)


# --- PostgreSQL -----------------------------------------------------------------------------------


class _Cluster(msgspec.Struct, frozen=True):
    """One PostgreSQL data directory."""

    data: str
    owner: str
    socket: str = ""  # folder of the server's socket; empty: it does not run
    port: str = ""


def _postgresql(plain: Resolved, run: Run) -> Resolved:
    folders = plain.spec.directories or _listed_clusters(plain.name, run)
    clusters = [_cluster(plain.name, folder) for folder in folders]
    every = dict.fromkeys(place for cluster in clusters for place in _places(plain.name, cluster))
    running = [cluster for cluster in clusters if cluster.port]
    found = _with(plain, tuple(every), _POSTGRES_NOT)
    if not plain.spec.quiesce:
        found = msgspec.structs.replace(
            found, quiesce=tuple(_checkpoint(cluster) for cluster in running), consistency=Consistency.CRASH
        )
    return msgspec.structs.replace(found, one_instant=plain.spec.one_instant or bool(running))


def _listed_clusters(name: str, run: Run) -> tuple[str, ...]:
    """Data directories of all clusters that Debian's tools manage."""
    try:
        lines = run(["pg_lsclusters", "--no-header"]).splitlines()
    except FileNotFoundError as error:
        install = f"postgresql-common, or name the data directory in [subsystem.{name}] directories"
        raise ToolMissing(tool="pg_lsclusters", install=install) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise SubsystemFailed(subsystem=name, reason=f"pg_lsclusters failed: {error}") from error
    found = tuple(fields[5] for fields in (line.split() for line in lines) if len(fields) > 5)
    if not found:
        raise SubsystemFailed(subsystem=name, reason="pg_lsclusters lists no cluster; name its data directory")
    return found


def _cluster(name: str, folder: str) -> _Cluster:
    data = os.path.realpath(folder)
    try:
        owner = os.stat(os.path.join(data, "PG_VERSION")).st_uid
    except OSError as error:
        raise SubsystemFailed(
            subsystem=name, reason=f"{folder} is no PostgreSQL data directory: {error.strerror}"
        ) from error
    try:
        user = pwd.getpwuid(owner).pw_name
    except KeyError:
        user = str(owner)
    lines = _pid_file(data)
    # Line 4 is the port, 5 the socket's folder: "Database File Layout" of the manual, and miscadmin.h
    return _Cluster(data, user, lines[4] or "127.0.0.1", lines[3]) if len(lines) > 4 else _Cluster(data, user)


def _pid_file(data: str) -> list[str]:
    """Lines of a running server's pid file; none when the server does not run."""
    try:
        with open(os.path.join(data, "postmaster.pid"), encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
        os.kill(abs(int(lines[0])), 0)
    except (FileNotFoundError, ProcessLookupError):
        return []
    except PermissionError:  # it runs, as somebody else
        return lines
    return lines


def _places(name: str, cluster: _Cluster) -> tuple[str, ...]:
    """The data directory and what links of it lead to: tablespaces, and the log where it was moved away."""
    found = [cluster.data]
    links = [os.path.join(cluster.data, "pg_wal")]
    spaces = os.path.join(cluster.data, "pg_tblspc")
    try:
        links += [os.path.join(spaces, link) for link in sorted(os.listdir(spaces))]
    except OSError as error:
        raise SubsystemFailed(subsystem=name, reason=f"{spaces} cannot be read: {error.strerror}") from error
    found += [os.path.realpath(link) for link in links if os.path.islink(link)]
    return tuple(found)


def _checkpoint(cluster: _Cluster) -> tuple[str, ...]:
    """CHECKPOINT as the owner of the cluster, who is its superuser."""
    as_owner = ("runuser", "-u", cluster.owner, "--") if os.geteuid() == 0 and cluster.owner != "root" else ()
    where = ("--host", cluster.socket, "--port", cluster.port, "--username", cluster.owner, "--dbname", "postgres")
    return (*as_owner, "psql", "--no-psqlrc", "--no-password", "--quiet", *where, "--command", "CHECKPOINT")


def _with(plain: Resolved, folders: tuple[str, ...], left_out: tuple[str, ...]) -> Resolved:
    spec = msgspec.structs.replace(plain.spec, directories=folders, exclude=(*plain.spec.exclude, *left_out))
    return msgspec.structs.replace(plain, spec=spec)
