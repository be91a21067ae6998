"""Below the trial: a machine that has just been started is watched until it gives its sign of life, or never will."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError, StartRefused
from graincopy.hypervisor import machine as machines
from graincopy.hypervisor.console import Console, take_picture
from graincopy.hypervisor.link import Link, binding
from graincopy.hypervisor.sign import Sign, agent_answers

LOOK_SECONDS = 0.5


class Outcome:
    """What is found out step by step. ``reason``: why it counts as dead."""

    alive = False
    reason = ""
    console = b""
    picture = b""


@contextmanager
def started(link: Link, name: str, text: str, uuid: str) -> Iterator[Any]:
    """The virDomain of ``text``, not yet let go; gone at the end of the block. Raises StartRefused."""
    libvirt = binding()
    flags = libvirt.VIR_DOMAIN_START_PAUSED | libvirt.VIR_DOMAIN_START_AUTODESTROY
    try:
        domain = link.call(lambda connection: connection.createXML(text, flags), domain=name, again=False)
    except GraincopyError as failure:
        machines.destroy(link, uuid)
        raise StartRefused(domain=name, reason=failure.facts.get("reason", failure)) from failure
    try:
        yield domain
    finally:
        machines.destroy(link, uuid)


def watch(clock: Clock, link: Link, domain: Any, uuid: str, sign: Sign, patience: float) -> Outcome:
    """Let it run until it gives its sign of life, ends, or time is up."""
    libvirt, outcome = binding(), Outcome()
    console = None
    try:
        with suppress(libvirt.libvirtError):
            console = Console(domain)
        domain.resume()
        give_up = clock.monotonic() + patience
        while True:
            if console is not None:
                outcome.console = console.listen()
            if _gives(link, uuid, sign, outcome.console):
                outcome.alive = True
                return outcome
            outcome.reason = _why_not(domain, libvirt) or outcome.reason
            if outcome.reason:
                return outcome
            if clock.monotonic() >= give_up:
                outcome.reason = f"no sign of life ({sign}) within {patience:g} s"
                return outcome
            clock.sleep(LOOK_SECONDS)
    except (libvirt.libvirtError, GraincopyError) as failure:
        outcome.reason = outcome.reason or f"it went away: {failure}"
        return outcome
    finally:
        if console is not None:
            console.close()


def _gives(link: Link, uuid: str, sign: Sign, said: bytes) -> bool:
    if sign.text:
        return sign.text.encode("utf-8", "surrogateescape") in said
    return agent_answers(link, uuid)


def _why_not(domain: Any, libvirt: Any) -> str:
    """Why it will not come any more; "" while it may."""
    state, cause = domain.state()[:2]
    if state == libvirt.VIR_DOMAIN_PAUSED and cause == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
        return "it stands still because a disk cannot be read"
    if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED):
        return "it shut down or crashed"
    return ""


def picture_of(domain: Any) -> bytes:
    """What its screen shows, as PNG; empty where it cannot be taken."""
    libvirt = binding()
    try:
        return take_picture(domain) or b""
    except libvirt.libvirtError:
        return b""  # it may have gone at this moment; the picture is a courtesy
