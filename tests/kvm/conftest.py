"""Fixtures for tests that need real guests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vm_lab import GuestLab


@pytest.fixture(scope="session")
def guests() -> Iterator[GuestLab]:
    """One private libvirtd for all tests here."""
    with GuestLab() as lab:
        yield lab
