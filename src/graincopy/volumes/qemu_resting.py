"""Machines that are off: the driver below that holds or clones the file of a disk (stages 3 to 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from graincopy.core.errors import SnapshotFailed, TargetLost
from graincopy.model.snapshot import Role, Target
from graincopy.model.volume import Claim, Refusal
from graincopy.volumes import qemu_rest
from graincopy.volumes.base import PreparedGroup, VolumeDriver
from graincopy.volumes.image import FdImage
from graincopy.volumes.qemu_bitmaps import bitmap_of
from graincopy.volumes.qemu_image import NbdImage
from graincopy.volumes.qemu_notes import Note, Notes


class Resting:
    """Disks at rest, over the drivers ``below``, best first. What was done is noted as it is done."""

    def __init__(self, below: Sequence[VolumeDriver], notes: Notes[Note]) -> None:
        self._below = {driver.name: driver for driver in below}
        self._notes = notes

    def holder(self, path: str) -> Claim | Refusal:
        """The claim of the first driver below that takes the file at ``path`` by itself."""
        refusals = []
        for driver in self._below.values():
            answer = driver.resolve(path)
            if isinstance(answer, Claim) and answer.identity:
                return answer
            refusals.append(answer.reason if isinstance(answer, Refusal) else "it is one file of many on a volume")
        reason = "; ".join(refusals) or "nothing is there that could hold it still"
        return Refusal(path=path, driver="qemu", reason=reason)

    def snapshots(self, claim: Claim) -> bool:
        """Whether the driver of ``claim`` lets writers go on while its target is read."""
        return self._below[claim.driver].capabilities().snapshots

    def prepare(self, note: Note) -> Note:
        """The bitmap begins, then the target below is provisioned. Raises SnapshotFailed, and what that raises.

        Only what may become a checkpoint gets a bitmap.
        """
        claim = self.holder(note.path)
        if isinstance(claim, Refusal):
            raise SnapshotFailed(volume=note.target.volume, reason=claim.reason)
        bitmap = bitmap_of(note.target.tag.run) if note.target.tag.role is Role.TARGET else None
        note = self._notes.put(replace(note, bitmap=bitmap, inner_claim=claim, why="it was not taken to be a base"))
        if bitmap is not None:
            note = self._notes.put(replace(note, why=qemu_rest.add_bitmap(note.path, bitmap)))
        (inner,) = self._below[claim.driver].prepare([claim.volume], note.target.tag).targets
        return self._notes.put(replace(note, inner=inner))

    def take(self, note: Note) -> Target:
        """The instant."""
        assert note.inner is not None
        (inner,) = self._below[note.inner.driver].snapshot(PreparedGroup((note.inner,)))
        return self._notes.put(replace(note, inner=inner)).target

    def settle(self, note: Note) -> None:
        """Make the target below durable."""
        assert note.inner is not None
        (inner,) = self._below[note.inner.driver].settle([note.inner])
        self._notes.put(replace(note, inner=inner))

    @contextmanager
    def image(self, note: Note) -> Iterator[FdImage]:
        """The file as the target below shows it."""
        if note.inner is None or note.inner_claim is None:
            raise TargetLost(target=note.target.id, reason="the snapshot was never taken")
        with self._below[note.inner.driver].open(note.inner, note.inner_claim) as image:
            assert isinstance(image, FdImage)
            yield image

    def verify(self, note: Note) -> None:
        """Raise SourceWritten or TargetLost when the driver below cannot vouch for what was read."""
        with self.image(note) as image:
            image.verify()

    def release(self, note: Note) -> None:
        """Delete the target below."""
        if note.inner is not None:
            self._below[note.inner.driver].delete(note.inner)

    def allocated(self, note: Note) -> int:
        """Bytes that the target below takes, as far as its driver can tell."""
        if note.inner is None:
            return 0
        found = self._below[note.inner.driver].list_targets([note.inner.volume])
        return sum(one.allocated for one in found if one.id == note.inner.id)


class Vouched:
    """An image of a disk at rest: what the driver below says of its T goes for the guest's view of it."""

    def __init__(self, inner: NbdImage, vouch: Callable[[], None]) -> None:
        self.size = inner.size
        self.readinto, self.placement, self.close = inner.readinto, inner.placement, inner.close
        self._vouch = vouch

    def verify(self) -> None:
        """Raise SourceWritten or TargetLost when what was read so far may not be one instant."""
        self._vouch()
