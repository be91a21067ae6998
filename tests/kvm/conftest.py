"""Fixtures for tests that need real guests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "e2e"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "flashcopy"))

from vm_lab import GuestLab


@pytest.fixture(scope="session")
def guests() -> Iterator[GuestLab]:
    """One private libvirtd for all tests here."""
    with GuestLab() as lab:
        yield lab
