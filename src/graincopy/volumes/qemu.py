"""The qemu driver (stages 3-7, 9): S is what a guest sees of its disk, T the same as it was, inside the guest's QEMU.

The software form of a FlashCopy mapping with copy rate 0: what the guest is about to overwrite goes to a thin scratch
file first (``qemu_live``). When the machine is off, T is what another driver makes of the file, shown through the
stated format (``qemu_rest``). Either way S keeps one name and one kind of checkpoint, a dirty bitmap, so that lineage
goes on when a machine is switched on or off. Notes on disk (``qemu_notes``) carry the tags.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from typing import ClassVar

import numpy as np
from msgspec.structs import replace

from graincopy.core.errors import GraincopyError, SnapshotFailed, TargetLost, TargetNoSpace
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement, State
from graincopy.hypervisor.daemon import StorageDaemon
from graincopy.hypervisor.nbd import DIRTY, NbdClient
from graincopy.model.change_map import Changed, ChangeMap, Unknown
from graincopy.model.snapshot import Absent, Deleted, Role, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.model.workload import Representation
from graincopy.volumes import qemu_rest
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver
from graincopy.volumes.qemu_bitmaps import GRAIN, bitmap_of, frozen_of
from graincopy.volumes.qemu_claims import DRIVER, Claims
from graincopy.volumes.qemu_graph import NoPlace
from graincopy.volumes.qemu_header import HeaderUnfit
from graincopy.volumes.qemu_host import scratch_is_full
from graincopy.volumes.qemu_image import NbdImage
from graincopy.volumes.qemu_notes import CHECKPOINT, LIVE, REST, Note, Notes
from graincopy.volumes.qemu_resting import Resting, Vouched
from graincopy.volumes.qemu_running import Found, QemuPlaces, Running
from graincopy.volumes.qemu_sink import open_guest_sink
from graincopy.volumes.qemu_source import identity, parts


class QemuDriver(VolumeDriver):
    """Disks of running QEMUs, and qcow2 disks of machines that are off. ``below`` hold those still, best first."""

    name: ClassVar[str] = DRIVER

    def __init__(self, places: QemuPlaces, below: Sequence[VolumeDriver] = ()) -> None:
        self._places = places
        self._running = Running(places)
        self._notes = Notes(os.path.join(places.state, "targets"), Note)
        self._resting = Resting(below, self._notes)
        self._claims = Claims(self._running, self._resting)

    def capabilities(self) -> VolumeCapabilities:
        """``group_instant`` holds for the disks of one QEMU: those are the claims of one group."""
        return VolumeCapabilities(group_instant=True, change_map=True, checkpoints=True, grain=GRAIN)

    # --- stage 3: S -------------------------------------------------------------------------------

    def resolve(self, path: str) -> Claim | Refusal:
        """Raw disks of running machines only: of any other format the file's bytes are not what the guest sees."""
        answer = self._claims.resolve(path, "raw")
        return replace(answer, representation=Representation.FILE) if isinstance(answer, Claim) else answer

    def resolve_guest(self, path: str, format: str) -> Claim | Refusal:
        return self._claims.resolve(path, format)

    def describe(self, volume: VolumeId) -> SourceVolume:
        kind, path = parts(volume)
        try:
            found = self._running.find(path)
            size, incarnation = identity(path, kind, found)
        except (HeaderUnfit, NoPlace, OSError) as error:
            raise SnapshotFailed(volume=volume, reason=str(error)) from error
        home = self._places.scratch_folder  # how full it is does not matter: checkpoints do not lie there
        return SourceVolume(id=volume, driver=self.name, size=size, incarnation=incarnation, home=home)

    # --- stages 4 and 5: S → T --------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        made: list[Target] = []
        try:
            for volume in volumes:
                made.append(self._prepare(volume, tag))
        except BaseException:
            for target in made:
                self.delete(target)
            raise
        return PreparedGroup(tuple(made))

    def _prepare(self, volume: VolumeId, tag: TargetTag) -> Target:
        kind, path = parts(volume)
        place = f"{volume}@{tag.run}"
        known = self._notes.find(place)
        if known is not None:
            return known.target
        source = self.describe(volume)
        target = Target(
            id=place, driver=self.name, volume=volume, size=source.size, incarnation=source.incarnation, tag=tag
        )
        note = Note(target=target, path=path, format=kind, mode=REST)
        try:
            found = self._running.find(path)
            return (self._prepare_live(note, found) if found is not None else self._resting.prepare(note)).target
        except NoPlace as error:
            raise SnapshotFailed(volume=volume, reason=str(error)) from error
        except BaseException:
            if self._notes.find(place) is not None:
                self.delete(target)
            raise

    def _prepare_live(self, note: Note, found: Found) -> Note:
        note = replace(
            note,
            mode=LIVE,
            monitor=found.monitor,
            disk=found.disk.disk,
            anchor=found.disk.anchor or "",
            bitmap=bitmap_of(note.target.tag.run),
        )
        note = self._notes.put(self._running.place(note, found))
        if not note.anchor:
            note = self._notes.put(replace(note, anchor=self._running.anchor(found, note.target.volume)))
        self._running.prepare(note, found)
        return note

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        notes = [self._note(target) for target in group.targets]
        self._running.take([note for note in notes if note.mode == LIVE])
        taken = {note.target.id: self._resting.take(note) for note in notes if note.mode == REST}
        return tuple(taken.get(note.target.id, note.target) for note in notes)

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        for target in targets:
            note = self._note(target)
            if note.mode == REST:
                self._resting.settle(note)
        return tuple(targets)

    # --- stages 6 and 7: reading T ------------------------------------------------------------------

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        note = self._note(target)
        with self._shown(note) as (socket, export, _):
            lost = partial(_lost, note)
            if note.mode == LIVE:
                zeros = partial(self._running.zeros, note, socket)
                with closing(NbdImage(socket, export, target.size, lost, GRAIN, zeros)) as image:
                    yield image
            else:
                with closing(NbdImage(socket, export, target.size, lost)) as image:
                    yield Vouched(image, partial(self._resting.verify, note))

    @contextmanager
    def _shown(self, note: Note, wanted: Sequence[str] = ()) -> Iterator[tuple[str, str, StorageDaemon | None]]:
        """NBD socket and export at which T is readable."""
        if note.mode == CHECKPOINT:
            raise TargetLost(target=note.target.id, reason="a checkpoint of this driver keeps a bitmap and no data")
        if note.mode == LIVE:
            yield self._running.show(note), note.key, None
            return
        with (
            self._resting.image(note) as image,
            qemu_rest.shown(note.target.volume, note.path, image.fd, wanted) as (daemon, socket),
        ):
            yield socket, qemu_rest.EXPORT, daemon

    def changed(self, base: Target, now: Target) -> ChangeMap:
        """What the bitmap that began with ``base`` knew at the instant of ``now``."""
        old, new = self._notes.find(base.id), self._note(now)
        if old is None:
            return Unknown("the checkpoint is gone")
        if base.incarnation != now.incarnation:
            return Unknown("the disk was replaced")
        if old.bitmap is None or (old.mode == REST and old.why):
            return Unknown(old.why or "the checkpoint has no bitmap")
        return self._changed_live(old, new) if new.mode == LIVE else self._changed_rest(old, new)

    def _changed_live(self, old: Note, new: Note) -> ChangeMap:
        context = f"qemu:dirty-bitmap:{frozen_of(old.target.tag.run, new.target.tag.run)}"
        try:
            return _read_bitmap(self._running.show(new), new.key, context, old.target, new.target)
        except LookupError:
            bitmap = self._running.bitmap(new, old.target.tag.run)
        except OSError as error:
            raise _lost(new, str(error)) from error
        if bitmap is not None and not bitmap.sound:
            return Unknown(bitmap.why)
        if new.format == "raw":
            return Unknown("QEMU was started anew since, and a raw disk keeps no bitmap")
        return Unknown("its bitmap was removed")

    def _changed_rest(self, old: Note, new: Note) -> ChangeMap:
        assert old.bitmap is not None
        with self._shown(new, [old.bitmap]) as (socket, export, daemon):
            assert daemon is not None
            found = next((one for one in qemu_rest.bitmaps_in(daemon) if one.name == old.bitmap), None)
            if found is None:
                return Unknown("its bitmap was removed")
            if not found.sound:
                return Unknown(found.why)
            return _read_bitmap(socket, export, f"qemu:dirty-bitmap:{old.bitmap}", old.target, new.target)

    def placement_at(self, base: Target, claim: Claim, now: Placement, changed: Extents) -> Placement:
        """The disk is the volume, and the bitmap knows of zeroes and discards too: it alone decides.

        What changed counts as written then, so that what is a hole now differs from it.
        """
        kept = (now.allocated() | changed).clip(0, base.size)
        states = np.full(len(kept), State.WRITTEN, np.uint8)
        return Placement(base.size, kept.starts, kept.stops, kept.starts, states)

    # --- stage 9: what stays ------------------------------------------------------------------------

    def retag(self, target: Target, tag: TargetTag) -> Target:
        """A checkpoint is only the bitmap: whatever showed the data goes, and goes first. A crash in between leaves a
        target that the reaper promotes again; the other way round a filter would stay in the guest's way."""
        note = self._note(target)
        mode = note.mode
        if tag.role is Role.CHECKPOINT and mode != CHECKPOINT:
            self._release(note, keep_bitmap=True)
            mode = CHECKPOINT
        return self._notes.put(replace(note, mode=mode, target=replace(note.target, tag=tag))).target

    def delete(self, target: Target) -> Deleted | Absent:
        note = self._notes.find(target.id)
        if note is None:
            return Absent()
        self._release(note, keep_bitmap=False)
        if note.bitmap is not None:
            self._remove_bitmap(note)
        self._notes.forget(target.id)
        return Deleted()

    def _release(self, note: Note, *, keep_bitmap: bool) -> None:
        if note.mode == LIVE:
            self._running.release(note, keep_bitmap=keep_bitmap)
        if note.mode == REST:
            self._resting.release(note)

    def _remove_bitmap(self, note: Note) -> None:
        """Wherever the disk is now: in a QEMU, or in a file that nobody has open."""
        assert note.bitmap is not None
        try:
            found = self._running.find(note.path)
        except NoPlace as error:
            raise SnapshotFailed(volume=note.target.volume, reason=str(error)) from error
        if found is not None:
            self._running.remove_bitmap(found, note)
        elif note.format == "qcow2" and os.path.exists(note.path):
            qemu_rest.remove_bitmap(note.target.volume, note.path, note.bitmap)

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        return tuple(replace(note.target, allocated=self._allocated(note)) for note in self._notes.all())

    def _allocated(self, note: Note) -> int:
        try:
            if note.mode == LIVE:
                return os.stat(note.scratch).st_blocks * 512
            if note.mode == REST:
                return self._resting.allocated(note)
        except (OSError, GraincopyError):
            pass  # a number for people
        return 0

    # --- stage R ------------------------------------------------------------------------------------

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        """Raises SourceInUse while a QEMU has the disk open."""
        kind, path = parts(claim.volume)
        return open_guest_sink(path, kind, self._running)

    def _note(self, target: Target) -> Note:
        note = self._notes.find(target.id)
        if note is None:
            raise TargetLost(target=target.id, reason="it was deleted")
        return note


def _read_bitmap(socket: str, export: str, context: str, old: Target, new: Target) -> ChangeMap:
    """The dirty ranges of ``context``, and what S grew by: a bitmap that grows with its disk does not count that."""
    client = NbdClient(socket, export, [context])
    try:
        grown = Extents.of((min(old.size, new.size), new.size))
        return Changed((client.extents(context, DIRTY) | grown).clip(0, new.size), "bitmap")
    finally:
        client.close()


def _lost(note: Note, reason: str) -> GraincopyError:
    if note.mode == LIVE and scratch_is_full(note.scratch):
        return TargetNoSpace(volume=note.target.volume)
    return TargetLost(target=note.target.id, reason=reason)
