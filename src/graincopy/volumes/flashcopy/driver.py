"""The flashcopy driver (stages 3-7, 9): S is a vdisk of an IBM Storage Virtualize array, T a thin vdisk that maps it.

The array exports no changes, so there is no change map and no checkpoint: files are compared. One live T per S; who
comes second waits as long as the configuration says, and is refused then. A group of one array has one instant
(``startfcconsistgrp``); several arrays have one only inside the freeze window.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import msgspec

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError, SnapshotFailed, VolumeUnsupported
from graincopy.core.ids import VolumeId
from graincopy.model.snapshot import Absent, Deleted, Role, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes import live
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.flashcopy import names, provision
from graincopy.volumes.flashcopy.attached import Attachments
from graincopy.volumes.flashcopy.claims import DRIVER, claim_path
from graincopy.volumes.flashcopy.connection import Connection
from graincopy.volumes.flashcopy.console import Console
from graincopy.volumes.flashcopy.deferred import Note, Notes
from graincopy.volumes.flashcopy.host import HostDevices
from graincopy.volumes.flashcopy.listing import list_targets, target_of
from graincopy.volumes.flashcopy.provision import Pair
from graincopy.volumes.flashcopy.teardown import Teardown
from graincopy.volumes.flashcopy.wire import Vdisk
from graincopy.volumes.mounts import read_mounts, refuse_unmounted
from graincopy.volumes.topology import HostFiles

_STALE = 86400.0  # seconds after which a note about a T that was never made is dropped


class ArrayTerms(msgspec.Struct, frozen=True, kw_only=True):
    """One configured array. ``pool`` empty: T lies in S's pool; ``wait``: seconds for another T of S to go."""

    name: str
    host_name: str  # what the array calls this host
    notes_folder: str
    pool: str = ""
    wait: float = 0.0


class _Array(msgspec.Struct, frozen=True):
    terms: ArrayTerms
    console: Console
    notes: Notes
    teardown: Teardown
    attachments: Attachments


class _Handle(msgspec.Struct, frozen=True):
    """What the instant needs for one array: the group, its sources, and whether it was started before."""

    array: str
    group: str
    volumes: tuple[VolumeId, ...]
    taken: bool


class FlashCopyDriver(VolumeDriver):
    """Volumes of all configured arrays; ``connections`` by the arrays' names."""

    name: ClassVar[str] = DRIVER

    def __init__(
        self,
        terms: Sequence[ArrayTerms],
        connections: Mapping[str, Connection],
        devices: HostDevices,
        clock: Clock,
        host: HostFiles | None = None,
    ) -> None:
        self._devices, self._clock = devices, clock
        self._host = host or HostFiles()
        self._arrays = {one.name: self._array(one, connections[one.name]) for one in terms}
        self._known: dict[str, str] = {}  # uid → array: a vdisk never moves to another array

    def _array(self, terms: ArrayTerms, connection: Connection) -> _Array:
        console, notes = Console(terms.name, connection, self._clock), Notes(terms.notes_folder)
        teardown = Teardown(console, notes, self._devices, terms.host_name)
        return _Array(terms, console, notes, teardown, Attachments(console, self._devices, teardown))

    def close(self) -> None:
        """Hang up; any verb connects again."""
        for array in self._arrays.values():
            array.console.close()

    def capabilities(self) -> VolumeCapabilities:
        return VolumeCapabilities(
            group_instant=len(self._arrays) == 1, block_device=True, freeze="outside", live_targets=1
        )

    # --- stage 3: S -------------------------------------------------------------------------------

    def resolve(self, path: str) -> Claim | Refusal:
        """Raises ArrayUnreachable and the like when ``path`` lies on a LUN and no array can say that it is its own."""
        return claim_path(path, self._host, self._devices, self._array_of)

    def _array_of(self, uid: str) -> str | None:
        """An array that is down stands in nobody's way whose LUN another one knows."""
        failure: GraincopyError | None = None
        for name, array in self._arrays.items():
            try:
                if uid not in self._known and any(each.uid == uid for each in array.console.vdisks()):
                    self._known[uid] = name
            except GraincopyError as error:
                failure = error
        try:
            if uid not in self._known and failure is not None:
                raise failure
        finally:
            failure = None  # a frame that holds its own traceback is collected late, and the connection with it
        return self._known.get(uid)

    def describe(self, volume: VolumeId) -> SourceVolume:
        found = provision.find_source(self._of(volume).console, volume)
        return SourceVolume(id=volume, driver=self.name, size=found.size, incarnation=found.uid)

    # --- stages 4 and 5: T ------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        """Targets are on the array, empty; their groups are ``prepared``: sources flushed, ready to start."""
        made: list[Target] = []
        handles: list[_Handle] = []
        try:
            for name in dict.fromkeys(names.split_volume(volume)[0] for volume in volumes):
                members = [volume for volume in volumes if names.split_volume(volume)[0] == name]
                handles.append(self._prepare_on(self._of(members[0]), members, tag, made))
        except BaseException as error:
            self._take_back(made, error)
            raise
        predicted = sum(provision.predicted_ms(self._arrays[each.array].console) for each in handles)
        return PreparedGroup(tuple(made), handle=tuple(handles), predicted_ms=predicted)

    def _take_back(self, made: Sequence[Target], error: BaseException) -> None:
        for target in made:
            try:
                self.delete(target)
            except (GraincopyError, OSError) as problem:
                error.add_note(f"target {target.id} could not be deleted: {problem}")

    def _prepare_on(self, array: _Array, volumes: Sequence[VolumeId], tag: TargetTag, made: list[Target]) -> _Handle:
        console, all_of = array.console, ", ".join(volumes)
        pairs = [self._pair(array, volume, tag) for volume in volumes]
        group = names.group_name(tag.run, (each.source.uid for each in pairs))
        self._forget_stale(array)
        for pair in pairs:
            self._await_room(array, pair, 0.0 if tag.role is Role.VIEW else array.terms.wait)
        for pair in pairs:
            note = Note(
                name=pair.target, volume=pair.volume, size=pair.source.size, incarnation=pair.source.uid, tag=tag
            )
            made.append(target_of(console.name, array.notes.put(note)))
            provision.make_target(console, pair, array.terms.pool)
        provision.make_maps(console, pairs, group)
        for pair in pairs:  # each makes its mapping first and looks then: of two at least one sees the other
            provision.refuse_busy(console, array.notes, pair)
        for pair in pairs:
            self._flush(pair.source)
        taken = provision.prepare(console, group, all_of)
        return _Handle(array.terms.name, group, tuple(volumes), taken)

    def _pair(self, array: _Array, volume: VolumeId, tag: TargetTag) -> Pair:
        source = provision.find_source(array.console, volume)
        if names.is_target(source.name):
            raise SnapshotFailed(volume=volume, reason=f"{source.name} is itself a target of graincopy")
        return Pair(volume, source, names.target_name(tag.run, source.uid))

    def _await_room(self, array: _Array, pair: Pair, patience: float) -> None:
        """Until no other T lives on S. Raises VolumeBusy after ``patience`` seconds (a view does well without T)."""

        def free() -> bool | None:
            array.teardown.remove_doomed()
            return True if provision.holder_of(array.console, array.notes, pair) is None else None

        if array.console.wait(free, patience) is None:
            provision.refuse_busy(array.console, array.notes, pair)

    def _forget_stale(self, array: _Array) -> None:
        """Notes about targets that were never made, because somebody died in between."""
        there = {each.name for each in array.console.vdisks()}
        for note in list(array.notes.all()):
            if note.name not in there and not note.doomed and self._clock.now() - note.tag.created > _STALE:
                array.notes.forget(note.name)

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        handles = group.handle if isinstance(group.handle, tuple) else ()
        for each in handles:
            console = self._arrays[each.array].console
            for volume in each.volumes:
                self._flush_raw(names.split_volume(volume)[1])
            if not each.taken:
                provision.start(console, each.group, ", ".join(each.volumes))
        return group.targets

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        """The array made it durable; what is looked at is that every T really can be read. Raises TargetLost."""
        for target in targets:
            array, name = self._at(target.id)
            provision.require_alive(array.console, name, target.id)
        return tuple(targets)

    def _flush(self, source: Vdisk) -> None:
        self._flush_raw(source.uid)

    def _flush_raw(self, uid: str) -> None:
        """What this host caches of a LUN that is used as a device. A mounted one is flushed by the freeze window."""
        path = self._devices.find(uid)
        if path is None or self._is_mounted(path):
            return
        try:
            self._devices.flush(uid)
        except OSError as error:
            raise SnapshotFailed(volume=path, reason=f"it cannot be flushed: {error.strerror}") from error

    def _is_mounted(self, path: str) -> bool:
        number = os.stat(path).st_rdev
        return any(mount.device == f"{os.major(number)}:{os.minor(number)}" for mount in read_mounts(self._host.proc))

    # --- stages 6 and 7: reading ------------------------------------------------------------------

    def open(self, target: Target, claim: Claim) -> AbstractContextManager[FileImage]:
        array, _ = self._at(target.id)
        return array.attachments.open(target, claim)

    def open_folder(self, target: Target, claim: Claim) -> AbstractContextManager[int]:
        array, _ = self._at(target.id)
        return array.attachments.open_folder(target, claim)

    # --- stage 9 ----------------------------------------------------------------------------------

    def delete(self, target: Target) -> Deleted | Absent:
        """T is doomed durably on return, and gone if the array lets it go now; otherwise every later run tries again.

        Raises ArrayUnreachable and the like: T stays doomed then too.
        """
        array, name = self._at(target.id)
        return Deleted() if array.teardown.remove(name) else Absent()

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """Everything on the arrays that is called as ours is, of whatever host. What is not noted here has no owner."""
        return tuple(target for array in self._arrays.values() for target in list_targets(array.console, array.notes))

    # --- the way back -----------------------------------------------------------------------------

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        """Raises VolumeUnsupported when the path no longer leads to the LUN that the claim is about."""
        refuse_unmounted(claim)
        if claim.identity:
            uid, device = names.split_volume(claim.volume)[1], os.path.basename(os.path.realpath(claim.path))
            if self._devices.uid_of(device) != uid:
                raise VolumeUnsupported(path=claim.path, reason=f"the device is not the LUN {uid} any more")
        return live.open_sink(os.path.realpath(claim.path) if claim.identity else claim.path)

    # --- arrays -----------------------------------------------------------------------------------

    def _of(self, volume: VolumeId) -> _Array:
        name = names.split_volume(volume)[0]
        if name not in self._arrays:
            raise SnapshotFailed(volume=volume, reason=f"no array {name} is configured")
        return self._arrays[name]

    def _at(self, target_id: str) -> tuple[_Array, str]:
        array, name = names.split_target(target_id)
        return self._of(names.volume_id(array, "")), name
