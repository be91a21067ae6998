"""Beside the stages: one command line, cut off at a named step. ``python -m graincopy.testing.crash``.

    crash --at published[:2] [--signal KILL|STOP|TERM|INT] -- backup /ds1/web.raw
    crash --list -- backup /ds1/web.raw

The command runs in this process, exactly as ``graincopy`` would run it; when it reaches the step for the n-th time it
sends the signal to itself. So a kill is a real one: no ``finally`` runs, and whatever other processes belong to the
run (the freeze guard) find their parent gone. ``--list`` lets the command run to its end and prints every step that
it passed, one a line, in order; the command's own output then goes to stderr. The exit code is the command's, or
NOT_REACHED when it ended without coming to the step.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

NOT_REACHED = 98
SIGNALS = ("KILL", "STOP", "TERM", "INT")


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """The ``count``-th time that ``step`` is reached."""

    step: str
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> CrashPoint:
        """From ``STEP`` or ``STEP:N``. Raises ValueError."""
        step, colon, count = text.partition(":")
        if not step or (colon and not (count.isdecimal() and int(count))):
            raise ValueError(f"{text!r} is no STEP or STEP:N with N from 1 on")
        return cls(step, int(count) if colon else 1)

    def __str__(self) -> str:
        return f"{self.step}:{self.count}"


@dataclass(slots=True)
class Passing:
    """Hears of every step; calls ``strike`` once, at the crash point."""

    at: CrashPoint | None
    strike: Callable[[], None]
    passed: list[str] = field(default_factory=list)

    def __call__(self, step: str) -> None:
        self.passed.append(step)
        if self.at is not None and step == self.at.step and self.passed.count(step) == self.at.count:
            self.strike()

    @property
    def reached(self) -> bool:
        """Whether the crash point was passed."""
        return self.at is not None and self.passed.count(self.at.step) >= self.at.count


def crash_points(passed: Sequence[str]) -> tuple[CrashPoint, ...]:
    """Every place where a command that passed these steps can be cut off: each step, each time."""
    return tuple(CrashPoint(step, passed[: at + 1].count(step)) for at, step in enumerate(passed))


def command(arguments: Sequence[str], at: CrashPoint | None = None, number: str = "KILL") -> tuple[str, ...]:
    """What to run, with the present interpreter, to cut ``arguments`` off ``at`` a step; to list its steps without."""
    how = ("--list",) if at is None else ("--at", str(at), "--signal", number)
    return (sys.executable, "-m", __name__, *how, "--", *arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; answers its exit code."""
    wanted = _parser().parse_args(arguments)
    passing = Passing(wanted.at, lambda: os.kill(os.getpid(), getattr(signal, f"SIG{wanted.signal}")))
    from graincopy.cli.main import run  # this program stands above the faces, whatever room it is kept in

    with contextlib.redirect_stdout(sys.stderr) if wanted.list else contextlib.nullcontext():
        code = run(wanted.command, step=passing)
    if wanted.list:
        sys.stdout.writelines(f"{step}\n" for step in passing.passed)
    elif not passing.reached:
        sys.stderr.write(f"crash: the command ended with {code} and did not reach {wanted.at}\n")
        return NOT_REACHED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("crash", description="Run one graincopy command and cut it off at a step.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--at", type=_crash_point, metavar="STEP[:N]", help="where to send the signal")
    what.add_argument("--list", action="store_true", help="print the steps that the command passes")
    parser.add_argument("--signal", choices=SIGNALS, default="KILL", help="which one (default: %(default)s)")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="a graincopy command line")
    return parser


def _crash_point(text: str) -> CrashPoint:
    try:
        return CrashPoint.parse(text)
    except ValueError as failure:
        raise argparse.ArgumentTypeError(str(failure)) from failure


if __name__ == "__main__":
    sys.exit(main())
