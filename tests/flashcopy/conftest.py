"""Fixtures of the flashcopy tests. What needs no bytes runs on an array without a data plane, and without root."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "e2e"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "crash"))
sys.path.insert(0, os.path.dirname(__file__))

from array_world import World


@pytest.fixture
def world(tmp_path: os.PathLike[str]) -> World:
    """A fresh array, and a fresh host."""
    return World(os.path.join(tmp_path, "notes"))
