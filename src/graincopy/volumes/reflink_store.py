"""What the reflink driver leaves on storage (stages 4 and 9): clone files, and their tags.

A target of ``DIR/NAME`` is the file ``DIR/.graincopy/<hash of NAME>.<run>.target``, mode 0600 in a folder of mode
0700. Its tag is a JSON record in the extended attribute ``user.graincopy.target``; the file gets its name (linkat
of an O_TMPFILE) only when it has its tag, so that a crash leaves either nothing or a tagged, empty file. What is in
the folder and is not ours is left alone and reported.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from graincopy.core.ids import VolumeId, digest_id
from graincopy.model.snapshot import Target, TargetTag
from graincopy.volumes import ioctl
from graincopy.volumes.places import sync_directory

FOLDER = ".graincopy"
SUFFIX = ".target"
ATTRIBUTE = "user.graincopy.target"
_LONGEST_PLAIN = 4096  # bytes of a tag that is stored as it is; Btrfs takes no attribute beyond 16 KiB
_LONGEST_TAG = 1 << 24  # bytes of a tag after decompression: a damaged one must not eat the memory
_ATTEMPTS = 8  # somebody may remove the empty folder between our opening it and our putting something there
_PLAIN_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The tag as it lies on storage. ``volume`` and ``size`` are of S; ``taken``: the clone is complete and durable."""

    format: int = 1
    volume: bytes  # VolumeId; undecodable bytes of the path as they are
    incarnation: str
    size: int = 0
    taken: bool = False
    tag: TargetTag

    def target(self, path: str, driver: str) -> Target:
        """What lies at ``path``, as the target that ``driver`` made."""
        return Target(
            id=path,
            driver=driver,
            volume=VolumeId(os.fsdecode(self.volume)),
            size=self.size,
            incarnation=self.incarnation,
            tag=self.tag,
        )


class Stray(msgspec.Struct, frozen=True):
    """Something in a folder of ours that is not ours, or is damaged. It is never deleted."""

    path: str
    reason: str


class Found(msgspec.Struct, frozen=True):
    """A target on storage."""

    path: str
    record: Record


# --- names ----------------------------------------------------------------------------------------


def target_path(source: str, run: str) -> str:
    """Path of the target that ``run`` makes of ``source``: always the same, so that a rerun finds it."""
    directory, name = os.path.split(source)
    safe_run = run if _PLAIN_RUN.fullmatch(run) else digest_id("run", [run])
    return os.path.join(directory, FOLDER, f"{digest_id('reflink', [name])[:16]}.{safe_run}{SUFFIX}")


@contextmanager
def _folder(path: str, create: bool) -> Iterator[int]:
    """Descriptor of the folder ``path``, checked to be nobody else's. Raises OSError; EPERM when it is somebody's."""
    if create:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        else:
            sync_directory(os.path.dirname(path))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise OSError(errno.EPERM, f"{path} belongs to another user or can be written by one")
        yield fd
    finally:
        os.close(fd)


# --- the record -----------------------------------------------------------------------------------


def write_record(fd: int, record: Record) -> None:
    """Put ``record`` on the open target, replacing another one at once. Not durable before fsync. Raises OSError."""
    data = msgspec.json.encode(record)
    os.setxattr(fd, ATTRIBUTE, data if len(data) <= _LONGEST_PLAIN else zlib.compress(data))


def read_record(fd: int) -> Record:
    """The record of an open target. Raises ValueError when there is none, or it is damaged or of another format."""
    try:
        data = os.getxattr(fd, ATTRIBUTE)
    except OSError as error:
        raise ValueError(f"it has no tag ({error.strerror})") from error
    try:
        if not data.startswith(b"{"):
            data = zlib.decompressobj().decompress(data, _LONGEST_TAG)
        record = msgspec.json.decode(data, type=Record)
    except (msgspec.MsgspecError, zlib.error) as error:
        raise ValueError(f"its tag is damaged ({error})") from error
    if record.format != 1:
        raise ValueError(f"its tag has the unknown format {record.format}")
    return record


def open_target(path: str, writable: bool = False) -> int:
    """Open a target by path; nothing but a regular file, never through a link. Raises OSError."""
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


# --- verbs ----------------------------------------------------------------------------------------


def create_target(path: str, record: Record, flags: int) -> Record:
    """Make the tagged, empty, durable target ``path``, or find it; gives the record that it has.

    ``flags`` are the FS_*_FL flags of S; a clone must agree with S on NOCOW. Raises OSError, and ValueError when
    something else has the name.
    """
    folder = os.path.dirname(path)
    for _ in range(_ATTEMPTS):
        try:
            with _folder(folder, create=True) as fd, _removed_if_empty(folder):
                return _link_tagged(fd, path, record, flags)
        except FileNotFoundError:
            continue  # another run removed the folder because it was empty
    raise OSError(errno.EAGAIN, f"{folder} keeps being removed")


@contextmanager
def _removed_if_empty(folder: str) -> Iterator[None]:
    """What is raised inside leaves no empty folder of ours."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        raise


def _link_tagged(folder: int, path: str, record: Record, flags: int) -> Record:
    fd = nameless(f"/proc/self/fd/{folder}", flags)
    try:
        write_record(fd, record)
        os.fsync(fd)
        try:
            os.link(f"/proc/self/fd/{fd}", os.path.basename(path), dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            record = _existing(path, record)
        else:
            os.fsync(fd)  # on Btrfs the new name is the inode's, too
        os.fsync(folder)
        return record
    finally:
        os.close(fd)


def nameless(folder: str, flags: int) -> int:
    """An empty file in ``folder`` that has no name (O_TMPFILE), open for writing. Raises OSError.

    It gets the NOCOW flag if S (``flags``) has it and loses it if not: Btrfs refuses a clone between the two kinds.
    """
    fd = os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    try:
        mine = ioctl.inode_flags(fd)
        wanted = mine & ~ioctl.FS_NOCOW_FL | flags & ioctl.FS_NOCOW_FL
        if mine != wanted:
            ioctl.set_inode_flags(fd, wanted)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _existing(path: str, wanted: Record) -> Record:
    """The record of the target that has the name already; replaced by ``wanted`` when it was never completed."""
    fd = open_target(path, writable=True)
    try:
        found = read_record(fd)
        if found.volume != wanted.volume or found.tag.run != wanted.tag.run:
            raise ValueError(f"{path} is a target of something else")
        if not found.taken:
            os.ftruncate(fd, 0)
            write_record(fd, wanted)
            os.fsync(fd)
            return wanted
        return found
    finally:
        os.close(fd)


def remove_target(path: str) -> bool:
    """Remove the target, and the folder when it is empty, durably. False when it was not there. Raises OSError."""
    folder, parent = os.path.dirname(path), os.path.dirname(os.path.dirname(path))
    try:
        os.unlink(path)
    except FileNotFoundError:
        was_there = False
    else:
        was_there = True
        sync_directory(folder)
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return was_there
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise
        return was_there
    sync_directory(parent)
    return was_there


def scan(directory: str, name: str = FOLDER) -> tuple[list[Found], list[Stray]]:
    """Targets in the folder ``name`` of ``directory``, and what else is in the folder. No folder: nothing."""
    folder = os.path.join(directory, name)
    found: list[Found] = []
    strays: list[Stray] = []
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return found, strays
    except OSError as error:
        return found, [Stray(folder, f"it cannot be listed ({error.strerror})")]
    for name in names:
        path = os.path.join(folder, name)
        try:
            found.append(Found(path, _record_at(path)))
        except FileNotFoundError:
            continue  # deleted meanwhile
        except (OSError, ValueError) as error:
            strays.append(Stray(path, error.strerror if isinstance(error, OSError) and error.strerror else str(error)))
    return found, strays


def _record_at(path: str) -> Record:
    if not path.endswith(SUFFIX):
        raise ValueError("it is not named as a target is")
    fd = open_target(path)
    try:
        return read_record(fd)
    finally:
        os.close(fd)
