"""The volume laws over a real qemu-storage-daemon, disks raw and qcow2, switched on; and qcow2 switched off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import lab
import pytest

from graincopy.testing.qemu_lab import QemuLab
from graincopy.testing.volume_suite import VolumeSuite
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.reflink import ReflinkDriver


class TestRunningQcow2(VolumeSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuLab]:
        with contextlib.closing(QemuLab(str(tmp_path_factory.mktemp("qcow2")), "qcow2")) as made:
            yield made


class TestRunningRaw(VolumeSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuLab]:
        with contextlib.closing(QemuLab(str(tmp_path_factory.mktemp("raw")), "raw")) as made:
            yield made


@pytest.mark.root
class TestQcow2AtRest(VolumeSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, small_xfs: lab.ReflinkFs) -> Iterator[QemuLab]:
        below = (ReflinkDriver(MemoryPlaces()),)
        with contextlib.closing(QemuLab(small_xfs.path, "qcow2", below, running=False)) as made:
            yield made
