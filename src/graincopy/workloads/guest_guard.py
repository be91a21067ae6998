"""The watchdog of guests (stage 5): a program of its own that quiesces guests, and lets them go on whatever happens.

It is exec'd with one JSON document as its argument and speaks JSON lines over its standard input and output::

    python -I -S guest_guard.py {"uri", "binding", "deadline", "patience",
                                 "guests": [{"uuid", "name", "freeze", "pause"}]}

    guard  → {"say": "ready", "states": [...]}           running, paused, off or gone, one for each guest
    parent → freeze
    guard  → {"say": "frozen", "guest", "count"}         its agent froze that many file systems
           | {"say": "unfrozen", "guest", "trouble"}     nothing is frozen there; or it is taken back as soon as it is
    guard  → {"say": "paused", "guest"} | {"say": "unpaused", "guest", "trouble"}
    guard  → {"say": "held", "ms"}                       all of that has been tried
    parent → thaw
    guard  → {"say": "trying", "guest", "trouble"}       it cannot be released yet
    guard  → {"say": "released", "guest", "held", "trouble"}
    guard  → {"say": "done", "cause", "ms"}              asked, deadline or parent; ms is the whole window

Guests are frozen in parallel, then paused in parallel; each is resumed and then thawed. It does so when asked, when its
standard input ends (the parent was killed) and at the deadline, counted from the first freeze; exactly what it froze
and paused itself. A daemon that is restarted meanwhile is connected to again, an agent that does not answer is asked
again, for as long as GIVE_UP says; what does not work is also said to syslog, because the parent may be gone.

"binding" is the directory of libvirt-python; "patience" the seconds that an agent is given to freeze.
"""

import importlib
import json
import os
import queue
import select
import signal
import sys
import syslog
import threading
import time
from collections.abc import Callable
from typing import Any

GIVE_UP = 900.0  # seconds for which a guest that cannot be released is tried
_LATE = 60.0  # seconds for which an agent that did not answer in time is asked to take a late freeze back
_PAUSE = 0.2  # seconds between two tries
_SHOUT = 3.0  # seconds without success until syslog hears of it
_BLOCK = -2  # VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK, libvirt's default
_PAUSED, _OFF = 3, 5  # virDomainState
_STATES = {1: "running", 2: "running", 3: "paused", 4: "running", 7: "paused"}  # 4: shutting down, 7: asleep
_STATUS = '{"execute":"guest-fsfreeze-status"}'


class Guest:
    """One guest, and the thread that alone talks about it, over a connection of its own: any call may hang."""

    def __init__(self, number: int, order: dict[str, Any], wishes: dict[str, Any], api: Any, news: int) -> None:
        self.number, self.uri, self.patience = number, order["uri"], order["patience"]
        self.uuid, self.name = wishes["uuid"], wishes["name"]
        self.wants_freeze, self.wants_pause = wishes["freeze"], wishes["pause"]
        self.api, self.news = api, news
        self.orders: queue.Queue[Callable[[], None]] = queue.Queue()
        self.connection: Any = None
        self.domain: Any = None
        self.state = "gone"
        self.frozen = self.late = self.paused = False  # late: it may freeze yet
        self.busy = False
        self.lines: list[dict[str, Any]] = []
        self.order(self.look)
        threading.Thread(target=self._work, daemon=True).start()

    @property
    def holds(self) -> bool:
        """We keep it from going on."""
        return self.frozen or self.paused

    def order(self, what: Callable[[], None]) -> None:
        """Have the thread do ``what`` when it has done what it is at."""
        self.busy = True
        self.orders.put(what)

    def _work(self) -> None:
        while True:
            what = self.orders.get()
            try:
                what()
            except self.api.libvirtError as failure:
                self._say("trouble", trouble=str(failure))
            self.busy = not self.orders.empty()
            os.write(self.news, b".")

    def _say(self, word: str, **facts: Any) -> None:
        self.lines.append({"say": word, "guest": self.number, **facts})

    # --- what the thread does ---------------------------------------------------------------------

    def look(self) -> None:
        """Connect, and see what state it is in."""
        self._connect()
        self.state = _STATES.get(self._domain_state(), "off")

    def freeze(self) -> None:
        """Its agent freezes its file systems. ``late`` until it is known that nothing is going to be frozen."""
        self.late = True
        try:
            self.domain.agentSetResponseTimeout(max(1, int(self.patience)))
            count = self.domain.fsFreeze()
        except self.api.libvirtError as failure:
            # One that the agent itself refused was not done: another failure says nothing about the guest.
            self.late = not _answered(failure) and failure.get_error_code() not in self._never_sent()
            self._say("unfrozen", trouble=failure.get_error_message())
            return
        self.frozen, self.late = count > 0, False
        if self.frozen:
            self._say("frozen", count=count)
        else:
            self._say("unfrozen", trouble="its agent froze no file system")

    def pause(self) -> None:
        """Stop its vCPUs; QEMU finishes what they had asked of the disks."""
        self.paused = True  # a failure says nothing about the guest; resuming looks first
        try:
            self.domain.suspend()
        except self.api.libvirtError as failure:
            self._say("unpaused", trouble=failure.get_error_message())
        else:
            self._say("paused")

    def release(self) -> None:
        """Resume, then thaw; each until it has worked, or the guest is gone."""
        held, trouble = self._until(self._resume, GIVE_UP) if self.paused else (True, "")
        if self.frozen:
            thawed, complaint = self._until(self._thaw, GIVE_UP)
            held, trouble = held and thawed, trouble or complaint
        self._say("released", held=held, trouble=trouble)
        self.frozen = self.paused = False
        os.write(self.news, b".")
        if self.late:  # the parent does not wait for this
            self._until(self._thaw, _LATE)
            self.late = False
        if self.wants_freeze and self.state == "running":
            self._forget_patience()

    def _connect(self) -> None:
        self.connection = self.api.open(self.uri)
        self.domain = self.connection.lookupByUUIDString(self.uuid)

    def _domain_state(self) -> int:
        return int(self.domain.state()[0])

    def _never_sent(self) -> tuple[int, ...]:
        """Failures that came before the agent was asked for anything."""
        api = self.api
        return api.VIR_ERR_OPERATION_INVALID, api.VIR_ERR_ARGUMENT_UNSUPPORTED, api.VIR_ERR_CONFIG_UNSUPPORTED

    def _resume(self) -> bool:
        if self._domain_state() != _PAUSED:
            return False
        self.domain.resume()
        return True

    def _thaw(self) -> bool:
        return self._domain_state() != _OFF and self.domain.fsThaw() > 0

    def _until(self, action: Callable[[], bool], give_up: float) -> tuple[bool, str]:
        """Whether the guest had been held until ``action`` let it go on, and what stood in the way for good."""
        began, shouted = time.monotonic(), False
        while True:
            try:
                return action(), ""
            except self.api.libvirtError as failure:
                trouble = str(failure.get_error_message())
                if self._over(failure):
                    return False, trouble
            waited = time.monotonic() - began
            if waited > _SHOUT and not shouted and self.holds:
                shouted = True
                syslog.syslog(syslog.LOG_CRIT, f"guest {self.name} may still stand still, tried again: {trouble}")
                self._say("trying", trouble=trouble)
                os.write(self.news, b".")
            if waited > give_up:
                if self.holds:
                    syslog.syslog(syslog.LOG_CRIT, f"GUEST {self.name} MAY STILL BE FROZEN OR PAUSED: {trouble}")
                return False, f"given up: {trouble}"
            time.sleep(_PAUSE)
            self._reconnect()

    def _over(self, failure: Any) -> bool:
        """Whether there is nothing left to release: the guest is gone, or thawed although its agent complained."""
        if failure.get_error_code() == self.api.VIR_ERR_NO_DOMAIN:
            return True
        try:
            if self._domain_state() == _OFF:
                return True
            if not _answered(failure):
                return False
            answer = importlib.import_module("libvirt_qemu").qemuAgentCommand(self.domain, _STATUS, 5, 0)
        except self.api.libvirtError:
            return False
        return "thawed" in answer

    def _reconnect(self) -> None:
        """Anew where the connection is broken; the daemon may be away for a while."""
        try:
            if self.connection is None or not self.connection.isAlive():
                self._connect()
            self.domain.info()
        except self.api.libvirtError as failure:
            if failure.get_error_code() != self.api.VIR_ERR_NO_DOMAIN:
                self.connection = None

    def _forget_patience(self) -> None:
        try:
            self.domain.agentSetResponseTimeout(_BLOCK)
        except self.api.libvirtError:
            return


def _answered(failure: Any) -> bool:
    """Whether the agent itself said no: then it is alive, and can say what is frozen."""
    return "unable to execute QEMU agent command" in str(failure)


class Guard:
    """All guests, the parent's orders and the deadline. Every line is said by the main thread."""

    def __init__(self, order: dict[str, Any], api: Any) -> None:
        self.patience: float = order["deadline"]
        self.freeze_patience: float = order["patience"]
        self.woken, self.wake = os.pipe()
        self.input = 0  # a descriptor; -1 when nothing that it says matters any more
        self.began = self.deadline = 0.0
        self.guests = [Guest(number, order, one, api, self.wake) for number, one in enumerate(order["guests"])]

    def run(self) -> None:
        """From "ready" to the end."""
        while any(guest.busy for guest in self.guests):
            if self._wait(None) == "parent":
                return
        say(say="ready", states=[guest.state for guest in self.guests], lines=[guest.lines for guest in self.guests])
        if self._order() != "freeze":
            return
        self._count()
        self._release(self._freeze() or self._pause() or self._hold())

    def _order(self) -> str:
        heard = ""
        while not heard:
            heard = self._wait(None)
        return heard

    def _count(self) -> None:
        """The deadline counts from now."""
        self.began = time.monotonic()
        self.deadline = self.began + self.patience

    def _freeze(self) -> str:
        """Have all agents freeze; "" or why it has to end now. Who does not answer in time is not waited for."""
        guests = [guest for guest in self.guests if guest.wants_freeze and guest.state == "running"]
        for guest in guests:
            guest.order(guest.freeze)
        limit = min(self.deadline, self.began + 2 * self.freeze_patience)  # the agent's answer to "are you there?" too
        while any(guest.busy for guest in guests):
            cause = self._wait(limit)
            self._tell()
            if cause == "deadline":
                break
            if cause:
                return cause
        for guest in guests:
            if guest.busy:
                say(say="unfrozen", guest=guest.number, trouble="its agent did not answer in time")
        if not any(guest.frozen for guest in guests):
            self._count()
        return ""

    def _pause(self) -> str:
        """Pause all that are to be; "" or why it has to end now."""
        guests = [guest for guest in self.guests if guest.wants_pause and guest.state == "running"]
        for guest in guests:
            guest.order(guest.pause)
        while any(guest.busy for guest in guests):
            cause = self._wait(self.deadline)
            self._tell()
            if cause:
                return cause
        return ""

    def _hold(self) -> str:
        """Wait; why it ended."""
        self._tell()
        say(say="held", ms=self._ms())
        cause = ""
        while not cause:
            cause = self._wait(self.deadline)
            self._tell()
        return cause

    def _release(self, cause: str) -> None:
        """Let everything go on. An agent that has not answered yet is not waited for by the parent."""
        self.input = -1
        for guest in self.guests:
            guest.order(guest.release)
        while any(guest.holds for guest in self.guests):
            self._wait(None)
            self._tell()
        self._tell()
        say(say="done", cause=cause, ms=self._ms())
        os.close(1)
        give_up = time.monotonic() + _LATE + 2 * self.freeze_patience
        while any(guest.busy for guest in self.guests) and time.monotonic() < give_up:
            self._wait(give_up)

    def _ms(self) -> float:
        return round((time.monotonic() - self.began) * 1000, 1)

    def _wait(self, limit: float | None) -> str:
        """What the parent said ("freeze", "asked", "parent"), "deadline" at ``limit``, or "" when a guest has news."""
        left = None if limit is None else max(0.0, limit - time.monotonic())
        ready = select.select([fd for fd in (self.input, self.woken) if fd >= 0], [], [], left)[0]
        if self.woken in ready:
            os.read(self.woken, 4096)
        if self.input in ready:
            order = os.read(self.input, 64).strip()
            return {b"freeze": "freeze", b"thaw": "asked"}.get(order, "parent")
        return "" if ready else "deadline"

    def _tell(self) -> None:
        for guest in self.guests:
            while guest.lines:
                say(**guest.lines.pop(0))


def say(**words: Any) -> None:
    """One line to the parent; a parent that is gone does not matter."""
    try:
        os.write(1, json.dumps(words).encode() + b"\n")
    except OSError:
        return


def settle_in() -> None:
    """Be hard to kill and to stop, as far as this user may; nothing of it is needed to be correct."""
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


def main(arguments: list[str]) -> None:
    """``arguments``: the order as JSON."""
    settle_in()
    order = json.loads(arguments[0])
    sys.path.append(order["binding"])
    api = importlib.import_module("libvirt")
    importlib.import_module("libvirt_qemu")
    api.registerErrorHandler(_quiet, None)
    syslog.openlog("graincopy", syslog.LOG_PID, syslog.LOG_DAEMON)
    Guard(order, api).run()


def _quiet(_context: object, _error: object) -> None:
    """libvirt's own printing of errors; they come as exceptions as well."""


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # threads that hang in a call, or wait for orders, are not waited for
