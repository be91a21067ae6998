"""What the host knows about files of QEMUs (stages 3 and 4): who has one open, as which user, and folders for both."""

from __future__ import annotations

import fcntl
import os
import stat

from graincopy.core.errors import GraincopyError, SnapshotFailed
from graincopy.core.ids import VolumeId
from graincopy.volumes import leases
from graincopy.volumes.leases import Holder
from graincopy.volumes.places import make_directory, sync_directory
from graincopy.volumes.qemu_bitmaps import GRAIN


def writers_of(path: str) -> tuple[Holder, ...]:
    """Who has the file at ``path`` open for writing. A lease tells of most files at once that it is nobody.

    Where a lease tells that it is somebody who cannot be seen, that is the answer.
    """
    try:
        fd = leases.open_existing(path)
    except (OSError, GraincopyError):
        return ()
    try:
        taken = leases.take(fd, fcntl.F_RDLCK)
        if taken:
            leases.give_back(fd)
            return ()
        seen = leases.writers_of(os.fstat(fd))
        return seen or ((Holder("a process that this user may not see"),) if taken is False else ())
    finally:
        os.close(fd)


def scratch_is_full(path: str) -> bool:
    """Whether the file system under a scratch file has no room for one more grain."""
    try:
        found = os.statvfs(path)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < GRAIN


def has_open(pid: int | None, path: str) -> bool:
    """Whether process ``pid`` has the file at ``path`` open; also true where that cannot be seen."""
    if pid is None:
        return True
    try:
        wanted = os.stat(path)
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return True
    seen = 0
    for name in names:
        try:
            found = os.stat(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        seen += 1
        if os.path.samestat(found, wanted) or (stat.S_ISBLK(wanted.st_mode) and found.st_rdev == wanted.st_rdev):
            return True
    return not seen


def user_of(path: str) -> int:
    """As which user the process runs that writes the file at ``path``; we ourselves where that cannot be told."""
    for holder in writers_of(path):
        try:
            return os.stat(f"/proc/{holder.pid}").st_uid
        except OSError:
            continue
    return os.geteuid()


def make_room(folder: str, uid: int, volume: VolumeId) -> None:
    """A folder for a QEMU of user ``uid`` and for us, and for nobody else."""
    if not os.path.isdir(folder):
        make_directory(folder)
        if uid != os.geteuid():
            os.chown(folder, uid, -1)
        sync_directory(os.path.dirname(folder))
    owner = os.stat(folder, follow_symlinks=False)
    if owner.st_uid not in (uid, os.geteuid()) or owner.st_mode & 0o022:
        raise SnapshotFailed(volume=volume, reason=f"{folder} belongs to somebody else, or can be written by others")
