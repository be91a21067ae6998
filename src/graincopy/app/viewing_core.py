"""What every operation that shows a restore point live begins and ends with: its view, and whence its bytes came."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from graincopy.app.answer import table
from graincopy.app.wiring import Wiring
from graincopy.core.errors import printable
from graincopy.core.units import format_size
from graincopy.views.disk import Finding
from graincopy.workflow.view import View, ViewWish, open_view

Values = dict[str, Any]


def complain(finding: Finding) -> None:
    """One line on stderr at the moment it is found: a view may be open for days."""
    sys.stderr.write(f"warning: {printable(finding)}\n")
    sys.stderr.flush()


@contextmanager
def opened_view(
    wiring: Wiring, values: Values, disk: str | None = None, *, tell: Callable[[Finding], None] = complain
) -> Iterator[View]:
    """A view of ``values["point"]``: of its disk called ``disk``, or of all. Everything is taken down at the end.

    Raises PointUnknown, PointAmbiguous, DiskUnknown and whatever opening a repository raises.
    """
    repository = wiring.repository()
    point = repository.find_point(values["point"])
    records = repository.find_disks(point, disk)
    wish = ViewWish(
        hybrid=not values.get("medium_only", False),
        trust_map=bool(values.get("trust_map", False)),
    )
    with open_view(wiring.context(repository), point, records, wish, tell=tell) as view:
        yield view


def view_document(view: View) -> dict[str, object]:
    """Where the bytes came from, for machines."""
    return {
        "restore_point": view.point.id,
        "fetched_bytes": view.fetched_bytes,
        "disks": [_without_objects(one) for one in view.report()],
    }


def _without_objects(report: object) -> dict[str, object]:
    document: dict[str, object] = msgspec.to_builtins(report)
    return document


def view_lines(view: View) -> tuple[str, ...]:
    """Where the bytes came from, for people."""
    rows = [
        (
            printable(one.name),
            format_size(one.local_bytes),
            format_size(one.medium_bytes),
            format_size(one.zero_bytes),
            printable(one.near),
        )
        for one in view.report()
    ]
    return table(("DISK", "FROM S", "FROM MEDIUM", "ZEROS", "READ FROM S"), rows)


def view_warnings(view: View) -> tuple[str, ...]:
    """What could not be read, one clause each."""
    return tuple(str(finding) for one in view.report() for finding in one.findings)
