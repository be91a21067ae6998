"""The volume laws for a driver with a hypervisor's bitmaps around it; every write goes through a real QEMU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import lab
import pytest
from datacenter import DataCentre
from tracked_lab import BlindReflink, TrackedArrayLab, TrackedReflinkLab

from graincopy.testing.array_plane import WallClock
from graincopy.testing.lab import VolumeLab
from graincopy.testing.volume_suite import VolumeSuite
from graincopy.volumes.places import MemoryPlaces


@lab.root_test
class TestTrackedOverClones(VolumeSuite):
    """Any number of targets at once, so that every law can be tried."""

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        places = MemoryPlaces()
        with contextlib.ExitStack() as stack:
            outer = stack.enter_context(lab.ReflinkFs(tmp_path_factory.mktemp("tracked"), "xfs", 4096 * lab.MIB))
            luns = [
                stack.enter_context(lab.Lun(outer.path, f"lun{n}", 320 * lab.MIB, "xfs", mount_at=f"{outer.path}.{n}"))
                for n in range(2)
            ]
            made = TrackedReflinkLab([one.path for one in luns], lambda: BlindReflink(places), WallClock())
            yield stack.enter_context(contextlib.closing(made))


@lab.root_test
class TestTrackedOnAnArray(VolumeSuite):
    """One target at a time: what it looks like, and that it goes, with its bitmaps."""

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        with contextlib.ExitStack() as stack:
            folder = os.fspath(tmp_path_factory.mktemp("array"))
            made = stack.enter_context(DataCentre(folder, ("ext4", 64), ("ext4", 64)))
            yield stack.enter_context(contextlib.closing(TrackedArrayLab(made, "ext4")))
