"""What goes wrong around LVM: full pools, taken slots, crashes in between, volumes that are not what they were."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import thin

from graincopy.core.errors import SnapshotFailed, SourceChanged, TargetLost, TargetNoSpace, VolumeUnsupported
from graincopy.model.change_map import Changed, Unknown
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim, Refusal
from graincopy.testing.looking import read_image
from graincopy.testing.lvm_lab import BLOCK, LvmLab, command, listing
from graincopy.volumes.lvm_thin import LvmThinDriver
from graincopy.volumes.lvm_thin_report import dm_name
from graincopy.volumes.lvm_thin_slot import metadata_snapshot
from graincopy.volumes.lvm_thin_tools import Lvm
from graincopy.volumes.lvm_thin_watch import PoolLimits

GUEST = True
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def lab(thin_storage: thin.ThinStorage) -> Iterator[LvmLab]:
    before = listing()
    made = LvmLab(thin_storage, thin.SystemClock())
    yield made
    made.reset()
    assert listing() == before


def pool_of(storage: thin.ThinStorage) -> str:
    return dm_name(storage.vg, storage.pool, "tpool")


def held(storage: thin.ThinStorage) -> bool:
    """Whether the pool's metadata snapshot is taken."""
    return Lvm().pool_status(storage.vg, storage.pool).held is not None


def pair(lab: LvmLab) -> tuple[Claim, Target, Target]:
    """A disk, and two targets of it with one changed block between them."""
    claim = lab.make(MIB)
    lab.write(claim, 0, os.urandom(512 * KIB))
    base = lab.snapshot([claim])[claim.volume]
    lab.write(claim, 100_000, b"changed")
    return claim, base, lab.snapshot([claim])[claim.volume]


# --- the metadata snapshot --------------------------------------------------------------------------


def test_a_slot_that_somebody_holds_is_left_alone(lab: LvmLab) -> None:
    _, base, now = pair(lab)
    command("dmsetup", "message", pool_of(lab.storage), "0", "reserve_metadata_snap")
    try:
        answer = lab.driver().changed(base, now)
        assert isinstance(answer, Unknown)
        assert "somebody else holds" in answer.reason
        lab.driver().delete(now)
        assert held(lab.storage)
    finally:
        command("dmsetup", "message", pool_of(lab.storage), "0", "release_metadata_snap")


def test_a_slot_left_by_a_crash_is_given_back_by_whoever_comes_next(lab: LvmLab) -> None:
    _, base, now = pair(lab)
    pool = next(one for one in Lvm().volumes() if one.name == lab.storage.pool)

    def crash() -> None:
        child = os.fork()
        if not child:
            with metadata_snapshot(Lvm(), pool):
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert held(lab.storage)

    crash()
    answer = lab.driver().changed(base, now)
    assert isinstance(answer, Changed)
    assert list(answer.extents) == [(BLOCK, 2 * BLOCK)]
    assert not held(lab.storage)
    crash()
    lab.driver().delete(now)
    assert not held(lab.storage)
    assert not any("holds-metadata" in line for line in listing())


def test_a_slot_in_use_by_a_living_process_is_not_taken_for_a_crash(lab: LvmLab) -> None:
    _, _, now = pair(lab)
    pool = next(one for one in Lvm().volumes() if one.name == lab.storage.pool)
    with metadata_snapshot(Lvm(), pool):
        lab.driver().delete(now)
        assert held(lab.storage)
    assert not held(lab.storage)


# --- full pools -------------------------------------------------------------------------------------


def test_a_pool_too_full_before_the_run(lab: LvmLab) -> None:
    claim, before = lab.make(MIB), listing()
    for limits in (PoolLimits(data=0.0), PoolLimits(metadata=0.01)):
        with pytest.raises(TargetNoSpace, match="in use"):
            LvmThinDriver(thin.SystemClock(), limits=limits).create_targets([claim.volume], lab.tag())
    assert listing() == before


class Jumping(thin.SystemClock):
    """Every look at the clock is a minute later."""

    def __init__(self) -> None:
        self._at = 0.0

    def monotonic(self) -> float:
        self._at += 60.0
        return self._at


def test_a_pool_that_fills_up_during_the_run(lab: LvmLab) -> None:
    claim, _, now = pair(lab)
    used = Lvm().pool_status(lab.storage.vg, lab.storage.pool).data_used
    driver = LvmThinDriver(Jumping(), limits=PoolLimits(data=used + 0.01))
    with driver.open(now, claim) as image:
        image.readinto(0, memoryview(bytearray(4096)))
        big = lab.make(64 * MIB)
        lab.write(big, 0, os.urandom(32 * MIB))
        os.sync()
        with pytest.raises(TargetNoSpace, match="data space"):
            image.readinto(4096, memoryview(bytearray(4096)))


def test_a_restore_that_would_fill_the_pool(lab: LvmLab) -> None:
    claim, _, _ = pair(lab)
    used = Lvm().pool_status(lab.storage.vg, lab.storage.pool).data_used
    driver = LvmThinDriver(Jumping(), limits=PoolLimits(data=used + 0.01))
    with driver.open_for_restore(claim) as sink:
        free = sink.free_bytes()
        assert free is not None and 0 < free <= 11 * MIB  # a hundredth of the pool
        sink.write(0, memoryview(b"fits"))
        big = lab.make(64 * MIB)
        lab.write(big, 0, os.urandom(32 * MIB))
        os.sync()
        with pytest.raises(TargetNoSpace):
            sink.write(4096, memoryview(b"too much"))


# --- volumes that are not what they were ------------------------------------------------------------


def test_what_is_removed_under_us(lab: LvmLab) -> None:
    claim, base, now = pair(lab)
    lab.storage.remove(base.id)
    assert isinstance(lab.driver().changed(base, now), Unknown)
    lab.storage.remove(now.id)
    with pytest.raises(TargetLost), lab.driver().open(now, claim):
        pass
    with pytest.raises(TargetLost):
        lab.driver().changed(base, now)


def test_a_volume_replaced_between_prepare_and_snapshot(lab: LvmLab) -> None:
    claim = lab.make(MIB)
    group = lab.driver().prepare([claim.volume], lab.tag())
    lab.taken.extend(group.targets)
    lab.recreate_volume(claim)
    with pytest.raises((SourceChanged, SnapshotFailed)):
        lab.driver().settle(lab.driver().snapshot(group))


def test_a_volume_that_is_gone(lab: LvmLab) -> None:
    claim = lab.make(MIB)
    lab.storage.remove("disk-0")
    with pytest.raises(SnapshotFailed, match="no such logical volume"):
        lab.driver().describe(claim.volume)
    with pytest.raises(VolumeUnsupported, match="lvcreate"), lab.driver().open_for_restore(claim):
        pass
    assert not os.path.lexists(claim.path)  # nothing was made in /dev


def test_what_has_no_block_reads_from_an_external_origin(lab: LvmLab) -> None:
    """There a hole is no zero: all of the volume counts as written."""
    vg, data = lab.storage.vg, os.urandom(MIB)
    command("lvcreate", "-q", "-y", "-L", "1M", "-n", "thick", vg)
    try:
        with open(lab.storage.device_of("thick"), "wb") as file:
            file.write(data)
        pool = f"{vg}/{lab.storage.pool}"
        command(
            "lvconvert", "-q", "-y", "--type", "thin", "--thinpool", pool, "--originname", "thick-ro", f"{vg}/thick"
        )
        claim = lab.driver().resolve(lab.storage.device_of("thick"))
        assert isinstance(claim, Claim)
        lab.write(claim, 0, b"one block")
        target = lab.snapshot([claim])[claim.volume]
        with lab.driver().open(target, claim) as image:
            assert read_image(image) == b"one block" + data[9:]
            assert image.placement().allocated().total == MIB
        lab.reset_targets()
    finally:
        lab.storage.remove("thick", "thick-ro")


# --- what is refused --------------------------------------------------------------------------------


def test_classic_volumes_and_the_pool_are_refused_with_the_reason(lab: LvmLab) -> None:
    vg = lab.storage.vg
    command("lvcreate", "-q", "-y", "-L", "8M", "-n", "thick", vg)
    command("lvcreate", "-q", "-y", "-s", "-L", "4M", "-n", "thick-snap", f"{vg}/thick")
    try:
        for name, reason in (("thick", "classic (thick) logical volume"), ("thick-snap", "classic (thick) snapshot")):
            answer = lab.driver().resolve(lab.storage.device_of(name))
            assert isinstance(answer, Refusal)
            assert reason in answer.reason
            assert "lvcreate --thin" in answer.remedy
    finally:
        lab.storage.remove("thick-snap", "thick")
    assert isinstance(lab.driver().resolve("/dev/vda"), Refusal)


def test_a_target_is_no_source_and_nobody_sees_it(lab: LvmLab, datastores: list[thin.Datastore]) -> None:
    """While T is read, every link by UUID still leads to S."""
    path = os.path.join(datastores[0].path, "disk.raw")
    with open(path, "wb") as file:
        file.write(os.urandom(MIB))
    try:
        claim = lab.driver().resolve(path)
        assert isinstance(claim, Claim)
        target = lab.snapshot([claim])[claim.volume]
        with lab.driver().open(target, claim) as image:
            command("udevadm", "settle")
            read_image(image)
            name = dm_name(lab.storage.vg, target.id)
            node = f"/dev/dm-{command('dmsetup', 'info', '-c', '--noheadings', '-o', 'minor', name).strip()}"
            links = {
                os.path.realpath(os.path.join("/dev/disk/by-uuid", one)) for one in os.listdir("/dev/disk/by-uuid")
            }
            assert node not in links
            assert os.path.realpath(datastores[0].device) in links
            answer = lab.driver().resolve(node)
            assert isinstance(answer, Refusal)
            assert "target that graincopy made" in answer.reason
        assert name not in command("dmsetup", "ls")
        lab.reset_targets()
    finally:
        os.unlink(path)
