"""Below stage V, the trial: signs of life that a guest can be asked for."""

from __future__ import annotations

import json

import msgspec

from graincopy.core.errors import AgentFailed, DomainBusy, HypervisorRefused
from graincopy.hypervisor.domain_xml import parse_domain
from graincopy.hypervisor.link import Link, binding

_PING_SECONDS = 5


class Sign(msgspec.Struct, frozen=True):
    """What shows that a guest is up: ``text`` on its console, or, without one, an answer of its agent."""

    text: str = ""

    def __str__(self) -> str:
        return f"console:{self.text}" if self.text else "agent"


def parse_sign(text: str) -> Sign:
    """``agent`` or ``console:TEXT``. Raises ValueError."""
    if text == "agent":
        return Sign()
    head, _, tail = text.partition(":")
    if head != "console" or not tail:
        raise ValueError(f"{text} is neither agent nor console:TEXT")
    return Sign(tail)


def agent_answers(link: Link, machine: str) -> bool:
    """Whether the guest's agent answers a ping now. Raises DomainUnknown, HypervisorDown."""
    found = parse_domain(link.domain(machine, lambda domain: str(domain.XMLDesc(0))))
    if not found.agent_connected:
        return False
    binding()
    import libvirt_qemu

    ping = json.dumps({"execute": "guest-ping"})
    try:
        link.domain(machine, lambda domain: libvirt_qemu.qemuAgentCommand(domain, ping, _PING_SECONDS, 0))
    except (AgentFailed, DomainBusy, HypervisorRefused):
        return False
    return True
