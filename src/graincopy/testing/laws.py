"""What a law is: a plain function over a lab that returns, or raises LawBroken, or says why it cannot be tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Lab = TypeVar("Lab")


class LawBroken(AssertionError):
    """The storage did something that the contract forbids. Its text is for people."""


class NotTried(Exception):
    """The lab or the driver declares that it lacks what the law needs. Its text is the reason; it is counted."""


@dataclass(frozen=True, slots=True)
class Law(Generic[Lab]):
    """One law, or one case of it: ``name`` begins with the number in the contract."""

    name: str
    says: str
    check: Callable[[Lab], None]

    def __str__(self) -> str:
        return self.name


def require(kept: bool, what: str) -> None:
    """Raise LawBroken(``what``) unless ``kept``."""
    if not kept:
        raise LawBroken(what)
