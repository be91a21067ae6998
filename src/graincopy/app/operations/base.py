"""What an operation is, and what several of them take."""

from __future__ import annotations

import msgspec


class Input(msgspec.Struct, frozen=True):
    """One argument. A name that begins with ``-`` is an option, any other is positional."""

    name: str
    help: str
    kind: str = "text"  # "text", "flag", "number", "many" (one or more), "any" (none or more), "optional", "repeated"
    metavar: str = ""
    default: object = None
    choices: tuple[str, ...] = ()


class Operation(msgspec.Struct, frozen=True):
    """One thing that can be asked for."""

    name: str
    summary: str
    action: str
    inputs: tuple[Input, ...] = ()
    examples: tuple[str, ...] = ()
    about: str = ""
    changes: bool = False  # has effects, so it takes --dry-run
    results: tuple[tuple[int, str], ...] = ()  # exit codes that mean something special here
    opens: bool = True  # the repository, so its key can be derived while the rest is being imported
    looks_inside: bool = False  # a guest's file system, so its reader can start meanwhile


class Table(msgspec.Struct, frozen=True):
    """All operations, by name."""

    operations: tuple[Operation, ...] = msgspec.field(default_factory=tuple)

    def find(self, name: str) -> Operation:
        """The operation called ``name``. Raises KeyError."""
        for operation in self.operations:
            if operation.name == name:
                return operation
        raise KeyError(name)


POINT = Input("point", "an id, a unique beginning of one, latest, or latest~N", metavar="POINT")
DISK = Input("--disk", "only this disk (its NAME in the restore point)", metavar="NAME")
WARNED = (3, "done, with warnings")
HYBRID = (
    Input("--medium-only", "take no snapshot of the original volumes; read everything from the medium", kind="flag"),
    Input("--trust-map", "do not prove by its id what is read from the original volumes", kind="flag"),
)
