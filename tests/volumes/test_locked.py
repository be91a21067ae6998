"""The locked driver: the file itself is T, and whoever writes meanwhile is held off or noticed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from instants import image_of, run_id, tag

from graincopy.core.errors import SnapshotFailed, SourceInUse, SourceWritten, TargetLost, Unsupported
from graincopy.core.placement import State
from graincopy.model.snapshot import Absent, Deleted
from graincopy.model.volume import Claim, Refusal
from graincopy.volumes.locked import LockedDriver

CONTENT = os.urandom(100_000)


@pytest.fixture
def driver() -> LockedDriver:
    return LockedDriver()


@pytest.fixture
def disk(tmp_path: Path) -> str:
    path = os.path.join(str(tmp_path), os.fsdecode(b"a disk\n\xff"))
    with open(path, "wb") as file:
        file.write(CONTENT)
    return path


def claim_of(driver: LockedDriver, path: str) -> Claim:
    claim = driver.resolve(path)
    assert isinstance(claim, Claim), claim
    return claim


def open_for_writing(path: str) -> None:
    """As another process would; fails with EAGAIN at once where it would have to wait."""
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_reads_the_file_and_keeps_writers_off_until_deleted(driver: LockedDriver, disk: str) -> None:
    claim = claim_of(driver, disk)
    assert claim.identity and claim.volume == f"locked:{disk}"
    (target,) = driver.create_targets([claim.volume], tag())
    content, placement = image_of(driver, target, claim)
    assert content == CONTENT
    assert placement.allocated().total == len(CONTENT)
    assert driver.delete(target) == Deleted()
    open_for_writing(disk)
    assert driver.delete(target) == Absent()
    with pytest.raises(TargetLost), driver.open(target, claim):
        pass


def test_declares_no_powers(driver: LockedDriver, disk: str) -> None:
    powers = driver.capabilities()
    assert not (powers.snapshots or powers.change_map or powers.checkpoints or powers.group_instant or powers.exact)
    (target,) = driver.create_targets([claim_of(driver, disk).volume], tag())
    with pytest.raises(Unsupported):
        driver.changed(target, target)
    with pytest.raises(Unsupported):
        driver.retag(target, tag())
    assert driver.list_targets([target.volume]) == ()
    driver.delete(target)


def test_writer_that_waits_is_noticed_after_the_last_read(driver: LockedDriver, disk: str) -> None:
    claim = claim_of(driver, disk)
    (target,) = driver.create_targets([claim.volume], tag())
    with driver.open(target, claim) as image:
        image.readinto(0, memoryview(bytearray(10)))
        image.verify()
        with pytest.raises(BlockingIOError):
            open_for_writing(disk)  # the kernel holds it off, and tells us that it waits
        with pytest.raises(SourceWritten):
            image.verify()
    driver.delete(target)


@pytest.mark.parametrize("change", ["touch", "truncate", "replace"])
def test_changes_that_need_no_opening_are_noticed(driver: LockedDriver, disk: str, change: str) -> None:
    claim = claim_of(driver, disk)
    (target,) = driver.create_targets([claim.volume], tag())
    with driver.open(target, claim) as image:
        if change == "touch":
            os.utime(disk, ns=(1, 1))
        elif change == "replace":
            with open(disk + "2", "wb"):
                os.replace(disk + "2", disk)
        else:
            shrink = "import os, sys; os.truncate(sys.argv[1], 5)"  # waits for the lease to be given back
            other = subprocess.Popen([sys.executable, "-c", shrink, disk])
            while image_is_right(image):
                pass
        with pytest.raises(SourceWritten):
            image.verify()
    driver.delete(target)
    if change == "truncate":
        assert other.wait(20) == 0
        assert os.stat(disk).st_size == 5


def image_is_right(image: object) -> bool:
    try:
        image.verify()  # type: ignore[attr-defined]
    except SourceWritten:
        return False
    return True


def test_refuses_what_is_open_for_writing_and_holds_nothing_then(
    driver: LockedDriver, disk: str, tmp_path: Path
) -> None:
    other = os.path.join(str(tmp_path), "other")
    with open(other, "wb") as writer:
        writer.write(b"x")
        volumes = [claim_of(driver, path).volume for path in (disk, other)]
        with pytest.raises(SourceInUse) as refused:
            driver.create_targets(volumes, tag())
    assert refused.value.facts["path"] == other
    assert str(os.getpid()) in str(refused.value)
    open_for_writing(disk)
    for target in driver.create_targets(volumes, tag()):
        driver.delete(target)


def test_repeated_prepare_keeps_the_lease_and_runs_do_not_share_targets(driver: LockedDriver, disk: str) -> None:
    volume = claim_of(driver, disk).volume
    one = driver.prepare([volume], tag()).targets
    assert driver.prepare([volume], tag()).targets == one
    (other,) = driver.prepare([volume], tag(run_id(2))).targets
    assert other.id != one[0].id
    driver.delete(one[0])
    with pytest.raises(OSError) as held:
        open_for_writing(disk)
    assert held.value.errno == errno.EAGAIN
    driver.delete(other)


def test_sparse_files_show_their_holes(driver: LockedDriver, tmp_path: Path) -> None:
    path = os.path.join(str(tmp_path), "sparse")
    with open(path, "wb") as file:
        file.truncate(10 << 20)
        file.seek(5 << 20)
        file.write(b"x" * 4096)
    claim = claim_of(driver, path)
    (target,) = driver.create_targets([claim.volume], tag())
    _, placement = image_of(driver, target, claim)
    assert placement.allocated().total == 4096
    assert placement.in_state(State.HOLE).total == (10 << 20) - 4096
    assert (placement.volume == placement.starts).all()
    driver.delete(target)


def test_refuses_what_is_no_file(driver: LockedDriver, tmp_path: Path) -> None:
    pipe = os.path.join(str(tmp_path), "pipe")
    os.mkfifo(pipe)
    for path in (str(tmp_path), pipe, os.path.join(str(tmp_path), "none"), "/dev/null"):
        refusal = driver.resolve(path)
        assert isinstance(refusal, Refusal) and refusal.reason
    with pytest.raises(SnapshotFailed):
        driver.prepare([claim_of(driver, __file__).volume.replace("test_", "no_")], tag())  # type: ignore[list-item]
