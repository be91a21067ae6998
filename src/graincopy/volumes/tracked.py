"""A driver that has no change map, around which a hypervisor tells what its guests wrote (stages 3 to 7, 9).

T is what the driver below makes, and goes after every run. The checkpoint is a dirty bitmap inside the QEMU that has
the file open. Both come from different layers, so the order of things is what makes the answer sound. The new bitmap
begins in ``prepare``, before the instant; the older ones are copied in ``settle``, after it, when QEMU has let every
request that was under way come to its end: a bit is set only when a write completes, which may be after it reached S.
What falls in between is dirty in both. A write that completed before the bitmap began is in T, even if it lay in the
page cache: the freeze window, or the flush of a raw device by the driver below, writes that out before the instant.
Nothing is asked of QEMU inside the window, when a write may stand still in a frozen file system and QEMU with it.

Files that no QEMU has open are compared, as without all this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from graincopy.core.errors import GraincopyError, SourceChanged
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement, State
from graincopy.model.change_map import Changed, ChangeMap, Unknown
from graincopy.model.snapshot import Absent, Deleted, Role, Target, TargetTag
from graincopy.model.volume import Claim, Refusal
from graincopy.volumes.base import PreparedGroup, VolumeDriver
from graincopy.volumes.qemu_notes import Notes
from graincopy.volumes.qemu_tracker import QemuTracker, Tracked
from graincopy.volumes.wrappers import Wrapped

_LEFT = "/left"  # after the id of a T that the storage has not let go yet, beside the checkpoint of that id
_UNTRACKED = "no QEMU had it open when the last backup began"


class TrackedNote(Struct, frozen=True, kw_only=True):
    """A T and the files on it that are tracked. ``kept``: T is gone, and only the bitmaps are left, a checkpoint."""

    target: Target
    run: str  # that made T: the bitmaps bear its name
    files: tuple[Tracked, ...]
    kept: bool = False

    def file_at(self, claim: Claim) -> Tracked | None:
        """What is known of the file of ``claim``."""
        same = (one for one in self.files if (one.claim.path, one.claim.inner_path) == (claim.path, claim.inner_path))
        return next(same, None)


class TrackedDriver(Wrapped):
    """``inner``, and what ``tracker`` knows of the files; durable notes about that lie in ``folder``."""

    def __init__(self, inner: VolumeDriver, tracker: QemuTracker, folder: str) -> None:
        super().__init__(inner)
        self._tracker = tracker
        self._notes = Notes(folder, TrackedNote)
        self._claims: dict[VolumeId, dict[str, Claim]] = {}  # what was resolved, for ``prepare``

    # --- stage 3 ------------------------------------------------------------------------------------

    def resolve(self, path: str) -> Claim | Refusal:
        claim = super().resolve(path)
        if not isinstance(claim, Claim):
            return claim
        on_volume = self._claims.setdefault(claim.volume, {})
        on_volume.pop(claim.path, None)
        refusal = self._tracker.refusal(claim.path)
        if refusal is not None:
            return replace(claim, why=f"{claim.why}; what is written is not told: {refusal}") if refusal else claim
        on_volume[claim.path] = claim
        return replace(claim, tracked=True, why=f"{claim.why}; its QEMU tells what is written")

    # --- stages 4 and 5 -----------------------------------------------------------------------------

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        group = super().prepare(volumes, tag)
        try:
            for target in group.targets:
                self._begin(target)
        except BaseException as error:
            for target in group.targets:
                self._take_back(target, error)
            raise
        return group

    def _take_back(self, target: Target, error: BaseException) -> None:
        try:
            self.delete(target)
        except (GraincopyError, OSError) as problem:
            error.add_note(f"target {target.id} could not be deleted: {problem}")

    def _begin(self, target: Target) -> None:
        """Noted before anything is made. Whoever died in between has begun nothing: it may be past the instant now."""
        claims = tuple(self._claims.get(target.volume, {}).values())
        if not claims or self._notes.find(target.id) is not None:
            return
        files = self._tracker.locate(claims)
        unsure = tuple(replace(one, why=one.why or "the last backup was interrupted") for one in files)
        note = self._notes.put(TrackedNote(target=target, run=target.tag.run, files=unsure))
        if target.tag.role is Role.TARGET:  # nothing is ever computed from the others
            files = self._tracker.begin(note.run, files)
        self._notes.put(replace(note, files=files))

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        settled = super().settle(targets)
        for target in settled:
            note = self._notes.find(target.id)
            if note is not None:
                self._notes.put(replace(note, files=self._tracker.freeze(note.run, note.files)))
        return settled

    # --- stages 6 and 7 -----------------------------------------------------------------------------

    def changed(self, base: Target, now: Target) -> ChangeMap:
        """Of the tracked files what their bitmaps know, and all of the volume besides."""
        old, new = self._notes.find(base.id), self._notes.find(now.id)
        if old is None and new is None:
            return super().changed(base, now)
        if old is None or new is None:
            return Unknown("the checkpoint is gone" if old is None else "no QEMU has it open now")
        if base.incarnation != now.incarnation:
            return Unknown("the volume was recreated")
        reasons: list[str] = []
        known, written = Extents.empty(), Extents.empty()
        for file in new.files:
            dirty = self._dirty(old, new, file.claim)
            if isinstance(dirty, Unknown):
                reasons.append(dirty.reason)
                continue
            try:
                placement = self._placement(now, file.claim)
            except SourceChanged as error:
                reasons.append(str(error))
                continue
            known |= placement.to_volume(Extents.whole(placement.size))
            written |= placement.to_volume(dirty)
        if len(reasons) == len(new.files):
            return Unknown(reasons[0])
        return Changed((Extents.whole(now.size) - known) | written.clip(0, now.size), "bitmap")

    def _placement(self, target: Target, claim: Claim) -> Placement:
        with self.inner.open(target, claim) as image:
            return image.placement()

    def _dirty(self, old: TrackedNote, new: TrackedNote, claim: Claim) -> Extents | Unknown:
        before, now = old.file_at(claim), new.file_at(claim)
        if before is None or now is None:
            return Unknown(_UNTRACKED)
        return self._tracker.dirty(old.run, before, new.run, now)

    def placement_at(self, base: Target, claim: Claim, now: Placement, changed: Extents) -> Placement:
        """The bitmap alone decides: what it does not know lies as it does now. Raises SourceChanged: nothing is known.

        Nobody says which T shows ``now``: what is known is put together for all that are there, as a rule one.
        """
        old = self._notes.find(base.id)
        before = old.file_at(claim) if old is not None else None
        if old is None or before is None:
            raise SourceChanged(path=claim.path, reason=_UNTRACKED)
        written = Extents.empty()
        for note in self._notes.all():
            if note.kept or note.target.volume != base.volume or note.target.id == base.id:
                continue
            dirty = self._dirty(old, note, claim)
            if isinstance(dirty, Unknown):
                raise SourceChanged(path=claim.path, reason=dirty.reason)
            written |= dirty
        if not written.total:  # it reaches beyond the end of the file where there is any T at all
            raise SourceChanged(path=claim.path, reason="no target shows it now")
        return _before(now, written, before.size)

    # --- stage 9 ------------------------------------------------------------------------------------

    def retag(self, target: Target, tag: TargetTag) -> Target:
        """A checkpoint is only the bitmaps: T goes, and goes first. A crash in between leaves a note without a T, which
        the reaper promotes again."""
        note = self._notes.find(target.id)
        if note is None or tag.role is not Role.CHECKPOINT:
            return super().retag(target, tag)
        if not note.kept:
            self.inner.delete(target)
            self._tracker.release(note.run, note.files, keep_bitmap=True)
        return self._notes.put(replace(note, kept=True, target=replace(note.target, tag=tag, allocated=0))).target

    def delete(self, target: Target) -> Deleted | Absent:
        """A QEMU that cannot be asked keeps its bitmap, and the note stays until it can."""
        if target.id.endswith(_LEFT):
            return super().delete(replace(target, id=target.id.removesuffix(_LEFT)))
        note = self._notes.find(target.id)
        if note is None:
            return super().delete(target)
        if not note.kept:
            self.inner.delete(target)
        if self._tracker.release(note.run, note.files, keep_bitmap=False):
            self._notes.forget(target.id)
        return Deleted()

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        """Those of the driver below, and the notes whose T is gone."""
        found = super().list_targets(volumes)
        usual = {one.id: one.tag for one in found}
        notes = [note for note in self._notes.all() if note.kept or usual.get(note.target.id) != note.target.tag]
        apart = {note.target.id for note in notes}  # T is gone, or going: another tag says so
        rest = tuple(replace(one, id=one.id + _LEFT) if one.id in apart else one for one in found)
        return tuple(note.target for note in notes) + rest


def _before(now: Placement, dirty: Extents, size: int) -> Placement:
    """Where a file of ``size`` bytes lay that lies at ``now`` by now, only ``dirty`` of it having been written since.

    What reads as zeros now and was written counts as written then, so that it differs.
    """
    gone = (now.zero() & dirty).clip(0, size)
    unwritten = now.in_state(State.UNWRITTEN) - gone
    kept = np.isin(now.states, (State.WRITTEN, State.OPAQUE))
    starts = np.concatenate([now.starts[kept], unwritten.starts, gone.starts])
    stops = np.concatenate([now.stops[kept], unwritten.stops, gone.stops])
    volume = np.concatenate([now.volume[kept], unwritten.starts, gone.starts])
    states = np.concatenate(
        [
            now.states[kept],
            np.full(len(unwritten), State.UNWRITTEN, np.uint8),
            np.full(len(gone), State.WRITTEN, np.uint8),
        ]
    )
    order = np.argsort(starts, kind="stable")
    order = order[starts[order] < size]
    return Placement.from_arrays(size, starts[order], stops[order], volume[order], states[order])
