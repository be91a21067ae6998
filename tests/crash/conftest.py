"""Fixtures of the crash tests: two datastores on real storage per module, an empty repository per test."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "e2e"))
sys.path.insert(0, os.path.dirname(__file__))

import lab
import scene
import story


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[scene.Storage]:
    """An XFS with two LUN images, of which one carries ext4 and the other XFS."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = os.fspath(tmp_path_factory.mktemp("crash"))
    with contextlib.ExitStack() as held:
        outer = held.enter_context(lab.ReflinkFs(folder, "xfs", 1024 * lab.MIB))
        luns = [
            held.enter_context(
                lab.Lun(outer.path, f"lun{at}", size * lab.MIB, inner, mount_at=os.path.join(folder, f"ds{at}"))
            )
            for at, (inner, size) in enumerate((("ext4", 64), ("xfs", 320)))
        ]
        yield scene.Storage(folder, outer, luns)


@pytest.fixture
def cli(tmp_path: os.PathLike[str]) -> story.Cli:
    """An empty repository."""
    return story.Cli(os.path.join(tmp_path, "graincopy")).init()


@pytest.fixture
def stage(storage: scene.Storage) -> Iterator[scene.Storage]:
    """The storage with fresh disks and no targets; afterwards nothing is mounted, bound or frozen that was not."""
    storage.clear()
    traces = lab.Traces(storage.folder)
    yield storage
    storage.must_be_thawed()
    assert traces.gone(), f"left behind: {traces.now()}, before: {traces.before}"
