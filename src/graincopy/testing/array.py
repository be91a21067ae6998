"""An array of our own: the command subset of IBM Storage Virtualize over a data plane, with faults to switch on.

It is strict where a driver could be careless (``-iogrp``, ``-unit``, names, states, ``-force``), and spells states and
errors as the real one does. It proves a driver's flow, not the array: that is what ``validate-volume`` is for.
What it does to bytes is the data plane's part (``array_plane``); who may talk to it, the SSH server's (``array_ssh``).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

from graincopy.core.clock import Clock
from graincopy.testing.array_parts import Answered, DataPlane, Faults, FcMap, LineBroken, Vdisk
from graincopy.testing.array_rows import copy_row, host_row, map_row, vdisk_row
from graincopy.testing.array_words import Options, Refuse, detail, parse, table

__all__ = ["Answered", "Array", "DataPlane", "Faults", "LineBroken", "Refuse"]

POOL = "Pool0"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\- ]{0,62}")
_READY = ("idle_or_copied", "stopped")
_UNKNOWN = "CMMVC5754E The specified object does not exist, or the name does not meet the naming rules."


class Array:
    """The whole array. One command at a time; ``log`` keeps every line it was given."""

    def __init__(self, plane: DataPlane, clock: Clock, serial: int = 0x8180) -> None:
        self.plane, self.clock, self.faults = plane, clock, Faults()
        self.vdisks: dict[str, Vdisk] = {}
        self.maps: dict[int, FcMap] = {}
        self.groups: dict[str, int] = {}
        self.log: list[str] = []
        self._serial, self._next = serial, 0
        self._lock = threading.RLock()

    # --- by hand ----------------------------------------------------------------------------------

    def make(self, name: str, size: int, *hosts: str) -> str:
        """A vdisk of somebody else's, shown to ``hosts``; its uid."""
        with self._lock:
            vdisk = self._add(name, size, POOL, "0", thin=False)
            for host in hosts:
                self._show(vdisk, host)
            return vdisk.uid

    def drop(self, name: str) -> None:
        """Remove a vdisk with all that hangs on it, as an administrator with -force would."""
        with self._lock:
            vdisk = self.vdisks.pop(name)
            self.maps = {n: one for n, one in self.maps.items() if name not in (one.source, one.target)}
            if vdisk.hosts:
                self.plane.withdraw(vdisk.number, vdisk.uid)
            self.plane.remove(vdisk.number)

    def resize(self, name: str, size: int) -> None:
        """Another size for a vdisk that is in no mapping."""
        with self._lock:
            self.vdisks[name].size = size
            self.plane.resize(self.vdisks[name].number, size)

    def rename(self, name: str, new: str) -> None:
        """Another name, the same vdisk."""
        with self._lock:
            vdisk = self.vdisks.pop(name)
            vdisk.name = new
            self.vdisks[new] = vdisk
            for each in self.maps.values():
                each.source = new if each.source == name else each.source
                each.target = new if each.target == name else each.target

    def footprint(self) -> frozenset[str]:
        """Everything that lsvdisk, lsfcmap, lsfcconsistgrp and lsvdiskhostmap show."""
        with self._lock:
            shown = {f"host {host} sees {one.name}" for one in self.vdisks.values() for host in one.hosts}
            maps = {f"map {one.source} to {one.target}" for one in self.maps.values()}
            return frozenset({f"vdisk {name}" for name in self.vdisks} | maps | set(self.groups) | shown)

    # --- commands ---------------------------------------------------------------------------------

    def execute(self, line: str) -> Answered:
        """One command line. Raises LineBroken when the connection is to be cut instead of an answer."""
        with self._lock:
            self.log.append(line)
            verb = line.partition(" ")[0]
            faults = self.faults
            if verb in faults.before:
                faults.before.pop(verb)()
            if faults.use(faults.lose_before, verb):
                raise LineBroken(verb)
            answer = self._answer(line, verb)
            if faults.use(faults.lose_after, verb):
                raise LineBroken(verb)
            if faults.garble.get(verb):
                return Answered(0, faults.garble[verb].pop(0))
            if faults.warn and not answer.status:
                return Answered(0, "CMMVC6372W The virtualized storage capacity is used to 90 %.\n" + answer.out)
            return answer

    def _answer(self, line: str, verb: str) -> Answered:
        try:
            if self.faults.refuse.get(verb):
                raise Refuse(self.faults.refuse[verb].pop(0))
            options, names = parse(line)
            self._pass_time()
            done = getattr(self, f"_{verb}")(options, *names)
        except Refuse as refused:
            return Answered(1, "", f"{refused}\n")
        return Answered(0, done or "")

    def _pass_time(self) -> None:
        """Passing states end by themselves."""
        now = self.clock.monotonic()
        following = {"preparing": "prepared", "stopping": "stopped"}
        for each in self.maps.values():
            if each.state in following and now >= each.until:
                each.state = following[each.state]

    def _find(self, name: str) -> Vdisk:
        if name not in self.vdisks:
            raise Refuse(_UNKNOWN)
        return self.vdisks[name]

    def _map(self, name: str) -> FcMap:
        found = [one for one in self.maps.values() if name in (one.name, str(one.number))]
        if not found:
            raise Refuse("CMMVC5753E The specified object does not exist or is not a suitable candidate.")
        return found[0]

    def _members(self, group: str) -> list[FcMap]:
        if group not in self.groups:
            raise Refuse(_UNKNOWN)
        return [one for one in self.maps.values() if one.group == group]

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _named(self, name: str, taken: Sequence[str]) -> str:
        if not _NAME.fullmatch(name):
            raise Refuse(_UNKNOWN)
        if name in taken:
            raise Refuse("CMMVC6035E The action failed because the object already exists.")
        return name

    # --- vdisks -----------------------------------------------------------------------------------

    def _add(self, name: str, size: int, pool: str, iogrp: str, thin: bool) -> Vdisk:
        number = self._number()
        uid = f"60050768{self._serial:08X}{number:016X}"
        vdisk = self.vdisks[name] = Vdisk(number, name, size, uid, pool, iogrp, thin)
        self.plane.create(number, size)
        return vdisk

    def _mkvdisk(self, options: Options) -> str:
        for needed in ("-mdiskgrp", "-iogrp", "-size", "-unit", "-name"):
            if needed not in options:
                raise Refuse(f"CMMVC5707E Required parameters are missing: {needed}")
        size = int(options["-size"])
        if options["-unit"] != "b" or size % 512:
            raise Refuse("CMMVC5709E The size is not valid with this unit.")
        if self.faults.pool_full:
            raise Refuse("CMMVC5860E The action failed because there were not enough extents in the storage pool.")
        name = self._named(options["-name"], list(self.vdisks))
        if options["-mdiskgrp"] not in {one.pool for one in self.vdisks.values()}:
            raise Refuse(_UNKNOWN)
        vdisk = self._add(name, size, options["-mdiskgrp"], options["-iogrp"], "-rsize" in options)
        return f"Virtual Disk, id [{vdisk.number}], successfully created\n"

    def _rmvdisk(self, options: Options, name: str) -> None:
        vdisk = self._find(name)
        in_map = any(name in (one.source, one.target) for one in self.maps.values())
        if vdisk.hosts or in_map:
            raise Refuse("CMMVC5840E The volume was not deleted because it is mapped to a host or part of a mapping.")
        self._refuse_protected(vdisk)
        del self.vdisks[name]
        self.plane.remove(vdisk.number)

    def _refuse_protected(self, vdisk: Vdisk) -> None:
        if self.clock.monotonic() - vdisk.seen < self.faults.protection_s:
            raise Refuse("CMMVC8783E The action failed because the volume has been active within the protection time.")

    def _status(self, vdisk: Vdisk) -> str:
        stopped = any(one.target == vdisk.name and one.state in ("stopped", "stopping") for one in self.maps.values())
        return "offline" if stopped or vdisk.name in self.faults.offline else "online"

    def _row(self, one: Vdisk) -> dict[str, str]:
        return vdisk_row(one, self._status(one), self.maps.values())

    def _lsvdisk(self, options: Options, name: str | None = None) -> str:
        if "-bytes" not in options:
            raise Refuse("CMMVC5709E without -bytes sizes are rounded here; a driver must not rely on that.")
        if name is None:
            return table([self._row(one) for one in self.vdisks.values()], options)
        vdisk = self._find(name)
        return detail([self._row(vdisk), copy_row(self.plane.used(vdisk.number))], options)

    # --- mappings and groups ----------------------------------------------------------------------

    def _mkfcconsistgrp(self, options: Options) -> str:
        self._refuse_unlicensed()
        name = self._named(options.get("-name", f"fccstgrp{self._next}"), list(self.groups))
        self.groups[name] = self._number()
        return f"FlashCopy Consistency Group, id [{self.groups[name]}], successfully created\n"

    def _refuse_unlicensed(self) -> None:
        if self.faults.unlicensed:
            raise Refuse("CMMVC5886E The FlashCopy feature is not licensed.")

    def _mkfcmap(self, options: Options) -> str:
        self._refuse_unlicensed()
        source, target = self._find(options["-source"]), self._find(options["-target"])
        if source.size != target.size:
            raise Refuse("CMMVC5924E The mapping was not created because the source and target have different sizes.")
        if any(one.target == target.name for one in self.maps.values()):
            raise Refuse("CMMVC6466E The FlashCopy mapping already exists.")
        if sum(one.source == source.name for one in self.maps.values()) >= self.faults.most_maps:
            raise Refuse("CMMVC6425E The maximum number of FlashCopy mappings of this source has been reached.")
        group = options.get("-consistgrp", "")
        if group and len(self._members(group)) >= 512:
            raise Refuse("CMMVC6426E The maximum number of mappings of this consistency group has been reached.")
        number = self._number()
        self.maps[number] = FcMap(number, source.name, target.name, group, int(options.get("-copyrate", "50")))
        return f"FlashCopy Mapping, id [{number}], successfully created\n"

    def _prestartfcconsistgrp(self, options: Options, group: str) -> None:
        members = self._members(group)
        if not members or any(one.state not in _READY for one in members):
            raise Refuse("CMMVC5907E The consistency group was not prepared because of its state.")
        for one in members:
            self.plane.prepare(self._find(one.source).number, self._find(one.target).number)
            one.state, one.until = "preparing", self.clock.monotonic() + self.faults.preparing_s

    def _startfcconsistgrp(self, options: Options, group: str) -> None:
        members = self._members(group)
        if not members or any(one.state != "prepared" for one in members):
            raise Refuse("CMMVC5910E The consistency group was not started because it is not prepared.")
        self.plane.clone([(self._find(one.source).number, self._find(one.target).number) for one in members])
        for one in members:
            one.state = "copying"

    def _stopfcconsistgrp(self, options: Options, group: str) -> None:
        members = self._members(group)
        if not members or all(one.state in _READY for one in members):
            raise Refuse("CMMVC5912E The consistency group was not stopped because it is stopped already.")
        for one in members:
            one.state, one.until = "stopping", self.clock.monotonic() + self.faults.stopping_s

    def _rmfcmap(self, options: Options, name: str) -> None:
        found = self._map(name)
        if found.state not in _READY:
            raise Refuse("CMMVC5906E The FlashCopy mapping was not deleted because of its state.")
        del self.maps[found.number]

    def _rmfcconsistgrp(self, options: Options, group: str) -> None:
        if self._members(group):
            raise Refuse("CMMVC5905E The consistency group was not deleted because it is not empty.")
        del self.groups[group]

    def _lsfcmap(self, options: Options, name: str | None = None) -> str:
        rows = [map_row(one, self._find(one.source), self._find(one.target), self.groups) for one in self.maps.values()]
        return table(rows, options)

    def _lsfcconsistgrp(self, options: Options, name: str | None = None) -> str:
        rows = []
        for group, number in self.groups.items():
            states = {one.state for one in self._members(group)} or {"empty"}
            rows.append({"id": str(number), "name": group, "status": min(states), "start_time": ""})
        return table(rows, options)

    # --- hosts ------------------------------------------------------------------------------------

    def _show(self, vdisk: Vdisk, host: str) -> None:
        if not vdisk.hosts:
            self.plane.publish(vdisk.number, vdisk.uid)
        vdisk.hosts.append(host)
        vdisk.seen = self.clock.monotonic()

    def _mkvdiskhostmap(self, options: Options, name: str) -> str:
        vdisk = self._find(name)
        if options["-host"] in vdisk.hosts:
            raise Refuse("CMMVC5878E The mapping was not created because the volume is already mapped to this host.")
        self._show(vdisk, options["-host"])
        return f"Virtual Disk to Host map, id [{len(vdisk.hosts) - 1}], successfully created\n"

    def _rmvdiskhostmap(self, options: Options, name: str) -> None:
        vdisk = self._find(name)
        if options["-host"] not in vdisk.hosts:
            raise Refuse("CMMVC5842E The action failed because the volume is not mapped to this host.")
        self._refuse_protected(vdisk)
        vdisk.hosts.remove(options["-host"])
        if not vdisk.hosts:
            self.plane.withdraw(vdisk.number, vdisk.uid)

    def _lsvdiskhostmap(self, options: Options, name: str) -> str:
        vdisk = self._find(name)
        return table([host_row(vdisk, number, host) for number, host in enumerate(vdisk.hosts)], options)
