"""Workload ``vm`` (stages 2 and 5): virtual machines that libvirt knows, whole, quiesced by their guest agents.

``vm:NAME`` takes a domain's name or UUID; several make one workload. What belongs to a VM, what is left out and why is
decided in :mod:`graincopy.workloads.libvirt_files`; who keeps guests from standing still for ever is
:mod:`graincopy.workloads.guest_guard`.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

from msgspec.structs import replace

from graincopy.core.clock import Clock
from graincopy.core.errors import DefineRefused, DomainBusy, HypervisorRefused, WorkloadWrong
from graincopy.core.ids import WorkloadId, digest_id
from graincopy.hypervisor.domain_xml import Domain, parse_domain
from graincopy.hypervisor.link import Link, binding
from graincopy.model.workload import Consistency, FileMetadata, SourceCapabilities, Workload
from graincopy.workloads.base import Quiesced, WorkloadSource
from graincopy.workloads.files import stat_metadata
from graincopy.workloads.libvirt_facts import (
    Facts,
    Machine,
    definition_name,
    definitions,
    look,
    machine_list,
    machines,
    volume_path,
)
from graincopy.workloads.libvirt_files import SWTPM_ROOT, Exclusions, files_of
from graincopy.workloads.libvirt_guard import GuestGuard, GuestWish

_LEVELS = (Consistency.CRASH, Consistency.FILE_SYSTEM, Consistency.APPLICATION)


def several_disks(workload: Workload) -> bool:
    """The usual reason to pause: more than one file has to show one instant, and it is not known what holds them."""
    return len(workload.files) > 1


class LibvirtSource(WorkloadSource):
    """VMs of the libvirt behind ``link``.

    ``exclude``: disks to leave out, each a target dev (``vdb``), a NAME or a path, or one of these behind ``VM:``;
    ``exclude_now`` the same, where each must fit a disk.
    ``application``: VMs whose guests have hooks that bring their applications to rest; nothing outside the guest can
    see that. ``pause``: whether vCPUs are stopped around the instant, so that no disk is ahead of another.
    ``metadata`` reads what a file needs back; ``swtpm`` is where libvirt keeps the state of emulated TPMs.
    """

    prefix: ClassVar[str] = "vm"

    def __init__(
        self,
        link: Link,
        clock: Clock,
        *,
        exclude: Sequence[str] = (),
        exclude_now: Sequence[str] = (),
        application: Collection[str] = (),
        pause: Callable[[Workload], bool] = several_disks,
        metadata: Callable[[str], FileMetadata] = stat_metadata,
        swtpm: str = SWTPM_ROOT,
    ) -> None:
        self._link, self._clock = link, clock
        self._exclude, self._exclude_now = tuple(exclude), tuple(exclude_now)
        self._application = frozenset(application)
        self._used: set[str] = set()  # exclusions that fitted a disk
        self._pause, self._metadata, self._swtpm = pause, metadata, swtpm
        self._guards: dict[str, GuestGuard] = {}
        self._held_ms: dict[str, float | None] = {}

    def capabilities(self) -> SourceCapabilities:
        return SourceCapabilities(quiesce=True, define=True, discover=True)

    def list(self) -> tuple[str, ...]:
        """Names of all domains, running or not."""
        return tuple(one.name for one in self.overview())

    def overview(self) -> tuple[Machine, ...]:
        """All domains by name, for people who choose what to back up. Raises HypervisorDown, HypervisorRefused."""
        return self._link.call(lambda connection: machine_list(connection.listAllDomains(0)))

    # --- stage 2 ----------------------------------------------------------------------------------

    def describe(self, selectors: Sequence[str], name: str | None = None) -> Workload:
        """The VMs called ``selectors``. Their id comes from their UUIDs, whatever they are called.

        Raises WorkloadWrong for what cannot be backed up, DomainUnknown, DomainBusy while another job works on a VM,
        HypervisorDown, PathMissing, PathUnreadable.
        """
        if not selectors:
            raise WorkloadWrong(workload=name or "vm:", reason="it names no virtual machine")
        facts = {one.uuid: one for one in (self._look(selector) for selector in selectors)}
        found = [facts[uuid] for uuid in sorted(facts)]
        for one in found:  # said here already: with a job about, its disks cannot be made out
            if one.running:
                self._link.domain(one.uuid, _ready, shown=one.name)
        exclusions = Exclusions(self._exclude, self._exclude_now, [one.name for one in found], self._used)
        chosen = files_of(found, exclusions, self._volume_path, self._metadata, self._swtpm)
        workload = Workload(
            id=WorkloadId(digest_id("vm", [one.uuid for one in found])),
            name=name or "+".join(sorted(one.name for one in found)),
            kind=self.prefix,
            files=chosen.files,
            definitions={key: value for one in found for key, value in definitions(one).items()},
            notes=(*chosen.notes, *(note for one in found for note in self._notes(one))),
        )
        still = not any(one.running for one in found)
        return replace(workload, paused=still or self._pause(workload))

    def _look(self, selector: str) -> Facts:
        try:
            return self._link.domain(selector, look)
        except ValueError as failure:
            raise WorkloadWrong(workload=f"vm:{selector}", reason=f"its definition is odd: {failure}") from failure

    def _volume_path(self, pool: str, volume: str) -> str:
        return self._link.call(lambda connection: volume_path(connection, pool, volume))

    def _notes(self, facts: Facts) -> tuple[str, ...]:
        notes = [f"{facts.name}: {note}" for note in facts.notes]
        if not facts.persistent:
            notes.append(f"{facts.name} is transient: libvirt forgets it when it stops; a restore defines it for good")
        if facts.running and not facts.live.agent:
            notes.append(f"{facts.name} has no channel for a guest agent: the backup is crash-consistent")
        elif facts.running and not facts.live.agent_connected:
            notes.append(f"no guest agent runs in {facts.name}: the backup is crash-consistent")
        return tuple(notes)

    # --- stage 5 ----------------------------------------------------------------------------------

    def quiesce(self, workload: Workload, deadline: float) -> Quiesced:
        """Freeze through the agents, then pause where the workload says so. A VM without an agent is not frozen.

        Raises DomainUnknown, DomainBusy while another job works on a VM, HypervisorDown, GuestThawFailed.
        """
        live = {uuid: self._link.domain(uuid, _ready, shown=one.name) for uuid, one in machines(workload).items()}
        guard = GuestGuard(
            self._link,
            [
                GuestWish(uuid, found.name, freeze=found.agent_connected, pause=workload.paused)
                for uuid, found in live.items()
            ],
            deadline,
            self._clock,
        )
        guard.start()
        guard.freeze()
        token = digest_id("quiesce", [workload.id, str(self._clock.monotonic())])
        self._guards[token] = guard
        levels = {guest.wish.name: self._level(guest.frozen, guest.wish.name) for guest in guard.guests}
        return Quiesced(
            workload,
            min(levels.values(), key=_LEVELS.index, default=Consistency.CRASH),
            token,
            levels,
            tuple(self._warnings(guard, live)),
        )

    def _level(self, frozen: int, name: str) -> Consistency:
        if not frozen:
            return Consistency.CRASH
        return Consistency.APPLICATION if name in self._application else Consistency.FILE_SYSTEM

    @staticmethod
    def _warnings(guard: GuestGuard, live: Mapping[str, Domain]) -> builtins.list[str]:
        """Agents that should have frozen their guest and did not."""
        return [
            f"{guest.wish.name} is only crash-consistent: {guest.trouble or 'its agent froze nothing'}"
            for guest in guard.guests
            if guest.state == "running" and live[guest.wish.uuid].agent_connected and not guest.frozen
        ]

    def thaw(self, quiesced: Quiesced) -> bool:
        """Resume and thaw. Raises GuestThawFailed, loudly, when a guest may stand still; its guard goes on trying."""
        guard = self._guards.pop(quiesced.token, None)
        if guard is None:
            return False
        try:
            return guard.thaw()
        finally:
            stood = any(guest.frozen or guest.paused for guest in guard.guests)
            self._held_ms[quiesced.token] = guard.held_ms if stood else None

    def held_ms(self, quiesced: Quiesced) -> float | None:
        """From the first freeze to the last thaw, of guests that were frozen or paused."""
        return self._held_ms.get(quiesced.token)

    # --- back -------------------------------------------------------------------------------------

    def define(self, workload: Workload) -> None:
        """Define every VM of ``workload`` as it was. One that is defined already is brought to the old definition.

        Raises DefineRefused, HypervisorDown.
        """
        for uuid in machines(workload):
            text = workload.definitions[definition_name(uuid, "inactive.xml")].decode()
            self.define_xml(text)

    def define_xml(self, text: str) -> None:
        """Define the domain that ``text`` describes. Raises DefineRefused, HypervisorDown."""
        try:
            domain = parse_domain(text)
        except ValueError as failure:
            raise DefineRefused(domain="of this restore point", reason=str(failure)) from failure
        try:
            self._link.call(lambda connection: connection.defineXMLFlags(text, 0), domain=domain.name)
        except HypervisorRefused as failure:
            raise DefineRefused(domain=domain.name, reason=failure.facts["reason"]) from failure

    def missing(self, workload: Workload) -> tuple[str, ...]:
        """Networks and storage pools that the VMs of ``workload`` need and this host does not have, one clause each."""
        absent = []
        for domain in machines(workload).values():
            for kind, names in (("network", domain.networks), ("pool", domain.pools)):
                absent += [f"{domain.name} needs {kind} {name}" for name in names if not self._has(kind, name)]
        return tuple(absent)

    def _has(self, kind: str, name: str) -> bool:
        def names(connection: Any) -> Collection[str]:
            listed = connection.listAllNetworks() if kind == "network" else connection.listAllStoragePools()
            return {one.name() for one in listed}

        return name in self._link.call(names)


def _ready(domain: Any) -> Domain:
    """The domain as it runs now. Raises DomainBusy while another job works on it."""
    libvirt = binding()
    found = parse_domain(domain.XMLDesc(0))
    if not domain.isActive():
        return found
    if domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
        raise DomainBusy(domain=found.name, reason="a job runs on it (migration, snapshot, save or backup)")
    for disk in found.disks:
        if disk.source.kind and domain.blockJobInfo(disk.dev):
            raise DomainBusy(domain=found.name, reason=f"a block job runs on its disk {disk.dev}")
    return found
