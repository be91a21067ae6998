"""``validate-volume qemu DIR``: the laws on disks in a user's own folder, of a QEMU that runs and of none."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import lab
import pytest

from graincopy.app.settings import read_settings
from graincopy.app.validating import labs_for
from graincopy.app.wiring import Wiring, wire
from graincopy.cli.main import run
from graincopy.core.errors import OutputUnfit, StorageUnreachable, UsageWrong
from graincopy.testing.laws_volume import volume_laws


@pytest.fixture
def wiring(tmp_path: Path) -> Wiring:
    config = tmp_path / "config.toml"
    config.write_text(f'[paths]\nstate = "{tmp_path}/state"\n[rbd]\nconf = "{tmp_path}/no-ceph.conf"\n')
    return wire(read_settings(str(config), None))


@pytest.mark.root
def test_where_files_are_cloned_machines_that_are_off_are_tried_too(wiring: Wiring, small_xfs: lab.ReflinkFs) -> None:
    names = tried(wiring, Path(small_xfs.path))
    assert names == ["qemu-qcow2", "qemu-raw", "qemu-qcow2-off"]


def test_elsewhere_those_that_run(wiring: Wiring, tmp_path: Path) -> None:
    assert tried(wiring, tmp_path)[:2] == ["qemu-qcow2", "qemu-raw"]


def tried(wiring: Wiring, parent: Path) -> list[str]:
    """Names of the labs, after one law in each; the folder is as it was."""
    folder = parent / "a folder"
    folder.mkdir()
    names = []
    for make in labs_for(wiring, "qemu", str(folder)):
        with closing(make()) as made:
            names.append(made.name)
            assert os.listdir(folder), "it works there"
            next(law for law in volume_laws() if law.name.startswith("08")).check(made)
        assert os.listdir(folder) == []
    return names


@pytest.mark.parametrize("driver", ["reflink", "btrfs", "locked", "copied", "lvm-thin", "rbd", "qemu"])
def test_every_driver_can_be_named(wiring: Wiring, tmp_path: Path, driver: str) -> None:
    assert labs_for(wiring, driver, str(tmp_path))
    # what is no directory is the name of a pool to Ceph, of which there is none here
    with pytest.raises(StorageUnreachable if driver == "rbd" else OutputUnfit):
        labs_for(wiring, driver, str(tmp_path / "nowhere"))


def test_an_unknown_one_is_refused_with_the_names(wiring: Wiring, tmp_path: Path) -> None:
    with pytest.raises(UsageWrong, match=r"btrfs, .*qemu, rbd, reflink"):
        labs_for(wiring, "floppy", str(tmp_path))


def test_a_driver_that_does_not_fit_is_said_by_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is on no thin volume: an error in one sentence, and nothing left behind."""
    assert run(["validate-volume", "lvm-thin", str(tmp_path)]) >= 10
    assert len(capsys.readouterr().err.strip().splitlines()) <= 3
    assert os.listdir(tmp_path) == []
