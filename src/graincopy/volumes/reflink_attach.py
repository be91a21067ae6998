"""Targets that are files, opened; a file system on one is attached once, however many of its files are open (stage 7).

One that was not frozen cleanly is replayed on a throw-away clone of T, which has no name and is gone with its last
user. There metadata lies elsewhere than T's change map knows (with data=journal even file content does), so nothing
in it is tied to volume offsets: all of it is opaque, and is compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import msgspec
import numpy as np

from graincopy.core.errors import AttachFailed, Unsupported
from graincopy.core.placement import Placement, State
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.volumes import ioctl, reflink_store
from graincopy.volumes.attach import AttachedFileSystem, attach, replay, unclean
from graincopy.volumes.base import FileImage
from graincopy.volumes.image import FdImage
from graincopy.volumes.reflink_clone import failures, identity_placement, open_taken
from graincopy.volumes.reflink_store import Record

_Key = tuple[str, str, int, int]
Opened = Callable[[Target], tuple[int, Record]]  # a completed target, open for reading. Raises TargetLost


class _Attachment(msgspec.Struct):
    file_system: AttachedFileSystem
    replayed: bool
    users: int = 0


class Attachments:
    """The attached file systems of one driver object. Safe to use from several threads.

    Beside the path that is a target's id a nameless clone of it can be made.
    """

    def __init__(self, opened: Opened = open_taken) -> None:
        self._opened = opened
        self._attached: dict[_Key, _Attachment] = {}
        self._lock = Lock()

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        """The file of ``claim`` in ``target``: all of it, where S is the file by itself.

        Raises TargetLost, AttachFailed, SourceChanged, TargetNoSpace.
        """
        if claim.inner_path is None:
            fd, record = self._opened(target)
            with FdImage(fd, record.size, lambda: identity_placement(fd, record.size)) as image:
                yield image
            return
        with self._use(target, claim) as attachment:
            image = attachment.file_system.open_file(claim.inner_path, claim.path)
            try:
                yield _untied(image) if attachment.replayed else image
            finally:
                image.close()

    @contextmanager
    def open_folder(self, target: Target, claim: Claim) -> Iterator[int]:
        """The folder of ``claim`` in ``target``.

        Raises TargetLost, AttachFailed, SourceChanged, TargetNoSpace; Unsupported where S is a file by itself.
        """
        if claim.inner_path is None:
            raise Unsupported(driver=target.driver, power="show folders of a volume that is a file by itself")
        with self._use(target, claim) as attachment:
            fd = attachment.file_system.open_folder(claim.inner_path, claim.path)
            try:
                yield fd
            finally:
                os.close(fd)

    @contextmanager
    def _use(self, target: Target, claim: Claim) -> Iterator[_Attachment]:
        key = (target.id, claim.fs_type or "", claim.fs_offset, claim.fs_size)
        with self._lock:
            attachment = self._attached.get(key)
            if attachment is None:
                attachment = self._attached[key] = _attach(target, key, self._opened)
            attachment.users += 1
        try:
            yield attachment
        finally:
            with self._lock:
                attachment.users -= 1
                if not attachment.users:
                    del self._attached[key]
                    attachment.file_system.close()


def _attach(target: Target, key: _Key, opened: Opened) -> _Attachment:
    _, fs_type, offset, size = key
    fd, _ = opened(target)
    try:
        path = f"/proc/self/fd/{fd}"
        if unclean(path, fs_type, offset) is None:
            return _Attachment(attach(path, fs_type, offset, size), replayed=False)
        throw_away = _throw_away(target, fd)
        try:
            name = f"/proc/self/fd/{throw_away}"
            replay(name, fs_type, offset, size)
            return _Attachment(attach(name, fs_type, offset, size), replayed=True)
        finally:
            os.close(throw_away)  # the loop device keeps it
    except AttachFailed as failure:
        raise AttachFailed(volume=target.volume, reason=failure.facts["reason"]) from failure
    finally:
        os.close(fd)


def _throw_away(target: Target, fd: int) -> int:
    """A nameless clone of the open ``target``."""
    with failures(target.volume):
        clone = reflink_store.nameless(os.path.dirname(target.id), ioctl.inode_flags(fd))
        try:
            ioctl.clone(fd, clone)
        except BaseException:
            os.close(clone)
            raise
    return clone


def _untied(image: FdImage) -> FileImage:
    """``image`` with nothing written in it tied to a volume offset."""

    def placement() -> Placement:
        found = image.placement()
        states = np.where(found.states == State.WRITTEN, State.OPAQUE, found.states).astype(np.uint8)
        return Placement(found.size, found.starts, found.stops, found.volume, states)

    return FdImage(image.fd, image.size, placement)
