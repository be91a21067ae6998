"""The volume laws as a pytest class. A driver adopts them in ten lines::

    class TestMyDriver(VolumeSuite):
        @pytest.fixture(scope="class")
        @classmethod
        def storage(cls):
            with my_storage() as directory:
                yield FileLab([directory], MyDriver, my_clock)

What the lab or the driver declares it cannot is skipped with its reason, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import Law, NotTried
from graincopy.testing.laws_restore import restore_laws
from graincopy.testing.laws_volume import volume_laws
from graincopy.testing.machines import run_soundness


class VolumeSuite:
    """Subclass it, and give a fixture ``storage`` that is a :class:`VolumeLab` (any scope)."""

    examples: ClassVar[int] = 6  # of the random walk; real storage is slow
    steps: ClassVar[int] = 10

    @pytest.fixture
    def lab(self, storage: VolumeLab) -> Iterator[VolumeLab]:
        """The storage, empty before and after every law."""
        yield storage
        storage.reset()

    @pytest.mark.parametrize("law", [*volume_laws(), *restore_laws()], ids=str)
    def test_law(self, lab: VolumeLab, law: Law[VolumeLab]) -> None:
        try:
            law.check(lab)
        except NotTried as reason:
            pytest.skip(str(reason))

    def test_random_walk(self, lab: VolumeLab) -> None:
        """02, 04: soundness and reconstruction after random sequences of everything that can happen to a disk."""
        try:
            run_soundness(lab, self.examples, self.steps)
        except NotTried as reason:
            pytest.skip(str(reason))
