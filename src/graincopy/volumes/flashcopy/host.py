"""A LUN on this host: which device shows the vdisk with a uid, read-only, and how it is let go (stages 3 and 7).

The uid of a vdisk is the WWN of its LUN (NAA type 6). udev makes names of it: ``wwn-0x…``, ``scsi-3…``, and
``dm-uuid-mpath-3…`` for the multipath device over all paths, which is preferred. sysfs: Documentation/ABI/testing/
sysfs-block-device (``wwid``), sysfs-class-scsi_host (``scan``), sysfs-block-dm (``uuid``). BLKROSET: linux/fs.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence

from graincopy.core.clock import Clock
from graincopy.core.errors import AttachFailed
from graincopy.volumes import ioctl

BY_ID = "/dev/disk/by-id"
PATIENCE = 60.0  # seconds in which a LUN appears
_BLKROSET = 0x125D
_NAMES = ("dm-uuid-mpath-3{}", "wwn-0x{}", "scsi-3{}")
_UID = re.compile(r"[0-9a-f]{32}")
_LINK = re.compile(r"(?:dm-uuid-mpath-3|wwn-0x|scsi-3)([0-9a-f]{32})")
_TOOL_TIMEOUT = 60.0


def _flush_multipath(name: str) -> None:
    """Take the multipath device ``name`` down. Raises OSError."""
    try:
        subprocess.run(["multipath", "-f", name], capture_output=True, timeout=_TOOL_TIMEOUT, check=True)
    except subprocess.SubprocessError as error:
        raise OSError(errno.EBUSY, f"multipath -f {name} failed") from error


class HostDevices:
    """The block devices of this host. ``by_id`` (folders) and ``sys`` are parameters for tests and other udev rules."""

    def __init__(
        self,
        clock: Clock,
        by_id: Sequence[str] = (BY_ID,),
        sys: str = "/sys",
        patience: float = PATIENCE,
        flush_multipath: Callable[[str], None] = _flush_multipath,
    ) -> None:
        self._clock, self._by_id, self._sys, self._patience = clock, tuple(by_id), sys, patience
        self._flush_multipath = flush_multipath

    def uid_of(self, name: str) -> str | None:
        """The uid of the vdisk that the device with kernel name ``name`` shows; None without a WWN of that kind."""
        mapped = self._read(f"{name}/dm/uuid")
        if mapped.startswith("mpath-3"):
            return _uid(mapped.removeprefix("mpath-3"))
        wwid = self._read(f"{name}/device/wwid")
        return _uid(wwid.removeprefix("naa.")) if wwid else self._linked_uid(name)

    def _linked_uid(self, name: str) -> str | None:
        """By the names in the by-id directory, for devices of which sysfs says nothing."""
        for path in self._links():
            found = _LINK.fullmatch(os.path.basename(path).lower())
            if found and os.path.basename(os.path.realpath(path)) == name:
                return found[1]
        return None

    def _links(self) -> Iterator[str]:
        for folder in self._by_id:
            with contextlib.suppress(OSError):
                yield from sorted(os.path.join(folder, link) for link in os.listdir(folder))

    def find(self, uid: str) -> str | None:
        """Path of the device that shows the vdisk; None when this host does not see it."""
        for pattern in _NAMES:
            for folder in self._by_id:
                path = os.path.realpath(os.path.join(folder, pattern.format(uid)))
                if os.path.exists(path):
                    return path
        return None

    def attach(self, uid: str, size: int, volume: str) -> str:
        """Path of the device of the LUN that was just mapped: read-only, and of ``size`` bytes. Raises AttachFailed."""
        path = self._await(uid)
        if path is None:
            reason = f"no device with the WWN {uid} appeared within {self._patience:g} s"
            raise AttachFailed(volume=volume, reason=reason)
        try:
            for each in (*self._paths(path), path):
                self._set_read_only(each)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = ioctl.device_size(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise AttachFailed(volume=volume, reason=f"{path}: {error.strerror}") from error
        if found != size:
            raise AttachFailed(volume=volume, reason=f"{path} has {found} bytes instead of {size}")
        return path

    def _await(self, uid: str) -> str | None:
        end, pause = self._clock.monotonic() + self._patience, 0.02
        while True:
            path = self.find(uid)
            if path is not None and self.uid_of(os.path.basename(path)) in (uid, None):
                return path
            if self._clock.monotonic() >= end:
                return None
            self._scan()
            self._clock.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _scan(self) -> None:
        """Ask every SCSI host (FC and iSCSI alike) to look for new LUNs."""
        root = f"{self._sys}/class/scsi_host"
        with contextlib.suppress(OSError):
            for host in os.listdir(root):
                _write(f"{root}/{host}/scan", "- - -")

    def drop(self, uid: str) -> None:
        """Let the device go before the LUN is taken away. Raises OSError when something still holds it."""
        path = self.find(uid)
        if path is None:
            return
        name = os.path.basename(path)
        paths = self._paths(path)
        if self._read(f"{name}/dm/uuid"):
            self._flush_multipath(self._read(f"{name}/dm/name") or name)
        for each in (*paths, path):
            delete = f"{self._sys}/block/{os.path.basename(each)}/device/delete"
            if os.path.exists(delete):
                _write(delete, "1")

    def flush(self, uid: str) -> None:
        """Write out what this host caches of a raw S; nothing where a file system on it does that. Raises OSError."""
        path = self.find(uid)
        if path is None:
            return
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _paths(self, path: str) -> tuple[str, ...]:
        """The devices below a multipath device."""
        folder = f"{self._sys}/block/{os.path.basename(path)}/slaves"
        try:
            return tuple(os.path.join(os.path.dirname(path), name) for name in sorted(os.listdir(folder)))
        except OSError:
            return ()

    def _set_read_only(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _BLKROSET, struct.pack("i", 1))
        finally:
            os.close(fd)

    def _read(self, attribute: str) -> str:
        try:
            with open(f"{self._sys}/block/{attribute}", "rb") as file:
                return os.fsdecode(file.read()).strip()
        except OSError:
            return ""


def _uid(text: str) -> str | None:
    found = text.strip().lower()
    return found if _UID.fullmatch(found) else None


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
