"""The laws against a user's own storage, without pytest and hypothesis: ``validate-volume`` and ``validate-medium``.

Every law is tried, also after one was broken; each cleans up after itself. Random walks are seeded: the message of a
broken one names its seed, and the same seed does the same again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from subprocess import SubprocessError
from typing import Protocol, TypeVar

from graincopy.core.errors import GraincopyError
from graincopy.core.units import KIB
from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import Law, LawBroken, NotTried
from graincopy.testing.laws_medium import MediumLab, medium_laws
from graincopy.testing.laws_restore import restore_laws
from graincopy.testing.laws_volume import volume_laws
from graincopy.testing.looking import Moment, check_change, powers
from graincopy.testing.oracle import Disk, appends, fit, random_operation

# what a driver that was never tried raises: it ends that law, not the validation
_BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    SubprocessError,
)
OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one law: ``outcome`` is ok, failed or skipped; ``message`` says why, for people."""

    law: str
    says: str
    outcome: str
    message: str = ""


class _Resettable(Protocol):
    def reset(self) -> None: ...


Lab = TypeVar("Lab", bound=_Resettable)


def validate_volume(lab: VolumeLab, walks: int = 4, seed: int = 0, steps: int = 12) -> Iterator[Verdict]:
    """Try the volume laws, and ``walks`` random walks of ``steps`` operations, one after the other."""
    random_laws = [
        Law(f"02-soundness-random-{number}", "random operations", partial(random_walk, seed=number, steps=steps))
        for number in range(seed, seed + walks)
    ]
    return _try_all(lab, [*volume_laws(), *restore_laws(), *random_laws])


def validate_medium(lab: MediumLab) -> Iterator[Verdict]:
    """Try the medium laws, one after the other."""
    return _try_all(lab, medium_laws())


def random_walk(lab: VolumeLab, seed: int, steps: int) -> None:
    """Random operations with a snapshot after every few; any two neighbouring ones, and the ends, are compared."""
    powers(lab, "change_map", "snapshots")
    chance = random.Random(seed)
    disk = Disk(lab, chance.choice([1000, 300_123, 512 * KIB]), compressed="compress" in lab.powers and seed % 2 == 1)
    disk.write(0, disk.size, seed=2)
    first = last = Moment(lab, disk)
    for step in range(1, steps + 1):
        operation = fit(random_operation(lab.powers, chance), disk.size, lab.block)
        if operation is not None and not (lab.fixed_size and appends(operation, disk.size)):
            disk.do(operation)
        if step % 4 == 0 or step == steps:
            now = Moment(lab, disk)
            check_change(lab, last, now, disk)
            last = now
    check_change(lab, first, last, disk)


def _try_all(lab: Lab, laws: Iterable[Law[Lab]]) -> Iterator[Verdict]:
    for law in laws:
        outcome, message = _try(lab, law)
        try:
            lab.reset()
        except (OSError, GraincopyError) as error:
            outcome, message = FAILED, f"{message} cleaning up failed: {error}".strip()
        yield Verdict(law.name, law.says, outcome, message)


def _try(lab: Lab, law: Law[Lab]) -> tuple[str, str]:
    try:
        law.check(lab)
    except NotTried as reason:
        return SKIPPED, str(reason)
    except LawBroken as broken:
        return FAILED, str(broken)
    except (OSError, GraincopyError, *_BUGS) as error:
        return FAILED, f"{type(error).__name__}: {error}"
    return OK, ""
