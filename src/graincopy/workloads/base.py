"""The workload seam: one small contract between the workflow and whatever runs virtual machines.

Contract
    * ``describe`` names every file that is needed to bring the workload back, and none that is not. It has no
      effect and may be called any number of times.
    * ``quiesce`` returns within ``deadline`` seconds or raises; after it raised, nothing is quiesced.
    * ``thaw`` is idempotent and says whether the quiesce had held until then.
    * A power that ``capabilities`` does not declare raises ``Unsupported`` before any effect.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

from graincopy.core.errors import Unsupported
from graincopy.model.workload import Consistency, SourceCapabilities, Workload


class Quiesced(msgspec.Struct, frozen=True):
    """A workload brought to ``consistency``; hand it back to ``thaw``.

    ``workload`` may say more than what was asked for: its definitions and notes go to the restore point. ``levels`` is
    what each member reached, by name, where there are several; ``warnings`` are clauses for people.
    """

    workload: Workload
    consistency: Consistency
    token: str = ""
    levels: Mapping[str, Consistency] = msgspec.field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class WorkloadSource(ABC):
    """One kind of workload. ``prefix`` is what stands before the colon in WORKLOAD."""

    prefix: ClassVar[str]

    @abstractmethod
    def capabilities(self) -> SourceCapabilities:
        """Declared powers."""

    @abstractmethod
    def list(self) -> tuple[str, ...]:
        """Selectors of the workloads that can be discovered; empty without the power."""

    @abstractmethod
    def describe(self, selectors: Sequence[str], name: str | None = None) -> Workload:
        """The workload that ``selectors`` name together; any order gives the same workload.

        Raises PathMissing, PathUnreadable, PathUnfit or WorkloadWrong.
        """

    def quiesce(self, workload: Workload, deadline: float) -> Quiesced:
        """Bring ``workload`` to the best consistency it offers. Without the power: crash, at once."""
        return Quiesced(workload, Consistency.CRASH)

    def thaw(self, quiesced: Quiesced) -> bool:
        """Let the workload go on. False when it was no longer quiesced: the instant is then worthless."""
        return True

    def held_ms(self, quiesced: Quiesced) -> float | None:
        """How long the workload stood still, in milliseconds, once it is thawed. None: it did not, or nobody knows."""
        return None

    def define(self, workload: Workload) -> None:
        """Recreate the workload from its definitions."""
        raise Unsupported(driver=self.prefix, power="recreate a workload")
