"""The fixture of all tests of the repository; what they are built of is in ``shelves``."""

from __future__ import annotations

import pytest
from shelves import make

from graincopy.repository.repository import Repository


@pytest.fixture
def repository() -> Repository:
    return make()
