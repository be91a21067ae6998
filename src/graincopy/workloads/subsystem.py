"""Workload ``subsystem``: a management subsystem, its files and directories, quiesced by commands (stages 2 and 5).

What has to be resumed is held by a process of its own (command_guard.py): it resumes when it is told to, at the
deadline, and when graincopy was killed. Before and after the instant the subsystem is looked at again: when it is not
what was described (another tablespace, a server that was started), the instant does not count.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

import msgspec
from msgspec.structs import replace

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError, PathMissing, PathUnfit, ResumeFailed, SubsystemFailed, WorkloadWrong
from graincopy.core.ids import WorkloadId, digest_id
from graincopy.model.subsystem import Subsystem
from graincopy.model.tree import definition_of
from graincopy.model.workload import Consistency, SourceCapabilities, Tree, Workload
from graincopy.workloads.base import Quiesced, WorkloadSource
from graincopy.workloads.files import disk_names
from graincopy.workloads.guarded import Commands, Guarded
from graincopy.workloads.known_subsystems import Resolved, resolve
from graincopy.workloads.merge import Member, anonymous_id, merge, named_id
from graincopy.workloads.tree import ReadMetadata, list_live

Resolve = Callable[[str, Subsystem], Resolved]


class _Held(msgspec.Struct):
    """A quiesced subsystem, and how it was described."""

    was: Resolved
    guard: Guarded | None


class SubsystemSource(WorkloadSource):
    """Subsystems by name. ``files`` describes named files; ``mounts`` tells the mount points of this host."""

    prefix: ClassVar[str] = "subsystem"

    def __init__(
        self,
        specs: Mapping[str, Subsystem],
        files: WorkloadSource,
        read_metadata: ReadMetadata,
        clock: Clock,
        mounts: Callable[[], Collection[str]] = tuple,
        resolve: Resolve = resolve,
    ) -> None:
        self._specs, self._files, self._read_metadata = specs, files, read_metadata
        self._clock, self._mounts, self._resolve = clock, mounts, resolve
        self._described: dict[WorkloadId, tuple[Resolved, ...]] = {}
        self._held: dict[str, list[_Held]] = {}

    def capabilities(self) -> SourceCapabilities:
        return SourceCapabilities(quiesce=True, discover=True)

    def list(self) -> tuple[str, ...]:
        return tuple(sorted(self._specs))

    # --- stage 2 ----------------------------------------------------------------------------------

    def describe(self, selectors: Sequence[str], name: str | None = None) -> Workload:
        wanted = sorted(set(selectors))
        if not wanted:
            raise WorkloadWrong(workload=name or "subsystem:", reason="it names no subsystem")
        resolved = tuple(self._known(selector) for selector in wanted)
        members = [self._one(subsystem) for subsystem in resolved]
        if len(members) == 1 and name is None:
            workload = members[0]
        else:
            parts = [Member(member, f"{member.name}_") for member in members]
            id = named_id(name) if name else anonymous_id([member.id for member in members])
            workload = merge(parts, id, name or "+".join(wanted), self.prefix)
        self._described[workload.id] = resolved
        return workload

    def _known(self, name: str) -> Resolved:
        if name not in self._specs:
            known = ", ".join(sorted(self._specs)) or "none"
            raise WorkloadWrong(workload=f"subsystem:{name}", reason=f"there is no such subsystem; there are: {known}")
        return self._resolve(name, self._specs[name])

    def _one(self, subsystem: Resolved) -> Workload:
        spec = subsystem.spec
        roots = sorted({_real_folder(path) for path in spec.directories}, key=os.fsencode)
        named = self._files.describe(spec.files).files if spec.files else ()
        names = disk_names(sorted({*roots, *(file.path for file in named)}, key=os.fsencode))
        trees = [Tree(path=path, name=names[path], exclude=spec.exclude) for path in _outermost(roots)]
        listings = [list_live(tree, self._read_metadata, self._mounts()) for tree in trees]
        paths = {file.path for file in named}
        found = [file for listing in listings for file in listing.files if file.path not in paths]
        return Workload(
            id=WorkloadId(digest_id("subsystem", [subsystem.name])),
            name=subsystem.name,
            kind=self.prefix,
            files=(*(replace(file, name=names[file.path]) for file in named), *found),
            definitions=dict(definition_of(listing.manifest) for listing in listings),
            notes=tuple(note for listing in listings for note in listing.notes),
            trees=tuple(trees),
            one_instant=subsystem.one_instant,
            paused=spec.pauses,
        )

    # --- stage 5 ----------------------------------------------------------------------------------

    def quiesce(self, workload: Workload, deadline: float) -> Quiesced:
        """All subsystems of ``workload`` at a time. A command may take its own ``timeout``; ``deadline`` is how long
        they then stay quiesced where ``hold`` says nothing else. Raises SubsystemFailed, ResumeFailed; then all that
        was quiesced has been resumed."""
        described = self._described.get(workload.id)
        if described is None:
            raise WorkloadWrong(workload=workload.name, reason="it was not described by this source")
        held = [_Held(one, self._guard(one, deadline)) for one in described]
        started: list[Guarded] = []
        try:
            for guard in (one.guard for one in held if one.guard is not None):
                guard.begin()
                started.append(guard)
            for guard in started:
                guard.settle()
            for one in held:
                self._look_again(one.was)
        except BaseException as error:
            _resume_all(started, error)
            raise
        self._held[workload.id] = held
        levels = {one.was.name: one.was.consistency for one in held}
        return Quiesced(workload, min(levels.values(), key=list(Consistency).index), levels=levels)

    def _guard(self, subsystem: Resolved, deadline: float) -> Guarded | None:
        if not subsystem.quiesce:
            return None
        spec = subsystem.spec
        resume = (spec.resume,) if spec.resume else ()
        commands = Commands(subsystem.name, subsystem.quiesce, resume, spec.timeout, spec.hold or deadline)
        return Guarded(commands, self._clock)

    def _look_again(self, was: Resolved) -> None:
        """Raises SubsystemFailed when the subsystem is not what was described."""
        if was.spec.kind != "plain" and self._resolve(was.name, self._specs[was.name]) != was:
            reason = "its directories or servers changed while it was backed up; run the same command again"
            raise SubsystemFailed(subsystem=was.name, reason=reason)

    def thaw(self, quiesced: Quiesced) -> bool:
        """Resume all, always. Raises ResumeFailed when one was not, and SubsystemFailed when one is not what it was."""
        held = self._held.pop(quiesced.workload.id, [])
        stuck: ResumeFailed | None = None
        kept = bool(held)
        for guard in (one.guard for one in reversed(held) if one.guard is not None):
            try:
                kept &= guard.resume()
            except ResumeFailed as failure:
                stuck = stuck or failure
        if stuck is not None:
            raise stuck
        for one in held:
            self._look_again(one.was)
        return kept


def _resume_all(guards: Sequence[Guarded], error: BaseException) -> None:
    """Let all go on while ``error`` is on its way; whoever cannot be resumed is added to it."""
    for guard in guards:
        try:
            guard.abandon()
        except GraincopyError as failure:
            error.add_note(f"{failure}. {failure.next_move}")


def _real_folder(path: str) -> str:
    try:
        real = os.path.realpath(path, strict=True)
        kind = stat.S_IFMT(os.stat(real).st_mode)
    except OSError as error:
        raise PathMissing(path=path) from error
    if kind != stat.S_IFDIR:
        raise PathUnfit(path=path, what="no directory")
    return real


def _outermost(roots: Sequence[str]) -> tuple[str, ...]:
    """Without those that lie in another one."""
    return tuple(path for path in roots if not any(path != other and path.startswith(f"{other}/") for other in roots))
