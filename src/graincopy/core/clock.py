"""Time and chance as parameters: nothing below the wiring asks the machine for either."""

from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Wall-clock seconds since the epoch. May jump; never decides correctness."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back."""

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass."""


class Chance(Protocol):
    """Where randomness comes from."""

    def token(self, size: int) -> bytes:
        """``size`` unpredictable bytes."""

    def below(self, limit: int) -> int:
        """An integer in ``[0, limit)``, evenly distributed."""
