"""A restore point as a directory of disk images: one read-only file per disk, served through FUSE (mfusepy, libfuse 3).

The files can be looked into with whatever reads disk images, loop-mounted included. Serving ends when the directory is
unmounted, or with SIGTERM, SIGINT or SIGHUP; the directory is as it was then.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import importlib.util
import os
import shutil
import signal
import stat
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

from graincopy.core.errors import MountPointUnfit, ToolMissing
from graincopy.views.source import ViewDisk

_DEVICE = "/dev/fuse"
_WINDOW = 1 << 32  # bytes of a disk that are asked for holes at a time
_BY_SIGNAL = 8  # what fuse_main of libfuse 3 answers when a signal ended its loop
_FOREVER: Final = 86400  # seconds that names and attributes are kept by the kernel; they never change


def refuse_unfit(directory: str) -> None:
    """Raise MountPointUnfit or ToolMissing when ``directory`` cannot be mounted on. Without effect."""
    try:
        with os.scandir(directory) as entries:
            crowded = next(entries, None) is not None
    except OSError as failure:
        raise MountPointUnfit(path=directory, reason=_no_directory(failure)) from failure
    if crowded:
        raise MountPointUnfit(path=directory, reason="it is not empty")
    if os.path.ismount(directory):
        raise MountPointUnfit(path=directory, reason="something is mounted there already")
    _refuse_device(directory)
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise ToolMissing(tool="fusermount3, to mount without root", install="apt-get install fuse3")
    if not os.access(directory, os.W_OK):
        raise MountPointUnfit(path=directory, reason="without root it has to be a directory that you may write to")


def _no_directory(failure: OSError) -> str:
    if failure.errno == errno.ENOTCONN:
        return "a dead mount is there (fusermount3 -u or umount removes it)"
    if failure.errno == errno.ENOENT:
        return "it does not exist; make it first"
    return failure.strerror or str(failure)


def _refuse_device(directory: str) -> None:
    if not os.path.exists(_DEVICE):
        raise ToolMissing(tool=f"{_DEVICE}, the kernel's side of FUSE", install="modprobe fuse")
    if not os.access(_DEVICE, os.R_OK | os.W_OK, effective_ids=True):
        reason = f"{_DEVICE} is closed to this user (as root: chmod 666 {_DEVICE}, as the fuse3 package sets it)"
        raise MountPointUnfit(path=directory, reason=reason)


def load() -> ModuleType:
    """mfusepy with libfuse 3. Raises ToolMissing."""
    if importlib.util.find_spec("mfusepy") is None:
        raise ToolMissing(tool="mfusepy, to mount through FUSE", install="pip install graincopy[fuse]")
    os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")  # it would take libfuse 2 first, which knows no SEEK_HOLE
    try:
        mfusepy = importlib.import_module("mfusepy")
    except (OSError, AttributeError) as failure:
        raise ToolMissing(tool="libfuse 3", install="apt-get install fuse3") from failure
    if mfusepy.fuse_version_major != 3:
        raise ToolMissing(tool="libfuse 3", install="apt-get install fuse3")
    return mfusepy


def serve(
    disks: Sequence[ViewDisk], directory: str, time: float, ready: Callable[[], None], *, allow_other: bool = False
) -> None:
    """Mount ``disks`` on the empty ``directory`` and serve until it is unmounted or a signal says so.

    ``time`` (seconds since the epoch) is what the files show as theirs; ``ready`` is called once they can be read.
    Only the main thread may call this. Raises MountPointUnfit and ToolMissing.
    """
    directory = os.path.abspath(directory)
    refuse_unfit(directory)
    mfusepy = load()
    files = DiskFiles(disks, time, ready)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        _server_class(mfusepy)(
            files,
            directory,
            foreground=True,
            ro=True,
            fsname="graincopy",
            subtype="graincopy",
            default_permissions=True,
            kernel_cache=True,
            attr_timeout=_FOREVER,
            entry_timeout=_FOREVER,
            **_options(mfusepy, allow_other),
        )
    except RuntimeError as failure:
        if failure.args != (_BY_SIGNAL,):
            raise MountPointUnfit(
                path=directory, reason=f"libfuse refuses ({failure}); its reason is above"
            ) from failure
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _options(mfusepy: ModuleType, allow_other: bool) -> dict[str, object]:
    options: dict[str, object] = {"allow_other": True} if allow_other else {}
    if mfusepy.fuse_version_minor >= 12:
        options |= {"max_threads": 8, "max_idle_threads": 8}  # else 3.12 to 3.14 complain of what nobody gave
    return options


class DiskFiles:
    """What the kernel may ask about the directory and its files. Called from several threads at once."""

    use_ns = True  # read by mfusepy: times are nanoseconds

    def __init__(self, disks: Sequence[ViewDisk], time: float, ready: Callable[[], None]) -> None:
        self._disks = tuple(disks)
        self._numbers = {f"/{disk.name}": number for number, disk in enumerate(disks)}
        self._time, self._ready = int(time * 1e9), ready

    def init(self, _path: str) -> None:
        """Mounted, and answering from now on."""
        self._ready()

    def getattr(self, path: str, _handle: int | None = None) -> dict[str, int]:
        """stat(2)."""
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), self._time)
        owner = {"st_uid": os.geteuid(), "st_gid": os.getegid()}
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o500, "st_nlink": 2, **owner, **times}
        size = self._disks[self._number(path)].size
        blocks = {"st_size": size, "st_blocks": -(-size // 512), "st_blksize": 1 << 17}
        return {"st_mode": stat.S_IFREG | 0o400, "st_nlink": 1, **blocks, **owner, **times}

    def readdir(self, _path: str, _handle: int) -> list[str]:
        """Names."""
        return [".", "..", *(disk.name for disk in self._disks)]

    def open(self, path: str, flags: int) -> int:
        """The disk's number as handle."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self._number(path)

    def statfs(self, _path: str) -> dict[str, int]:
        """As large as all disks together, and full."""
        total = sum(disk.size for disk in self._disks)
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": -(-total // 4096), "f_namemax": 255}

    def read(self, number: int, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer``; how many bytes there were. Raises OSError."""
        disk = self._disks[number]
        length = max(0, min(len(buffer), disk.size - offset))
        disk.readinto(offset, buffer[:length])
        return length

    def lseek(self, number: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE of lseek(2). Raises OSError; ENXIO beyond the last data or the end."""
        disk = self._disks[number]
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        at = offset
        while 0 <= at < disk.size:
            for span in disk.extents(at, min(_WINDOW, disk.size - at)):
                if span.zero == (whence == os.SEEK_HOLE):
                    return max(span.start, offset)
                at = span.stop
        if whence == os.SEEK_HOLE and 0 <= offset < disk.size:
            return disk.size
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))

    def _number(self, path: str) -> int:
        number = self._numbers.get(path)
        if number is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return number


def _server_class(mfusepy: ModuleType) -> Any:
    """mfusepy's server with what it lacks: lseek, and reads without copies."""

    class Server(mfusepy.FUSE):  # type: ignore[misc, name-defined, unused-ignore]
        def read(self, _path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
            target = (ctypes.c_char * size).from_address(ctypes.addressof(buffer.contents))
            return int(self.operations.read(info.contents.fh, offset, memoryview(target).cast("B")))

        def lseek(self, _path: bytes | None, offset: int, whence: int, info: Any) -> int:
            return int(self.operations.lseek(info.contents.fh, offset, whence))

    return Server
