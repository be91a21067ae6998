"""Stages 4 and 5 on the array: thin targets, mappings in one consistency group, prepared; then the instant.

Each step looks first, acts, and looks again when the answer was lost or was no; so a rerun under the same run id goes
on where the last one stopped, whatever killed that. The step that must not be guessed is the start: it has happened
exactly when the array says so, by exit status or by the state ``copying``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from graincopy.core.errors import SnapshotFailed, TargetLost, TargetNoSpace, VolumeBusy
from graincopy.core.ids import VolumeId
from graincopy.model.snapshot import Role
from graincopy.volumes.flashcopy import names, wire
from graincopy.volumes.flashcopy.connection import Lost
from graincopy.volumes.flashcopy.console import ATTEMPTS, Console, Refused
from graincopy.volumes.flashcopy.deferred import Notes
from graincopy.volumes.flashcopy.wire import ONLINE, FcMap, MapStatus, Vdisk

PREPARE_PATIENCE = 300.0  # seconds until the array must have flushed its cache
_WAITING = frozenset({MapStatus.IDLE, MapStatus.STOPPED})


class Pair(msgspec.Struct, frozen=True):
    """One S and the name that its T has."""

    volume: VolumeId
    source: Vdisk
    target: str


def find_source(console: Console, volume: VolumeId) -> Vdisk:
    """S as the array has it now, under whatever name. Raises SnapshotFailed when it is gone."""
    _, uid = names.split_volume(volume)
    found = next((each for each in console.vdisks() if each.uid == uid), None)
    if found is None:
        raise SnapshotFailed(volume=volume, reason=f"array {console.name} has no vdisk with the uid {uid}")
    return found


def holder_of(console: Console, notes: Notes, pair: Pair) -> str | None:
    """Who holds this S: another T of ours, of whatever host. It takes one at a time; None when there is room."""
    note = notes.get(pair.target)
    if note is not None and note.doomed:
        return f"target {pair.target}, which is being deleted"
    for each in console.maps():
        if each.source == pair.source.name and names.is_target(each.target) and each.target != pair.target:
            return _holder(console, notes, each)
    return None


def refuse_busy(console: Console, notes: Notes, pair: Pair) -> None:
    """Raise VolumeBusy when there is no room for T."""
    holder = holder_of(console, notes, pair)
    if holder is not None:
        raise VolumeBusy(volume=pair.volume, holder=holder)


def _holder(console: Console, notes: Notes, rival: FcMap) -> str:
    note = notes.get(rival.target)
    if note is None:
        return f"target {rival.target} of another host on array {console.name}"
    if note.doomed:
        return f"target {rival.target}, which is being deleted ({note.held or 'the array is at it'})"
    tag = note.tag
    what = {Role.UNDO: f"the undo of restore {tag.run}", Role.VIEW: f"a view by {tag.owner}"}
    return f"{what.get(tag.role, f'run {tag.run} by {tag.owner}')} (target {rival.target})"


def make_target(console: Console, pair: Pair, pool: str) -> None:
    """T: thin, empty, of exactly S's size. Raises SnapshotFailed or TargetNoSpace."""
    source = pair.source
    command = wire.make_vdisk(pair.target, source.size, pool or source.pool, source.iogrp)
    try:
        target = console.until(lambda: console.vdisk(pair.target), command)
    except Refused as refused:
        raise _refusal(pair.volume, console, refused) from refused
    if target.size != source.size:
        reason = f"its target {pair.target} is there already, with {target.size} bytes instead of {source.size}"
        raise SnapshotFailed(volume=pair.volume, reason=reason)


def make_maps(console: Console, pairs: Sequence[Pair], group: str) -> None:
    """The consistency group with a mapping for each pair. Raises SnapshotFailed or TargetNoSpace."""
    try:
        console.until(lambda: group if group in console.groups() else None, wire.make_group(group))
        for pair in pairs:
            command = wire.make_map(pair.source.name, pair.target, group)
            found = console.until(partial(_map_to, console, pair.target), command)
            if (found.source, found.group) != (pair.source.name, group):
                reason = f"its target {pair.target} is in another mapping ({found.source}, {found.group})"
                raise SnapshotFailed(volume=pair.volume, reason=reason)
    except Refused as refused:
        raise _refusal(", ".join(each.volume for each in pairs), console, refused) from refused


def _map_to(console: Console, target: str) -> FcMap | None:
    return next((each for each in console.maps() if each.target == target), None)


def prepare(console: Console, group: str, volumes: str, patience: float = PREPARE_PATIENCE) -> bool:
    """Flush the sources, and wait until the group can be started; True when it was started already.

    Raises SnapshotFailed when the array does not come to it within ``patience`` seconds.
    """
    told = False

    def ready() -> bool | None:
        nonlocal told
        states = wire.states(console.maps(), group)
        if states == {MapStatus.COPYING}:
            return True
        if states == {MapStatus.PREPARED}:
            return False
        if not states or states - {*_WAITING, MapStatus.PREPARING, MapStatus.PREPARED}:
            reason = f"the array shows the state {', '.join(sorted(states)) or 'of no mapping'} while it prepares"
            raise SnapshotFailed(volume=volumes, reason=reason)
        if states <= _WAITING:
            told = _begin_to_prepare(console, group, volumes, told)
        return None

    found = console.wait(ready, patience)
    if found is None:
        raise SnapshotFailed(volume=volumes, reason=f"the array has not prepared it within {patience:g} s")
    return found


def _begin_to_prepare(console: Console, group: str, volumes: str, told: bool) -> bool:
    """Say it; an answer that was lost is judged by the state, a refusal too unless nothing follows from it."""
    try:
        console.tell(wire.prepare_group(group))
    except Lost:
        return told
    except Refused as refused:
        if told or wire.states(console.maps(), group) <= _WAITING:
            raise SnapshotFailed(volume=volumes, reason=_says(console, refused)) from refused
    return True


def start(console: Console, group: str, volumes: str) -> None:
    """The instant. On return every target shows its source; nobody knows when exactly if this raises.

    Raises SnapshotFailed, ArrayUnreachable; then the targets are to be deleted.
    """
    trouble = ""
    for _ in range(ATTEMPTS):
        try:
            console.tell(wire.start_group(group))
            return
        except Lost as lost:
            trouble = str(lost)
        except Refused as refused:
            trouble = _says(console, refused)
        states = wire.states(console.maps(), group)
        if states == {MapStatus.COPYING}:
            return
        if states != {MapStatus.PREPARED}:
            break
    raise SnapshotFailed(volume=volumes, reason=trouble)


def require_alive(console: Console, target: str, shown: str) -> Vdisk:
    """T, when it can be read and still is what it was. Raises TargetLost; ``shown`` is how errors call it."""
    vdisk = console.vdisk(target)
    if vdisk is None:
        raise TargetLost(target=shown, reason=f"array {console.name} has no such vdisk")
    if vdisk.status not in ONLINE:
        raise TargetLost(target=shown, reason=f"the vdisk is {vdisk.status}")
    found = _map_to(console, target)
    if found is None or found.status != MapStatus.COPYING:
        state = f"its mapping is {found.status}" if found else "it is in no mapping"
        raise TargetLost(target=shown, reason=f"{state}, so it does not show the instant")
    return vdisk


def _says(console: Console, refused: Refused) -> str:
    return f"array {console.name} refused {refused.command[0]}: {refused.message}"


def _refusal(volume: str, console: Console, refused: Refused) -> SnapshotFailed | TargetNoSpace:
    if wire.is_pool_full(refused.message):
        return TargetNoSpace(volume=volume)
    return SnapshotFailed(volume=volume, reason=_says(console, refused))


def predicted_ms(console: Console) -> float:
    """How long the start will take, in milliseconds: two of the round trips seen, and a little."""
    return 20.0 + 2000.0 * console.round_trip
