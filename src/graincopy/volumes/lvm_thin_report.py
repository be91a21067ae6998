"""What LVM and device-mapper print, as values, and the tags that graincopy puts on its snapshots (stages 3-5). Pure.

``lvs --reportformat json``: lvmreport(7). ``dmsetup status`` of a thin pool: Documentation/admin-guide/device-mapper/
thin-provisioning.rst. Tags: lvm(8), at most 1024 of the characters A-Z a-z 0-9 _ + . - / = ! : & #.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Sequence

import msgspec

from graincopy.core.ids import VolumeId, digest_id
from graincopy.model.snapshot import TargetTag

PREFIX = "lvm-thin:"
INTENT = "graincopy-holds-metadata-snapshot"  # tag of a pool whose metadata snapshot is ours, or about to be
FIELDS = (
    "vg_name,vg_uuid,vg_permissions,lv_name,lv_uuid,lv_size,segtype,pool_lv,pool_lv_uuid,thin_id,origin,origin_uuid,"
    "data_percent,metadata_percent,chunk_size,lv_tags,lv_kernel_minor,lv_permissions,metadata_lv,lv_role"
)
_TAG = re.compile(r"graincopy\.(\d+)\.(\d+)\.(\d+)\.([A-Za-z0-9_-]+)")
_PIECE = 900  # characters of the record in one tag
_LONGEST_RECORD = 1 << 20  # bytes
_DASHES = (6, 4, 4, 4, 4, 4, 6)


class LogicalVolume(msgspec.Struct, frozen=True):
    """One logical volume as ``lvs`` reports it. Sizes in bytes, percentages as shares of 1 or None (inactive)."""

    vg: str
    name: str
    uuid: str
    size: int
    segtype: str
    vg_uuid: str = ""
    vg_writable: bool = True
    pool: str = ""
    pool_uuid: str = ""
    thin_id: int = -1
    origin: str = ""
    origin_uuid: str = ""
    data_used: float | None = None
    metadata_used: float | None = None
    block: int = 0
    tags: tuple[str, ...] = ()
    minor: int = -1
    read_only: bool = False
    metadata_lv: str = ""
    roles: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """As LVM's commands take it."""
        return f"{self.vg}/{self.name}"

    @property
    def device(self) -> str | None:
        """The kernel's own node, which no rule of udev makes or takes away; None while it is inactive."""
        return f"/dev/dm-{self.minor}" if self.minor >= 0 else None

    @property
    def dm_uuid(self) -> str:
        """Device-mapper's UUID of its device."""
        return f"LVM-{self.vg_uuid}{self.uuid}".replace("-", "").replace("LVM", "LVM-", 1)

    @property
    def volume(self) -> VolumeId:
        """Its id as a source volume."""
        return VolumeId(f"{PREFIX}{self.path}")

    @property
    def incarnation(self) -> str:
        """What no other volume of this name will ever have; another one, too, after a merge or in another pool."""
        return f"{self.uuid}.{self.pool_uuid}.{self.thin_id}"


def parse_lvs(text: str) -> tuple[LogicalVolume, ...]:
    """The volumes of a JSON report of :data:`FIELDS`, each once. Raises ValueError when it is none."""
    try:
        report = msgspec.json.decode(text, type=dict[str, object])["report"]
        rows = msgspec.convert(report, list[dict[str, list[dict[str, str]]]])
        found = [_volume(row) for part in rows for row in part["lv"]]
    except (KeyError, msgspec.MsgspecError) as error:
        raise ValueError(f"lvs answered with no report: {error}") from error
    return tuple({one.uuid: one for one in found}.values())


def _volume(row: dict[str, str]) -> LogicalVolume:
    return LogicalVolume(
        vg=row["vg_name"],
        name=row["lv_name"],
        uuid=row["lv_uuid"],
        size=int(row["lv_size"]),
        segtype=row["segtype"],
        vg_uuid=row["vg_uuid"],
        vg_writable=row["vg_permissions"] == "writeable",
        pool=_bare(row["pool_lv"]),
        pool_uuid=row["pool_lv_uuid"],
        thin_id=int(row["thin_id"] or -1),
        origin=_bare(row["origin"]),
        origin_uuid=row["origin_uuid"],
        data_used=_share(row["data_percent"]),
        metadata_used=_share(row["metadata_percent"]),
        block=int(row["chunk_size"] or 0),
        tags=tuple(tag for tag in row["lv_tags"].split(",") if tag),
        minor=int(row["lv_kernel_minor"] or -1),
        read_only=row["lv_permissions"].startswith("read-only"),
        metadata_lv=_bare(row["metadata_lv"]),
        roles=tuple(row["lv_role"].split(",")),
    )


def _bare(name: str) -> str:
    """Names of hidden volumes stand in brackets."""
    return name.strip("[]")


def _share(percent: str) -> float | None:
    return float(percent) / 100 if percent else None


def dm_name(vg: str, lv: str, layer: str = "") -> str:
    """Device-mapper's name: hyphens inside the parts are doubled."""
    parts = [vg.replace("-", "--"), lv.replace("-", "--")]
    return "-".join([*parts, layer] if layer else parts)


def uuid_of(dm_uuid: str) -> str | None:
    """The UUID, as LVM shows it, of the logical volume behind a device-mapper UUID; None when it is none, or a part."""
    found = re.fullmatch(r"LVM-[A-Za-z0-9]{32}([A-Za-z0-9]{32})", dm_uuid)
    if found is None:
        return None
    plain, parts, at = found[1], [], 0
    for length in _DASHES:
        parts.append(plain[at : at + length])
        at += length
    return "-".join(parts)


# --- lvcreate -v ------------------------------------------------------------------------------------


def held_ms(said: Sequence[tuple[float, str]], device: str, begun: float, ended: float) -> float:
    """For how many milliseconds at most the dm ``device`` was suspended; times, in seconds, are when a line came.

    From LVM's word that it suspends, which comes before the kernel is asked, to its first word after the one that it
    resumes. What it does not say in these words (libdm/libdm-deptree.c) begins or ends with the command itself.
    """
    times = [*(at for at, _ in said), ended]
    suspends = [number for number, (_, line) in enumerate(said) if line.lstrip().startswith(f"Suspending {device} (")]
    resumes = [number for number, (_, line) in enumerate(said) if line.lstrip().startswith(f"Resuming {device} (")]
    first = times[suspends[0]] if suspends else begun
    last = times[resumes[-1] + 1] if resumes else ended
    return 1000 * (last - first)


# --- the pool -------------------------------------------------------------------------------------


class PoolStatus(msgspec.Struct, frozen=True):
    """A thin pool as the kernel sees it. ``held``: block of the metadata snapshot, None when there is none."""

    metadata_used: float  # shares of 1
    data_used: float
    held: int | None
    trouble: str = ""  # why nothing may be made in it, or empty


def parse_pool_status(line: str) -> PoolStatus:
    """``dmsetup status POOL-tpool``. Raises ValueError when it is no thin pool's."""
    words = line.split()
    if len(words) < 4 or words[2] != "thin-pool":
        raise ValueError(f"device-mapper says {line.strip()!r} of the thin pool")
    if words[3] in ("Fail", "Error"):
        return PoolStatus(1.0, 1.0, None, "the kernel has given it up (needs lvconvert --repair)")
    metadata, data, held, *rest = words[4:]
    trouble = next((why for word, why in _TROUBLES.items() if word in rest), "")
    return PoolStatus(_ratio(metadata), _ratio(data), None if held == "-" else int(held), trouble)


_TROUBLES = {
    "ro": "it is read-only",
    "needs_check": "its metadata needs a check (lvconvert --repair)",
    "out_of_data_space": "it has no data space left",
}


def _ratio(text: str) -> float:
    used, total = text.split("/")
    return int(used) / int(total)


def external_device(table: str) -> str:
    """The device that a thin device with this table reads what it has no block for from, "major:minor" or "".

    ``0 SECTORS thin POOL-DEVICE DEVICE-ID [EXTERNAL-ORIGIN]``: thin-provisioning.rst of the kernel.
    """
    words = table.split()
    return words[5] if words[2:3] == ["thin"] and len(words) > 5 else ""


def external_origin(volume: LogicalVolume, every: Sequence[LogicalVolume]) -> bool:
    """Whether ``volume``, or what it is a snapshot of, began as a snapshot of a volume outside of its pool."""
    known = {one.uuid: one for one in every}
    at, seen = volume, set[str]()
    while at.origin_uuid in known and at.uuid not in seen:
        seen.add(at.uuid)
        at = known[at.origin_uuid]
        if at.segtype != "thin" or at.pool_uuid != volume.pool_uuid:
            return True
    return False


# --- the tags -------------------------------------------------------------------------------------


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about T and S, written onto T together with T itself."""

    format: int = 1
    volume: str  # S as it was called
    incarnation: str
    tag: TargetTag


def target_name(source: LogicalVolume, run: str) -> str:
    """Name of the snapshot that ``run`` makes of ``source``: always the same, so that a rerun finds it."""
    return f"graincopy-{digest_id('lvm-thin', [source.uuid, run])[:32]}"


def encode_tags(record: Record, generation: int) -> tuple[str, ...]:
    """``record`` as LVM tags. A higher ``generation`` overrules: retagging need not be one step on storage."""
    packed = zlib.compress(msgspec.json.encode(record), 9)
    text = base64.urlsafe_b64encode(packed).decode().rstrip("=")
    pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
    return tuple(f"graincopy.{generation}.{at}.{len(pieces)}.{piece}" for at, piece in enumerate(pieces))


def own_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """Those of ``tags`` that hold a record, or a part of one."""
    return tuple(tag for tag in tags if _TAG.fullmatch(tag))


def decode_tags(tags: Sequence[str]) -> tuple[Record, int] | None:
    """The newest complete record in ``tags`` and its generation; None where there is none that can be read."""
    found: dict[int, dict[int, str]] = {}
    counts: dict[int, int] = {}
    for match in filter(None, map(_TAG.fullmatch, tags)):
        generation = int(match[1])
        found.setdefault(generation, {})[int(match[2])] = match[4]
        counts[generation] = int(match[3])
    for generation in sorted(found, reverse=True):
        pieces = found[generation]
        if sorted(pieces) != list(range(counts[generation])):
            continue
        record = _decode("".join(pieces[at] for at in sorted(pieces)))
        if record is not None:
            return record, generation
    return None


def _decode(text: str) -> Record | None:
    try:
        packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        record = msgspec.json.decode(zlib.decompressobj().decompress(packed, _LONGEST_RECORD), type=Record)
    except (ValueError, zlib.error, msgspec.MsgspecError):
        return None
    return record if record.format == 1 else None


# --- what can be taken ----------------------------------------------------------------------------


def unfit(volume: LogicalVolume) -> tuple[str, str] | None:
    """Why no thin snapshot can be made of ``volume``, and what would help; None when one can."""
    if "thicksnapshot" in volume.roles:
        return (
            f"{volume.path} is a classic (thick) snapshot, which is no thin volume",
            "name a thin volume: lvcreate --thin",
        )
    if volume.segtype == "thin-pool":
        return f"{volume.path} is the thin pool itself", "name a thin volume in it"
    if volume.segtype != "thin":
        return (
            f"{volume.path} is a classic (thick) logical volume ({volume.segtype}): its snapshots have a fixed size, "
            "become invalid when that is full, slow down every write, and do not tell what changed",
            "move the disk to a thin volume (lvcreate --thin), or put the disk file on XFS or Btrfs",
        )
    if decode_tags(volume.tags) is not None:
        return f"{volume.path} is a target that graincopy made", "name its origin"
    if not volume.vg_writable:
        return f"volume group {volume.vg} is read-only", f"vgchange --permission rw {volume.vg}"
    return None
