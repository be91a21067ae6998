"""The machine itself, for the wiring: its clock, its chance, who we are, and whether another process lives."""

from __future__ import annotations

import os
import platform
import resource
import secrets
import time

from graincopy.model.snapshot import Owner


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        """Wall-clock seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since some start."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        time.sleep(seconds)


class SystemChance:
    """The kernel's random numbers."""

    def token(self, size: int) -> bytes:
        """``size`` unpredictable bytes."""
        return secrets.token_bytes(size)

    def below(self, limit: int) -> int:
        """An integer in ``[0, limit)``."""
        return secrets.randbelow(limit)


def raise_file_limit() -> None:
    """As many open files as this process may have: a restore in place holds every file of a directory at a time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def this_process() -> Owner:
    """The running process as owner of what it makes."""
    pid = os.getpid()
    return Owner(
        host=_machine_id(),
        boot=_boot_id(),
        pid=pid,
        started=_started(pid) or 0,
        hostname=platform.node() or "localhost",
    )


def alive(owner: Owner) -> bool | None:
    """Whether ``owner`` still runs: known for this host, None for another one.

    Another boot of this host, or another start time under the same pid, proves that it does not.
    """
    if owner.host != _machine_id():
        return None
    return owner.boot == _boot_id() and _started(owner.pid) == owner.started


def _machine_id() -> str:
    """The host's id (machine-id(5)); where there is none, its name."""
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        text = _read(path)
        if text:
            return text
    return f"name-{platform.node()}"


def _boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id") or "unknown"


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of ``pid`` (proc(5), stat field 22); None when there is none, or a zombie."""
    text = _read(f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""
