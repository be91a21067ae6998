"""The reference workload source: workloads that are put into it, with every power there is.

``quiesced`` names those whose writers stand still; a test breaks a quiesce by taking one out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from graincopy.core.errors import WorkloadWrong
from graincopy.core.ids import WorkloadId, digest_id
from graincopy.model.workload import Consistency, SourceCapabilities, Workload
from graincopy.workloads.base import Quiesced, WorkloadSource


class MemorySource(WorkloadSource):
    """Workloads by name."""

    prefix: ClassVar[str] = "memory"

    def __init__(self, workloads: Sequence[Workload] = (), consistency: Consistency = Consistency.APPLICATION) -> None:
        self.workloads = {workload.name: workload for workload in workloads}
        self.consistency = consistency
        self.quiesced: set[str] = set()

    def capabilities(self) -> SourceCapabilities:
        return SourceCapabilities(quiesce=True, define=True, discover=True)

    def list(self) -> tuple[str, ...]:
        return tuple(sorted(self.workloads))

    def describe(self, selectors: Sequence[str], name: str | None = None) -> Workload:
        missing = sorted(set(selectors) - set(self.workloads))
        if missing or not selectors:
            raise WorkloadWrong(workload=",".join(missing) or "memory:", reason="there is no such workload")
        found = [self.workloads[selector] for selector in sorted(set(selectors))]
        if len(found) == 1 and name is None:
            return found[0]
        title = name or "+".join(workload.name for workload in found)
        return Workload(
            id=WorkloadId(digest_id("name", [title])),
            name=title,
            kind=self.prefix,
            files=tuple(file for workload in found for file in workload.files),
        )

    def quiesce(self, workload: Workload, deadline: float) -> Quiesced:
        self.quiesced.add(workload.id)
        return Quiesced(workload, self.consistency)

    def thaw(self, quiesced: Quiesced) -> bool:
        held = quiesced.workload.id in self.quiesced
        self.quiesced.discard(quiesced.workload.id)
        return held

    def define(self, workload: Workload) -> None:
        self.workloads[workload.name] = workload
