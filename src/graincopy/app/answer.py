"""What an operation gives back: one document for machines, lines for people, an exit code. Faces only print it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from graincopy.core.errors import DONE


class Answer(msgspec.Struct, frozen=True):
    """``document`` is plain JSON values, None when it was printed already.

    ``warnings`` go to stderr and, with exit code 3, into the document.
    """

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


def decodable(value: Any) -> Any:
    """Undecodable bytes of paths as ``\\xNN``, in every string of the document."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {decodable(key): decodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [decodable(item) for item in value]
    return value
