"""Below stages 4 to 7: the machine protocol of QEMU and qemu-storage-daemon, spoken synchronously over a unix socket.

Not the package ``qemu.qmp``: that is asyncio, brings an event loop into threads that have none, and what is needed of
the protocol is a line out and a line in. https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

from __future__ import annotations

import json
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

PATIENCE = (
    30.0  # seconds for one answer; a monitor serves one client at a time, and the one before us may still be busy
)


class QmpRefused(Exception):
    """QEMU understood a command and did not do it. ``kind`` is its error class, the text its reason."""

    def __init__(self, command: str, reason: str, kind: str = "GenericError") -> None:
        super().__init__(reason)
        self.command, self.reason, self.kind = command, reason, kind


class Commands(ABC):
    """What can be asked of a QEMU, however it is reached."""

    @abstractmethod
    def run(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What ``command`` returns. Raises QmpRefused; OSError when the connection or QEMU ended."""

    @abstractmethod
    def wait(self, event: str, about: str) -> None:
        """Until ``event`` has come that names ``about`` as its ``id``. Raises TimeoutError, OSError."""

    @property
    def peer(self) -> int | None:
        """The QEMU process; None when it cannot be told."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let it go; may be repeated."""

    def transaction(self, actions: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """All of ``actions`` (type, data) at one instant, or none."""
        if actions:
            self.run("transaction", {"actions": [{"type": kind, "data": dict(data)} for kind, data in actions]})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Monitor(Commands):
    """One connection to one monitor. Not for several threads at once."""

    def __init__(self, channel: socket.socket, patience: float = PATIENCE) -> None:
        """Takes over ``channel``, connected already. Raises OSError when nothing that speaks QMP answers in time."""
        self._channel = channel
        self._asked = 0  # commands
        try:
            channel.settimeout(patience)
            self._events: deque[dict[str, Any]] = deque(maxlen=1000)
            self._reader = channel.makefile("rb")
            greeting = self._receive()
            if "QMP" not in greeting:
                raise ConnectionError("what answers there is no QEMU monitor")
            self.version = _version(greeting["QMP"])
            self.run("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(cls, path: str, patience: float = PATIENCE) -> Monitor:
        """To the unix socket at ``path``. Raises OSError (FileNotFoundError, ConnectionRefusedError: no QEMU there)."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # not settimeout(): then connect(2) does not wait where others queue for a monitor, but fails with EAGAIN
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", *_timeval(patience)))
            connect_unix(channel, path)
        except BaseException:
            channel.close()
            raise
        return cls(channel, patience)

    def run(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What ``command`` returns. Raises QmpRefused; OSError when the connection or QEMU ended."""
        self._asked += 1
        message: dict[str, Any] = {"execute": command, "id": self._asked}
        if arguments:
            message["arguments"] = dict(arguments)
        self._channel.sendall(json.dumps(message).encode() + b"\n")
        answer = self._receive()
        while not self._answers(answer):
            answer = self._receive()
        if "error" in answer:
            error = answer["error"]
            raise QmpRefused(command, str(error.get("desc", error)).rstrip("."), str(error.get("class", "")))
        return answer.get("return")

    def _answers(self, found: dict[str, Any]) -> bool:
        """Whether it is what was asked for last. A QEMU that is just starting greets twice; events are kept."""
        if "event" in found:
            self._events.append(found)
        return ("return" in found or "error" in found) and found.get("id", self._asked) == self._asked

    def wait(self, event: str, about: str) -> None:
        """Until ``event`` has come that names ``about`` as its ``id``. Raises TimeoutError, OSError."""
        while not any(one["event"] == event and one.get("data", {}).get("id") == about for one in self._events):
            found = self._receive()
            if "event" in found:
                self._events.append(found)

    @property
    def peer(self) -> int | None:
        """Process that listens at the other end (unix(7), SO_PEERCRED); None when it cannot be told."""
        size = struct.calcsize("3i")
        try:
            pid, _, _ = struct.unpack("3i", self._channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        except OSError:
            return None
        return int(pid) or None

    def close(self) -> None:
        """Let the monitor go to the next client; may be repeated."""
        reader = getattr(self, "_reader", None)
        if reader is not None:
            reader.close()
        self._channel.close()

    def _receive(self) -> dict[str, Any]:
        line = self._reader.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("QEMU closed its monitor")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ConnectionError("what answers there is no QEMU monitor")
        return found


def connect_unix(channel: socket.socket, path: str) -> None:
    """Connect to the unix socket at ``path``, which may be longer than the 107 bytes that an address has room for."""
    try:
        channel.connect(path)
    except OSError as error:
        if error.errno is not None:
            raise
        folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            channel.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        finally:
            os.close(folder)


def _version(greeting: Mapping[str, Any]) -> tuple[int, int]:
    found = greeting.get("version", {}).get("qemu", {})
    return int(found.get("major", 0)), int(found.get("minor", 0))


def _timeval(seconds: float) -> tuple[int, int]:
    """As the kernel takes it: seconds and microseconds. Nothing at all would be for ever."""
    micros = max(1, round(seconds * 1_000_000))
    return micros // 1_000_000, micros % 1_000_000
