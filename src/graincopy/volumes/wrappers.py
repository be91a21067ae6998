"""What every volume driver can be wrapped in: a log, retries, faults. Drivers hold none of it.

:class:`Wrapped` hands every verb with an effect on through one method, ``around``; a wrapper is what it does there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol, TypeVar

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import Placement
from graincopy.model.change_map import ChangeMap
from graincopy.model.snapshot import Absent, Deleted, Target, TargetTag
from graincopy.model.volume import Claim, Refusal, SourceVolume, VolumeCapabilities
from graincopy.volumes.base import FileImage, FileSink, PreparedGroup, VolumeDriver

T = TypeVar("T")


class Log(Protocol):
    """Takes one structured event (structlog's bound loggers do)."""

    def __call__(self, event: str, **facts: object) -> None: ...


class Fault(Protocol):
    """Asked at every point where a call can go wrong; raises to make it so (``graincopy.testing.faults``)."""

    def __call__(self, point: str, subject: str) -> None: ...


class Wrapped(VolumeDriver):
    """A driver that does what ``inner`` does, under its name."""

    def __init__(self, inner: VolumeDriver) -> None:
        self.inner = inner
        vars(self)["name"] = inner.name  # shadows the class variable: claims and targets bear the driver's own name

    def around(self, verb: str, subject: str, call: Callable[[], T]) -> T:
        """Every verb that touches storage comes through here."""
        return call()

    def capabilities(self) -> VolumeCapabilities:
        return self.inner.capabilities()

    def resolve(self, path: str) -> Claim | Refusal:
        return self.around("resolve", path, lambda: self.inner.resolve(path))

    def resolve_guest(self, path: str, format: str) -> Claim | Refusal:
        return self.around("resolve_guest", path, lambda: self.inner.resolve_guest(path, format))

    def describe(self, volume: VolumeId) -> SourceVolume:
        return self.around("describe", volume, lambda: self.inner.describe(volume))

    def prepare(self, volumes: Sequence[VolumeId], tag: TargetTag) -> PreparedGroup:
        return self.around("prepare", ", ".join(volumes), lambda: self.inner.prepare(volumes, tag))

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        return self.around("snapshot", _ids(group.targets), lambda: self.inner.snapshot(group))

    def settle(self, targets: Sequence[Target]) -> tuple[Target, ...]:
        return self.around("settle", _ids(targets), lambda: self.inner.settle(targets))

    def open(self, target: Target, claim: Claim) -> AbstractContextManager[FileImage]:
        return self._entered("open", target.id, lambda: self.inner.open(target, claim))

    def open_folder(self, target: Target, claim: Claim) -> AbstractContextManager[int]:
        return self._entered("open_folder", target.id, lambda: self.inner.open_folder(target, claim))

    def changed(self, base: Target, now: Target) -> ChangeMap:
        return self.around("changed", now.id, lambda: self.inner.changed(base, now))

    def placement_at(self, base: Target, claim: Claim, now: Placement, changed: Extents) -> Placement:
        return self.around("placement_at", base.id, lambda: self.inner.placement_at(base, claim, now, changed))

    def retag(self, target: Target, tag: TargetTag) -> Target:
        return self.around("retag", target.id, lambda: self.inner.retag(target, tag))

    def delete(self, target: Target) -> Deleted | Absent:
        return self.around("delete", target.id, lambda: self.inner.delete(target))

    def list_targets(self, volumes: Sequence[VolumeId] = ()) -> tuple[Target, ...]:
        return self.around("list_targets", ", ".join(volumes), lambda: self.inner.list_targets(volumes))

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        return self._entered("open_for_restore", claim.path, lambda: self.inner.open_for_restore(claim))

    @contextmanager
    def _entered(self, verb: str, subject: str, call: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """The effect of opening lies in entering, so that is what ``around`` sees."""
        with ExitStack() as stack:
            yield self.around(verb, subject, lambda: stack.enter_context(call()))


class Logged(Wrapped):
    """Says of every call what it was, how it ended and how many seconds it took."""

    def __init__(self, inner: VolumeDriver, log: Log, clock: Clock) -> None:
        super().__init__(inner)
        self._log, self._clock = log, clock

    def around(self, verb: str, subject: str, call: Callable[[], T]) -> T:
        began = self._clock.monotonic()
        outcome = "failed"
        try:
            answer = call()
            outcome = type(answer).__name__
            return answer
        except GraincopyError as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = self._clock.monotonic() - began
            self._log(f"volume.{verb}", driver=self.name, subject=subject, outcome=outcome, seconds=seconds)


class Retried(Wrapped):
    """Repeats a call that raised one of ``on``, up to ``attempts`` times in all, waiting twice as long each time.

    Never the instant: a second ``snapshot`` would be a second instant, outside the window. Nor opening for restore,
    whose refusal is an answer.
    """

    def __init__(
        self,
        inner: VolumeDriver,
        clock: Clock,
        on: tuple[type[GraincopyError], ...],
        attempts: int = 4,
        first_wait: float = 0.5,
    ) -> None:
        if attempts < 1:
            raise ValueError("at least one attempt is needed")
        super().__init__(inner)
        self._clock, self._on, self._attempts, self._first_wait = clock, on, attempts, first_wait

    def around(self, verb: str, subject: str, call: Callable[[], T]) -> T:
        attempts = 1 if verb in ("snapshot", "open_for_restore") else self._attempts
        for attempt in range(attempts - 1):
            try:
                return call()
            except self._on:
                self._clock.sleep(self._first_wait * 2**attempt)
        return call()


class Faulty(Wrapped):
    """Fails where ``fault`` says: before a call took effect (``delete``), after it (``delete.done``), while reading
    (``read``, its subject the target's id and the offset)."""

    def __init__(self, inner: VolumeDriver, fault: Fault) -> None:
        super().__init__(inner)
        self._fault = fault

    def around(self, verb: str, subject: str, call: Callable[[], T]) -> T:
        self._fault(verb, subject)
        answer = call()
        self._fault(f"{verb}.done", subject)
        return answer

    @contextmanager
    def open(self, target: Target, claim: Claim) -> Iterator[FileImage]:
        with super().open(target, claim) as image:
            yield FaultyImage(image, self._fault, target.id)


class FaultyImage:
    """An image whose reads fail where ``fault`` says."""

    def __init__(self, inner: FileImage, fault: Fault, subject: str) -> None:
        self._inner, self._fault, self._subject = inner, fault, subject

    @property
    def size(self) -> int:
        return self._inner.size

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._fault("read", f"{self._subject}+{offset}")
        self._inner.readinto(offset, buffer)

    def placement(self) -> Placement:
        return self._inner.placement()

    def verify(self) -> None:
        self._inner.verify()

    def close(self) -> None:
        self._inner.close()


def _ids(targets: Sequence[Target]) -> str:
    return ", ".join(target.id for target in targets)
