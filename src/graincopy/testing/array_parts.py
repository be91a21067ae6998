"""What our own array is made of: its data plane as a contract, its faults, its volumes and mappings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class DataPlane(Protocol):
    """What happens to bytes. ``number`` is a vdisk's id."""

    def create(self, number: int, size: int) -> None:
        """A vdisk of zeros."""

    def resize(self, number: int, size: int) -> None:
        """Another size."""

    def remove(self, number: int) -> None:
        """It is gone."""

    def clone(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Each second shows its first, all as of one instant."""

    def prepare(self, source: int, target: int) -> None:
        """The source is flushed, the target's content discarded; what helps a quick :meth:`clone` is done now."""

    def publish(self, number: int, uid: str) -> None:
        """It becomes a LUN of the host."""

    def withdraw(self, number: int, uid: str) -> None:
        """It is no LUN any more."""

    def used(self, number: int) -> int:
        """Bytes that it alone takes."""

    def flush(self, number: int) -> None:
        """What was written to it is where ``used`` looks."""


@dataclass
class Faults:
    """What goes wrong. Counters and lists are used up; the others hold until they are set back."""

    refuse: dict[str, list[str]] = field(default_factory=dict)  # verb → messages, one for each call
    lose_before: dict[str, int] = field(default_factory=dict)  # verb → how often the line breaks before it takes effect
    lose_after: dict[str, int] = field(default_factory=dict)
    garble: dict[str, list[str]] = field(default_factory=dict)  # verb → what is answered instead
    before: dict[str, Callable[[], None]] = field(default_factory=dict)  # verb → what happens just before
    unlicensed: bool = False
    pool_full: bool = False
    most_maps: int = 256  # of one source
    protection_s: float = 0.0  # seconds since the host last saw a vdisk, before which it is not let go
    preparing_s: float = 0.0
    stopping_s: float = 0.0
    offline: set[str] = field(default_factory=set)
    warn: bool = False  # every success comes with a warning

    def use(self, counter: dict[str, int], verb: str) -> bool:
        """Whether it goes wrong this time."""
        left = counter.get(verb, 0)
        counter[verb] = max(0, left - 1)
        return left > 0


class LineBroken(Exception):
    """The connection is to be cut; ``after``: when the command has taken effect."""


@dataclass
class Vdisk:
    number: int
    name: str
    size: int
    uid: str
    pool: str
    iogrp: str
    thin: bool
    hosts: list[str] = field(default_factory=list)
    seen: float = float("-inf")  # when a host could last read it


@dataclass
class FcMap:
    number: int
    source: str
    target: str
    group: str
    rate: int
    state: str = "idle_or_copied"
    until: float = 0.0  # when a passing state ends

    @property
    def name(self) -> str:
        return f"fcmap{self.number}"


@dataclass(frozen=True)
class Answered:
    """Exit status and text of one command."""

    status: int
    out: str = ""
    err: str = ""
