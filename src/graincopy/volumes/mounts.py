"""Mounts: which one holds a path (stage 3), and mounts of T that nobody else sees (stage 7).

/proc/PID/mountinfo: Documentation/filesystems/proc.rst §3.5. Detached mounts: fsopen(2), fsconfig(2), fsmount(2);
such a mount has no mount point, is in no namespace and ends with its last descriptor, so that SIGKILL leaves
nothing to unmount (docs/decisions/0001-detached-mounts.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterable, Sequence

import msgspec

from graincopy.core.errors import VolumeUnsupported
from graincopy.model.volume import Claim
from graincopy.volumes.ioctl import SYS_FSCONFIG, SYS_FSMOUNT, SYS_FSOPEN, SYS_OPENAT2

# linux/mount.h
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8

# linux/openat2.h
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08

_ESCAPE = re.compile(rb"\\([0-7]{3})")


class Mount(msgspec.Struct, frozen=True):
    """One line of mountinfo. ``root`` is the directory of the file system that is mounted at ``point``."""

    mount_id: int
    device: str  # "major:minor"; major 0: no block device of its own
    root: str
    point: str
    fs_type: str
    source: str
    options: frozenset[str]
    super_options: frozenset[str]

    def inside(self, path: str) -> str:
        """Path of ``path`` inside the file system, relative to the file system's own root."""
        relative = os.path.relpath(os.fsencode(path), os.fsencode(self.point))
        root = self.root.strip("/")
        if relative == b".":
            return root
        return "/".join(part for part in (root, os.fsdecode(relative)) if part)


def parse_mountinfo(text: bytes) -> tuple[Mount, ...]:
    """Every mount of a mountinfo file, in its order (a later one at the same point hides the earlier)."""
    return tuple(_parse_line(line) for line in text.split(b"\n") if line)


def _parse_line(line: bytes) -> Mount:
    fields = line.split(b" ")
    dash = fields.index(b"-", 6)
    fs_type, source, super_options = [*fields[dash + 1 :], b"", b""][:3]
    return Mount(
        mount_id=int(fields[0]),
        device=os.fsdecode(fields[2]),
        root=_unescape(fields[3]),
        point=_unescape(fields[4]),
        fs_type=_unescape(fs_type),
        source=_unescape(source),
        options=frozenset(os.fsdecode(fields[5]).split(",")),
        super_options=frozenset(os.fsdecode(super_options).split(",")),
    )


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def read_mounts(proc: str = "/proc") -> tuple[Mount, ...]:
    """The mounts that this process sees. Raises OSError."""
    with open(f"{proc}/self/mountinfo", "rb") as file:
        return parse_mountinfo(file.read())


def mount_id_of(path: str) -> int:
    """Id of the mount that holds ``path``, from the kernel: right also where mounts hide mounts. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            facts = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
    finally:
        os.close(fd)
    return int(facts[b"mnt_id"])


def mount_of(path: str, mounts: Iterable[Mount] | None = None) -> Mount | None:
    """The mount that holds the existing ``path``; None when it lies outside of what this process sees."""
    wanted = mount_id_of(path)
    return next((mount for mount in mounts or read_mounts() if mount.mount_id == wanted), None)


# --- detached mounts ------------------------------------------------------------------------------


class MountRefused(OSError):
    """The kernel did not mount; ``strerror`` has its own words where it said any."""


def mount_detached(fs_type: str, device: str, options: Sequence[str], read_only: bool = True) -> int:
    """Mount ``device`` where nobody sees it and return the mount's descriptor; closing it unmounts.

    ``options`` are words or ``key=value`` of the file system. nosuid, nodev, noexec always; read-only unless a log is
    to be replayed on a throw-away clone. Raises MountRefused (an OSError) with the kernel's message.
    """
    context = _call(SYS_FSOPEN, _text(fs_type), _FSOPEN_CLOEXEC)
    try:
        _set(context, _SET_STRING, "source", device)
        for option in ("ro", *options) if read_only else options:
            key, equals, value = option.partition("=")
            _set(context, _SET_STRING if equals else _SET_FLAG, key, value if equals else None)
        _set(context, _CMD_CREATE, None, None)
        attributes = _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC | (_ATTR_RDONLY if read_only else 0)
        return _call(SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
    except OSError as error:
        said = _messages(context)
        raise MountRefused(error.errno, said or os.strerror(error.errno or 0)) from None
    finally:
        os.close(context)  # left open it would hold the super block, and so the device, after the mount is gone


def _set(context: int, command: int, key: str | None, value: str | None) -> None:
    _call(SYS_FSCONFIG, context, command, _text(key), _text(value), 0)


def _messages(context: int) -> str:
    """What the kernel logged into the file-system context: lines of ``e``/``w``/``i``, a space and the message."""
    said: list[str] = []
    with contextlib.suppress(OSError):  # ENODATA: nothing more
        while line := os.read(context, 4096):
            said.append(os.fsdecode(line).strip().partition(" ")[2])
    return "; ".join(said)


def open_beneath(directory_fd: int, path: str, flags: int = os.O_RDONLY) -> int:
    """Open ``path`` below ``directory_fd``, following no symbolic link and never leaving it (openat2(2)).

    Raises OSError; ELOOP for a symbolic link, EXDEV for a path that leads out.
    """
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, resolve)
    return _call(SYS_OPENAT2, directory_fd, _text(path), how, ctypes.sizeof(how))


def _text(text: str | None) -> ctypes.c_char_p:
    return ctypes.c_char_p(None if text is None else os.fsencode(text))


def _call(number: int, *arguments: object) -> int:
    """A system call that libc may not know yet. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def refuse_unmounted(claim: Claim) -> None:
    """Raises VolumeUnsupported for a file that is not there because the file system it lies on is not mounted.

    It must not be made anew in the folder that the volume is mounted over at other times.
    """
    if claim.inner_path is None or os.path.lexists(claim.path):
        return
    root = claim.path.removesuffix(claim.inner_path)
    if root != claim.path and not os.path.ismount(root):
        raise VolumeUnsupported(path=claim.path, reason=f"its file system is not mounted at {root}")
