"""The volume laws on LVM's thin volumes: the disk is the volume, and disks are files on the file system on one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import thin

from graincopy.testing.file_lab import FileLab
from graincopy.testing.lab import VolumeLab
from graincopy.testing.lvm_lab import LvmLab, listing
from graincopy.testing.volume_suite import VolumeSuite
from graincopy.volumes.lvm_thin import LvmThinDriver

GUEST = True


class ThinFilesLab(FileLab):
    """Files on mounted thin volumes; logical volumes and devices count as traces, too."""

    def footprint(self) -> frozenset[str]:
        return super().footprint() | listing()


class TestVolumes(VolumeSuite):
    """The disk is the volume."""

    examples, steps = 1, 6

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, thin_storage: thin.ThinStorage) -> VolumeLab:
        return LvmLab(thin_storage, thin.SystemClock())


class TestFiles(VolumeSuite):
    """Disks are files on XFS and on ext4.

    How bytes of a file can change is tried by the laws on loop devices, where a snapshot takes no seconds: unless
    GRAINCOPY_LAB_FULL is set, only the ways in which this driver's part differs are tried here.
    """

    examples, steps = 1, 6
    here = (
        *("01-instant", "02-soundness-zero-range", "02-soundness-punch", "02-soundness-collapse"),
        *("02-soundness-reflink-within", "02-soundness-rename-over", "02-soundness-neighbour", "07-one-instant"),
        *("08-idempotence", "09-restart", "14-no-trace", "15-restore-missing", "15-restore-in-use"),
    )

    @pytest.fixture(autouse=True)
    def chosen(self, request: pytest.FixtureRequest) -> None:
        law = request.node.callspec.params.get("law") if hasattr(request.node, "callspec") else None
        if str(law) not in self.here and not os.environ.get("GRAINCOPY_LAB_FULL"):
            pytest.skip("tried on loop devices; with GRAINCOPY_LAB_FULL=1 here, too")

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, datastores: list[thin.Datastore]) -> Iterator[VolumeLab]:
        folders = [one.path for one in datastores]
        made = ThinFilesLab(folders, lambda: LvmThinDriver(thin.SystemClock()), thin.SystemClock(), name="lvm-files")
        with contextlib.closing(made) as lab:
            assert all(os.path.ismount(folder) for folder in folders)
            yield lab
