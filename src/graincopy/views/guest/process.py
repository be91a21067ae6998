"""The process that reads a guest's file system, as its keeper has it: a socket, and an end."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from types import TracebackType

START = "import sys; sys.path[:] = sys.argv[2:]; from graincopy.views.guest.child import main; main()"


class ReaderProcess:
    """One process, running until :meth:`end`. ``mount_fd``: a mounted file system that it is to read, or -1."""

    def __init__(self, mount_fd: int = -1) -> None:
        self.socket, theirs = socket.socketpair()
        inherited = [fd for fd in (theirs.fileno(), mount_fd) if fd >= 0]
        command = [sys.executable, "-I", "-S", "-c", START, str(theirs.fileno()), *sys.path]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=inherited,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={"LC_ALL": "C.UTF-8"},
                    cwd="/",
                )
            except OSError:
                self.socket.close()
                raise

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def ended(self, seconds: float) -> int | None:
        """Its exit code, or minus the signal that ended it; None when it does not end within ``seconds``."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """It does not run on return; may be repeated."""
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Nothing is left of it; may be repeated."""
        self.kill()
        self.socket.close()


class Spare:
    """A reader started before it is known what there is to read: starting takes as long as deriving a key does."""

    def __init__(self) -> None:
        self._process: ReaderProcess | None = None

    def __enter__(self) -> Spare:
        if can_read():
            self._process = ReaderProcess()
        return self

    def take(self) -> ReaderProcess:
        """The one that waits, or a new one; whoever takes it ends it."""
        process, self._process = self._process, None
        return process or ReaderProcess()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self._process.end()


def can_read() -> bool:
    """Whether there is something on this host for a reader to read with."""
    return importlib.util.find_spec("pytsk3") is not None
