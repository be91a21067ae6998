"""Tests of the lvm-thin driver: those in modules with ``GUEST = True`` run in the guest of scripts/lab-lvm.sh.

On the host they are collected as usual, and one boot runs all that were chosen; each then reports here what became of
it there. They are part of ``scripts/test-lab.sh`` (GRAINCOPY_LABS=lvm), not of ``scripts/test.sh``: an emulated
machine is slow.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import pytest

HERE = os.path.dirname(__file__)
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, *(os.path.join(ROOT, "tests", name) for name in ("volumes", "e2e", "flashcopy"))]

from guest import Guest, in_guest, wanted  # noqa: E402

_RESULTS = pytest.StashKey[str]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On the host the guest runs them."""
    if in_guest():
        return
    chosen = [item for item in items if isinstance(item, pytest.Function) and getattr(item.module, "GUEST", False)]
    if not wanted():
        for item in chosen:
            item.add_marker(pytest.mark.skip(reason="runs in the LVM lab: scripts/test-lab.sh lvm"))
        return
    guest = Guest(ROOT, [item.nodeid for item in chosen])
    config.add_cleanup(guest.clean_up)
    for item in chosen:
        item.setup = lambda: None  # type: ignore[method-assign]
        item.runtest = lambda nodeid=item.nodeid: guest.report(nodeid)  # type: ignore[method-assign,misc]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = os.environ.get("GRAINCOPY_GUEST_RESULTS", "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In the guest: what became of each phase goes to the results at once, so that a guest that dies has told much."""
    report = yield
    path = item.config.stash[_RESULTS]
    if path and (report.when == "call" or not report.passed):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([item.nodeid, report.outcome, text, round(call.duration, 1)]) + "\n")
    return report


# --- in the guest -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def thin_storage() -> Iterator[object]:
    """The guest's volume group, with one pool of small blocks."""
    import thin

    storage = thin.ThinStorage(thin.FIRST, thin.VG, thin.POOL)
    storage.create("neighbour", 4 * thin.MIB)  # the first volume in a pool gives it one more device
    yield storage
    storage.close()


@pytest.fixture(scope="session")
def datastores(thin_storage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[object]]:  # type: ignore[no-untyped-def]
    """An XFS and an ext4, each on a thin volume."""
    import thin

    folder = os.fspath(tmp_path_factory.mktemp("datastores"))
    made = [
        thin.Datastore(thin_storage, "ds-xfs", "xfs", folder, 384 * thin.MIB),
        thin.Datastore(thin_storage, "ds-ext4", "ext4", folder, 128 * thin.MIB),
    ]
    yield made
    for one in made:
        one.close()
