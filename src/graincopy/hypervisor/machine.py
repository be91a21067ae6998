"""Below stages R and V: one virtual machine as a whole: stopped, defined, started. Every verb may be repeated."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from graincopy.core.clock import Clock
from graincopy.core.errors import (
    AgentFailed,
    DefineRefused,
    DomainBusy,
    DomainStays,
    DomainUnknown,
    HypervisorRefused,
    StartRefused,
)
from graincopy.hypervisor.domain_xml import Domain, parse_xml
from graincopy.hypervisor.link import Link, binding

_LOOK = 0.25  # seconds between two looks at a machine that is to stop
_REMIND = 15.0  # seconds: some guests miss the first push of the power button


def is_running(link: Link, machine: str) -> bool | None:
    """Whether the domain (a name or UUID) runs, or is paused; None when libvirt does not know it."""
    try:
        return link.domain(machine, lambda domain: bool(domain.isActive()))
    except DomainUnknown:
        return None


def has_saved_state(link: Link, machine: str) -> bool:
    """Whether its next start would go on from memory that fits its present disks (``virsh managedsave``)."""
    try:
        return link.domain(machine, lambda domain: bool(domain.hasManagedSaveImage(0)))
    except DomainUnknown:
        return False


def stop(link: Link, machine: str, name: str, *, patience: float, force: bool, clock: Clock) -> bool:
    """Shut it down as its owner would, within ``patience`` seconds; whether it had been running.

    ``force``: then pull the plug. Raises DomainStays, DomainBusy, HypervisorDown.
    """
    if not is_running(link, machine):
        return False
    give_up, remind = clock.monotonic() + patience, clock.monotonic()
    while clock.monotonic() < give_up:
        if clock.monotonic() >= remind:
            _ask_to_stop(link, machine)
            remind = clock.monotonic() + _REMIND
        if not is_running(link, machine):
            return True
        clock.sleep(_LOOK)
    if is_running(link, machine):
        if not force:
            raise DomainStays(domain=name, seconds=f"{patience:g}")
        destroy(link, machine)
    return True


def _ask_to_stop(link: Link, machine: str) -> None:
    """By its agent where one answers, else by the power button; a guest that hears neither is waited for."""
    # An agent that is just going, a domain that is gone already: the look decides.
    with suppress(AgentFailed, DomainBusy, HypervisorRefused, DomainUnknown):
        link.domain(machine, lambda domain: domain.shutdownFlags(0))


def destroy(link: Link, machine: str) -> None:
    """Pull the plug. Nothing to do when it is off or unknown."""

    def act(domain: Any) -> None:
        if domain.isActive():
            domain.destroy()

    try:
        link.domain(machine, act)
    except (DomainUnknown, HypervisorRefused):
        if is_running(link, machine):
            raise


def start(link: Link, machine: str, name: str) -> None:
    """Start it, unless it runs. Raises StartRefused with what libvirt says."""

    def act(domain: Any) -> None:
        if not domain.isActive():
            domain.create()

    try:
        link.domain(machine, act, again=False)
    except HypervisorRefused as failure:
        raise StartRefused(domain=name, reason=failure.facts["reason"]) from failure


def define(link: Link, text: str, name: str) -> None:
    """Define the domain that ``text`` describes, or bring it to that definition. Raises DefineRefused."""
    try:
        link.call(lambda connection: connection.defineXML(text), domain=name)
    except HypervisorRefused as failure:
        raise DefineRefused(domain=name, reason=failure.facts["reason"]) from failure


def refuse_taken(link: Link, name: str) -> None:
    """Raise DefineRefused when a domain is called ``name`` already."""
    if is_running(link, name) is not None:
        raise DefineRefused(domain=name, reason="there is a domain of that name already")


def refuse_lacking(link: Link, name: str, domain: Domain) -> None:
    """Raise DefineRefused when ``domain`` names networks that are not there."""

    def known(connection: Any) -> set[str]:
        return {one.name() for one in connection.listAllNetworks(0)}

    if domain.networks:
        lacking = [network for network in domain.networks if network not in link.call(known)]
        if lacking:
            reason = f"there is no network {', '.join(lacking)} here; nothing was written"
            raise DefineRefused(domain=name, reason=reason)


def description(link: Link, machine: str) -> str:
    """Its XML as it is defined; of a transient one, as it runs."""
    flags = binding()
    wanted = flags.VIR_DOMAIN_XML_INACTIVE | flags.VIR_DOMAIN_XML_SECURE
    return str(link.domain(machine, lambda domain: domain.XMLDesc(wanted)))


def qemu_user(link: Link) -> tuple[int, int] | None:
    """User and group as which libvirt runs QEMU; None where that is not changed from its own.

    https://libvirt.org/formatcaps.html#elementHost, secmodel
    """
    host = parse_xml(link.call(lambda connection: str(connection.getCapabilities())))
    for model in host.findall("host/secmodel"):
        if model.findtext("model") == "dac":
            label = model.findtext("baselabel") or ""
            user, _, group = label.replace("+", "").partition(":")
            return (int(user), int(group)) if user.isdecimal() and group.isdecimal() else None
    return None
