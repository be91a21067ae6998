"""What the ls commands of the array (``array``) show of one thing: columns as the real one spells them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graincopy.testing.array_parts import FcMap, Vdisk


def vdisk_row(one: Vdisk, status: str, maps: Iterable[FcMap]) -> dict[str, str]:
    """lsvdisk; sizes are bytes."""
    return {
        "id": str(one.number),
        "name": one.name,
        "IO_group_id": one.iogrp,
        "IO_group_name": f"io_grp{one.iogrp}",
        "status": status,
        "mdisk_grp_id": "0",
        "mdisk_grp_name": one.pool,
        "capacity": str(one.size),
        "type": "striped",
        "FC_id": "",
        "FC_name": "",
        "RC_id": "",
        "RC_name": "",
        "vdisk_UID": one.uid,
        "fc_map_count": str(sum(one.name in (each.source, each.target) for each in maps)),
        "copy_count": "1",
        "se_copy_count": str(int(one.thin)),
    }


def copy_row(used: int) -> dict[str, str]:
    """The copy that lsvdisk shows below one vdisk; ``used`` bytes of it are allocated."""
    return {
        "copy_id": "0",
        "status": "online",
        "sync": "yes",
        "primary": "yes",
        "mdisk_grp_name": "other",
        "type": "striped",
        "used_capacity": str(used),
        "autoexpand": "on",
    }


def map_row(one: FcMap, source: Vdisk, target: Vdisk, groups: Mapping[str, int]) -> dict[str, str]:
    """lsfcmap."""
    return {
        "id": str(one.number),
        "name": one.name,
        "source_vdisk_id": str(source.number),
        "source_vdisk_name": one.source,
        "target_vdisk_id": str(target.number),
        "target_vdisk_name": one.target,
        "group_id": str(groups.get(one.group, "")),
        "group_name": one.group,
        "status": one.state,
        "progress": "0",
        "copy_rate": str(one.rate),
        "clean_progress": "100",
        "incremental": "off",
        "partner_FC_id": "",
        "start_time": "",
    }


def host_row(vdisk: Vdisk, number: int, host: str) -> dict[str, str]:
    """lsvdiskhostmap: the ``number``-th of its hosts."""
    return {
        "id": str(vdisk.number),
        "name": vdisk.name,
        "SCSI_id": str(number),
        "host_id": "0",
        "host_name": host,
        "vdisk_UID": vdisk.uid,
        "IO_group_id": vdisk.iogrp,
    }
