"""Labs: tests that need servers or machines of their own are part of scripts/test-lab.sh, not of scripts/test.sh."""

from __future__ import annotations

import os

import pytest

LABS = {"guests": "kvm", "ceph": "rbd", "database": "postgres"}  # fixture → the lab that it needs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and count, what needs a lab that was not asked for."""
    wanted = os.environ.get("GRAINCOPY_LABS", "").split(",")
    for item in items:
        for lab in {LABS[name] for name in getattr(item, "fixturenames", ()) if name in LABS}:
            if lab not in wanted:
                item.add_marker(pytest.mark.skip(reason=f"runs in the lab: scripts/test-lab.sh {lab}"))
