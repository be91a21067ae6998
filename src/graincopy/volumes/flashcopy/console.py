"""The array as verbs: queries that are asked until answered, commands that are given once (below stages 3 to 9).

What every step rests on: after a lost connection or a refusal nothing is assumed. The state is read again, and says
whether the command took effect (:meth:`Console.until`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from graincopy.core.clock import Clock
from graincopy.core.errors import ArrayGarbled, ArrayRefused, ArrayUnreachable
from graincopy.volumes.flashcopy import wire
from graincopy.volumes.flashcopy.connection import Connection, Lost
from graincopy.volumes.flashcopy.wire import Command, FcMap, Garbled, Mapped, Vdisk

ATTEMPTS = 4
_PAUSES = (0.2, 1.0, 3.0)  # seconds before the second, third and fourth attempt
_POLL = (0.02, 1.0)  # seconds: first and longest pause between two looks

Value = TypeVar("Value")


class Refused(Exception):
    """The array said no; nothing was done. Its own words."""

    def __init__(self, command: Command, message: str) -> None:
        self.command, self.message = command, message
        super().__init__(message)


class Console:
    """One array. ``name`` is what the configuration calls it."""

    def __init__(self, name: str, connection: Connection, clock: Clock) -> None:
        self.name, self.clock = name, clock
        self._connection = connection
        self.round_trip = 0.0  # seconds that the last command took

    def close(self) -> None:
        """Hang up; the next command connects again."""
        self._connection.close()

    # --- asking -----------------------------------------------------------------------------------

    def vdisks(self) -> tuple[Vdisk, ...]:
        """Every vdisk. Raises ArrayUnreachable, ArrayLoginFailed, ArrayGarbled, ArrayRefused, as all queries do."""
        return self._ask(wire.list_vdisks(), wire.read_vdisks)

    def vdisk(self, name: str) -> Vdisk | None:
        """The vdisk called ``name``, if there is one."""
        return next((each for each in self.vdisks() if each.name == name), None)

    def used(self, name: str) -> int:
        """Bytes that the thin vdisk ``name`` takes; 0 where the array does not say, or it is gone."""
        try:
            return self._ask(wire.show_vdisk(name), wire.read_vdisk).used
        except ArrayRefused:
            return 0

    def maps(self) -> tuple[FcMap, ...]:
        """Every FlashCopy mapping."""
        return self._ask(wire.list_maps(), wire.read_maps)

    def groups(self) -> tuple[str, ...]:
        """Names of all consistency groups."""
        return self._ask(wire.list_groups(), wire.read_groups)

    def shown_to(self, vdisk: str) -> tuple[Mapped, ...]:
        """The hosts that see the vdisk, which must be there."""
        return self._ask(wire.list_hosts_of(vdisk), wire.read_mapped)

    def _ask(self, command: Command, read: Callable[[str], Value]) -> Value:
        """Ask until there is an answer that can be understood."""
        reason, garbled = "", False
        for attempt in range(ATTEMPTS):
            self._pause(attempt)
            try:
                return read(self._run(command))
            except (Lost, Garbled) as trouble:
                reason, garbled = str(trouble), isinstance(trouble, Garbled)
            except Refused as refused:
                raise ArrayRefused(array=self.name, command=command[0], reason=refused.message) from refused
        if garbled:
            raise ArrayGarbled(array=self.name, command=command[0], reason=reason)
        raise ArrayUnreachable(array=self.name, reason=reason)

    # --- telling ----------------------------------------------------------------------------------

    def tell(self, command: Command) -> None:
        """Give a command, once. Raises Refused, Lost, ArrayUnreachable, ArrayLoginFailed."""
        self._run(command)

    def until(self, done: Callable[[], Value | None], command: Command) -> Value:
        """What ``done`` finds, ``command`` being given when it finds nothing yet. Raises Refused.

        A command whose answer was lost is given again only after ``done`` has looked.
        """
        reason = f"{command[0]} was accepted and shows no effect"
        for attempt in range(ATTEMPTS):
            self._pause(attempt)
            found = done()
            if found is not None:
                return found
            try:
                self.tell(command)
            except Lost as lost:
                reason = str(lost)
                continue
            except Refused:
                found = done()  # somebody, perhaps we ourselves a moment ago, did it
                if found is None:
                    raise
                return found
            found = done()
            if found is not None:
                return found
        raise ArrayUnreachable(array=self.name, reason=reason)

    def wait(self, reached: Callable[[], Value | None], patience: float) -> Value | None:
        """What ``reached`` finds within ``patience`` seconds; None when it finds nothing."""
        end, pause = self.clock.monotonic() + patience, _POLL[0]
        while True:
            found = reached()
            if found is not None or self.clock.monotonic() >= end:
                return found
            self.clock.sleep(pause)
            pause = min(2 * pause, _POLL[1])

    def _pause(self, attempt: int) -> None:
        if attempt:
            self.clock.sleep(_PAUSES[attempt - 1])

    def _run(self, command: Command) -> str:
        began = self.clock.monotonic()
        reply = self._connection.run(wire.line(command))
        self.round_trip = self.clock.monotonic() - began
        if reply.status:
            raise Refused(command, wire.error_line(reply.out, reply.err))
        return reply.out
