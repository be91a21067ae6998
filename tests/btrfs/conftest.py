"""Fixtures: one small Btrfs per session, a fresh subvolume per test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "e2e"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "crash"))
sys.path.insert(0, os.path.dirname(__file__))

import lab
import subvolumes

from graincopy.volumes.btrfs import BtrfsDriver
from graincopy.volumes.places import MemoryPlaces


@pytest.fixture(scope="session")
def btrfs_fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.ReflinkFs]:
    """A Btrfs of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab.ReflinkFs(tmp_path_factory.mktemp("btrfs-driver"), "btrfs", 4096 * lab.MIB) as made:
        yield made


@pytest.fixture
def subvolume(btrfs_fs: lab.ReflinkFs) -> str:
    """A fresh subvolume in a fresh folder."""
    return subvolumes.make_subvolume(btrfs_fs)


@pytest.fixture
def driver() -> BtrfsDriver:
    return BtrfsDriver(MemoryPlaces())
