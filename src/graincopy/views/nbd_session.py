"""One client of the NBD server: moves bytes between its socket, the protocol machine and the pool.

What bounds a client, and why:

================  =====================================================================================
WAITING_MOST      requests parsed and not answered. Then nothing more is read from its socket
STARTED_BYTES     bytes of replies being made for it; one request always may be, and is 32 MiB at most
UNSENT_BYTES      replies it has not read yet. Then nothing new is started for it until it reads
WIDTH             threads that work for it at once, so that others find one free
HANDSHAKE_S       seconds until it must have chosen an export, so that half-open ones do not add up
LINGER_S          seconds for a client that said goodbye to read its last replies
================  =====================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from graincopy.views.nbd_answers import Answers, Served
from graincopy.views.nbd_handshake import Export, Tls
from graincopy.views.nbd_outlet import Buffers, Outlet
from graincopy.views.nbd_pool import Pool
from graincopy.views.nbd_protocol import Close, Connection, Event, Opened, Send, StartTls, State
from graincopy.views.nbd_request import Request
from graincopy.views.nbd_wire import Cmd

WAITING_MOST = 256
WAITING_BYTES = 32 << 20  # of payloads among them
STARTED_BYTES = 8 << 20
UNSENT_BYTES = 1 << 20
WIDTH = 6
FAST_WIDTH = 2  # while storage answers at once more threads only take turns
JOB_REQUESTS, JOB_BYTES = 64, 768 << 10
INBOX_BYTES = 128 << 10  # read from the socket at a time
SEND_BUFFER = 1 << 20  # bytes, in the kernel
_SO_SNDBUFFORCE = 32  # socket(7); the socket module lacks it
HANDSHAKE_S, TLS_S, LINGER_S = 60.0, 20.0, 10.0


def _weight(request: Request) -> int:
    """Bytes that its reply will hold."""
    return request.length if request.command == Cmd.READ else 0


def _widen(sock: socket.socket) -> None:
    """Room for some replies in the kernel, so that they go out in one call each; more than usual only for root."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


class Host(Protocol):
    """What a session needs of its server."""

    exports: tuple[Export, ...]
    tls: ssl.SSLContext | None
    pool: Pool[Served]
    buffers: Buffers
    monotonic: Callable[[], float]
    sent_bytes: int

    def answers(self, opened: Opened) -> Answers:
        """For the requests of one connection."""

    def joined(self, session: Session) -> bool:
        """A client came; False when there are too many."""

    def left(self, session: Session, reason: str) -> None:
        """It is gone."""


class Session(asyncio.BufferedProtocol):
    """One connection. Everything runs in the loop's thread but :meth:`Answers.serve`."""

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        self._host, self._loop = host, loop
        self._machine = Connection(host.exports, Tls.REQUIRED if host.tls else Tls.NONE)
        self._inbox = memoryview(bytearray(INBOX_BYTES))  # of a bytearray asyncio's TLS would slice copies
        self._transport: asyncio.Transport | None = None
        self._outlet: Outlet | None = None
        self._answers: Answers | None = None
        self._waiting: deque[Request] = deque()
        self._waiting_bytes = self._jobs = self._started = self._started_bytes = 0
        self._slow = self._choked = self._reading_paused = self._leaving = False
        self._reason = ""
        self._timer: asyncio.TimerHandle | None = None
        self._upgrade: asyncio.Task[None] | None = None

    # --- the transport's side ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's are like it, not of it
        if not self._host.joined(self):
            transport.abort()
            return
        self._outlet = Outlet(transport, tls=False)
        transport.set_write_buffer_limits(high=UNSENT_BYTES)
        _widen(transport.get_extra_info("socket"))
        transport.write(self._machine.greeting())
        self._timer = self._loop.call_later(HANDSHAKE_S, self.drop, "it did not choose an export in time")

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._inbox

    def buffer_updated(self, nbytes: int) -> None:
        self._machine.receive(self._inbox[:nbytes])
        self._go_on()

    def eof_received(self) -> bool:
        """A client that only stopped sending still gets its replies, except through TLS, which cannot do that."""
        if self._host.tls or not (self._started or self._waiting):
            return False
        self._leave()
        return True

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is None:
            return
        self._transport = None
        self._waiting.clear()
        self._stop_timer()
        self._host.left(self, self._reason or (str(exc) if exc else ""))

    # --- the server's side ------------------------------------------------------------------------

    def shut_down(self) -> None:
        """Answer what was asked, refuse what comes, then go."""
        self._machine.shutting_down = True
        self._leave()

    def drop(self, reason: str) -> None:
        """Go at once."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    # --- requests and replies ---------------------------------------------------------------------

    def _go_on(self) -> None:
        """Do all that can be done now."""
        if not self._leaving:
            for event in self._machine.events():
                self._act(event)
                if self._full() or self._leaving:
                    break
        self._start_jobs()
        self._throttle()
        if self._leaving and not self._started and not self._waiting and self._transport is not None:
            self._transport.close()

    def _act(self, event: Event) -> None:
        transport = self._transport
        if transport is None:
            return
        if isinstance(event, Request):
            self._waiting.append(event)
            self._waiting_bytes += len(event.payload)
        elif isinstance(event, Send):
            if self._machine.state is State.TLS:  # what follows our answer is not plain any more
                transport.pause_reading()
            transport.write(event.data)
        elif isinstance(event, Opened):
            self._answers = self._host.answers(event)
            self._stop_timer()
        elif isinstance(event, StartTls):
            self._upgrade = self._loop.create_task(self._start_tls(transport))
        elif isinstance(event, Close) and event.reason:
            self.drop(event.reason)
        else:
            self._leave()

    def _full(self) -> bool:
        waiting = len(self._waiting) + self._started
        return self._choked or waiting >= WAITING_MOST or self._waiting_bytes >= WAITING_BYTES

    def _throttle(self) -> None:
        """Read from the socket only while there is room. TLS that is being started has the socket to itself."""
        if self._transport is None or self._machine.state is State.TLS or self._transport.is_closing():
            return
        if self._full() != self._reading_paused:
            self._reading_paused = not self._reading_paused
            if self._reading_paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _start_jobs(self) -> None:
        answers = self._answers
        width = WIDTH if self._slow else FAST_WIDTH
        while self._waiting and answers and not self._choked and self._jobs < width:
            if self._started and self._started_bytes + _weight(self._waiting[0]) > STARTED_BYTES:
                break
            batch = self._take()
            self._host.pool.submit(
                functools.partial(answers.serve, batch, self._host.monotonic),
                functools.partial(self._post, batch),
            )

    def _take(self) -> list[Request]:
        """The next requests for one thread: many while storage is quick, one by one while it is not."""
        batch = [self._waiting.popleft()]
        size = _weight(batch[0])
        most = 1 if self._slow else JOB_REQUESTS
        while self._waiting and len(batch) < most and size + _weight(self._waiting[0]) <= JOB_BYTES:
            batch.append(self._waiting.popleft())
            size += _weight(batch[-1])
        self._count(batch, 1)
        return batch

    def _count(self, batch: list[Request], sign: int) -> None:
        self._jobs += sign
        self._started += sign * len(batch)
        self._started_bytes += sign * sum(map(_weight, batch))

    def _post(self, batch: list[Request], served: Served | None) -> None:
        """From a thread of the pool. The loop may be gone already: then nobody waits for the answer."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._served, batch, served)

    def _served(self, batch: list[Request], served: Served | None) -> None:
        self._count(batch, -1)
        if served is None:
            self.drop("internal error")
            return
        done = batch[: len(batch) - len(served.left)]
        self._waiting_bytes -= sum(len(request.payload) for request in done)
        self._waiting.extendleft(reversed(served.left))
        self._slow = served.slow
        self._write(served)
        self._go_on()

    def _write(self, served: Served) -> None:
        if self._transport is None or self._outlet is None:
            return
        self._host.sent_bytes += sum(map(len, served.parts))
        if self._outlet.send(served.parts):
            for buffer in served.borrowed:
                self._host.buffers.give_back(buffer)

    # --- coming and going -------------------------------------------------------------------------

    async def _start_tls(self, transport: asyncio.Transport) -> None:
        assert self._host.tls is not None
        try:
            upgraded = await self._loop.start_tls(
                transport, self, self._host.tls, server_side=True, ssl_handshake_timeout=TLS_S
            )
        except OSError as failure:  # ssl.SSLError and time limits are such
            transport.abort()
            self._reason = self._reason or f"TLS failed: {failure}"
            self.connection_lost(None)
            return
        if upgraded is None or self._transport is None:
            transport.abort()
            return
        upgraded.set_write_buffer_limits(high=UNSENT_BYTES)
        self._transport, self._outlet = upgraded, Outlet(upgraded, tls=True)
        self._machine.tls_started()
        self._go_on()

    def _leave(self) -> None:
        """Close when everything that was asked is answered, and everything that was answered is read, or soon after."""
        if self._leaving:
            return
        self._leaving = True
        self._stop_timer()
        self._timer = self._loop.call_later(LINGER_S, self.drop, "it did not read its last replies")
        if not self._started and not self._waiting and self._transport is not None:
            self._transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
