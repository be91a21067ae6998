"""The volume laws through SSH and real block devices: files on LUNs, and LUNs as disks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import lab
import pytest
from datacenter import DataCentre

from graincopy.model.volume import Claim
from graincopy.testing.array_lab import ArrayFilesLab, ArrayLunLab
from graincopy.testing.array_ssh import HOST
from graincopy.testing.lab import VolumeLab
from graincopy.testing.volume_suite import VolumeSuite


class _FilesOnLuns(VolumeSuite):
    inner, size = "ext4", 64

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        folder = os.fspath(tmp_path_factory.mktemp("array"))
        with DataCentre(folder, (cls.inner, cls.size), (cls.inner, cls.size)) as made:
            name = f"flashcopy-{cls.inner}"
            files = ArrayFilesLab(made.array, made.datastores, made.driver, made.clock, name)
            with contextlib.closing(files):
                yield files


@lab.root_test
class TestFilesOnExt4Luns(_FilesOnLuns):
    pass


@lab.root_test
class TestFilesOnXfsLuns(_FilesOnLuns):
    inner, size = "xfs", 320


@lab.root_test
class TestLuns(VolumeSuite):
    """Identity: the device is the disk."""

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        with DataCentre(os.fspath(tmp_path_factory.mktemp("array"))) as made:
            made.array.make("first of the pool", 1 << 20)
            luns = ArrayLunLab(made.array, made.plane, HOST, made.driver)
            yield luns
            luns.reset()


@lab.root_test
def test_what_is_cached_of_a_raw_lun_between_prepare_and_the_instant_is_in_the_target(tmp_path: object) -> None:
    """The law prepares once more before its instant, which flushes; a backup does not."""
    with DataCentre(os.fspath(tmp_path)) as made:  # type: ignore[call-overload]
        made.array.make("raw", 1 << 20, HOST)
        path = made.plane.device(made.array.vdisks["raw"].number)
        driver = made.driver()
        claim = driver.resolve(path)
        assert isinstance(claim, Claim)
        prepared = driver.prepare([claim.volume], VolumeLab.tag(None))  # type: ignore[arg-type]
        lab.write_at(path, (100_000, b"cached" * 1000), sync=False)
        (target,) = driver.snapshot(prepared)
        lab.write_at(path, (100_000, b"later!" * 1000))
        seen = bytearray(6000)
        with driver.open(target, claim) as image:
            image.readinto(100_000, memoryview(seen))
            image.verify()
        driver.delete(target)
        assert bytes(seen) == b"cached" * 1000
