"""Fixtures for directories on real storage: LUN images with a file system each, and a repository per test."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "e2e"))
sys.path.insert(0, os.path.dirname(__file__))

import lab
import story


@pytest.fixture(scope="module")
def storage() -> Iterator[story.Stage]:
    """An XFS with two LUN images: XFS and ext4."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = tempfile.mkdtemp(prefix="gc-trees-")  # pytest's own folders keep ordinary users out
    os.chmod(folder, 0o755)
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, folder)
        outer = held.enter_context(lab.ReflinkFs(folder, "xfs", 1536 * lab.MIB))
        luns = [
            held.enter_context(lab.Lun(outer.path, name, size * lab.MIB, inner, mount_at=os.path.join(folder, name)))
            for name, inner, size in (("ds0", "xfs", 512), ("ds1", "ext4", 128))
        ]
        yield story.Stage(folder, outer, luns)


@pytest.fixture
def stage(storage: story.Stage) -> Iterator[story.Stage]:
    """The storage, empty at the start; afterwards no loop device or mount is there that was not before."""
    storage.clear()
    traces = lab.Traces(storage.folder)
    yield storage
    assert traces.gone(), "a loop device or mount was left behind"


@pytest.fixture
def cli(tmp_path: os.PathLike[str]) -> story.Cli:
    """An empty repository."""
    return story.Cli(os.path.join(tmp_path, "graincopy")).init()


@pytest.fixture
def plain(tmp_path: os.PathLike[str]) -> Iterator[str]:
    """A folder on a file system that cannot clone files."""
    folder = tempfile.mkdtemp(prefix="graincopy-test-", dir="/dev/shm")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sockets() -> Iterator[str]:
    """A folder with a short path that everybody may write to."""
    folder = tempfile.mkdtemp(prefix="gc-pg-")
    os.chmod(folder, 0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
