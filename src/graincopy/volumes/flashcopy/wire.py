"""Commands of the array and the delimited text it answers with, as values (stages 3 to 9). Pure.

Only the conservative subset that every implementation has. Every query is delimited by ``!``; columns are found by
their names in the header, unknown ones are ignored and missing ones an error. Source: the command-line reference of
IBM Storage Virtualize (mkvdisk, mkfcmap, prestartfcconsistgrp …, "lsvdisk", "lsfcmap").
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

DELIMITER = "!"
COPY_RATE = 0  # the array's own default is 50: always say it
GRAIN_KIB = 256
Command = tuple[str, ...]

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./!-]+")  # "!" is special in interactive shells alone
_WARNING = re.compile(r"^CMMVC\d+W\b")
_ERROR = re.compile(r"\b(CMMVC\d+E)\b")
_POOL_FULL = ("CMMVC5860E", "CMMVC8710E")


class Garbled(ValueError):
    """The array's answer is not what the command answers with."""


class MapStatus(StrEnum):
    """States of a mapping, as the array spells them."""

    IDLE = "idle_or_copied"
    PREPARING = "preparing"
    PREPARED = "prepared"
    COPYING = "copying"
    STOPPING = "stopping"
    STOPPED = "stopped"
    SUSPENDED = "suspended"


ONLINE = ("online", "degraded")  # a vdisk that can be read


class Vdisk(msgspec.Struct, frozen=True):
    """A volume of the array. ``size`` in bytes; ``uid`` 32 lower-case hex digits, also its WWN."""

    name: str
    uid: str
    size: int
    status: str
    pool: str
    iogrp: str
    used: int = 0  # bytes, where the detailed view says so


class FcMap(msgspec.Struct, frozen=True):
    """A FlashCopy mapping; ``group`` is empty for one that is in none."""

    id: str
    name: str
    source: str
    target: str
    group: str
    status: str


class Mapped(msgspec.Struct, frozen=True):
    """A vdisk shown to a host."""

    host: str
    vdisk: str


# --- commands ---------------------------------------------------------------------------------------


def line(command: Command) -> str:
    """What is sent: one line, quoted for the array's shell only where it has to be."""
    return " ".join(word if _PLAIN.fullmatch(word) else shlex.quote(word) for word in command)


def list_vdisks() -> Command:
    """Every vdisk, sizes in bytes."""
    return ("lsvdisk", "-bytes", "-delim", DELIMITER)


def show_vdisk(name: str) -> Command:
    """One vdisk in detail, sizes in bytes."""
    return ("lsvdisk", "-bytes", "-delim", DELIMITER, name)


def make_vdisk(name: str, size: int, pool: str, iogrp: str) -> Command:
    """A thin vdisk of exactly ``size`` bytes that takes nothing and grows by itself."""
    place = ("mkvdisk", "-mdiskgrp", pool, "-iogrp", iogrp, "-size", str(size), "-unit", "b")
    thin = ("-rsize", "0%", "-autoexpand", "-warning", "0", "-grainsize", str(GRAIN_KIB))
    return (*place, *thin, "-name", name)


def remove_vdisk(name: str) -> Command:
    """Never with -force: a vdisk that is still mapped or copied is not ours to tear out."""
    return ("rmvdisk", name)


def list_maps() -> Command:
    """Every FlashCopy mapping."""
    return ("lsfcmap", "-delim", DELIMITER)


def make_map(source: str, target: str, group: str) -> Command:
    """A mapping in ``group`` that copies nothing in the background."""
    pair = ("mkfcmap", "-source", source, "-target", target)
    return (*pair, "-copyrate", str(COPY_RATE), "-consistgrp", group, "-grainsize", str(GRAIN_KIB))


def remove_map(name: str) -> Command:
    """Remove a stopped mapping."""
    return ("rmfcmap", name)


def list_groups() -> Command:
    """Every consistency group."""
    return ("lsfcconsistgrp", "-delim", DELIMITER)


def make_group(name: str) -> Command:
    """An empty consistency group."""
    return ("mkfcconsistgrp", "-name", name)


def prepare_group(name: str) -> Command:
    """Flush the sources and discard the targets."""
    return ("prestartfcconsistgrp", name)


def start_group(name: str) -> Command:
    """The instant."""
    return ("startfcconsistgrp", name)


def stop_group(name: str) -> Command:
    """End the copy: the targets go offline. Never with -force."""
    return ("stopfcconsistgrp", name)


def remove_group(name: str) -> Command:
    """Remove an empty consistency group."""
    return ("rmfcconsistgrp", name)


def list_hosts_of(vdisk: str) -> Command:
    """The hosts that ``vdisk`` is shown to."""
    return ("lsvdiskhostmap", "-delim", DELIMITER, vdisk)


def show_to_host(vdisk: str, host: str) -> Command:
    """Make ``vdisk`` a LUN of ``host``."""
    return ("mkvdiskhostmap", "-host", host, vdisk)


def hide_from_host(vdisk: str, host: str) -> Command:
    """Take the LUN away from ``host``."""
    return ("rmvdiskhostmap", "-host", host, vdisk)


# --- answers ----------------------------------------------------------------------------------------


def read_rows(text: str, *needed: str) -> tuple[Mapping[str, str], ...]:
    """The rows of a concise view by column name. No text at all: no rows. Raises Garbled."""
    lines = _lines(text)
    if not lines:
        return ()
    header = lines[0].split(DELIMITER)
    missing = [name for name in needed if name not in header]
    if missing:
        raise Garbled(f"there is no column {missing[0]}")
    rows = []
    for each in lines[1:]:
        fields = each.split(DELIMITER)
        if len(fields) != len(header):
            raise Garbled(f"a row has {len(fields)} fields, its header {len(header)}")
        rows.append(dict(zip(header, fields, strict=True)))
    return tuple(rows)


def read_detail(text: str, *needed: str) -> tuple[Mapping[str, str], tuple[Mapping[str, str], ...]]:
    """A detailed view: the volume's own fields, and those of each of its copies. Raises Garbled.

    Each copy repeats names of the volume (``status`` …) after its ``copy_id``: they do not replace the volume's.
    """
    own: dict[str, str] = {}
    copies: list[dict[str, str]] = []
    for each in _lines(text):
        name, delimiter, value = each.partition(DELIMITER)
        if not delimiter:
            raise Garbled(f"a line holds no {DELIMITER}")
        if name == "copy_id":
            copies.append({})
        (copies[-1] if copies else own).setdefault(name, value)
    missing = [name for name in needed if name not in own]
    if missing:
        raise Garbled(f"there is no field {missing[0]}")
    return own, tuple(copies)


def _lines(text: str) -> list[str]:
    """Lines without warnings, which may accompany success."""
    return [each for each in text.splitlines() if each.strip() and not _WARNING.match(each)]


_VDISK = ("name", "vdisk_UID", "capacity", "status", "mdisk_grp_name")


def read_vdisks(text: str) -> tuple[Vdisk, ...]:
    """The answer to :func:`list_vdisks`. Raises Garbled."""
    return tuple(_vdisk(row) for row in read_rows(text, *_VDISK))


def read_vdisk(text: str) -> Vdisk:
    """The answer to :func:`show_vdisk`. Raises Garbled."""
    own, copies = read_detail(text, *_VDISK)
    used = sum(_number(copy["used_capacity"]) for copy in copies if "used_capacity" in copy)
    return _vdisk(own, used)


def _vdisk(row: Mapping[str, str], used: int = 0) -> Vdisk:
    return Vdisk(
        name=row["name"],
        uid=row["vdisk_UID"].lower(),
        size=_number(row["capacity"]),
        status=row["status"],
        pool=row["mdisk_grp_name"],
        iogrp=row.get("IO_group_id", "0"),
        used=used,
    )


def read_maps(text: str) -> tuple[FcMap, ...]:
    """The answer to :func:`list_maps`. Raises Garbled."""
    needed = ("id", "name", "source_vdisk_name", "target_vdisk_name", "group_name", "status")
    rows = read_rows(text, *needed)
    strange = [row["status"] for row in rows if row["status"] not in set(MapStatus)]
    if strange:
        raise Garbled(f"there is no mapping state {strange[0]}")
    return tuple(FcMap(*(row[name] for name in needed)) for row in rows)


def read_groups(text: str) -> tuple[str, ...]:
    """Names of the answer to :func:`list_groups`. Raises Garbled."""
    return tuple(row["name"] for row in read_rows(text, "name"))


def read_mapped(text: str) -> tuple[Mapped, ...]:
    """The answer to :func:`list_hosts_of`. Raises Garbled."""
    return tuple(Mapped(row["host_name"], row["name"]) for row in read_rows(text, "name", "host_name"))


def _number(text: str) -> int:
    if not text.isdecimal():
        raise Garbled(f"{text} is no number of bytes")
    return int(text)


def error_line(out: str, err: str) -> str:
    """The array's own words for a refusal: the line with its error code, or whatever it said first."""
    lines = [each.strip() for each in (*err.splitlines(), *out.splitlines()) if each.strip()]
    return next((each for each in lines if _ERROR.search(each)), lines[0] if lines else "it gave no reason")[:300]


def is_pool_full(message: str) -> bool:
    """Whether the refusal is for want of space in the pool."""
    found = _ERROR.search(message)
    return found is not None and found[1] in _POOL_FULL


def states(maps: Sequence[FcMap], group: str) -> frozenset[str]:
    """The states of all mappings in ``group``."""
    return frozenset(each.status for each in maps if each.group == group)
