"""The btrfs driver keeps the laws: in place, nodatacow, compressed, in the top level, and for LUN images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import lab
import pytest
from instants import CLOCK
from subvolumes import make_subvolume

from graincopy.testing.btrfs_lab import BtrfsLab
from graincopy.testing.lab import VolumeLab
from graincopy.testing.volume_suite import VolumeSuite
from graincopy.volumes.btrfs import BtrfsDriver
from graincopy.volumes.places import MemoryPlaces


@contextlib.contextmanager
def btrfs_lab(*directories: str, **more: Any) -> Iterator[BtrfsLab]:
    places = MemoryPlaces()  # outlives driver objects, as the file does
    with contextlib.closing(BtrfsLab(directories, lambda: BtrfsDriver(places), CLOCK, **more)) as made:
        yield made


@lab.root_test
class TestFilesInSubvolume(VolumeSuite):
    examples, steps = 8, 12

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, btrfs_fs: lab.ReflinkFs) -> Iterator[VolumeLab]:
        with btrfs_lab(make_subvolume(btrfs_fs), also=["exact"]) as made:
            yield made


@lab.root_test
class TestNodatacowFilesInSubvolume(VolumeSuite):
    """What libvirt makes of a storage pool on Btrfs: files that are written in place."""

    examples, steps = 8, 12

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, btrfs_fs: lab.ReflinkFs) -> Iterator[VolumeLab]:
        path = make_subvolume(btrfs_fs)
        lab.run("chattr", "+C", path)
        with btrfs_lab(path, name="btrfs-nodatacow", also=["exact"]) as made:
            assert "C" in lab.run("lsattr", "-d", path).split()[0]
            yield made


@lab.root_test
class TestFilesInCompressedTopLevel(VolumeSuite):
    """The targets lie in the subvolume that they are of; nothing that is compressed is called clean."""

    examples, steps = 4, 10

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        folder = tmp_path_factory.mktemp("compressed")
        with (
            lab.ReflinkFs(folder, "btrfs", 512 * lab.MIB, options="compress-force=zstd") as outer,
            btrfs_lab(outer.path, name="btrfs-zstd-top-level") as made,
        ):
            yield made


@lab.root_test
class TestExt4LunsInSubvolume(VolumeSuite):
    """The volume is a LUN image; two of them share a snapshot, and the file systems inside are frozen around it."""

    examples, steps = 3, 10

    @pytest.fixture(scope="class")
    @classmethod
    def storage(cls, btrfs_fs: lab.ReflinkFs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeLab]:
        folder, home = tmp_path_factory.mktemp("luns"), make_subvolume(btrfs_fs)
        with contextlib.ExitStack() as stack:
            kinds: tuple[tuple[str, bool], ...] = (("ext4", False), ("xfs", True))
            luns = [
                stack.enter_context(
                    lab.Lun(home, f"lun{n}", (320 if inner == "xfs" else 64) * lab.MIB, inner, parted, folder / str(n))
                )
                for n, (inner, parted) in enumerate(kinds)
            ]
            yield stack.enter_context(btrfs_lab(*(lun.path for lun in luns), name="luns-on-btrfs", watched=[home]))
