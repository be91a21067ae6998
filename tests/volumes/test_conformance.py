"""Every volume driver keeps the laws, on storage that is really there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lab
import pytest
from instants import CLOCK

from graincopy.testing.file_lab import FileLab
from graincopy.testing.lab import VolumeLab
from graincopy.testing.memory_lab import MemoryFilesLab, MemoryLab
from graincopy.testing.volume_suite import VolumeSuite
from graincopy.volumes.copied import CopiedDriver
from graincopy.volumes.locked import LockedDriver
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.reflink import ReflinkDriver


class TestMemory(VolumeSuite):
    examples, steps = 60, 15

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls) -> VolumeLab:
        return MemoryLab()


class TestMemoryFiles(VolumeSuite):
    examples, steps = 100, 20

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls) -> VolumeLab:
        return MemoryFilesLab()


@contextlib.contextmanager
def reflink_lab(*directories: str, **more: Any) -> Iterator[FileLab]:
    places = MemoryPlaces()  # outlives driver objects, as the file does
    with contextlib.closing(FileLab(directories, lambda: ReflinkDriver(places), CLOCK, **more)) as made:
        yield made


@lab.root_test
class TestReflinkFilesOnXfs(VolumeSuite):
    """Kind (b): the disk file is the volume."""

    examples, steps = 12, 12

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, xfs: lab.ReflinkFs) -> Iterator[VolumeLab]:
        with reflink_lab(xfs.path, name="reflink-xfs", also=["exact"]) as made:
            yield made


@lab.root_test
class TestReflinkFilesOnBtrfs(VolumeSuite):
    examples, steps = 12, 12

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, btrfs: lab.ReflinkFs) -> Iterator[VolumeLab]:
        with reflink_lab(btrfs.path, name="reflink-btrfs", also=["exact"]) as made:
            yield made


@lab.root_test
class TestReflinkFilesOnCompressedBtrfs(VolumeSuite):
    examples, steps = 6, 12

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        folder = tmp_path_factory.mktemp("compressed")
        with (
            lab.ReflinkFs(folder, "btrfs", 512 * lab.MIB, options="compress-force=zstd") as outer,
            reflink_lab(outer.path, name="reflink-btrfs-zstd") as made,
        ):
            yield made


class LunSuite(VolumeSuite):
    """Kind (a): the volume is a LUN image; the disks lie on the file system inside, which is frozen for the instant."""

    examples, steps = 3, 10
    outer, inner, partitioned = "xfs", "ext4", False

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        fs = request.getfixturevalue(cls.outer)
        folder = tmp_path_factory.mktemp("luns")
        size = (320 if cls.inner == "xfs" else 64) * lab.MIB
        with contextlib.ExitStack() as stack:
            luns = [
                stack.enter_context(
                    lab.Lun(
                        fs.path,
                        f"{folder.name}-{number}",
                        size,
                        cls.inner,
                        cls.partitioned,
                        folder / str(number),
                    )
                )
                for number in range(2)
            ]
            name = f"{cls.inner}-lun-on-{cls.outer}"
            # a small ext4 has blocks of 1 KiB: four of them share what the LUN's file system calls changed
            also = ["exact"] if cls.inner == "xfs" else []
            yield stack.enter_context(reflink_lab(*(lun.path for lun in luns), name=name, also=also, watched=[fs.path]))


@lab.root_test
class TestExt4LunOnXfs(LunSuite):
    pass


@lab.root_test
class TestPartitionedXfsLunOnXfs(LunSuite):
    inner, partitioned = "xfs", True


@lab.root_test
class TestPartitionedExt4LunOnBtrfs(LunSuite):
    outer, partitioned = "btrfs", True


@lab.root_test
class TestXfsLunOnBtrfs(LunSuite):
    outer, inner = "btrfs", "xfs"


class TestCopied(VolumeSuite):
    """T is a copy in memory; only small files, one by one."""

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        driver = CopiedDriver()  # its copies live in the object: a fresh one would know nothing
        folder = str(tmp_path_factory.mktemp("copied"))
        lacking = {"one_instant": "files are copied one after the other"}
        with contextlib.closing(FileLab([folder], lambda: driver, CLOCK, name="copied", lacking=lacking)) as made:
            yield made


class TestLocked(VolumeSuite):
    """No snapshots: what is left of the laws, and as an ordinary user too."""

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        driver = LockedDriver()  # its leases live in the object: a fresh one would know nothing
        folder = str(tmp_path_factory.mktemp("locked"))
        lacking = {"one_instant": "there are no snapshots"}
        with contextlib.closing(FileLab([folder], lambda: driver, CLOCK, name="locked", lacking=lacking)) as made:
            yield made
