"""The parent's end of the guard of guests (stage 5). See :mod:`graincopy.workloads.guest_guard`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from graincopy.core.clock import Clock
from graincopy.core.errors import DomainBusy, GraincopyError, GuestThawFailed, HypervisorDown
from graincopy.hypervisor.link import Link, binding
from graincopy.workloads import guest_guard

_START = 30.0  # seconds until the guard must be ready
_GRACE = 10.0  # seconds beyond the deadline until it must have answered
_AGENT_SHARE = 0.4  # of the deadline: what an agent is given to freeze


class GuestWish(msgspec.Struct, frozen=True):
    """What is to be done with one guest."""

    uuid: str
    name: str
    freeze: bool
    pause: bool


class GuestState(msgspec.Struct):
    """What became of one guest. ``trouble`` is why it is not frozen, or was not released as it should be."""

    wish: GuestWish
    state: str = ""  # running, paused, off, gone
    frozen: int = 0  # file systems that its agent froze
    paused: bool = False
    released: bool = False
    held: bool = False  # until it was released
    trouble: str = ""


class GuestGuard(msgspec.Struct):
    """Guests that are to be quiesced together, and the process that does it."""

    link: Link
    wishes: Sequence[GuestWish]
    deadline: float
    clock: Clock
    guests: list[GuestState] = msgspec.field(default_factory=list)
    held_ms: float | None = None  # the whole window, once it is over
    _process: subprocess.Popen[bytes] | None = None
    _unread: bytes = b""

    def start(self) -> None:
        """Have the guard connect and look. Raises HypervisorDown."""
        self.guests = [GuestState(wish) for wish in self.wishes]
        try:
            self._launch()
            line = self._line(self.clock.monotonic() + _START)
            if line is None or line["say"] != "ready":
                raise HypervisorDown(uri=self.link.uri, reason="the guard of the guests did not start")
        except BaseException:
            self.close()
            raise
        for guest, state, lines in zip(self.guests, line["states"], line["lines"], strict=True):
            guest.state = state
            if state == "gone":
                self.close()
                trouble = "; ".join(one["trouble"] for one in lines)
                raise HypervisorDown(uri=self.link.uri, reason=f"{guest.wish.name} is out of reach: {trouble}")

    def freeze(self) -> None:
        """Freeze, then pause, whatever can be. Raises GuestThawFailed, DomainBusy when a guest cannot be paused."""
        try:
            self._say(b"freeze\n")
            if self._listen("held") != "held":
                raise DomainBusy(domain=self._names(), reason="it could not be quiesced before the deadline")
            for guest in self.guests:
                if guest.wish.pause and guest.state == "running" and not guest.paused:
                    raise DomainBusy(domain=guest.wish.name, reason=guest.trouble or "it cannot be paused")
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> bool:
        """Let all of them go on; whether all had been held until then. Raises GuestThawFailed."""
        if self._process is None:
            return False
        try:
            self._say(b"thaw\n")
            cause = self._listen("")
            if not cause and self._is_dead():
                self._release_ourselves()
            stuck = [guest for guest in self.guests if _holds(guest)]
            if stuck:
                raise GuestThawFailed(
                    domain=", ".join(guest.wish.name for guest in stuck),
                    reason="; ".join(guest.trouble for guest in stuck if guest.trouble) or "libvirt does not answer",
                )
            return cause == "asked" and all(guest.held for guest in self.guests if guest.frozen or guest.paused)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the guard. It ends by itself as soon as it holds nothing; may be repeated."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)  # one that still tries to release a guest must not be killed
        process.returncode = process.returncode or 0  # it may outlive us; that is its purpose

    def _launch(self) -> None:
        order = {
            "uri": self.link.uri,
            "binding": os.path.dirname(binding().__file__),
            "deadline": self.deadline,
            "patience": self.deadline * _AGENT_SHARE,
            "guests": [
                {"uuid": wish.uuid, "name": wish.name, "freeze": wish.freeze, "pause": wish.pause}
                for wish in self.wishes
            ],
        }
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.realpath(guest_guard.__file__), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
        )

    def _is_dead(self) -> bool:
        """Whether the guard ended; one that is only silent is still trying, and better at it."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        return self._process.returncode is not None

    def _release_ourselves(self) -> None:
        """The guard died: let go on what it said to hold; nothing else."""
        for guest in self.guests:
            if not _holds(guest):
                continue
            try:
                self.link.domain(guest.wish.uuid, lambda domain, guest=guest: _release(domain, guest))  # type: ignore[misc]
                guest.released = True
            except GraincopyError as failure:
                guest.trouble = str(failure)

    def _names(self) -> str:
        return ", ".join(wish.name for wish in self.wishes)

    # --- the line protocol ------------------------------------------------------------------------

    def _say(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died; reading will tell
            self._process.stdin.write(line)

    def _listen(self, until: str) -> str:
        """Take in what the guard says up to ``until``: that word, the cause of its end, or "" when it is silent."""
        limit = self.clock.monotonic() + self.deadline + _GRACE
        while True:
            line = self._line(limit)
            if line is None:
                return ""
            word = line["say"]
            if word == until:
                return until
            if word == "done":
                self.held_ms = line["ms"]
                return str(line["cause"])
            if "guest" in line:
                _note(self.guests[line["guest"]], line)

    def _line(self, limit: float) -> dict[str, Any] | None:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, limit - self.clock.monotonic()))[0]:
                return None
            more = os.read(pipe, 65536)
            if not more:
                return None
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found


def _holds(guest: GuestState) -> bool:
    return bool(guest.frozen or guest.paused) and not guest.released


def _note(guest: GuestState, line: dict[str, Any]) -> None:
    """What the guard said about ``guest``. A freeze that came after it had been given up is its own business."""
    word = line["say"]
    if word == "frozen" and not guest.trouble:
        guest.frozen = line["count"]
    elif word == "paused":
        guest.paused = True
    elif word == "released":
        guest.released, guest.held = True, line["held"]
    guest.trouble = line.get("trouble", "") or guest.trouble


def _release(domain: Any, guest: GuestState) -> None:
    api = binding()
    if guest.paused and domain.state()[0] == api.VIR_DOMAIN_PAUSED:
        domain.resume()
    if guest.frozen and domain.isActive():
        domain.fsThaw()
