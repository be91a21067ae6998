"""What the btrfs driver leaves on storage (stages 4 and 9): one snapshot of a subvolume, and a tag for each file of it.

S is a file of a subvolume and is called ``btrfs:SUBVOLUME//FILE``. In one run all members on one subvolume share one
snapshot. Both lie in a folder ``.graincopy.btrfs`` of mode 0700, beside the subvolume where its parent directory is on
the same file system and may be written, else in its root directory:

    <hash of SUBVOLUME>.<hash of FILE>.<run>.target    the tag, as those of the reflink driver (reflink_store.py)
    <hash of SUBVOLUME>.<run>.snapshot                 the read-only snapshot

The first tag is durable before there is a snapshot, and the last tag goes after it, so that none is ever without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from graincopy.core.errors import TargetLost
from graincopy.core.ids import PointId, VolumeId, digest_id
from graincopy.model.snapshot import Target
from graincopy.volumes import btrfs_ioctl, ioctl, reflink_store
from graincopy.volumes.mounts import open_beneath
from graincopy.volumes.places import sync_directory
from graincopy.volumes.reflink_clone import open_record
from graincopy.volumes.reflink_store import Record

PREFIX = "btrfs:"
FOLDER = ".graincopy.btrfs"
SNAPSHOT = ".snapshot"
_DIGITS = 16
_PLAIN_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")


# --- names ----------------------------------------------------------------------------------------


def volume_id(root: str, inner: str) -> VolumeId:
    """The name of the file ``inner`` (relative) of the subvolume whose root directory is ``root``."""
    return VolumeId(f"{PREFIX}{root}//{inner}")


def split(volume: VolumeId) -> tuple[str, str]:
    """Subvolume and file of a volume. A real path holds no ``//``, so there is but one."""
    root, _, inner = volume.removeprefix(PREFIX).rpartition("//")
    return root, inner


def source_path(volume: VolumeId) -> str:
    """Real path of the file that is S."""
    root, inner = split(volume)
    return os.path.join(root, inner)


def _hash(text: str) -> str:
    return digest_id("btrfs", [text])[:_DIGITS]


def _safe(run: PointId) -> str:
    return run if _PLAIN_RUN.fullmatch(run) else digest_id("run", [run])


def target_path(home: str, volume: VolumeId, run: PointId) -> str:
    """Path of the tag that ``run`` makes for ``volume``: always the same, so that a rerun finds it."""
    root, inner = split(volume)
    return os.path.join(home, FOLDER, f"{_hash(root)}.{_hash(inner)}.{_safe(run)}{reflink_store.SUFFIX}")


def snapshot_path(target: str) -> str:
    """The snapshot that the tag at ``target`` is of."""
    folder, name = os.path.split(target)
    root, _, run, _ = name.split(".")
    return os.path.join(folder, f"{root}.{run}{SNAPSHOT}")


# --- S --------------------------------------------------------------------------------------------


def subvolume_root(path: str) -> str | None:
    """Root directory of the subvolume that holds the real ``path``; None when it cannot be reached from here.

    So it is where only a directory of the subvolume is mounted. Raises OSError.
    """
    folder = os.path.dirname(path)
    device = os.stat(path, follow_symlinks=False).st_dev
    while True:
        found = os.stat(folder, follow_symlinks=False)
        if found.st_dev != device:
            return None
        if found.st_ino == btrfs_ioctl.ROOT_INODE:
            return folder
        if folder == "/":
            return None
        folder = os.path.dirname(folder)


def is_root(path: str) -> bool:
    """Whether the root directory of a subvolume is at ``path`` now."""
    with contextlib.suppress(OSError), _directory(path) as fd:
        return os.fstat(fd).st_ino == btrfs_ioctl.ROOT_INODE and ioctl.btrfs_id(fd) is not None
    return False


def home_of(root: str) -> str:
    """Where the folder for targets of the subvolume at ``root`` is made: beside it, or in it. Raises OSError."""
    parent = os.path.dirname(root)
    if root == parent or not os.access(parent, os.W_OK | os.X_OK):
        return root
    with _directory(root) as mine, _directory(parent) as above:
        return parent if ioctl.btrfs_id(mine) == ioctl.btrfs_id(above) else root


def homes(volume: VolumeId) -> tuple[str, str]:
    """Both places where targets of ``volume`` may lie."""
    root, _ = split(volume)
    return root, os.path.dirname(root)


@contextmanager
def _directory(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def incarnation_of(fd: int) -> str:
    """Which file of which subvolume: another one when either was recreated. The same in S and in its snapshots.

    Raises OSError.
    """
    return _incarnation(fd, btrfs_ioctl.subvolume_of(fd).uuid)


def _incarnation(fd: int, subvolume: str) -> str:
    return f"{ioctl.fs_uuid(fd)}.{subvolume}.{os.fstat(fd).st_ino}.{ioctl.generation(fd)}"


# --- T --------------------------------------------------------------------------------------------


def take(root: str, path: str) -> None:
    """The instant: the snapshot ``path`` of the subvolume at ``root``. Raises OSError."""
    folder, name = os.path.split(path)
    with _directory(root) as source, _directory(folder) as fd:
        btrfs_ioctl.snapshot(source, fd, name)


def remove_snapshot(path: str) -> bool:
    """Remove a snapshot, durably. False when it was not there. Raises OSError."""
    folder, name = os.path.split(path)
    try:
        with _directory(folder) as fd:
            _destroy(fd, path, name)
            os.fsync(fd)
    except FileNotFoundError:
        return False
    return True


def _destroy(folder_fd: int, path: str, name: str) -> None:
    """Whoever is not root may delete none that is read-only."""
    try:
        btrfs_ioctl.destroy(folder_fd, name)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        with _directory(path) as top:
            btrfs_ioctl.make_writable(top)
        btrfs_ioctl.destroy(folder_fd, name)


def remove(target: str) -> bool:
    """Remove a tag, after the snapshot when it is the last tag of it, durably. False when it was not there.

    Two that remove the last two tags at once take turns: one of them removes the snapshot. Raises OSError.
    """
    folder = os.path.dirname(target)
    try:
        with _directory(folder) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not os.path.lexists(target):
                return False
            if not _others(fd, target):
                remove_snapshot(snapshot_path(target))
            os.unlink(target)
            os.fsync(fd)
    except FileNotFoundError:
        return False
    _remove_folder(folder)
    return True


def _others(folder_fd: int, target: str) -> bool:
    """Whether another tag is of the same snapshot."""
    snapshot = snapshot_path(target)
    tags = (name for name in os.listdir(folder_fd) if _is_tag(name) and name != os.path.basename(target))
    return any(snapshot_path(os.path.join(os.path.dirname(target), name)) == snapshot for name in tags)


def _is_tag(name: str) -> bool:
    return name.endswith(reflink_store.SUFFIX) and name.count(".") == 3


def _remove_folder(folder: str) -> None:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM):
            return
        raise
    sync_directory(os.path.dirname(folder))


def open_in_snapshot(target: Target) -> int:
    """The file of ``target`` in its snapshot, open for reading, when it is the file that S was. Raises TargetLost."""
    _, inner = split(target.volume)
    try:
        with _directory(snapshot_path(target.id)) as top:
            made = btrfs_ioctl.subvolume_of(top)
            if not made.read_only:
                raise TargetLost(target=target.id, reason="its snapshot has been made writable")
            fd = open_beneath(top, inner, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise TargetLost(target=target.id, reason=f"its snapshot: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or _incarnation(fd, made.parent_uuid) != target.incarnation:
            raise TargetLost(target=target.id, reason="its snapshot holds another file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_taken(target: Target) -> tuple[int, Record]:
    """The file of a completed target, open for reading, and the tag. Raises TargetLost."""
    tag_fd, record = open_record(target)
    os.close(tag_fd)
    if not record.taken:
        raise TargetLost(target=target.id, reason="the snapshot was never completed")
    fd = open_in_snapshot(target)
    size = os.fstat(fd).st_size
    if size != record.size:
        os.close(fd)
        raise TargetLost(target=target.id, reason=f"it has {size} bytes instead of {record.size}")
    return fd, record


def scan(home: str) -> tuple[list[reflink_store.Found], list[reflink_store.Stray]]:
    """Targets in the folder of ``home``, and what else is there. No folder: nothing."""
    found, strays = reflink_store.scan(home, FOLDER)
    kept = {snapshot_path(one.path) for one in found if _is_tag(os.path.basename(one.path))}
    return found, [one for one in strays if one.path not in kept]
