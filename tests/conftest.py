"""Labs: tests that need servers or machines of their own are part of scripts/test-lab.sh, not of scripts/test.sh."""

from __future__ import annotations

import os
import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background: children would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)

LABS = {"guests": "kvm", "own_guests": "kvm", "ceph": "rbd", "database": "postgres"}  # fixture → the lab that it needs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, and count, what needs a lab that was not asked for."""
    wanted = os.environ.get("GRAINCOPY_LABS", "").split(",")
    for item in items:
        for lab in {LABS[name] for name in getattr(item, "fixturenames", ()) if name in LABS}:
            if lab not in wanted:
                item.add_marker(pytest.mark.skip(reason=f"runs in the lab: scripts/test-lab.sh {lab}"))
