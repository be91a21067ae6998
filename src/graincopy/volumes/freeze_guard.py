"""The watchdog of the freeze window (stage 5): a program of its own that freezes, and thaws whatever happens.

It is exec'd with the mount points' descriptors inherited and speaks lines over its standard input and output::

    python -I -S freeze_guard.py DEADLINE_MS FD,FD/FD      descriptors by wave: "/" parts waves, inner ones first

    guard  → ready
    parent → freeze
    guard  → frozen FD ERRNO BEGAN_NS ENDED_NS             one for each, in the order in which they came
    guard  → held                                          when all of them are
    parent → thaw
    guard  → thawed FD ERRNO BEGAN_NS ENDED_NS             one for each that it had frozen; outer ones first
    guard  → done CAUSE                                    asked, failed, deadline or parent

Times are CLOCK_MONOTONIC. It thaws when asked, when a freeze failed, when its standard input ends (the parent was
killed) and at the deadline, counted from the first freeze; then exactly what it froze itself. A freeze that ends
after that moment is taken back by its own thread. EINVAL on a thaw says that somebody else had thawed it: broken.

Everything is loaded, and locked into memory, before "ready"; nothing is imported, opened or logged after that.
FIFREEZE and FITHAW: linux/fs.h. PR_SET_IO_FLUSHER: prctl(2), so that reclaim never waits for a frozen file system.
"""

import ctypes
import fcntl
import os
import select
import signal
import sys
import threading
import time

FIFREEZE = 0xC0045877
FITHAW = 0xC0045878
_MCL_CURRENT_AND_FUTURE = 1 | 2
_PR_SET_IO_FLUSHER = 57
_STACK = 256 << 10  # bytes of each thread's stack; all of it is locked
_THAW_PATIENCE = 1.0  # seconds that outer thaws may take before the inner ones are begun all the same


class Member:
    """One file system: a thread that freezes it when told to, and then thaws it when told to."""

    def __init__(self, fd: int, wake: int) -> None:
        self.fd = fd
        self.wake = wake
        self.begun = False
        self.go_freeze = threading.Event()
        self.go_thaw = threading.Event()
        self.freeze: tuple[int, int, int] | None = None  # errno, began, ended
        self.thaw: tuple[int, int, int] | None = None
        self.finished = False
        self.freeze_said = False
        self.thaw_said = False
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        self.go_freeze.wait()
        self.freeze = _timed_ioctl(self.fd, FIFREEZE)
        os.write(self.wake, b".")
        self.go_thaw.wait()
        if self.freeze[0] == 0:
            self.thaw = _timed_ioctl(self.fd, FITHAW)
        self.finished = True
        os.write(self.wake, b".")

    @property
    def held(self) -> bool:
        """Frozen by us and not thawed yet, as far as is known."""
        return self.freeze is not None and self.freeze[0] == 0 and not self.finished


class Guard:
    """The waves and what becomes of them; every line is said by the main thread."""

    def __init__(self, deadline: float, waves: list[list[int]]) -> None:
        self.patience = deadline
        self.deadline: float | None = None
        self.woken, self.wake = os.pipe()
        self.waves = [[Member(fd, self.wake) for fd in wave] for wave in waves]
        self.members = [member for wave in self.waves for member in wave]

    def run(self) -> None:
        """From "ready" to the end."""
        say("ready")
        if self._wait() != "freeze":
            return
        self.deadline = time.monotonic() + self.patience
        self._thaw(self._freeze() or self._hold())

    def _freeze(self) -> str:
        """Freeze wave by wave; "" when everything is frozen, else why not."""
        for wave in self.waves:
            for member in wave:
                member.begun = True
                member.go_freeze.set()
            while any(member.freeze is None for member in wave):
                cause = self._wait()
                self._tell()
                if cause:
                    return cause
            if any(member.freeze and member.freeze[0] for member in wave):
                return "failed"
        say("held")
        return ""

    def _hold(self) -> str:
        cause = ""
        while not cause:
            cause = self._wait()
        return cause

    def _thaw(self, cause: str) -> None:
        """Outer waves first; what is still being frozen is taken back by its own thread when that ends."""
        self.deadline = None
        for wave in reversed(self.waves):
            for member in wave:
                member.go_thaw.set()
            until = time.monotonic() + _THAW_PATIENCE
            while any(member.held for member in wave) and time.monotonic() < until:
                self._drain(until - time.monotonic())
                self._tell()
        while any(member.begun and not member.finished for member in self.members):
            self._drain(None)
            self._tell()
        self._tell()
        say(f"done {cause}")

    def _wait(self) -> str:
        """What ends the present state: "freeze", "asked", "parent", "deadline"; "" when a member has news."""
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        ready = select.select([0, self.woken], [], [], left)[0]
        if self.woken in ready:
            os.read(self.woken, 4096)
        if 0 in ready:
            order = os.read(0, 64).strip()
            return {b"freeze": "freeze", b"thaw": "asked"}.get(order, "parent")
        return "" if ready else "deadline"

    def _drain(self, seconds: float | None) -> None:
        if select.select([self.woken], [], [], seconds if seconds is None else max(0.0, seconds))[0]:
            os.read(self.woken, 4096)

    def _tell(self) -> None:
        for member in self.members:
            if member.freeze is not None and not member.freeze_said:
                member.freeze_said = True
                say("frozen {} {} {} {}".format(member.fd, *member.freeze))
        for member in self.members:
            if member.thaw is not None and not member.thaw_said:
                member.thaw_said = True
                say("thawed {} {} {} {}".format(member.fd, *member.thaw))


def _timed_ioctl(fd: int, request: int) -> tuple[int, int, int]:
    began = time.monotonic_ns()
    errno = 0
    try:
        fcntl.ioctl(fd, request, 0)
    except OSError as error:
        errno = error.errno or 5  # EIO
    return errno, began, time.monotonic_ns()


def say(line: str) -> None:
    """One line to the parent; a parent that is gone does not matter."""
    try:
        os.write(1, f"{line}\n".encode())
    except OSError:
        return


def settle_in() -> None:
    """Be hard to kill, to swap out and to stop, as far as this user may; nothing of it is needed to be correct."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"-1000")
        finally:
            os.close(fd)
    except OSError:
        pass  # an ordinary user may not lower it
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    threading.stack_size(_STACK)
    libc.mlockall(_MCL_CURRENT_AND_FUTURE)


def main(arguments: list[str]) -> None:
    """``arguments``: deadline in milliseconds, descriptors by wave."""
    settle_in()
    waves = [[int(fd) for fd in wave.split(",")] for wave in arguments[1].split("/")]
    Guard(int(arguments[0]) / 1000, waves).run()


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # threads of members that were never frozen are still waiting
