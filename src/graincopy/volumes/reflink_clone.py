"""One S and one T of the reflink driver: names, incarnation, the clone itself, and reading its tag (stages 3-5).

FICLONE: linux/fs.h, ioctl_ficlone(2). Everything here works on one volume; the driver works on groups.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from graincopy.core.errors import SnapshotFailed, SourceChanged, TargetLost, TargetNoSpace
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement
from graincopy.model.snapshot import Target, TargetTag
from graincopy.volumes import ioctl, reflink_store
from graincopy.volumes.fiemap import count_extents, read_placement, unshared_bytes
from graincopy.volumes.loop import loops_of
from graincopy.volumes.mounts import read_mounts
from graincopy.volumes.places import sync_directory
from graincopy.volumes.reflink_store import Record

PREFIX = "reflink:"
CLONE_MS = 3.0  # a clone of next to nothing
CLONE_MS_PER_EXTENT = 0.013  # every extent linked anew
WARM_MS_PER_EXTENT = 0.0015  # extents that T shares already, on XFS
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_WARM_EXTENTS = 512  # per piece: writers of S wait for about 8 ms
_RESIZE_ATTEMPTS = 3


# --- S ----------------------------------------------------------------------------------------------


def incarnation_of(fd: int) -> str:
    """What no other file of this name will ever have: file system, inode and its generation. Raises OSError."""
    return f"{ioctl.fs_uuid(fd)}.{os.fstat(fd).st_ino}.{ioctl.generation(fd)}"


def identity_placement(fd: int, size: int) -> Placement:
    """Placement of a file that is the volume: every range lies where it is, in the state that FIEMAP tells."""
    found = read_placement(fd, size)
    return Placement(size, found.starts, found.stops, found.starts, found.states)


def source_path(volume: VolumeId) -> str:
    """Real path of the file that is S."""
    return volume.removeprefix(PREFIX)


def open_source(path: str) -> int:
    """Descriptor of S (or of a raw device over it), for reading. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def opened(path: str) -> Iterator[int]:
    """:func:`open_source` for as long as the ``with`` lasts."""
    fd = open_source(path)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def failures(volume: str) -> Iterator[None]:
    """OSError and ValueError about ``volume`` as what the contract names."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise TargetNoSpace(volume=volume) from error
        raise SnapshotFailed(volume=volume, reason=error.strerror or str(error)) from error
    except ValueError as error:
        raise SnapshotFailed(volume=volume, reason=str(error)) from error


def raw_devices(source: str) -> tuple[str, ...]:
    """Loop devices over ``source`` that are not mounted themselves: what is in their page cache, S does not have."""
    found = os.stat(source)
    mounted = {mount.device for mount in read_mounts()}
    return tuple(f"/dev/{name}" for name in loops_of(found.st_dev, found.st_ino) if _number(name) not in mounted)


def _number(name: str) -> str:
    with open(f"/sys/block/{name}/dev", "rb") as file:
        return file.read().strip().decode()


def flush(devices: Sequence[str]) -> None:
    """Write the page cache of raw devices into S. One that may not be opened stays as after a power cut."""
    for device in devices:
        try:
            with opened(device) as fd:
                os.fsync(fd)
        except PermissionError:
            continue
        except OSError as error:
            raise SnapshotFailed(volume=device, reason=f"it cannot be flushed: {error.strerror}") from error


# --- T ----------------------------------------------------------------------------------------------


def warm(source: int, target: int) -> None:
    """Clone the open S into the open T ahead of time, piece by piece, so that the clone inside the window is short.

    XFS passes over extents that are shared already in a tenth of the time (measured: 1.1 instead of 15 µs each), and
    between two pieces writers get on. Btrfs drops and links every extent anew, so there is nothing to gain. Best
    effort: when S changes meanwhile, the clone itself has more to do. Raises OSError only for want of space.
    """
    if ioctl.xfs_geometry(source) is None:
        return
    size = os.fstat(source).st_size
    cuts = read_placement(source, size, sync=False).starts[_WARM_EXTENTS::_WARM_EXTENTS].tolist()
    for start, stop in itertools.pairwise((0, *cuts, 0)):
        try:
            ioctl.clone_range(source, target, start, max(0, stop - start))
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise
            return


def predict_clone_ms(source: int) -> float:
    """How long :func:`clone_one` will take, in milliseconds, when T was warmed. Raises OSError."""
    extents = count_extents(source)
    return CLONE_MS + extents * (WARM_MS_PER_EXTENT if ioctl.xfs_geometry(source) else CLONE_MS_PER_EXTENT)


def clone_one(target: Target) -> Target:
    """The instant for one volume. Raises SourceChanged, SnapshotFailed or TargetNoSpace."""
    source = source_path(target.volume)
    try:
        source_fd = open_source(source)
    except OSError as error:
        raise SourceChanged(path=source, reason=error.strerror) from error
    try:
        with failures(target.volume):
            if incarnation_of(source_fd) != target.incarnation:
                raise SourceChanged(path=source, reason="it was replaced by another file")
            fd = reflink_store.open_target(target.id, writable=True)
            try:
                return replace(target, size=_clone_whole(source_fd, fd, source))
            finally:
                os.close(fd)
    finally:
        os.close(source_fd)


def _clone_whole(source: int, target: int, path: str) -> int:
    """Make T what S is, to the last byte, and give its size: FICLONE leaves what T has behind the end of S."""
    for _ in range(_RESIZE_ATTEMPTS):
        size = os.fstat(source).st_size
        if os.fstat(target).st_size > size:
            os.ftruncate(target, size)
        ioctl.clone(source, target)
        cloned = os.fstat(target).st_size
        if cloned <= os.fstat(source).st_size:
            return cloned
    raise SourceChanged(path=path, reason="it is being cut short all the time")


def settle_one(target: Target) -> Target:
    """Make one clone durable, together with its tag. Raises TargetLost, SnapshotFailed or TargetNoSpace."""
    fd, record = open_record(target, writable=True)
    try:
        if record.taken:
            return target
        size = os.fstat(fd).st_size
        if size != target.size:
            raise SnapshotFailed(volume=target.volume, reason=f"its target has {size} bytes instead of {target.size}")
        with failures(target.volume):
            # Attribute and clone lie in one log: after a power cut the tag never says more than the clone holds.
            reflink_store.write_record(fd, replace(record, size=size, taken=True))
            os.fsync(fd)
            sync_directory(os.path.dirname(target.id))
    finally:
        os.close(fd)
    return target


def is_taken(target: Target) -> bool:
    """Whether the target is complete and durable."""
    try:
        fd, record = open_record(target)
    except TargetLost:
        return False
    os.close(fd)
    return record.taken


def retag(target: Target, tag: TargetTag) -> Target:
    """Put ``tag`` on it, durably. Raises TargetLost, SnapshotFailed or TargetNoSpace."""
    fd, record = open_record(target, writable=True)
    try:
        record = replace(record, tag=tag)
        with failures(target.volume):
            reflink_store.write_record(fd, record)
            os.fsync(fd)
    finally:
        os.close(fd)
    return record.target(target.id, target.driver)


def open_record(target: Target, writable: bool = False) -> tuple[int, Record]:
    """The target's descriptor and tag. Raises TargetLost."""
    try:
        fd = reflink_store.open_target(target.id, writable)
    except OSError as error:
        raise TargetLost(target=target.id, reason=error.strerror or str(error)) from error
    try:
        return fd, reflink_store.read_record(fd)
    except ValueError as error:
        os.close(fd)
        raise TargetLost(target=target.id, reason=str(error)) from error


def open_taken(target: Target) -> tuple[int, Record]:
    """A completed target, open for reading. Raises TargetLost."""
    fd, record = open_record(target)
    size = os.fstat(fd).st_size
    if record.taken and size == record.size:
        return fd, record
    os.close(fd)
    reason = f"it has {size} bytes instead of {record.size}" if record.taken else "the snapshot was never completed"
    raise TargetLost(target=target.id, reason=reason)


def allocated_of(path: str) -> int:
    """Bytes of the target at ``path`` that no other file shares."""
    return unshared(lambda: reflink_store.open_target(path))


def unshared(opened: Callable[[], int]) -> int:
    """Bytes that nothing else shares (st_blocks counts the shared ones, too) of the file whose descriptor ``opened``
    gives; 0 when that cannot be told."""
    try:
        fd = opened()
    except (OSError, TargetLost):
        return 0
    try:
        return unshared_bytes(fd)
    except OSError:
        return 0
    finally:
        os.close(fd)
