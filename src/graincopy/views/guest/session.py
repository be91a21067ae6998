"""The keeper of a process that reads one guest file system: starts it, feeds it bytes of the disk, believes little.

Everything happens in the caller's thread: while the caller waits for an answer the keeper serves what the reader wants.
A reader that gives no answer for too long, dies, or says something impossible ends in GuestUnreadable.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Final

import msgspec

from graincopy.core.clock import Clock
from graincopy.core.errors import GuestUnreadable, ToolMissing
from graincopy.views.guest import wire
from graincopy.views.guest.kernel_mount import mounted
from graincopy.views.guest.partitions import Partition
from graincopy.views.guest.process import ReaderProcess, Spare, can_read
from graincopy.views.source import ViewDisk

PATIENCE: Final = 120.0  # seconds without an answer, those apart in which the disk was read
_AT_ONCE = 1 << 17
_FRAME = max(wire.PIECE, wire.MESSAGE)


class GuestReader:
    """One file system of ``disk``, read by a process of its own. One request at a time."""

    def __init__(
        self,
        disk: ViewDisk,
        partition: Partition,
        clock: Clock,
        patience: float = PATIENCE,
        spare: Spare | None = None,
    ) -> None:
        """``spare`` may have a process that waits; this one ends it."""
        self.partition = partition
        self._spare = spare or Spare()
        self._disk, self._clock, self._patience = _Watched(disk), clock, patience
        self._heard = memoryview(b"")
        self._left = patience
        self._where = f"{disk.name}@{partition.number}" if partition.number else disk.name
        self._held = ExitStack()
        self._decoder = msgspec.msgpack.Decoder(wire.Message)

    def __enter__(self) -> GuestReader:
        """Raises GuestUnreadable, ToolMissing."""
        try:
            self._start()
            for _ in self._ask(self._begin()):
                pass
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and unmount what was mounted for it; may be repeated."""
        self._held.close()

    @property
    def pid(self) -> int:
        """Of the reading process."""
        return self._process.pid

    # --- requests ---------------------------------------------------------------------------------

    def look(self, path: bytes) -> wire.Entry | wire.Missing:
        """What lies at ``path``, without following a link at its end. Raises GuestUnreadable."""
        answers = [one for one in self._ask(wire.Look(path)) if isinstance(one, wire.Entry | wire.Missing)]
        if len(answers) != 1:
            raise self._unreadable("its reader does not answer")
        return answers[0]

    def list(self, path: bytes) -> Iterator[wire.Answer]:
        """Entry and Problem of everything in the directory at ``path``; or Missing. Raises GuestUnreadable."""
        return self._ask(wire.List(path))

    def fetch(self, path: bytes, *, follow: bool = False) -> Iterator[wire.Answer]:
        """Everything from ``path`` down; or Missing. Raises GuestUnreadable."""
        return self._ask(wire.Fetch(path, follow))

    # --- the process ------------------------------------------------------------------------------

    def _start(self) -> None:
        self._mount = -1
        if self.partition.reader == "kernel":
            self._mount = self._held.enter_context(mounted(self._disk, self.partition))
        elif self.partition.reader != "tsk":
            raise self._unreadable(_why_nobody(self.partition.fs_type))
        elif not can_read():
            raise ToolMissing(tool=f"pytsk3, to read {self.partition.fs_type}", install="pip install graincopy[guest]")
        self._process = ReaderProcess(self._mount) if self._mount >= 0 else self._spare.take()
        self._held.callback(self._process.end)
        self._socket = self._process.socket

    def _begin(self) -> wire.Begin:
        one = self.partition
        return wire.Begin(one.fs_type, one.start, one.size, self._mount)

    # --- the conversation -------------------------------------------------------------------------

    def _ask(self, request: wire.Request) -> Iterator[wire.Answer]:
        whole = False
        try:
            wire.send(self._socket.send, wire.REQUEST, msgspec.msgpack.encode(request))
            yield from self._answers()
            whole = True
        except TimeoutError as failure:  # it asks and does not read the answers
            raise self._hangs() from failure
        except (wire.WireBroken, msgspec.DecodeError, ConnectionError) as failure:
            raise self._unreadable(self._how_it_ended(failure)) from failure
        finally:
            if not whole:
                self._process.kill()  # answers that nobody waited for would be taken for those to the next request

    def _answers(self) -> Iterator[wire.Answer]:
        left = self._patience
        while True:
            waited = self._clock.monotonic()
            kind, data = self._receive(left)
            if kind == wire.WANT and len(data) == wire.WANTED.size:
                left -= self._clock.monotonic() - waited
                self._serve(*wire.WANTED.unpack(data))
                continue
            answer = self._answer(kind, data)
            if isinstance(answer, wire.End):
                return
            if isinstance(answer, wire.Broken):
                raise self._unreadable(answer.reason)
            yield answer
            left = self._patience

    def _receive(self, seconds: float) -> tuple[int, bytes]:
        self._left = max(seconds, 0.001)
        return wire.receive(self._hear, _FRAME)

    def _hear(self, most: int) -> bytes:
        """Some of what was said. Raises GuestUnreadable when nothing is, and the disk has no part in that."""
        while not self._heard:
            self._disk.idle()  # from now on
            self._socket.settimeout(self._left)
            try:
                self._heard = memoryview(self._socket.recv(_AT_ONCE))
            except TimeoutError as failure:
                if self._disk.idle():
                    raise self._hangs() from failure
            else:
                if not self._heard:
                    return b""
        part, self._heard = self._heard[:most], self._heard[most:]
        return bytes(part)

    def _answer(self, kind: int, data: bytes) -> wire.Answer:
        if kind == wire.DATA:
            return wire.Data(data)
        if kind == wire.HOLE and len(data) == wire.LENGTH.size:
            return wire.Hole(*wire.LENGTH.unpack(data))
        if kind != wire.SAID:
            raise wire.WireBroken("a frame of no known kind")
        answer = self._decoder.decode(data)
        return wire.checked(answer) if isinstance(answer, wire.Entry) else answer

    def _serve(self, offset: int, length: int) -> None:
        """The bytes that the reader wants; only of its own partition."""
        start, stop = self.partition.start, self.partition.start + self.partition.size
        if length > wire.PIECE or not start <= offset <= offset + length <= stop:
            raise wire.WireBroken("it wants bytes outside of its partition")
        data = memoryview(bytearray(length))
        try:
            self._disk.readinto(offset, data)
        except OSError as failure:
            wire.send(self._socket.send, wire.FAILED, wire.ERRNO.pack(failure.errno or 5))
        else:
            wire.send(self._socket.send, wire.BYTES, data)

    def _hangs(self) -> GuestUnreadable:
        return self._unreadable(f"its reader gave no answer for {self._patience:.0f} s")

    def _unreadable(self, reason: str) -> GuestUnreadable:
        return GuestUnreadable(where=self._where, reason=reason)

    def _how_it_ended(self, failure: Exception) -> str:
        code = self._process.ended(0.5)
        if code is None:
            return f"its reader said what no reader says: {failure}"
        if code >= 0:
            return f"its reader ended: {failure}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"its reader was ended by {name}; the file system is broken, or takes too much time or memory"


class _Watched:
    """A disk that tells whether it has been asked for anything: a slow medium is no reader that hangs."""

    def __init__(self, disk: ViewDisk) -> None:
        self.name, self.size, self.extents = disk.name, disk.size, disk.extents
        self._disk = disk
        self._lock = threading.Lock()
        self._asked = self._busy = 0

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """As the disk's own."""
        with self._lock:
            self._asked, self._busy = self._asked + 1, self._busy + 1
        try:
            self._disk.readinto(offset, buffer)
        finally:
            with self._lock:
                self._busy -= 1

    def idle(self) -> bool:
        """Whether nothing is being read, and nothing has been since this was asked last."""
        with self._lock:
            asked, self._asked = self._asked, 0
            return not asked and not self._busy


def _why_nobody(fs_type: str) -> str:
    known = {
        "lvm": "it is part of an LVM volume group; mount the disk and use the host's LVM tools on a copy",
        "luks": "it is encrypted (LUKS); mount the disk and open it with cryptsetup",
        "bitlocker": "it is encrypted (BitLocker); mount the disk and open it with cryptsetup",
        "swap": "it is swap space",
    }
    return known.get(fs_type, "no file system that graincopy knows")
