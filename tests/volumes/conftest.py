"""Fixtures over :mod:`lab`: one small file system per kind and session, a fresh folder on it per test."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.dirname(__file__))

import lab

_count = itertools.count()


def _session_fs(fs_type: str, factory: pytest.TempPathFactory) -> Iterator[lab.ReflinkFs]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab.ReflinkFs(factory.mktemp(fs_type), fs_type, 4096 * lab.MIB) as made:
        yield made


@pytest.fixture(scope="session")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.ReflinkFs]:
    """An XFS with reflink."""
    yield from _session_fs("xfs", tmp_path_factory)


@pytest.fixture(scope="session")
def btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.ReflinkFs]:
    """A Btrfs."""
    yield from _session_fs("btrfs", tmp_path_factory)


def _folder(fs: lab.ReflinkFs) -> str:
    path = os.path.join(fs.path, f"t{next(_count)}")
    os.mkdir(path)
    return path


@pytest.fixture
def xfs_dir(xfs: lab.ReflinkFs) -> str:
    """A fresh folder on the XFS."""
    return _folder(xfs)


@pytest.fixture
def btrfs_dir(btrfs: lab.ReflinkFs) -> str:
    """A fresh folder on the Btrfs."""
    return _folder(btrfs)


@pytest.fixture(params=["xfs", "btrfs"])
def reflink_dir(request: pytest.FixtureRequest) -> str:
    """A fresh folder on each file system that can reflink."""
    return _folder(request.getfixturevalue(request.param))


@pytest.fixture
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.Traces]:
    """Fails the test when it leaves a loop device or a mount behind."""
    found = lab.Traces(tmp_path_factory.getbasetemp())
    yield found
    assert found.gone(), "a loop device or mount was left behind"
