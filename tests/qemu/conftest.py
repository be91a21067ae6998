"""A small XFS for the tests at rest: machines that are off are cloned there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "volumes"))
sys.path.insert(0, os.path.dirname(__file__))

import lab


@pytest.fixture(scope="session")
def small_xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.ReflinkFs]:
    """An XFS with reflink."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab.ReflinkFs(tmp_path_factory.mktemp("qemu-xfs"), "xfs", 1024 * lab.MIB) as made:
        yield made
