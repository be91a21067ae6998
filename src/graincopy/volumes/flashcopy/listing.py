"""Stage 9: what of ours is on an array, from its names and from our notes, and whose it is."""

from __future__ import annotations

from collections.abc import Mapping

from graincopy.core.ids import PointId, RepositoryId, VolumeId
from graincopy.model.snapshot import Owner, Role, Target, TargetTag
from graincopy.volumes.flashcopy import names
from graincopy.volumes.flashcopy.claims import DRIVER
from graincopy.volumes.flashcopy.console import Console
from graincopy.volumes.flashcopy.deferred import Note, Notes
from graincopy.volumes.flashcopy.wire import FcMap, Vdisk

_NOBODY = Owner(host="", boot="", pid=0, started=0, hostname="an unknown host")


def list_targets(console: Console, notes: Notes) -> list[Target]:
    """Every vdisk that is called as a target of ours is, and every group of ours whose targets are gone."""
    vdisks = {each.name: each for each in console.vdisks()}
    ours = [each for each in vdisks.values() if names.is_target(each.name)]
    maps = {each.target: each for each in console.maps()}
    found = [_found(console, notes, each, vdisks, maps.get(each.name)) for each in ours]
    runs = {names.run_of(each.name) for each in ours}
    strays = [name for name in console.groups() if names.is_group(name) and names.run_of(name) not in runs]
    unknown = names.volume_id(console.name, "unknown")
    return found + [_ownerless(console.name, name, unknown, 0) for name in strays]


def _found(console: Console, notes: Notes, vdisk: Vdisk, vdisks: Mapping[str, Vdisk], mapping: FcMap | None) -> Target:
    note, used = notes.get(vdisk.name), console.used(vdisk.name)
    if note is not None:
        return target_of(console.name, note, used)
    source = vdisks.get(mapping.source) if mapping else None
    volume = names.volume_id(console.name, source.uid if source else "unknown")
    return _ownerless(console.name, vdisk.name, volume, vdisk.size, used)


def target_of(array: str, note: Note, allocated: int = 0) -> Target:
    """The T that ``note`` is about. A doomed one is nobody's and serves nothing: whoever reaps deletes it."""
    tag = note.tag
    if note.doomed:
        owner = Owner(host=tag.owner.host, boot="", pid=0, started=0, hostname=tag.owner.hostname)
        tag = TargetTag(
            run=tag.run, role=Role.TARGET, owner=owner, repository=tag.repository, disks=(), created=tag.created
        )
    return Target(
        id=f"{array}/{note.name}",
        driver=DRIVER,
        volume=VolumeId(note.volume),
        size=note.size,
        incarnation=note.incarnation,
        tag=tag,
        allocated=allocated,
    )


def _ownerless(array: str, name: str, volume: VolumeId, size: int, allocated: int = 0) -> Target:
    """A T that another host made, or whose note is lost: only its name speaks. It is reported, never reaped."""
    tag = TargetTag(
        run=PointId(names.run_of(name) or name),
        role=Role.TARGET,
        owner=_NOBODY,
        repository=RepositoryId(""),
        disks=(),
        created=0.0,
    )
    return Target(
        id=f"{array}/{name}",
        driver=DRIVER,
        volume=volume,
        size=size,
        incarnation=names.split_volume(volume)[1],
        tag=tag,
        allocated=allocated,
    )
