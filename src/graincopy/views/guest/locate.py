"""``DISK@PARTITION:/PATH``: which disk, which of its partitions, and a reader that has the path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from graincopy.core.clock import Clock
from graincopy.core.errors import GuestPathMissing, GuestUnreadable, ToolMissing, UsageWrong
from graincopy.views.guest import wire
from graincopy.views.guest.partitions import Partition, find_partitions
from graincopy.views.guest.process import Spare
from graincopy.views.guest.session import GuestReader
from graincopy.views.source import ViewDisk


@dataclass(frozen=True, slots=True)
class Place:
    """What ``DISK[@N][:PATH]`` says; ``path`` None: the disk's partitions are meant."""

    disk: str
    partition: int | None
    path: bytes | None


def parse_place(text: str, names: Sequence[str]) -> Place:
    """``text`` about one of the disks ``names``, which may hold @ and : themselves. Unknown disks: as it looks."""
    fitting = [name for name in names if text == name or text.startswith((f"{name}:", f"{name}@"))]
    for name in sorted(fitting, key=len, reverse=True):
        number, colon, path = text[len(name) :].partition(":")
        if number in ("", "@") or number[1:].isdecimal():
            partition = int(number[1:]) if number[1:] else None
            return Place(name, partition, os.fsencode(path) if colon else None)
    name, colon, path = text.partition(":")
    return Place(name, None, os.fsencode(path) if colon else None)


@dataclass(frozen=True, slots=True)
class Located:
    """An open reader of the partition that has the path."""

    reader: GuestReader
    partition: Partition
    path: bytes
    entry: wire.Entry


def partitions_of(disk: ViewDisk) -> tuple[Partition, ...]:
    """Partitions of ``disk``. Raises GuestUnreadable when its tables cannot be read."""

    def read(offset: int, length: int) -> bytes:
        data = bytearray(max(0, min(length, disk.size - offset)))
        disk.readinto(offset, memoryview(data))
        return bytes(data)

    try:
        return find_partitions(read, disk.size)
    except OSError as failure:
        raise GuestUnreadable(where=disk.name, reason=f"its partition table: {failure.strerror}") from failure


@contextmanager
def located(disk: ViewDisk, place: Place, clock: Clock, spare: Spare | None = None) -> Iterator[Located]:
    """The one partition that has ``place.path``, with its reader, which ends with the block; ``spare`` may be that.

    Raises GuestPathMissing, GuestUnreadable, ToolMissing, and UsageWrong when several partitions have it.
    """
    path = place.path or b"/"
    candidates = _candidates(disk, place)
    missing: list[wire.Missing] = []
    unread: list[GuestUnreadable | ToolMissing] = []
    found: list[Located] = []
    with ExitStack() as held:
        for partition in candidates:
            with ExitStack() as trial:
                try:
                    reader = trial.enter_context(GuestReader(disk, partition, clock, spare=spare))
                    answer = reader.look(path)
                except (GuestUnreadable, ToolMissing) as failure:
                    unread.append(failure)
                    continue
                if isinstance(answer, wire.Missing):
                    missing.append(answer)
                    continue
                found.append(Located(reader, partition, path, answer))
                held.enter_context(trial.pop_all())
        if len(found) > 1:
            choices = ", ".join(f"{disk.name}@{one.partition.number}" for one in found)
            raise UsageWrong(what=f"{os.fsdecode(path)} is on several partitions; name one of {choices}")
        if not found:
            raise _not_found(disk, place, path, missing, unread)
        yield found[0]


def _candidates(disk: ViewDisk, place: Place) -> tuple[Partition, ...]:
    """Partitions that may be meant: the named one, or all in which there are files."""
    every = partitions_of(disk)
    if place.partition is not None:
        named = tuple(one for one in every if one.number == place.partition)
        if not named:
            there = ", ".join(str(one.number) for one in every)
            raise GuestPathMissing(disk=disk.name, path=f"partition {place.partition}", reason=f"there are {there}")
        return named
    return tuple(one for one in every if one.reader) or every[:1]


def _not_found(
    disk: ViewDisk,
    place: Place,
    path: bytes,
    missing: Sequence[wire.Missing],
    unread: Sequence[GuestUnreadable | ToolMissing],
) -> GuestPathMissing | GuestUnreadable | ToolMissing:
    """What to say when no partition has it."""
    if not missing and unread:
        return unread[0]
    closest = max(missing, key=lambda one: (one.exists.count(b"/"), len(one.exists), len(one.near)))
    above = os.fsdecode(closest.exists).rstrip("/")
    near = ", ".join(f"{above}/{os.fsdecode(name)}" for name in closest.near)
    reason = f"did you mean {near}?" if near else f"there is only {above or '/'}"
    if unread:
        reason += f" (not looked into: {'; '.join(str(one) for one in unread)})"
    name = disk.name if place.partition is None else f"{disk.name}@{place.partition}"
    return GuestPathMissing(disk=name, path=os.fsdecode(path), reason=reason)
