"""Stage 9 on the array: T and what was made for it go, in the one order that harms nobody; or they are put off.

unmount and drop the device (``host``) → rmvdiskhostmap → stopfcconsistgrp → poll → rmfcmap → rmfcconsistgrp → rmvdisk.
Never with -force. A group is stopped only when every member of it is doomed, because that takes all its targets
offline. Whatever is refused, for whatever reason the array has (volume protection, a dependent mapping), is left as it
is and tried again later: the notes keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import msgspec

from graincopy.core.errors import ArrayRefused, GraincopyError
from graincopy.volumes.flashcopy import names, wire
from graincopy.volumes.flashcopy.console import Console, Refused
from graincopy.volumes.flashcopy.deferred import Notes
from graincopy.volumes.flashcopy.host import HostDevices
from graincopy.volumes.flashcopy.wire import Command, MapStatus, Vdisk

STOP_PATIENCE = 30.0  # seconds until a stop is left to itself, and looked at again later
_REMOVABLE = frozenset({MapStatus.IDLE, MapStatus.STOPPED})


class Held(Exception):
    """It cannot go now: why, in one clause."""


class Teardown(msgspec.Struct, frozen=True):
    """Removes doomed targets of one array. ``host_name`` is what the array calls this host."""

    console: Console
    notes: Notes
    devices: HostDevices
    host_name: str

    def remove(self, name: str) -> bool:
        """Doom the T called ``name`` and remove it, or as much of it as can go now; False when nothing was there.

        Raises ArrayUnreachable and the like; T stays doomed then.
        """
        self.notes.doom(name)
        there = self._is_there(name)
        if there or self.notes.get(name) is not None:
            self._try(name)
        return there

    def remove_doomed(self) -> None:
        """Try everything again that was put off."""
        for note in self.notes.doomed():
            self.remove(note.name)

    def _is_there(self, name: str) -> bool:
        if names.is_group(name):
            return name in self.console.groups()
        return self.console.vdisk(name) is not None or any(each.target == name for each in self.console.maps())

    def _try(self, name: str) -> None:
        try:
            if names.is_group(name):
                self._remove_group(name)
                return
            members = self._members(name)
            self._require_doomed(name, members)
            for each in members:
                self._hide(each)
            self._stop(members)
            for each in members:
                self._gone(partial(self._has_no_vdisk, each), wire.remove_vdisk(each))
                self.notes.forget(each)
        except Held as held:
            self.notes.doom(name, str(held))

    def _members(self, name: str) -> tuple[str, ...]:
        """The targets of the consistency group that ``name`` is in, itself included."""
        maps = self.console.maps()
        groups = {each.group for each in maps if each.target == name and names.is_group(each.group)}
        others = {each.target for each in maps if each.group in groups and names.is_target(each.target)}
        return tuple(sorted({name, *others}))

    def _require_doomed(self, name: str, members: Sequence[str]) -> None:
        for each in members:
            note = self.notes.get(each)
            if each != name and note is not None and not note.doomed:
                raise Held(f"{each} of the same consistency group is still in use")

    # --- steps ------------------------------------------------------------------------------------

    def hide(self, name: str) -> None:
        """Take the LUN of T away from this host, if the array lets it go now."""
        try:
            self._hide(name)
        except (Held, GraincopyError):
            return  # it stays mapped, read-only; deleting T takes it away

    def _hide(self, name: str) -> None:
        vdisk = self.console.vdisk(name)
        if vdisk is None or not self._is_shown(vdisk):
            return
        try:
            self.devices.drop(vdisk.uid)
        except OSError as error:
            raise Held(f"its device is still in use on this host ({error.strerror})") from error
        self._gone(lambda: not self._is_shown(vdisk), wire.hide_from_host(name, self.host_name))

    def _is_shown(self, vdisk: Vdisk) -> bool:
        try:
            return any(each.host == self.host_name for each in self.console.shown_to(vdisk.name))
        except ArrayRefused:
            if self.console.vdisk(vdisk.name) is None:
                return False
            raise

    def _stop(self, members: Sequence[str]) -> None:
        """Stop the group, wait, and remove mappings and group."""
        groups = {each.group for each in self.console.maps() if each.target in members}
        for group in sorted(groups):
            if not names.is_group(group):
                raise Held(f"it is in a mapping that graincopy did not make ({group or 'in no group'})")
            self._stop_group(group)
            for each in [one for one in self.console.maps() if one.group == group]:
                self._gone(partial(self._has_no_map, each.id), wire.remove_map(each.name))
            self._remove_group(group)
        self._remove_empty_groups({names.run_of(each) for each in members})

    def _remove_empty_groups(self, runs: Collection[str | None]) -> None:
        """Groups whose run died, or was refused, before the first mapping was made."""
        used = {each.group for each in self.console.maps()}
        for group in self.console.groups():
            if names.is_group(group) and names.run_of(group) in runs and group not in used:
                self._remove_group(group)

    def _has_no_vdisk(self, name: str) -> bool:
        return self.console.vdisk(name) is None

    def _has_no_map(self, map_id: str) -> bool:
        return all(each.id != map_id for each in self.console.maps())

    def _stop_group(self, group: str) -> None:
        def states() -> frozenset[str]:
            return wire.states(self.console.maps(), group)

        if not states() <= _REMOVABLE:
            self._gone(lambda: states() <= {*_REMOVABLE, MapStatus.STOPPING}, wire.stop_group(group))
        if self.console.wait(lambda: True if states() <= _REMOVABLE else None, STOP_PATIENCE) is None:
            raise Held("the array is still stopping its mapping")

    def _remove_group(self, group: str) -> None:
        self._gone(lambda: group not in self.console.groups(), wire.remove_group(group))

    def _gone(self, done: Callable[[], bool], command: Command) -> None:
        """Give ``command`` until ``done``. Raises Held when the array refuses."""
        try:
            self.console.until(lambda: True if done() else None, command)
        except Refused as refused:
            raise Held(f"{command[0]}: {refused.message}") from refused
