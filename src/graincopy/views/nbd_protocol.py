"""One NBD connection as a machine: bytes in, events out. It knows no socket, no disk, no time.

States are data: each says how many bytes it waits for and who takes them (``_STATES``)::

    FLAGS → OPTION ⇄ OPTION_DATA → REQUEST ⇄ PAYLOAD → CLOSED
                   ⇄ SKIP_OPTION           ⇄ SKIP_PAYLOAD

The shell gives it what came in (:meth:`Connection.receive`) and acts on :meth:`Connection.events`, in order. It never
raises, whatever a client sends: a client that breaks the protocol gets a reply where there is one, else a Close.

Every limit, and its reason:

=================  ======================================================================================
OPTION_LIMIT       an option holds a name (4096 bytes at most) and a few queries; more is kept by nobody
OPTION_SKIP_LIMIT  a longer option is skipped and refused; one that never ends is a flood
OPTIONS_LIMIT      options of one negotiation; ``nbdinfo --list`` takes 4 for each export
REQUEST_LIMIT      bytes of one READ or WRITE, which are held in memory; qemu and libnbd never ask for more
=================  ======================================================================================

How many requests may be under way is the shell's to say: it stops reading from the socket.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import ClassVar

import msgspec

from graincopy.views import nbd_wire as wire
from graincopy.views.nbd_handshake import REQUEST_LIMIT, Export, Haggling, Next, Tls, answer
from graincopy.views.nbd_request import Request, wrong
from graincopy.views.nbd_wire import Cmd, Opt, Rep

OPTION_LIMIT = 16 << 10  # bytes
OPTION_SKIP_LIMIT = 1 << 20  # bytes
OPTIONS_LIMIT = 4096


# --- events ---------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    """Bytes for the client."""

    data: bytes


class StartTls(msgspec.Struct, frozen=True):
    """Speak TLS from here on, then tell the machine by :meth:`Connection.tls_started`."""


class Opened(msgspec.Struct, frozen=True):
    """The transmission of ``export`` begins."""

    export: Export
    structured: bool
    contexts: tuple[str, ...]


class Close(msgspec.Struct, frozen=True):
    """Say nothing more; ``reason`` is empty when the client asked for it."""

    reason: str = ""


Event = Send | StartTls | Opened | Request | Close


class State(Enum):
    """What the machine waits for."""

    FLAGS = auto()
    OPTION = auto()
    OPTION_DATA = auto()
    SKIP_OPTION = auto()
    TLS = auto()
    REQUEST = auto()
    PAYLOAD = auto()
    SKIP_PAYLOAD = auto()
    CLOSED = auto()


class Connection:
    """The server's side of one connection to ``exports``."""

    def __init__(self, exports: Sequence[Export], tls: Tls = Tls.NONE) -> None:
        self.haggling = Haggling(exports, tls)
        self.state = State.FLAGS
        self.shutting_down = False
        self._needed = 4
        self._buffer = bytearray()
        self._at = 0  # what lies before it was taken
        self._option = 0
        self._options = 0
        self._request = Request(0, 0, 0, 0, 0)
        self._refusal: Send | None = None

    def greeting(self) -> bytes:
        """What the server says first."""
        return wire.GREETING

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take what came in; :meth:`events` says what it means."""
        if self.state is not State.CLOSED:
            self._buffer += data

    @property
    def held(self) -> int:
        """Bytes that came in and mean nothing yet."""
        return len(self._buffer) - self._at

    def tls_started(self) -> None:
        """TLS is on; what was agreed on before it counts for nothing."""
        old = self.haggling
        self.haggling = Haggling(old.exports, Tls.ON, old.fixed, old.no_zeroes)
        self._wait(State.OPTION, wire.OPTION.size)

    def events(self) -> Iterator[Event]:
        """Everything that follows from the bytes so far. May be left early and taken up again."""
        while self.state not in (State.CLOSED, State.TLS):
            skipping = self.state in (State.SKIP_OPTION, State.SKIP_PAYLOAD)
            available = len(self._buffer) - self._at
            if skipping and 0 < available < self._needed:
                self._at += available  # nobody wants it, so nobody keeps it
                self._needed -= available
            if len(self._buffer) - self._at < self._needed:
                break
            start, self._at = self._at, self._at + self._needed
            yield from self._STATES[self.state](self, start)
        self._forget()

    def _forget(self) -> None:
        """Give taken bytes back; of a closed connection all of them."""
        if self.state is State.CLOSED:
            self._buffer.clear()
            self._at = 0
        elif self._at:
            del self._buffer[: self._at]
            self._at = 0

    def _wait(self, state: State, needed: int) -> None:
        self.state, self._needed = state, needed

    def _close(self, reason: str = "") -> Iterator[Event]:
        self.state = State.CLOSED
        yield Close(reason)

    def _taken(self, start: int) -> bytes:
        return bytes(memoryview(self._buffer)[start : self._at])

    # --- negotiation ------------------------------------------------------------------------------

    def _on_flags(self, start: int) -> Iterator[Event]:
        flags = int.from_bytes(self._taken(start), "big")
        if flags & ~(wire.FLAG_C_FIXED_NEWSTYLE | wire.FLAG_C_NO_ZEROES):
            yield from self._close(f"unknown client flags {flags:#x}")
            return
        self.haggling.fixed = bool(flags & wire.FLAG_C_FIXED_NEWSTYLE)
        self.haggling.no_zeroes = bool(flags & wire.FLAG_C_NO_ZEROES)
        self._wait(State.OPTION, wire.OPTION.size)

    def _on_option(self, start: int) -> Iterator[Event]:
        magic, self._option, length = wire.OPTION.unpack_from(self._buffer, start)
        self._options += 1
        if magic != wire.OPTION_MAGIC:
            yield from self._close("garbage where an option should begin")
        elif self._options > OPTIONS_LIMIT or length > OPTION_SKIP_LIMIT:
            yield from self._close("more options, or longer ones, than any client needs")
        elif length > OPTION_LIMIT:
            self._wait(State.SKIP_OPTION, length)
        else:
            self._wait(State.OPTION_DATA, length)

    def _on_skipped_option(self, _start: int) -> Iterator[Event]:
        if self._option == Opt.EXPORT_NAME or not self.haggling.fixed:
            yield from self._close("an option that is too long")
            return
        self._wait(State.OPTION, wire.OPTION.size)
        yield Send(wire.option_reply(self._option, Rep.ERR_TOO_BIG, b"the option is too long"))

    def _on_option_data(self, start: int) -> Iterator[Event]:
        data = self._taken(start)
        if self.shutting_down and self._option not in (Opt.ABORT, Opt.EXPORT_NAME) and self.haggling.fixed:
            replies, following = wire.option_reply(self._option, Rep.ERR_SHUTDOWN), Next.OPTION
        else:
            replies, following = answer(self.haggling, self._option, data)
        self._wait(State.OPTION, wire.OPTION.size)
        if following is Next.TLS:
            if self.held:  # sent before our answer: somebody else's words would be taken for the client's own
                yield from self._close("plain bytes behind STARTTLS")
                return
            self._wait(State.TLS, 0)
        if following is Next.TRANSMISSION:
            self._wait(State.REQUEST, wire.REQUEST.size)
        if replies:
            yield Send(replies)
        if following is Next.TLS:
            yield StartTls()
        elif following is Next.TRANSMISSION and self.haggling.chosen:
            yield Opened(self.haggling.chosen, self.haggling.structured, self.haggling.contexts)
        elif following is Next.CLOSE:
            yield from self._close("" if replies else "an option that cannot be answered")

    # --- transmission -----------------------------------------------------------------------------

    def _on_request(self, start: int) -> Iterator[Event]:
        magic, flags, command, handle, offset, length = wire.REQUEST.unpack_from(self._buffer, start)
        if magic != wire.REQUEST_MAGIC:
            yield from self._close("garbage where a request should begin")
            return
        if command == Cmd.DISC:
            yield from self._close()
            return
        request = Request(command, flags, handle, offset, length)
        refused = self._refuse(request)
        if command == Cmd.WRITE:
            if length > REQUEST_LIMIT:
                yield from self._close(f"a write of {length} bytes")
                return
            self._request, self._refusal = request, refused
            self._wait(State.SKIP_PAYLOAD if refused else State.PAYLOAD, length)
            return
        yield refused or request

    def _on_payload(self, start: int) -> Iterator[Event]:
        self._request.payload = self._taken(start)
        self._wait(State.REQUEST, wire.REQUEST.size)
        yield self._request

    def _on_skipped_payload(self, _start: int) -> Iterator[Event]:
        self._wait(State.REQUEST, wire.REQUEST.size)
        if self._refusal:
            yield self._refusal

    def _refuse(self, request: Request) -> Send | None:
        """The error reply to a request that is out of order."""
        error, text = (
            (errno.ESHUTDOWN, "the server is going down") if self.shutting_down else wrong(request, self.haggling)
        )
        return Send(wire.failure(self.haggling.structured, request.handle, error, text)) if error else None

    # --- the table --------------------------------------------------------------------------------

    _STATES: ClassVar[dict[State, Callable[[Connection, int], Iterator[Event]]]] = {
        State.FLAGS: _on_flags,
        State.OPTION: _on_option,
        State.OPTION_DATA: _on_option_data,
        State.SKIP_OPTION: _on_skipped_option,
        State.REQUEST: _on_request,
        State.PAYLOAD: _on_payload,
        State.SKIP_PAYLOAD: _on_skipped_payload,
    }
