"""LVM's list of volumes, looked through for S, its pool, and T (stages 4 to 9). Used by the lvm-thin driver."""

from __future__ import annotations

from collections.abc import Sequence

from graincopy.core.errors import SnapshotFailed, TargetLost
from graincopy.core.ids import VolumeId
from graincopy.model.change_map import Unknown
from graincopy.model.snapshot import Target
from graincopy.volumes.lvm_thin_report import PREFIX, LogicalVolume, decode_tags


def source_of(every: Sequence[LogicalVolume], volume: VolumeId) -> LogicalVolume:
    """S. Raises SnapshotFailed when it is not there."""
    path = volume.removeprefix(PREFIX)
    for one in every:
        if one.path == path:
            return one
    raise SnapshotFailed(volume=volume, reason="there is no such logical volume")


def pool_of(every: Sequence[LogicalVolume], volume: LogicalVolume) -> LogicalVolume | None:
    """The thin pool of ``volume``."""
    return next((one for one in every if one.uuid == volume.pool_uuid), None)


def named(every: Sequence[LogicalVolume], name: str) -> LogicalVolume | None:
    """The target called ``name``, if there is one. Raises TargetLost when copies of a volume group hold it twice."""
    found = [one for one in every if one.name == name and decode_tags(one.tags) is not None]
    if len(found) > 1:
        raise TargetLost(target=name, reason=f"it is in several volume groups: {', '.join(one.vg for one in found)}")
    return found[0] if found else None


def unlike(base: LogicalVolume, now: LogicalVolume) -> Unknown | None:
    """Why two targets are not of one S in one pool, if so."""
    known = decode_tags(base.tags), decode_tags(now.tags)
    if known[0] is None or known[1] is None:
        return Unknown("the tags of a target are damaged")
    if base.pool_uuid != now.pool_uuid:
        return Unknown("the volume was moved to another thin pool")
    if known[0][0].incarnation != known[1][0].incarnation:
        return Unknown("the volume was recreated since the checkpoint")
    return None


def target_of(made: LogicalVolume, every: Sequence[LogicalVolume], driver: str) -> Target | None:
    """``made`` as a target of ``driver``; None when it is none of ours. Its S may be called otherwise by now."""
    known = decode_tags(made.tags)
    if known is None or made.segtype != "thin":
        return None
    record = known[0]
    uuid = record.incarnation.split(".")[0]
    volume = next((one.volume for one in every if one.uuid == uuid), VolumeId(record.volume))
    return Target(
        id=made.name,
        driver=driver,
        volume=volume,
        size=made.size,
        incarnation=record.incarnation,
        tag=record.tag,
    )
