"""Workloads of several kinds as one: what stands on a command line, and ``set:NAME`` of the configuration (stage 2).

Members of one kind go to their source together, so that it can quiesce them at one time. Sources are quiesced one
after the other, applications before machines, and thawed in reverse order, all of them, whatever happens.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import msgspec
from msgspec.structs import replace

from graincopy.core.errors import GraincopyError, WorkloadWrong
from graincopy.core.ids import WorkloadId, digest_id
from graincopy.model.workload import Consistency, SourceCapabilities, Workload
from graincopy.workloads.base import Quiesced, WorkloadSource
from graincopy.workloads.merge import Member, anonymous_id, merge, named_id

LEVELS = "members.json"  # definition: member → the consistency that it reached
_FILES = "files"
_SET = "set"


class _Part(msgspec.Struct, frozen=True):
    """The members that one source quiesces together."""

    source: WorkloadSource
    workload: Workload


class CombinedSource(WorkloadSource):
    """``sources`` in the order in which they are quiesced, by prefix; ``sets``: name → members, each a WORKLOAD.

    Selectors are WORKLOADs; what has no known prefix is a path. With only files everything is as ``files`` says.
    """

    prefix: ClassVar[str] = _SET

    def __init__(self, sources: Mapping[str, WorkloadSource], sets: Mapping[str, Sequence[str]] | None = None) -> None:
        self._sources, self._sets = sources, sets or {}
        self._parts: dict[WorkloadId, tuple[_Part, ...]] = {}
        self._quiesced: dict[WorkloadId, builtins.list[tuple[_Part, Quiesced]]] = {}
        self._held_ms: dict[WorkloadId, float | None] = {}

    def capabilities(self) -> SourceCapabilities:
        powers = [source.capabilities() for source in self._sources.values()]
        return SourceCapabilities(
            quiesce=any(power.quiesce for power in powers),
            define=any(power.define for power in powers),
            discover=bool(self._sets) or any(power.discover for power in powers),
        )

    def list(self) -> tuple[str, ...]:
        sets = tuple(f"{_SET}:{name}" for name in sorted(self._sets))
        members = (f"{prefix}:{name}" for prefix, source in self._sources.items() for name in source.list())
        return (*sets, *members)

    # --- stage 2 ----------------------------------------------------------------------------------

    def describe(self, selectors: Sequence[str], name: str | None = None) -> Workload:
        wanted = self._sorted_out(selectors)
        if not wanted:
            raise WorkloadWrong(workload=name or "nothing", reason="it names no workload")
        sets = {text for text in selectors if text.startswith(f"{_SET}:")}
        if not sets and (set(wanted) == {_FILES} or [len(names) for names in wanted.values()] == [1]):
            ((prefix, names),) = wanted.items()
            workload = self._sources[prefix].describe(names, name)
            self._parts[workload.id] = (_Part(self._sources[prefix], workload),)
            return workload
        parts = tuple(
            _Part(self._sources[prefix], self._sources[prefix].describe(names)) for prefix, names in wanted.items()
        )
        members = self._members(wanted)
        workload = merge(members, *self._identity(sets, selectors, name, members), _SET)
        # A source may hold several members still together that it would not hold still one by one.
        workload = replace(workload, paused=all(part.workload.paused for part in parts))
        self._parts[workload.id] = parts
        return workload

    def _identity(
        self, sets: Collection[str], selectors: Sequence[str], name: str | None, members: Sequence[Member]
    ) -> tuple[WorkloadId, str]:
        """Id and name: a set of the configuration keeps both whatever its members are."""
        if name is not None:
            return named_id(name), name
        if len(set(selectors)) == 1 and sets:
            (title,) = (text.partition(":")[2] for text in sets)
            return WorkloadId(digest_id(_SET, [title])), title
        id = anonymous_id([member.workload.id for member in members])
        return id, "+".join(member.workload.name for member in members)

    def _sorted_out(self, selectors: Sequence[str]) -> dict[str, builtins.list[str]]:
        """Prefix → names, in the order in which sources are quiesced; sets are opened, also sets of sets."""
        found: dict[str, set[str]] = {}
        for prefix, text in self._opened(selectors, ()):
            found.setdefault(prefix, set()).add(text)
        order = [prefix for prefix in self._sources if prefix in found]
        order += [prefix for prefix in found if prefix not in order]
        return {prefix: sorted(found[prefix], key=os.fsencode) for prefix in order}

    def _opened(self, selectors: Sequence[str], inside: tuple[str, ...]) -> builtins.list[tuple[str, str]]:
        found: builtins.list[tuple[str, str]] = []
        for text in selectors:
            prefix, colon, rest = text.partition(":")
            if colon and prefix == _SET:
                found += self._opened(self._members_of(rest, inside), (*inside, rest))
            elif colon and prefix == _FILES:
                found += [(_FILES, path) for path in rest.split(",")]
            else:
                found.append((prefix, rest) if colon and prefix in self._sources else (_FILES, text))
        return found

    def _members_of(self, name: str, inside: tuple[str, ...]) -> Sequence[str]:
        if name in inside:
            raise WorkloadWrong(workload=f"set:{name}", reason=f"it contains itself ({' → '.join((*inside, name))})")
        if name not in self._sets:
            known = ", ".join(sorted(self._sets)) or "none; [set.NAME] of the configuration makes one"
            raise WorkloadWrong(workload=f"set:{name}", reason=f"there is no such set; there are: {known}")
        return self._sets[name]

    def _members(self, wanted: Mapping[str, Sequence[str]]) -> builtins.list[Member]:
        """Each member by itself; all files together are one. NAMEs of files stay, others get their member's name."""
        found: builtins.list[Member] = []
        for prefix, names in wanted.items():
            if prefix == _FILES:
                found.append(Member(self._sources[prefix].describe(names)))
                continue
            for name in names:
                member = self._sources[prefix].describe([name])
                found.append(Member(member, f"{_legal(member.name)}_"))
        return found

    # --- stage 5 ----------------------------------------------------------------------------------

    def quiesce(self, workload: Workload, deadline: float) -> Quiesced:
        parts = self._parts.get(workload.id)
        if parts is None:
            raise WorkloadWrong(workload=workload.name, reason="it was not described by this source")
        reached: builtins.list[tuple[_Part, Quiesced]] = []
        try:
            for part in parts:
                mine = part.workload if part.workload.id != workload.id else workload
                reached.append((part, part.source.quiesce(mine, deadline)))
        except BaseException as error:
            _thaw_all(reached, error)
            raise
        self._quiesced[workload.id] = reached
        if len(parts) == 1 and parts[0].workload.id == workload.id:
            return reached[0][1]
        level = min((one.consistency for _, one in reached), key=weakest)
        levels = _levels(reached)
        return Quiesced(
            _with_levels(workload, reached, levels),
            level,
            levels=levels,
            warnings=tuple(warning for _, one in reached for warning in one.warnings),
        )

    def thaw(self, quiesced: Quiesced) -> bool:
        reached = self._quiesced.pop(quiesced.workload.id, [])
        held, failure = _thaw_all(reached, None)
        stood = [part.source.held_ms(one) for part, one in reached]
        self._held_ms[quiesced.workload.id] = max((time for time in stood if time is not None), default=None)
        if failure is not None:
            raise failure
        return held and bool(reached)

    def held_ms(self, quiesced: Quiesced) -> float | None:
        """The longest that a member stood still."""
        return self._held_ms.get(quiesced.workload.id)

    def define(self, workload: Workload) -> None:
        """Recreate what can be: every source that has the power is handed the definitions."""
        for source in self._sources.values():
            if source.capabilities().define:
                source.define(workload)


def _thaw_all(
    reached: Sequence[tuple[_Part, Quiesced]], error: BaseException | None
) -> tuple[bool, GraincopyError | None]:
    """Let all go on, the last quiesced first. Whether every one had held, and the first failure; those that follow it,
    and all when ``error`` is on its way already, are noted on it."""
    held, first = True, None
    for part, quiesced in reversed(reached):
        try:
            held = part.source.thaw(quiesced) and held
        except GraincopyError as failure:
            if first is None and error is None:
                first = failure
            else:
                (error or first or failure).add_note(f"{failure}. {failure.next_move}")
    return held, first


def weakest(level: Consistency) -> int:
    """Sorts levels, the weakest first."""
    return list(Consistency).index(level)


def _levels(reached: Sequence[tuple[_Part, Quiesced]]) -> dict[str, Consistency]:
    """What each member reached; a source that does not tell them apart speaks for all of its own."""
    return {
        f"{part.source.prefix}:{name}": level
        for part, one in reached
        for name, level in (one.levels or {part.workload.name: one.consistency}).items()
    }


def _with_levels(
    workload: Workload, reached: Sequence[tuple[_Part, Quiesced]], levels: Mapping[str, Consistency]
) -> Workload:
    """``workload`` with what the sources learnt, and each member's own consistency among the definitions."""
    learnt = {
        name: data
        for part, one in reached
        for name, data in one.workload.definitions.items()
        if part.workload.definitions.get(name) != data  # what is as described has its name in the whole already
    }
    more = {LEVELS: json.dumps(levels, sort_keys=True).encode()}
    return replace(workload, definitions={**workload.definitions, **learnt, **more})


def _legal(name: str) -> str:
    """A member's name as the beginning of a file name."""
    return name.replace("/", "_")
