"""The btrfs driver on a real Btrfs: what is claimed, one snapshot for many files, what changed, and what is left."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator

import lab
import pytest
from instants import blocks, claim_of, dirty_between, disk, everything_below, image_of, run_id, tag, unequal
from msgspec.structs import replace
from subvolumes import SIZE, create, listed, make_subvolume, take

from graincopy.core.errors import SnapshotFailed, SourceChanged, TargetLost, TargetNoSpace, VolumeUnsupported
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId
from graincopy.core.placement import State
from graincopy.model.change_map import Unknown
from graincopy.model.snapshot import Absent, Deleted, Role
from graincopy.model.volume import Refusal
from graincopy.volumes import btrfs_ioctl, btrfs_store
from graincopy.volumes.btrfs import BtrfsDriver
from graincopy.volumes.places import MemoryPlaces

# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["/", "/srv/vms", "/a b\n\udcff"])
@pytest.mark.parametrize("inner", ["disk.raw", "deep/er/disk\udcfe.raw"])
def test_a_volume_is_named_by_subvolume_and_file(root: str, inner: str) -> None:
    name = btrfs_store.volume_id(root, inner)
    assert btrfs_store.split(name) == (root, inner)
    assert btrfs_store.source_path(name) == os.path.join(root, inner)


def test_tags_of_one_subvolume_and_run_share_a_snapshot_and_no_others_do() -> None:
    names = [("/a", "x", 1), ("/a", "y", 1), ("/a", "x", 2), ("/b", "x", 1)]
    paths = [
        btrfs_store.target_path("/home", btrfs_store.volume_id(root, file), tag(run_id(n)).run)
        for root, file, n in names
    ]
    assert len(set(paths)) == 4
    first, second, *others = map(btrfs_store.snapshot_path, paths)
    assert first == second
    assert len({first, *others}) == 3


# --- what is claimed ------------------------------------------------------------------------------


@lab.root_test
def test_a_file_is_a_volume_of_its_subvolume(driver: BtrfsDriver, btrfs_fs: lab.ReflinkFs, subvolume: str) -> None:
    os.makedirs(f"{subvolume}/deep/er")
    path = disk(f"{subvolume}/deep/er")
    claim = claim_of(driver, path)
    assert claim.volume == f"btrfs:{subvolume}//deep/er/disk.raw"
    assert claim.identity
    assert subvolume in claim.why
    source = driver.describe(claim.volume)
    assert (source.size, source.extents, source.home) == (SIZE, 0, os.path.dirname(subvolume))
    assert source.allocated >= SIZE
    in_top_level = claim_of(driver, disk(os.path.dirname(subvolume)))
    assert in_top_level.volume.startswith(f"btrfs:{btrfs_fs.path}//")
    assert driver.describe(in_top_level.volume).home == btrfs_fs.path  # what lies above is another file system


@lab.root_test
def test_a_file_of_a_nested_subvolume_belongs_to_that_one(driver: BtrfsDriver, subvolume: str) -> None:
    inner = create(f"{subvolume}/nested")
    outside, inside = claim_of(driver, disk(subvolume)), claim_of(driver, disk(inner))
    assert inside.volume == f"btrfs:{inner}//disk.raw"
    targets = take(driver, 1, outside, inside)
    assert len({btrfs_store.snapshot_path(target.id) for target in targets}) == 2
    for target, claim in zip(targets, (outside, inside), strict=True):
        with open(claim.path, "rb") as file:
            assert image_of(driver, target, claim)[0] == file.read()
        driver.delete(target)


@lab.root_test
def test_what_cannot_be_snapshotted_is_refused_with_the_reason(
    driver: BtrfsDriver, subvolume: str, tmp_path: object
) -> None:
    here = os.fspath(str(tmp_path))
    elsewhere = driver.resolve(disk("/dev/shm" if _on_btrfs(here) else here, f"x{os.getpid()}.raw"))
    assert isinstance(elsewhere, Refusal)
    assert "not Btrfs" in elsewhere.reason
    os.unlink(elsewhere.path)
    missing = driver.resolve(f"{subvolume}/missing")
    assert isinstance(missing, Refusal)
    assert missing.missing
    os.mkdir(f"{subvolume}/part")
    os.mkdir(f"{here}/point")
    disk(f"{subvolume}/part")
    lab.run("mount", "--bind", f"{subvolume}/part", f"{here}/point")
    try:
        part = driver.resolve(f"{here}/point/disk.raw")
    finally:
        lab.unmount(f"{here}/point")
    assert isinstance(part, Refusal)
    assert "only a part of its Btrfs subvolume" in part.reason


@lab.root_test
def test_disk_files_can_be_left_to_others(subvolume: str) -> None:
    answer = BtrfsDriver(MemoryPlaces(), in_place=False).resolve(disk(subvolume))
    assert isinstance(answer, Refusal)
    assert "no LUN image" in answer.reason


def _on_btrfs(path: str) -> bool:
    return "btrfs" in lab.run("stat", "--file-system", "--format=%T", path)


@lab.root_test
def test_a_subvolume_that_is_mounted_by_itself_keeps_its_targets_inside(
    driver: BtrfsDriver, btrfs_fs: lab.ReflinkFs, subvolume: str, tmp_path: object
) -> None:
    point = f"{tmp_path}/point"
    os.mkdir(point)
    inside = os.path.relpath(subvolume, btrfs_fs.path)
    lab.run("mount", "-o", f"subvol={inside}", btrfs_fs.device, point)
    try:
        claim = claim_of(driver, disk(point))
        assert claim.volume == f"btrfs:{point}//disk.raw"
        (base,) = take(driver, 1, claim)
        lab.write_at(claim.path, (0, b"new"))
        (now,) = take(driver, 2, claim)
        assert os.path.dirname(now.id) == f"{point}/{btrfs_store.FOLDER}"
        assert dirty_between(driver, base, now, claim)[0] == blocks(0)
        for target in (base, now):
            driver.delete(target)
        assert os.listdir(point) == ["disk.raw"]
    finally:
        lab.unmount(point)


@lab.root_test
def test_btrfs_over_two_devices(driver: BtrfsDriver, tmp_path: object) -> None:
    images = [f"{tmp_path}/{n}.img" for n in range(2)]
    for image in images:
        lab.sparse(image, 256 * lab.MIB)
    devices = [lab.bind(image) for image in images]
    point = f"{tmp_path}/point"
    os.mkdir(point)
    try:
        lab.make_fs("btrfs", devices[0], "-d", "raid0", devices[1])
        lab.run("btrfs", "device", "scan", *devices)
        lab.run("mount", devices[0], point)
        claim = claim_of(driver, disk(create(f"{point}/vms"), size=16 * lab.MIB))
        (base,) = take(driver, 1, claim)
        lab.write_at(claim.path, (5 * 4096, b"n"))
        (now,) = take(driver, 2, claim)
        assert dirty_between(driver, base, now, claim)[0] == blocks(5)
        for target in (base, now):
            driver.delete(target)
    finally:
        lab.unmount(point)
        for device in devices:
            lab.unbind(device)


# --- one snapshot for all files of a subvolume ----------------------------------------------------


@lab.root_test
def test_three_files_share_a_snapshot_that_goes_with_the_last_of_them(
    driver: BtrfsDriver, btrfs_fs: lab.ReflinkFs, subvolume: str
) -> None:
    claims = [claim_of(driver, disk(subvolume, f"disk{n}.raw")) for n in range(3)]
    before, entries = listed(btrfs_fs.path), everything_below(os.path.dirname(subvolume))
    targets = take(driver, 1, *claims)
    (snapshot,) = set(listed(btrfs_fs.path)) - set(before)
    assert os.path.basename(snapshot).endswith(f"{run_id(1)}.snapshot")
    for claim in claims:
        lab.write_at(claim.path, (0, b"later"))
    for target, claim in zip(targets, claims, strict=True):
        with open(claim.path, "rb") as file:
            assert image_of(driver, target, claim)[0][5:] == file.read()[5:]
        assert image_of(driver, target, claim)[0][:5] != b"later"
    assert [driver.delete(target) for target in targets[:2]] == [Deleted(), Deleted()]
    assert snapshot in listed(btrfs_fs.path)
    assert image_of(driver, targets[2], claims[2])[0]
    assert driver.delete(targets[2]) == Deleted()
    assert driver.delete(targets[2]) == Absent()
    assert listed(btrfs_fs.path) == before
    assert everything_below(os.path.dirname(subvolume)) == entries


@lab.root_test
def test_writes_past_the_page_cache_are_seen_in_their_order(driver: BtrfsDriver, subvolume: str) -> None:
    """A writer counts up in one file and then in the other; a snapshot never shows the second ahead of the first."""
    claims = [claim_of(driver, disk(subvolume, f"disk{n}.raw", 4096)) for n in range(2)]
    stop = threading.Event()

    def count() -> None:
        fds = [os.open(claim.path, os.O_WRONLY | os.O_DIRECT) for claim in claims]
        with mmap.mmap(-1, 4096) as block:
            number = 0
            while not stop.is_set():
                number += 1
                block[:8] = number.to_bytes(8, "big")
                for fd in fds:
                    os.pwritev(fd, [block], 0)
        for fd in fds:
            os.close(fd)

    writer = threading.Thread(target=count)
    writer.start()
    try:
        shots = [take(driver, number, *claims) for number in range(2, 12)]
    finally:
        stop.set()
        writer.join()
    for targets in shots[1:]:
        seen = [image_of(driver, target, claim)[0][:8] for target, claim in zip(targets, claims, strict=True)]
        ahead, behind = (int.from_bytes(one, "big") for one in seen)
        assert behind <= ahead <= behind + 1
    for target in (target for targets in shots for target in targets):
        driver.delete(target)


# --- what changed ---------------------------------------------------------------------------------


@lab.root_test
@pytest.mark.parametrize("flag", ["+C", "-C"])
def test_repeated_writes_to_the_same_block_are_dirty_each_time(driver: BtrfsDriver, subvolume: str, flag: str) -> None:
    """nodatacow files are written in place; what a snapshot shares is copied once all the same."""
    lab.run("chattr", flag, subvolume)
    claim = claim_of(driver, disk(subvolume))
    targets = take(driver, 1, claim)
    for number in range(2, 6):
        for _ in range(2):  # the second write is in place
            lab.write_at(claim.path, (7 * 4096, os.urandom(100)))
        targets += take(driver, number, claim)
        dirty, before, after = dirty_between(driver, targets[-2], targets[-1], claim)
        assert dirty == blocks(7) == unequal(before, after)
    whole, before, after = dirty_between(driver, targets[0], targets[-1], claim)
    assert whole == blocks(7) == unequal(before, after)
    driver.delete(targets[1])
    assert dirty_between(driver, targets[0], targets[-1], claim)[0] == blocks(7)
    driver.delete(targets[0])
    assert isinstance(driver.changed(targets[0], targets[-1]), Unknown)  # in place, and nobody could tell
    for target in targets[2:]:
        driver.delete(target)


def _clone_from_neighbour(path: str) -> None:
    other = disk(os.path.dirname(path), "other.raw")
    lab.run("xfs_io", "-c", f"reflink {other} 0 65536 65536", path)


CHANGES: dict[str, tuple[Callable[[str], object], Extents]] = {
    "nothing": (lambda path: None, Extents.empty()),
    "range cloned from a neighbour": (_clone_from_neighbour, blocks(*range(16, 32))),
    "hole": (lambda path: lab.run("fallocate", "-p", "-o", "8192", "-l", "8192", path), blocks(2, 3)),
    "cut and grown again": (
        lambda path: (os.truncate(path, 10 * 4096 + 17), os.truncate(path, SIZE)),
        blocks(*range(10, 64)),
    ),
    "dirty in the page cache": (lambda path: lab.write_at(path, (9 * 4096, b"n"), sync=False), blocks(9)),
}


@lab.root_test
@pytest.mark.parametrize("flag", ["+C", "-C"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_told_to_the_block(driver: BtrfsDriver, subvolume: str, change: str, flag: str) -> None:
    lab.run("chattr", flag, subvolume)
    act, expected = CHANGES[change]
    claim = claim_of(driver, disk(subvolume))
    (base,) = take(driver, 1, claim)
    act(claim.path)
    (now,) = take(driver, 2, claim)
    dirty, before, after = dirty_between(driver, base, now, claim)
    assert dirty.covers(unequal(before, after))
    assert dirty == expected
    for target in (base, now):
        driver.delete(target)


@lab.root_test
def test_compressed_and_inline_extents_are_always_compared(driver: BtrfsDriver, subvolume: str) -> None:
    packed = os.path.join(subvolume, "packed.raw")
    lab.write_at(packed, (0, b""))
    lab.run("btrfs", "property", "set", packed, "compression", "zstd")
    lab.write_at(packed, (0, b"compressible " * 40000))
    small = os.path.join(subvolume, "small.raw")
    lab.write_at(small, (0, b"tiny"))
    claims = [claim_of(driver, path) for path in (packed, small)]
    bases, nows = take(driver, 1, *claims), take(driver, 2, *claims)
    for base, now, claim in zip(bases, nows, claims, strict=True):
        dirty, _, after = dirty_between(driver, base, now, claim)
        assert dirty == Extents.whole(len(after))
        assert image_of(driver, now, claim)[1].in_state(State.OPAQUE)
    for target in (*bases, *nows):
        driver.delete(target)


@lab.root_test
def test_balance_between_two_targets_hides_nothing(driver: BtrfsDriver, tmp_path: object) -> None:
    """All blocks move, in both snapshots alike: what is said is still right."""
    with lab.ReflinkFs(tmp_path, "btrfs", 1024 * lab.MIB, "balanced") as fs:
        claim = claim_of(driver, disk(create(f"{fs.path}/vms"), size=4 * lab.MIB))
        (base,) = take(driver, 1, claim)
        lab.write_at(claim.path, (5 * 4096, b"n"))
        lab.run("btrfs", "balance", "start", "-d", fs.path)
        lab.write_at(claim.path, (9 * 4096, b"n"))
        (now,) = take(driver, 2, claim)
        dirty, before, after = dirty_between(driver, base, now, claim)
        assert dirty == blocks(5, 9) == unequal(before, after)
        lab.run("btrfs", "balance", "start", "-d", fs.path)
        assert dirty_between(driver, base, now, claim)[0] == blocks(5, 9)


@lab.root_test
def test_another_file_or_subvolume_under_the_same_name_is_unknown(driver: BtrfsDriver, subvolume: str) -> None:
    claim = claim_of(driver, disk(subvolume))
    (base,) = take(driver, 1, claim)
    lab.run("cp", "--reflink=always", claim.path, f"{claim.path}.new")
    os.rename(f"{claim.path}.new", claim.path)
    (replaced,) = take(driver, 2, claim)
    assert driver.changed(base, replaced) == Unknown("the volume was recreated since the checkpoint")
    lab.run("btrfs", "subvolume", "snapshot", subvolume, f"{subvolume}.copy")
    os.rename(subvolume, f"{subvolume}.old")
    os.rename(f"{subvolume}.copy", subvolume)  # how people roll back
    assert driver.describe(claim.volume).incarnation != replaced.incarnation
    (rolled_back,) = take(driver, 3, claim)
    assert driver.changed(replaced, rolled_back) == Unknown("the volume was recreated since the checkpoint")
    for target in (base, replaced, rolled_back):
        assert driver.delete(target) == Deleted()


@lab.root_test
def test_targets_of_a_renamed_or_deleted_subvolume_are_found_and_go(
    driver: BtrfsDriver, btrfs_fs: lab.ReflinkFs
) -> None:
    before = listed(btrfs_fs.path)
    for fate in ("renamed", "deleted"):
        path = make_subvolume(btrfs_fs)
        claim = claim_of(driver, disk(path))
        (target,) = take(driver, 1, claim)
        if fate == "renamed":
            os.rename(path, f"{path}.renamed")
            assert claim_of(driver, f"{path}.renamed/disk.raw").volume != claim.volume
            lab.run("btrfs", "subvolume", "delete", f"{path}.renamed")
        else:
            lab.run("btrfs", "subvolume", "delete", path)
        with pytest.raises(SnapshotFailed):
            driver.describe(claim.volume)
        assert [one.id for one in driver.list_targets()] == [target.id]
        assert image_of(driver, target, claim)[0]
        assert driver.delete(target) == Deleted()
    assert listed(btrfs_fs.path) == before


# --- tags, reruns and crashes ---------------------------------------------------------------------


@lab.root_test
@pytest.mark.parametrize("reached", ["prepared", "snapshotted"])
def test_a_process_that_dies_leaves_only_tagged_targets_that_nobody_can_open(
    btrfs_fs: lab.ReflinkFs, subvolume: str, reached: str
) -> None:
    before = listed(btrfs_fs.path)
    paths = [disk(subvolume, name) for name in ("a", "b")]
    child = os.fork()
    if not child:
        try:
            mine = BtrfsDriver(MemoryPlaces())
            group = mine.prepare([claim_of(mine, path).volume for path in paths], tag(run_id(7)))
            if reached == "snapshotted":
                mine.snapshot(group)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(listed(btrfs_fs.path)) == len(before) + (reached == "snapshotted")
    fresh = BtrfsDriver(MemoryPlaces())
    claims = [claim_of(fresh, path) for path in paths]
    found = fresh.list_targets([claims[0].volume])
    assert {target.volume for target in found} == {claim.volume for claim in claims}
    assert all(target.tag == tag(run_id(7)) for target in found)
    for target in found:
        with pytest.raises(TargetLost, match="never completed"), fresh.open(target, claims[0]):
            pass
    lab.write_at(paths[0], (0, b"later"))
    (again,) = take(fresh, 7, claims[0])  # a rerun under the same id
    assert image_of(fresh, again, claims[0])[0][:5] == b"later"
    assert {fresh.delete(target) for target in found} == {Deleted()}
    assert listed(btrfs_fs.path) == before
    assert everything_below(subvolume) == sorted(paths)


@lab.root_test
def test_a_taken_instant_stays_and_a_new_tag_is_seen_by_everybody(driver: BtrfsDriver, subvolume: str) -> None:
    claim = claim_of(driver, disk(subvolume))
    (target,) = take(driver, 1, claim)
    content = image_of(driver, target, claim)[0]
    lab.write_at(claim.path, (0, b"later"))
    assert take(BtrfsDriver(MemoryPlaces()), 1, claim) == [target]
    assert image_of(driver, target, claim)[0] == content
    many = tag(run_id(1), Role.CHECKPOINT, disks=400)
    assert driver.retag(target, many) == replace(target, tag=many)
    (found,) = BtrfsDriver(MemoryPlaces()).list_targets([claim.volume])
    assert replace(found, allocated=0) == replace(target, tag=many)
    assert found.allocated == 0 or found.allocated <= SIZE
    driver.delete(target)
    with pytest.raises(TargetLost):
        driver.retag(target, many)


def _remove(snapshot: str) -> None:
    lab.run("btrfs", "subvolume", "delete", snapshot)


def _make_writable(snapshot: str) -> None:
    lab.run("btrfs", "property", "set", "-f", snapshot, "ro", "false")


def _exchange(snapshot: str) -> None:
    _remove(snapshot)
    create(snapshot)
    disk(snapshot)
    lab.run("btrfs", "property", "set", snapshot, "ro", "true")


@lab.root_test
@pytest.mark.parametrize("deed", [_remove, _make_writable, _exchange])
def test_a_snapshot_that_somebody_touched_is_lost_and_can_be_cleared_away(
    driver: BtrfsDriver, btrfs_fs: lab.ReflinkFs, subvolume: str, deed: Callable[[str], None]
) -> None:
    before = listed(btrfs_fs.path)
    claim = claim_of(driver, disk(subvolume))
    (hurt,) = take(driver, 1, claim)
    (now,) = take(driver, 2, claim)
    deed(btrfs_store.snapshot_path(hurt.id))
    with pytest.raises(TargetLost), driver.open(hurt, claim):
        pass
    answer = driver.changed(hurt, now)
    assert isinstance(answer, Unknown)
    assert "the checkpoint is gone" in answer.reason
    assert [driver.delete(target) for target in (hurt, now)] == [Deleted(), Deleted()]
    assert listed(btrfs_fs.path) == before


@lab.root_test
def test_foreign_entries_are_reported_and_left(driver: BtrfsDriver, subvolume: str) -> None:
    claim = claim_of(driver, disk(subvolume))
    (target,) = take(driver, 1, claim)
    folder = os.path.dirname(target.id)
    lab.write_at(f"{folder}/somebody's", (0, b"precious"))
    orphan = create(f"{folder}/0123456789abcdef.{run_id(9)}.snapshot")
    assert [one.id for one in driver.list_targets([claim.volume])] == [target.id]
    assert {one.path for one in driver.list_strays([claim.volume])} == {f"{folder}/somebody's", orphan}
    assert driver.delete(target) == Deleted()
    assert sorted(os.listdir(folder)) == sorted(map(os.path.basename, (f"{folder}/somebody's", orphan)))


@lab.root_test
def test_a_folder_of_somebody_else_is_not_trusted(driver: BtrfsDriver, subvolume: str) -> None:
    claim = claim_of(driver, disk(subvolume))
    folder = os.path.join(os.path.dirname(subvolume), btrfs_store.FOLDER)
    os.mkdir(folder)
    os.chown(folder, 65534, 65534)
    with pytest.raises(SnapshotFailed, match="another user"):
        driver.create_targets([claim.volume], tag())
    assert os.listdir(folder) == []


@lab.root_test
def test_paths_of_any_bytes(driver: BtrfsDriver, subvolume: str) -> None:
    odd = create(os.path.join(os.path.dirname(subvolume), os.fsdecode(b"sp ace\nline\xfe")))
    claim = claim_of(driver, disk(odd, os.fsdecode(b"d\xffisk " + b"n" * 240)))
    (target,) = take(driver, 1, claim)
    assert driver.list_targets([claim.volume]) == (target,)
    assert len(image_of(driver, target, claim)[0]) == SIZE
    assert driver.delete(target) == Deleted()


@lab.root_test
def test_a_snapshot_that_was_not_settled_is_taken_anew(
    driver: BtrfsDriver, btrfs_fs: lab.ReflinkFs, subvolume: str
) -> None:
    before = listed(btrfs_fs.path)
    claim = claim_of(driver, disk(subvolume))
    group = driver.prepare([claim.volume], tag())
    driver.snapshot(group)
    lab.write_at(claim.path, (0, b"later"))
    (target,) = driver.settle(driver.snapshot(group))
    assert image_of(driver, target, claim)[0][:5] == b"later"
    assert len(listed(btrfs_fs.path)) == len(before) + 1
    driver.delete(target)


@lab.root_test
def test_a_file_replaced_between_prepare_and_snapshot_is_noticed(driver: BtrfsDriver, subvolume: str) -> None:
    claim = claim_of(driver, disk(subvolume))
    group = driver.prepare([claim.volume], tag())
    os.rename(disk(subvolume, "other.raw"), claim.path)
    with pytest.raises(SourceChanged, match="replaced"):
        driver.snapshot(group)
    assert driver.delete(group.targets[0]) == Deleted()
    assert os.listdir(os.path.dirname(subvolume)) == ["vms"]


@lab.root_test
def test_full_file_system_gives_one_clear_error_and_leaves_nothing(driver: BtrfsDriver, tmp_path: object) -> None:
    with lab.ReflinkFs(tmp_path, "btrfs", 128 * lab.MIB, "full") as fs:
        claim = claim_of(driver, disk(create(f"{fs.path}/vms")))
        lab.run("btrfs", "quota", "enable", fs.path)
        lab.run("btrfs", "qgroup", "limit", "16K", "0/5", fs.path)  # the folder for targets lies in the top level
        with pytest.raises(TargetNoSpace):
            for number in range(1, 50):
                take(driver, number, claim)
        lab.run("btrfs", "quota", "disable", fs.path)
        for target in driver.list_targets([claim.volume]):
            assert driver.delete(target) == Deleted()
        assert listed(fs.path) == ["vms"]


@lab.root_test
def test_a_missing_file_is_not_made_where_its_subvolume_is_not(driver: BtrfsDriver, subvolume: str) -> None:
    claim = claim_of(driver, disk(subvolume))
    lab.run("btrfs", "subvolume", "delete", subvolume)
    os.mkdir(subvolume)
    with pytest.raises(VolumeUnsupported, match="not mounted"), driver.open_for_restore(claim):
        pass
    assert os.listdir(subvolume) == []
    assert VolumeId(f"btrfs:{subvolume}//disk.raw") == claim.volume


# --- LUN images -----------------------------------------------------------------------------------


@pytest.fixture
def lun(subvolume: str, tmp_path: object) -> Iterator[lab.Lun]:
    with lab.Lun(subvolume, "lun", 64 * lab.MIB, mount_at=f"{tmp_path}/datastore") as made:
        yield made


@lab.root_test
def test_a_lun_that_was_not_frozen_is_replayed_aside_and_compared(driver: BtrfsDriver, lun: lab.Lun) -> None:
    claim = claim_of(driver, disk(lun.path))
    assert claim == BtrfsDriver(MemoryPlaces(), in_place=False).resolve(claim.path)
    assert claim.mount == lun.path
    assert claim.volume.endswith("//lun.img")
    lab.run("sync", "-f", lun.path)
    lab.write_at(f"{lun.path}/more", (0, b"x"))  # the journal is not empty now
    (target,) = driver.create_targets([claim.volume], tag())
    content, placement = image_of(driver, target, claim)
    with open(claim.path, "rb") as file:
        assert content == file.read()
    assert placement.in_state(State.OPAQUE) == Extents.whole(SIZE)
    driver.delete(target)


@lab.root_test
def test_a_raw_device_over_a_lun_image_is_flushed_and_snapshotted(driver: BtrfsDriver, lun: lab.Lun) -> None:
    lun.unmount()
    claim = claim_of(driver, lun.device)
    assert claim.identity
    assert claim.volume.endswith("//lun.img")
    lab.write_at(lun.device, (4096, b"raw bytes"), sync=False)
    with open(lun.device, "rb"):  # the last one to close it would write everything out
        group = driver.prepare([claim.volume], tag())
        lab.write_at(lun.device, (8192, b"and later"), sync=False)
        (target,) = driver.settle(driver.snapshot(group))
    content, _ = image_of(driver, target, claim)
    assert (content[4096:4105], content[8192:8201]) == (b"raw bytes", b"and later")
    driver.delete(target)


# --- as an ordinary user --------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[str]:
    """A folder that others may enter, unlike those of pytest."""
    folder = tempfile.mkdtemp(prefix="graincopy-btrfs-", dir="/var/tmp")
    os.chmod(folder, 0o755)
    yield folder
    shutil.rmtree(folder)


@lab.root_test
@pytest.mark.parametrize("allowed", [True, False])
def test_an_ordinary_user_needs_the_mount_option(open_folder: str, allowed: bool) -> None:
    options = "user_subvol_rm_allowed" if allowed else ""
    with lab.ReflinkFs(open_folder, "btrfs", 256 * lab.MIB, options=options) as fs:
        path = create(f"{fs.path}/vms")
        image = disk(path)
        for each in (path, image):
            os.chown(each, 65534, 65534)
        child = os.fork()
        if not child:
            code = 99
            try:
                os.setgid(65534)
                os.setuid(65534)
                code = _as_user(image) if allowed else _refused(image)
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert listed(fs.path) == ["vms"]
        assert os.listdir(path) == ["disk.raw"]


def _as_user(image: str) -> int:
    driver = BtrfsDriver(MemoryPlaces())
    claim = claim_of(driver, image)
    (base,) = driver.create_targets([claim.volume], tag(run_id(1)))
    lab.write_at(image, (0, b"new"))
    (now,) = driver.create_targets([claim.volume], tag(run_id(2)))
    right = dirty_between(driver, base, now, claim)[0] == blocks(0)
    gone = [driver.delete(target) for target in (base, now)] == [Deleted(), Deleted()]
    return 0 if right and gone else 1


def _refused(image: str) -> int:
    answer = BtrfsDriver(MemoryPlaces()).resolve(image)
    return 0 if isinstance(answer, Refusal) and "user_subvol_rm_allowed" in answer.remedy else 1


@lab.root_test
def test_the_kernel_tells_what_a_subvolume_is(subvolume: str) -> None:
    fd = os.open(subvolume, os.O_RDONLY)
    try:
        found = btrfs_ioctl.subvolume_of(fd)
    finally:
        os.close(fd)
    shown = lab.run("btrfs", "subvolume", "show", subvolume)
    assert found.uuid in shown.replace("-", "")
    assert f"Subvolume ID: \t\t{found.number}" in shown
    assert not found.read_only
