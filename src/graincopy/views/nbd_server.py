"""The NBD server: disks of a view as exports, until somebody says that it is enough.

A thin shell: :mod:`~graincopy.views.nbd_protocol` knows what to say, :mod:`~graincopy.views.nbd_answers` what disks
say to it, and :mod:`~graincopy.views.nbd_session` moves the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from graincopy.views.nbd_answers import Answers, Served, WritableDisk
from graincopy.views.nbd_handshake import Export
from graincopy.views.nbd_listen import Listener
from graincopy.views.nbd_outlet import Buffers
from graincopy.views.nbd_pool import Pool
from graincopy.views.nbd_protocol import Opened
from graincopy.views.nbd_session import JOB_BYTES, JOB_REQUESTS, Session
from graincopy.views.nbd_wire import DATA_CHUNK
from graincopy.views.source import ViewDisk

BUFFERS = 8  # for replies, kept for the next ones: 4 MiB
THREADS = 12  # that touch disks, for all clients together
CLIENTS_MOST = 64  # nbdcopy opens 4 connections, qemu 1 for each disk; each may make us hold some memory
GRACE_S = 5.0  # for requests under way when the server is told to end; the limit for all of it is 10 s
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Offer(msgspec.Struct, frozen=True):
    """A disk that is served; ``writable`` is the same disk where it takes writes."""

    disk: ViewDisk
    writable: WritableDisk | None = None
    description: str = ""


class Server:
    """Serves ``offers``. ``monotonic`` gives seconds, to tell slow storage from quick."""

    def __init__(
        self, offers: Sequence[Offer], monotonic: Callable[[], float], tls: ssl.SSLContext | None = None
    ) -> None:
        self.exports = tuple(
            Export(offer.disk.name, offer.disk.size, offer.writable is not None, offer.description) for offer in offers
        )
        self.tls, self.monotonic = tls, monotonic
        self.pool: Pool[Served] = Pool(THREADS)
        self.buffers = Buffers(JOB_BYTES + JOB_REQUESTS * DATA_CHUNK.size, BUFFERS)
        self.clients = self.sent_bytes = 0
        self.dropped: dict[str, int] = {}  # reason → how often
        self._offers = dict(zip(self.exports, offers, strict=True))
        self._sessions: set[Session] = set()
        self._empty = asyncio.Event()

    # --- what sessions want -----------------------------------------------------------------------

    def answers(self, opened: Opened) -> Answers:
        """For the requests of one connection."""
        offer = self._offers[opened.export]
        return Answers(offer.disk, offer.writable, opened, self.buffers)

    def joined(self, session: Session) -> bool:
        """A client came; False when there are too many."""
        if len(self._sessions) >= CLIENTS_MOST:
            return False
        self.clients += 1
        self._sessions.add(session)
        return True

    def left(self, session: Session, reason: str) -> None:
        """It is gone."""
        self._sessions.discard(session)
        if reason:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
        if not self._sessions:
            self._empty.set()

    # --- life -------------------------------------------------------------------------------------

    async def serve(self, listener: Listener, stop: asyncio.Event, ready: Callable[[], None]) -> None:
        """Accept clients until ``stop``; ``ready`` is called when they can come."""
        loop = asyncio.get_running_loop()
        listen = loop.create_unix_server if listener.path else loop.create_server
        server = await listen(lambda: Session(self, loop), sock=listener.socket)
        try:
            ready()
            await stop.wait()
        finally:
            server.close()
            listener.close()
            await self._say_goodbye()
            self.pool.close()

    async def _say_goodbye(self) -> None:
        self._empty.clear()
        for session in list(self._sessions):
            session.shut_down()
        if self._sessions:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), GRACE_S)
        for session in list(self._sessions):
            session.drop("the server ended")
        await asyncio.sleep(0)  # aborted transports let their sockets go in the next turn of the loop


def run(server: Server, listener: Listener, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, which is the usual end and no error; afterwards they mean what they meant."""
    loop = _new_loop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = asyncio.Event()
    try:
        loop.set_exception_handler(_quiet_about_clients)
        for number in SIGNALS:
            loop.add_signal_handler(number, stop.set)
        loop.run_until_complete(server.serve(listener, stop, ready))
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
        _cancel_rest(loop)
        loop.close()


def _cancel_rest(loop: asyncio.AbstractEventLoop) -> None:
    """End what is still going on: TLS handshakes of clients that never answered."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks))


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = importlib.import_module("uvloop").new_event_loop()
    return loop


def _quiet_about_clients(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What clients do to their sockets is no news; everything else is reported."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)
