"""T as a LUN of this host, and its file system readable, once however many of its files are open (stage 7).

A T that is kept beyond its run (undo, view) is taken off this host with its last user, because it has the UUIDs of S;
that of a run in progress stays until it is deleted. An array that does not let it go yet keeps it mapped, read-only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock

import msgspec

from graincopy.core.errors import AttachFailed
from graincopy.core.placement import Placement
from graincopy.model.snapshot import Role, Target
from graincopy.model.volume import Claim
from graincopy.volumes.attach import AttachedFileSystem, attach
from graincopy.volumes.base import FileImage
from graincopy.volumes.flashcopy import names, wire
from graincopy.volumes.flashcopy.console import Console, Refused
from graincopy.volumes.flashcopy.host import HostDevices
from graincopy.volumes.flashcopy.provision import require_alive
from graincopy.volumes.flashcopy.teardown import Teardown
from graincopy.volumes.image import FdImage

_Where = tuple[str, int, int]


class _Attached(msgspec.Struct):
    """One T on this host: its device, and the file systems on it that are mounted."""

    device: str
    file_systems: dict[_Where, AttachedFileSystem] = msgspec.field(default_factory=dict)
    users: int = 0


class Attachments:
    """The targets of one array that this driver object shows. Safe to use from several threads."""

    def __init__(self, console: Console, devices: HostDevices, teardown: Teardown) -> None:
        self._console, self._devices, self._teardown = console, devices, teardown
        self._attached: dict[str, _Attached] = {}
        self._lock = Lock()

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        """The file of ``claim`` in ``target``. Raises TargetLost, AttachFailed, SourceChanged."""
        name = names.split_target(target.id)[1]

        def verify() -> None:
            require_alive(self._console, name, target.id)

        with self._use(target, name) as attached:
            image = self._image(attached, target, claim)
            try:
                yield FdImage(image.fd, image.size, image.placement, verify)
            finally:
                image.close()

    @contextmanager
    def open_folder(self, target: Target, claim: Claim) -> Iterator[int]:
        """Descriptor of the folder at ``claim.inner_path`` in ``target``. Raises as :meth:`open` does."""
        with self._use(target, names.split_target(target.id)[1]) as attached:
            fd = self._file_system(attached, claim).open_folder(claim.inner_path or "", claim.path)
            try:
                yield fd
            finally:
                os.close(fd)

    def _image(self, attached: _Attached, target: Target, claim: Claim) -> FdImage:
        if claim.inner_path is None:
            fd = os.open(attached.device, os.O_RDONLY | os.O_CLOEXEC)
            return FdImage(fd, target.size, partial(Placement.identity, target.size))
        return self._file_system(attached, claim).open_file(claim.inner_path, claim.path)

    def _file_system(self, attached: _Attached, claim: Claim) -> AttachedFileSystem:
        where = (claim.fs_type or "", claim.fs_offset, claim.fs_size)
        with self._lock:
            file_system = attached.file_systems.get(where)
            if file_system is None:
                file_system = attached.file_systems[where] = attach(attached.device, *where)
        return file_system

    @contextmanager
    def _use(self, target: Target, name: str) -> Iterator[_Attached]:
        with self._lock:
            attached = self._attached.get(name)
            if attached is None:
                attached = self._attached[name] = _Attached(self._show(target, name))
            attached.users += 1
        try:
            yield attached
        finally:
            with self._lock:
                attached.users -= 1
                if not attached.users:
                    del self._attached[name]
                    self._leave(target, name, attached)

    def _show(self, target: Target, name: str) -> str:
        """Map T to this host; the path of its device."""
        vdisk = require_alive(self._console, name, target.id)
        host = self._teardown.host_name
        try:
            self._console.until(partial(self._is_shown, name, host), wire.show_to_host(name, host))
        except Refused as refused:
            reason = f"array {self._console.name} refused {refused.command[0]}: {refused.message}"
            raise AttachFailed(volume=target.volume, reason=reason) from refused
        return self._devices.attach(vdisk.uid, target.size, target.volume)

    def _is_shown(self, name: str, host: str) -> bool | None:
        return True if any(each.host == host for each in self._console.shown_to(name)) else None

    def _leave(self, target: Target, name: str, attached: _Attached) -> None:
        for file_system in attached.file_systems.values():
            file_system.close()
        if target.tag.role in (Role.UNDO, Role.VIEW):
            self._teardown.hide(name)
