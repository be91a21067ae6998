"""The parent's end of the guard of a subsystem (stage 5). See :mod:`graincopy.workloads.command_guard`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from graincopy.core.clock import Clock
from graincopy.core.errors import ResumeFailed, SubsystemFailed
from graincopy.workloads import command_guard

_GRACE = 20.0  # seconds beyond all time-outs until the guard must have answered
_RESUMES = 4  # how often one resume command can run to its time-out: three attempts and their pauses


class Commands(msgspec.Struct, frozen=True):
    """What brings a subsystem to rest and what lets it go on. Times in seconds."""

    subsystem: str
    quiesce: tuple[tuple[str, ...], ...] = ()
    resume: tuple[tuple[str, ...], ...] = ()
    timeout: float = 30.0
    hold: float = 10.0


class Guarded(msgspec.Struct):
    """One subsystem on its way through quiesce and resume."""

    commands: Commands
    clock: Clock
    _process: subprocess.Popen[bytes] | None = None
    _unread: bytes = b""
    _settled: bool = False

    def begin(self) -> None:
        """Start the quiesce; :meth:`settle` waits for it."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.realpath(command_guard.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
        )
        order = {
            "quiesce": self.commands.quiesce,
            "resume": self.commands.resume,
            "timeout": self.commands.timeout,
            "hold": self.commands.hold,
        }
        self._say(json.dumps(order).encode() + b"\n")

    def settle(self) -> None:
        """Wait until it is quiesced. Raises SubsystemFailed (it was resumed) or ResumeFailed."""
        try:
            answer = self._listen(self._longest(len(self.commands.quiesce)))
            if answer is None:
                self._resume_ourselves("the guard of its quiesce was killed")
                raise SubsystemFailed(subsystem=self.commands.subsystem, reason="the guard of its quiesce was killed")
            if answer["said"] == "failed":
                self._refuse_stuck(answer["resume"])
                raise SubsystemFailed(subsystem=self.commands.subsystem, reason=answer["why"])
            self._settled = True
        except BaseException:
            self.close()
            raise

    def resume(self) -> bool:
        """Let it go on; whether it had been quiesced until now. Raises ResumeFailed."""
        if self._process is None:  # its quiesce failed, and it was resumed then
            return False
        try:
            self._say(b"resume\n")
            answer = self._listen(self._longest(0))
            if answer is None:
                self._resume_ourselves("the guard of its quiesce was killed")
                return False
            self._refuse_stuck(answer["resume"])
            return answer["cause"] == "asked"
        finally:
            self.close()

    def abandon(self) -> None:
        """Let it go on although its quiesce may not be over yet. Raises ResumeFailed."""
        if self._process is not None and not self._settled:
            with suppress(SubsystemFailed):  # it failed as well, and was resumed
                self.settle()
        self.resume()

    def close(self) -> None:
        """Let the guard go, which resumes what it holds. May be repeated."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):  # it must not be killed: it may still be resuming
            process.wait(self._longest(len(self.commands.quiesce)))

    def _longest(self, quiesces: int) -> float:
        resumes = _RESUMES * len(self.commands.resume)
        return (quiesces + resumes) * self.commands.timeout + _GRACE

    def _say(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone: what it says, or that it says nothing, tells more
            self._process.stdin.write(line)

    def _listen(self, patience: float) -> dict[str, str] | None:
        """The guard's next line; None when it is gone or silent."""
        assert self._process is not None and self._process.stdout is not None
        until = self.clock.monotonic() + patience
        while b"\n" not in self._unread:
            left = until - self.clock.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            piece = os.read(self._process.stdout.fileno(), 65536)
            if not piece:
                return None
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, str] = json.loads(line)
        return answer

    def _resume_ourselves(self, why: str) -> None:
        troubles = [trouble for argv in self.commands.resume if (trouble := self._run(argv))]
        self._refuse_stuck("; ".join(troubles) and f"{why}, and then {'; '.join(troubles)}")

    def _run(self, argv: Sequence[str]) -> str:
        return command_guard.run(list(argv), self.commands.timeout)[1]

    def _refuse_stuck(self, trouble: str) -> None:
        if trouble:
            commands = " && ".join(" ".join(argv) for argv in self.commands.resume)
            raise ResumeFailed(subsystem=self.commands.subsystem, reason=trouble, command=commands)
