"""What our own array is told and what it answers: command lines in, concise and detailed views out."""

from __future__ import annotations

import shlex

_OPTIONS: dict[str, tuple[str, ...]] = {  # verb → options that take a value; "=": takes none
    "lsvdisk": ("=-bytes", "-delim", "-filtervalue", "=-nohdr"),
    "lsfcmap": ("-delim", "-filtervalue", "=-nohdr"),
    "lsfcconsistgrp": ("-delim", "-filtervalue", "=-nohdr"),
    "lsvdiskhostmap": ("-delim", "=-nohdr"),
    "mkvdisk": ("-mdiskgrp", "-iogrp", "-size", "-unit", "-rsize", "=-autoexpand", "-warning", "-grainsize", "-name"),
    "rmvdisk": ("=-force",),
    "mkfcmap": ("-source", "-target", "-copyrate", "-consistgrp", "-grainsize"),
    "rmfcmap": ("=-force",),
    "mkfcconsistgrp": ("-name",),
    "rmfcconsistgrp": ("=-force",),
    "prestartfcconsistgrp": (),
    "startfcconsistgrp": (),
    "stopfcconsistgrp": ("=-force",),
    "mkvdiskhostmap": ("-host", "=-force", "-scsi"),
    "rmvdiskhostmap": ("-host",),
}
Options = dict[str, str]


class Refuse(Exception):
    """A command that is answered with an error."""


def parse(line: str) -> tuple[Options, list[str]]:
    """Options with their values ("" for one without), and what is left."""
    verb, *words = shlex.split(line)
    if verb not in _OPTIONS:
        raise Refuse(f"rbash: {verb}: command not found")
    options: Options = {}
    names: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if not word.startswith("-"):
            names.append(word)
        elif f"={word}" in _OPTIONS[verb]:
            options[word] = ""
        elif word in _OPTIONS[verb]:
            options[word] = next(waiting, "")
        else:
            raise Refuse(f"CMMVC5709E [{word}] is not a supported parameter.")
    return options, names


def table(rows: list[dict[str, str]], options: Options) -> str:
    """The concise view; nothing at all when there are no rows."""
    key, _, value = options.get("-filtervalue", "").partition("=")
    rows = [row for row in rows if not key or row[key] == value]
    delimiter = options.get("-delim", " ")
    lines = [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []
    return "".join(delimiter.join(fields) + "\n" for fields in lines)


def detail(parts: list[dict[str, str]], options: Options) -> str:
    """The detailed view: one field a line, the volume's own and then, after an empty line, each copy's."""
    delimiter = options.get("-delim", " ")
    return "\n".join("".join(f"{name}{delimiter}{value}\n" for name, value in part.items()) for part in parts)
