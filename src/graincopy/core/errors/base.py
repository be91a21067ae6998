"""What every error is, the results that are none, and the ends that come from outside."""

from __future__ import annotations

from typing import ClassVar

DONE = 0
FAILED = 1
USAGE = 2
WARNED = 3
INTERRUPTED = 130
TERMINATED = 143


def printable(value: object) -> str:
    """``value`` on one line: control characters and undecodable bytes as ``\\xNN``."""
    text = value if isinstance(value, str) else str(value)
    shown = []
    for char in text:
        code = ord(char)
        if 0xDC80 <= code <= 0xDCFF:
            shown.append(f"\\x{code - 0xDC00:02x}")
        elif code < 0x20 or code == 0x7F:
            shown.append(f"\\x{code:02x}")
        else:
            shown.append(char)
    return "".join(shown)


class GraincopyError(Exception):
    """Root of the tree. Callers catch it at the face (CLI) and nowhere else without a reason."""

    exit_code: ClassVar[int] = FAILED
    sentence: ClassVar[str] = "{what}"
    hint: ClassVar[str] = ""

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        shown = {name: printable(value) for name, value in facts.items()}
        self.message = self.sentence.format(**shown)
        self.next_move = self.hint.format(**shown)
        super().__init__(self.message)


class UsageWrong(GraincopyError):
    """The command line cannot be understood."""

    exit_code = USAGE
    hint = "See graincopy --help."


class Interrupted(GraincopyError):
    """SIGINT; everything is thawed and the target removed or tagged."""

    exit_code = INTERRUPTED
    sentence = "interrupted"
    hint = "Nothing was published. What was stored is found by the next run."


class Terminated(GraincopyError):
    """SIGTERM; as :class:`Interrupted`."""

    exit_code = TERMINATED
    sentence = "terminated"
    hint = "Nothing was published. What was stored is found by the next run."


def error_classes() -> list[type[GraincopyError]]:
    """Every error class, by exit code: what EXIT STATUS lists."""
    found: list[type[GraincopyError]] = []
    waiting: list[type[GraincopyError]] = [GraincopyError]
    while waiting:
        cls = waiting.pop()
        found.append(cls)
        waiting.extend(cls.__subclasses__())
    return sorted(found, key=lambda cls: cls.exit_code)
