"""Operations that look into restore points: the disks as files, and the files inside the disks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graincopy.app import host
from graincopy.app.answer import Answer, table
from graincopy.app.listing import listing_answer
from graincopy.app.viewing_core import (
    complain,
    opened_view,
    view_document,
    view_lines,
    view_warnings,
)
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, WARNED, GuestPathMissing, OutputExists, OutputUnfit, UsageWrong, printable
from graincopy.core.units import format_size
from graincopy.views import fuse
from graincopy.views.guest import wire
from graincopy.views.guest.extract import extract_into, extract_stream
from graincopy.views.guest.locate import Located, Place, located, parse_place, partitions_of
from graincopy.views.guest.metadata import Allowed, Extracted
from graincopy.views.guest.partitions import Partition
from graincopy.views.source import ViewDisk
from graincopy.workflow.view import View, ViewWish, open_view

Values = dict[str, Any]


# --- mount ------------------------------------------------------------------------------------------


def mount(wiring: Wiring, values: Values) -> Answer:
    """The disks of a restore point as files below DIR, until it is unmounted or a signal comes."""
    directory = os.path.abspath(values["directory"])
    fuse.refuse_unfit(directory)
    fuse.load()
    with opened_view(wiring, values, values.get("disk")) as view:

        def ready() -> None:
            out = sys.stderr if values.get("json") else sys.stdout
            names = ", ".join(printable(disk.name) for disk in view.disks)
            out.write(f"{printable(directory)} shows {names}; it ends with: fusermount3 -u {printable(directory)}\n")
            out.flush()

        fuse.serve(view.disks, directory, view.point.time, ready, allow_other=bool(values.get("allow_other")))
        warnings = view_warnings(view)
        document = {"directory": directory, **view_document(view), "warnings": list(warnings)}
        return Answer(document, view_lines(view), WARNED if warnings else DONE, warnings)


# --- files ------------------------------------------------------------------------------------------


def files(wiring: Wiring, values: Values) -> Answer:
    """The partitions of a disk, or what lies in a directory of one."""
    with _opened(wiring, values, hybrid=False) as (view, disk, place):  # T takes longer than a listing
        if place.path is None and place.partition is None:
            return _partitions_answer(view, disk)
        with located(disk, place, host.SystemClock(), wiring.spare) as found:
            return listing_answer(view.point.id, disk.name, found, as_json=bool(values.get("json")))


@contextmanager
def _opened(wiring: Wiring, values: Values, *, hybrid: bool) -> Iterator[tuple[View, ViewDisk, Place]]:
    """A view of the one disk that ``values["where"]`` is about. The repository is opened once: that takes a while."""
    repository = wiring.repository()
    point = repository.find_point(values["point"])
    place = parse_place(values["where"], [disk.name for disk in point.disks])
    records = repository.find_disks(point, place.disk)
    wish = ViewWish(hybrid=hybrid and not values.get("medium_only"), trust_map=bool(values.get("trust_map")))
    with open_view(wiring.context(repository), point, records, wish, tell=complain) as view:
        yield view, view.disks[0], place


def _partitions_answer(view: View, disk: ViewDisk) -> Answer:
    found = partitions_of(disk)
    rows = [
        (
            str(one.number) if one.number else "whole disk",
            format_size(one.start),
            format_size(one.size),
            one.fs_type or "unknown",
            "yes" if one.reader else "no",
            printable(one.name),
            one.note,
        )
        for one in found
    ]
    document = {
        "restore_point": view.point.id,
        "disk": disk.name,
        "size": disk.size,
        "partitions": [_partition_document(one) for one in found],
    }
    return Answer(document, table(("PARTITION", "START", "SIZE", "HOLDS", "READABLE", "NAME", ""), rows))


def _partition_document(one: Partition) -> dict[str, object]:
    return {
        "number": one.number,
        "start": one.start,
        "size": one.size,
        "name": one.name,
        "file_system": one.fs_type or None,
        "readable": bool(one.reader),
        "note": one.note,
    }


# --- extract ----------------------------------------------------------------------------------------


def extract(wiring: Wiring, values: Values) -> Answer:
    """One file or tree out of a disk, into a directory or, with ``-``, a file to standard output."""
    to = values["to"]
    if not to:
        raise UsageWrong(what="extract needs --to DIR, or --to - for one file to standard output")
    if to == "-" and values.get("json"):
        raise UsageWrong(what="with --to - the file itself is what goes to standard output; leave --json off")
    with _opened(wiring, values, hybrid=True) as (view, disk, place):
        if place.path is None:
            raise UsageWrong(what="extract needs DISK:PATH; graincopy files lists what there is")
        with located(disk, place, host.SystemClock(), wiring.spare) as found:
            return _to_stdout(disk, found) if to == "-" else _to_directory(view, disk, found, values)


def _to_stdout(disk: ViewDisk, found: Located) -> Answer:
    answers = found.reader.fetch(found.path, follow=True)
    first = next(answers, None)
    if isinstance(first, wire.Missing):
        raise GuestPathMissing(disk=disk.name, path=os.fsdecode(found.path), reason="it is a link to nothing")
    if not isinstance(first, wire.Entry) or first.kind != "file":
        kind = first.kind if isinstance(first, wire.Entry) else "unreadable"
        raise UsageWrong(what=f"{os.fsdecode(found.path)} is {kind}, no file; name a directory with --to")
    where = f"{disk.name}:{os.fsdecode(found.path)}"
    size = extract_stream(answers, sys.stdout.buffer.write, where)
    sys.stdout.buffer.flush()
    if found.partition.note:
        sys.stderr.write(f"note: {found.partition.note}\n")
    return Answer({"size": size}, ())


def _to_directory(view: View, disk: ViewDisk, found: Located, values: Values) -> Answer:
    directory = os.path.abspath(values["to"])
    name = _last_name(found.path)
    _refuse_taken(directory, name)
    allowed = Allowed(devices=bool(values.get("devices")), setuid=bool(values.get("setuid")))
    done = extract_into(found.reader.fetch(found.path), directory, name, allowed)
    warnings = (*_problem_lines(done), *view_warnings(view))
    target = os.path.join(directory, os.fsdecode(name)) if name else directory
    notes = [found.partition.note] if found.partition.note else []
    document = {
        "disk": disk.name,
        "partition": found.partition.number,
        "path": os.fsdecode(found.path),
        "target": target,
        "files": done.files,
        "directories": done.directories,
        "others": done.others,
        "size": done.size,
        "written_bytes": done.written,
        "skipped": done.skipped,
        "stripped": done.stripped,
        "failed": done.failed,
        "problems": [{"path": os.fsdecode(path), "reason": reason} for path, reason in done.problems],
        "notes": notes,
        "view": view_document(view),
        "warnings": list(warnings),
    }
    lines = (*_done_lines(done, target), *(f"note: {note}" for note in notes))
    return Answer(document, lines, WARNED if warnings else DONE, warnings)


def _last_name(path: bytes) -> bytes:
    """What a path is called on this side; empty for the root of a file system."""
    parts: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            parts = parts[:-1]
        elif part not in (b"", b"."):
            parts.append(part)
    return parts[-1] if parts else b""


def _refuse_taken(directory: str, name: bytes) -> None:
    """Raise OutputExists or OutputUnfit before anything is read."""
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise OutputUnfit(path=directory, reason="it is no directory")
    target = os.path.join(directory, os.fsdecode(name)) if name else directory
    if os.path.lexists(target) and (name or os.listdir(directory)):
        raise OutputExists(path=target)


def _problem_lines(done: Extracted) -> tuple[str, ...]:
    shown = tuple(f"{printable(os.fsdecode(path)) or 'the whole'}: {reason}" for path, reason in done.problems[:20])
    more = done.failed - len(shown)
    return (*shown, f"and {more} more that could not be extracted") if more > 0 else shown


def _done_lines(done: Extracted, target: str) -> tuple[str, ...]:
    counts = f"{done.files} files, {done.directories} directories, {done.others} links and pipes"
    lines = [f"extracted {counts}, {format_size(done.size)}, to {printable(target)}"]
    if done.skipped:
        lines.append(f"{done.skipped} device nodes and sockets left out; --devices makes device nodes")
    if done.stripped:
        lines.append(f"{done.stripped} came without setuid, setgid or capabilities; --setuid keeps them")
    return tuple(lines)
