"""What an operation gives back: one document for machines, lines for people, an exit code. Faces only print it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from graincopy.core.errors import DONE


class Answer(msgspec.Struct, frozen=True):
    """``document`` is plain JSON values; ``warnings`` go to stderr and, with exit code 3, into the document."""

    document: object
    lines: tuple[str, ...]
    exit_code: int = DONE
    warnings: tuple[str, ...] = ()


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Left-aligned columns under a head; nothing but the head when there are no rows."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return tuple(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )
