"""The medium laws as a pytest class; :class:`MemoryMediumLab` and :class:`DirectoryLab` are labs to adopt or copy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graincopy.testing.laws import Law, NotTried
from graincopy.testing.laws_medium import MediumLab, medium_laws


class MediumSuite:
    """Subclass it, and give a fixture ``place`` that is a :class:`MediumLab` (any scope)."""

    @pytest.fixture
    def lab(self, place: MediumLab) -> Iterator[MediumLab]:
        """The place, empty before and after every law."""
        yield place
        place.reset()

    @pytest.mark.parametrize("law", medium_laws(), ids=str)
    def test_law(self, lab: MediumLab, law: Law[MediumLab]) -> None:
        try:
            law.check(lab)
        except NotTried as reason:
            pytest.skip(str(reason))
