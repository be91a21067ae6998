"""The reflink driver on real XFS and Btrfs: disk files in place, and LUN images with a file system inside."""

from __future__ import annotations

import os
import subprocess
import traceback
from collections.abc import Callable, Iterator

import lab
import pytest
from instants import (
    CLOCK,
    blocks,
    claim_of,
    dirty_between,
    disk,
    everything_below,
    image_of,
    loops_below,
    loops_return_to,
    run_id,
    tag,
    unequal,
)
from msgspec.structs import replace

from graincopy.core.errors import SnapshotFailed, SourceChanged, TargetLost, TargetNoSpace
from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State
from graincopy.model.change_map import Changed, Unknown
from graincopy.model.snapshot import Absent, Deleted, Role, Target
from graincopy.model.volume import Claim, Refusal
from graincopy.volumes import reflink_changes, reflink_clone, reflink_store
from graincopy.volumes.fiemap import read_placement
from graincopy.volumes.instant import take_instant
from graincopy.volumes.places import FilePlaces, MemoryPlaces
from graincopy.volumes.reflink import ReflinkDriver

KIB64 = 1 << 16
SIZE = 64 * 4096


@pytest.fixture
def driver() -> ReflinkDriver:
    return ReflinkDriver(MemoryPlaces())


def take(driver: ReflinkDriver, claim: Claim, number: int) -> Target:
    """One target, through the freeze window where the file lies on a mounted LUN."""
    mounts = [claim.mount] if claim.mount else []
    instant = take_instant([(driver, [claim.volume])], tag(run_id(number)), mounts, clock=CLOCK)
    return instant.targets[driver.name, claim.volume]


# --- disk files in place --------------------------------------------------------------------------


@lab.root_test
def test_file_on_a_reflink_file_system_is_its_own_volume(driver: ReflinkDriver, reflink_dir: str) -> None:
    path = disk(reflink_dir)
    claim = claim_of(driver, path)
    assert claim.identity and claim.volume == f"reflink:{path}" and claim.mount is None
    source = driver.describe(claim.volume)
    assert source.size == SIZE and source.extents >= 1 and source.allocated >= SIZE and source.home == reflink_dir


@lab.root_test
def test_file_elsewhere_is_refused_with_a_remedy(driver: ReflinkDriver, two_mib_ext4: str) -> None:
    refusal = driver.resolve(disk(two_mib_ext4))
    assert isinstance(refusal, Refusal)
    assert "ext4" in refusal.reason and "XFS or Btrfs" in refusal.remedy
    assert isinstance(driver.resolve(two_mib_ext4), Refusal)


@pytest.fixture
def two_mib_ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with lab.ReflinkFs(tmp_path_factory.mktemp("plain"), "ext4", 32 * lab.MIB) as made:
        yield made.path


@lab.root_test
def test_target_is_isolated_thin_and_leaves_no_trace(driver: ReflinkDriver, reflink_dir: str) -> None:
    path = disk(reflink_dir)
    before = everything_below(reflink_dir)
    claim = claim_of(driver, path)
    with open(path, "rb") as file:
        content = file.read()
    target = take(driver, claim, 1)
    assert os.stat(target.id).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(target.id)).st_mode & 0o777 == 0o700
    assert driver.list_targets([claim.volume])[0].allocated == 0
    lab.write_at(path, (0, b"new" * 1000), (40960, b"x"))
    assert image_of(driver, target, claim)[0] == content
    alone = driver.list_targets([claim.volume])[0].allocated
    assert alone == (2 * 4096 if claim.why.startswith("the file lies on xfs") else 0)  # Btrfs shares extents as a whole
    assert driver.delete(target) == Deleted()
    assert driver.delete(target) == Absent()
    assert everything_below(reflink_dir) == before
    with pytest.raises(TargetLost), driver.open(target, claim):
        pass


def _fallocate(*options: str) -> Callable[[str], None]:
    return lambda path: lab.run("fallocate", *options, path) and None


def _truncate_down_and_up(path: str) -> None:
    os.truncate(path, 10 * 4096 + 17)
    os.truncate(path, SIZE)


def _clone_within(path: str) -> None:
    lab.run("xfs_io", "-c", f"reflink {path} 0 {KIB64} {KIB64}", path)


OPERATIONS: dict[str, tuple[Callable[[str], None], Extents | None]] = {
    "two scattered writes": (lambda path: lab.write_at(path, (5 * 4096 + 9, b"n"), (40 * 4096, b"m")), blocks(5, 40)),
    "a write that is not synced": (lambda path: lab.write_at(path, (7 * 4096, b"n"), sync=False), blocks(7)),
    "nothing": (lambda path: None, Extents.empty()),
    "zero range": (_fallocate("--zero-range", "--offset", "8192", "--length", "8192"), blocks(2, 3)),
    "punch": (_fallocate("--punch-hole", "--offset", "8192", "--length", "8192"), blocks(2, 3)),
    "growth": (lambda path: lab.write_at(path, (SIZE, b"grown")), Extents.of((SIZE, SIZE + 5))),
    "truncate down and up": (_truncate_down_and_up, None),
    "reflink inside": (_clone_within, None),
}


@lab.root_test
@pytest.mark.parametrize("operation", OPERATIONS)
def test_changed_holds_every_changed_byte_and_no_more(driver: ReflinkDriver, reflink_dir: str, operation: str) -> None:
    path = disk(reflink_dir)
    claim = claim_of(driver, path)
    base = take(driver, claim, 1)
    change, exactly = OPERATIONS[operation]
    change(path)
    now = take(driver, claim, 2)
    dirty, before, after = dirty_between(driver, base, now, claim)
    assert dirty.covers(unequal(before, after, 512))
    if exactly is not None:
        assert dirty == exactly


@lab.root_test
@pytest.mark.parametrize("option", ["--collapse-range", "--insert-range"])
def test_moved_ranges_are_changed(driver: ReflinkDriver, xfs_dir: str, option: str) -> None:
    path = disk(xfs_dir)
    claim = claim_of(driver, path)
    base = take(driver, claim, 1)
    lab.run("fallocate", option, "--offset", "40960", "--length", "8192", path)
    dirty, before, after = dirty_between(driver, base, take(driver, claim, 2), claim)
    assert dirty.covers(unequal(before, after, 512))
    assert not (dirty & Extents.of((0, 40960)))


@lab.root_test
def test_shrunk_and_grown_volumes_are_noticed(driver: ReflinkDriver, reflink_dir: str) -> None:
    path = disk(reflink_dir)
    claim = claim_of(driver, path)
    base = take(driver, claim, 1)
    os.truncate(path, SIZE // 2)
    small = take(driver, claim, 2)
    assert (small.size, base.size) == (SIZE // 2, SIZE)
    assert driver.changed(base, small) == Changed(Extents.empty(), "extents")
    assert driver.changed(small, base) == Changed(Extents.of((SIZE // 2, SIZE)), "extents")


@lab.root_test
def test_compressed_and_inline_extents_are_always_compared(driver: ReflinkDriver, btrfs_dir: str) -> None:
    lab.run("btrfs", "property", "set", btrfs_dir, "compression", "zstd")
    path = os.path.join(btrfs_dir, "text")
    lab.write_at(path, (0, b"compressible " * 100_000))
    tiny = os.path.join(btrfs_dir, "tiny")
    lab.write_at(tiny, (0, b"inline"))
    for each in (path, tiny):
        claim = claim_of(driver, each)
        base, now = take(driver, claim, 1), take(driver, claim, 2)
        dirty, before, after = dirty_between(driver, base, now, claim)
        assert before == after and dirty == Extents.whole(len(after))


@lab.root_test
def test_recreated_deleted_and_foreign_bases_are_unknown(driver: ReflinkDriver, reflink_dir: str) -> None:
    path = disk(reflink_dir)
    claim = claim_of(driver, path)
    base = take(driver, claim, 1)
    other = take(driver, claim_of(driver, disk(reflink_dir, "other.raw")), 1)
    os.unlink(path)
    disk(reflink_dir)
    now = take(driver, claim, 2)
    for one, word in ((base, "recreated"), (other, "another volume")):
        answer = driver.changed(one, now)
        assert isinstance(answer, Unknown) and word in answer.reason
    driver.delete(base)
    answer = driver.changed(base, now)
    assert isinstance(answer, Unknown) and "gone" in answer.reason


def test_comparison_needs_a_base_that_stands_still() -> None:
    still = Placement.of(8192, (0, 8192, 4096, State.WRITTEN))
    now = Placement.of(8192, (0, 4096, 4096, State.WRITTEN), (4096, 8192, 65536, State.WRITTEN))
    moves = iter(range(100))

    def moving(fd: int, size: int) -> Placement:
        return now if fd else Placement.of(8192, (0, 8192, 4096 * next(moves), State.WRITTEN))

    answer = reflink_changes._compare(0, 8192, 1, 8192, moving)
    assert isinstance(answer, Unknown) and "moves blocks" in answer.reason
    once = iter([Placement.of(8192, (0, 8192, 0, State.WRITTEN)), still, still])
    answer = reflink_changes._compare(0, 8192, 1, 8192, lambda fd, size: now if fd else next(once))
    assert answer == Changed(blocks(1), "extents")


@lab.root_test
def test_file_that_is_replaced_or_vanishes_before_the_instant(driver: ReflinkDriver, reflink_dir: str) -> None:
    path = disk(reflink_dir)
    claim = claim_of(driver, path)
    group = driver.prepare([claim.volume], tag())
    os.replace(disk(reflink_dir, "new.raw"), path)
    with pytest.raises(SourceChanged, match="replaced"):
        driver.snapshot(group)
    os.unlink(path)
    with pytest.raises(SourceChanged):
        driver.snapshot(group)
    with pytest.raises(SnapshotFailed):
        driver.describe(claim.volume)
    assert driver.delete(group.targets[0]) == Deleted()


WARMED: dict[str, Callable[[str], None]] = {
    "write": lambda path: lab.write_at(path, (5 * 4096 + 9, b"n"), (40 * 4096, b"m"), sync=False),
    "punch": _fallocate("--punch-hole", "--offset", "8192", "--length", "8192"),
    "zero range": _fallocate("--zero-range", "--offset", "8192", "--length", "8192"),
    "shorter": lambda path: os.truncate(path, 5 * 4096 + 99),
    "shorter and longer": _truncate_down_and_up,
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: lab.write_at(path, (SIZE + 5000, b"grown")),
}


@lab.root_test
@pytest.mark.parametrize("change", WARMED)
def test_target_shows_the_instant_and_not_the_preparation(
    driver: ReflinkDriver, reflink_dir: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reflink_clone, "_WARM_EXTENTS", 2)
    path = disk(reflink_dir)
    lab.run("fallocate", "--punch-hole", "--offset", "65536", "--length", "4096", path)
    lab.run("fallocate", "--zero-range", "--offset", "81920", "--length", "4096", path)
    lab.run("fallocate", "--punch-hole", "--offset", "98304", "--length", "4096", path)
    claim = claim_of(driver, path)
    base = take(driver, claim, 1)
    group = driver.prepare([claim.volume], tag(run_id(2)))
    WARMED[change](path)
    with open(path, "rb") as file:
        expected = file.read()
    (now,) = driver.settle(driver.snapshot(group))
    assert now.size == len(expected)
    dirty, before, after = dirty_between(driver, base, now, claim)
    assert after == expected
    assert dirty.covers(unequal(before, after, 512))


@lab.root_test
def test_warming_leaves_little_to_do_inside_the_window(driver: ReflinkDriver, xfs_dir: str) -> None:
    path = os.path.join(xfs_dir, "fragmented")
    lab.write_at(path, *((n * 8192, b"x" * 4096) for n in range(2000)))
    claim = claim_of(driver, path)
    assert driver.describe(claim.volume).extents >= 2000
    group = driver.prepare([claim.volume], tag())
    assert group.predicted_ms is not None and group.predicted_ms < 12
    with open(path, "rb") as source, open(group.targets[0].id, "rb") as target:
        size = os.fstat(source.fileno()).st_size
        was = read_placement(source.fileno(), size)
        assert not was.differs(read_placement(target.fileno(), size)) & was.allocated()  # preallocations become holes


# --- tags, reruns and crashes ---------------------------------------------------------------------


@lab.root_test
def test_process_that_dies_after_prepare_leaves_only_tagged_targets_that_nobody_can_open(
    reflink_dir: str, tmp_path: object
) -> None:
    paths = [disk(reflink_dir, name) for name in ("a", "b")]
    places = FilePlaces(os.path.join(str(tmp_path), "state", "places"))
    child = os.fork()
    if not child:
        try:
            mine = ReflinkDriver(places)
            mine.prepare([claim_of(mine, path).volume for path in paths], tag(run_id(7), disks=3))
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    fresh = ReflinkDriver(places)
    found = fresh.list_targets()
    assert {target.volume for target in found} == {f"reflink:{path}" for path in paths}
    assert all(target.tag == tag(run_id(7), disks=3) for target in found)
    for target in found:
        with pytest.raises(TargetLost, match="never completed"), fresh.open(target, claim_of(fresh, paths[0])):
            pass
        assert fresh.delete(target) == Deleted()
    assert everything_below(reflink_dir) == sorted(paths)


@lab.root_test
def test_repeated_prepare_finds_its_targets_and_a_taken_instant_stays(reflink_dir: str) -> None:
    path = disk(reflink_dir)
    first, second = ReflinkDriver(MemoryPlaces()), ReflinkDriver(MemoryPlaces())
    claim = claim_of(first, path)
    once = first.prepare([claim.volume], tag())
    again = second.prepare([claim.volume], tag())
    assert [one.id for one in once.targets] == [one.id for one in again.targets]
    (target,) = second.settle(second.snapshot(again))
    content, _ = image_of(first, target, claim)
    lab.write_at(path, (0, b"later"))
    (kept,) = first.create_targets([claim.volume], tag())
    assert kept == target
    assert image_of(first, kept, claim)[0] == content
    assert take(first, claim, 2).id != target.id


@lab.root_test
def test_retag_is_seen_by_everybody_and_may_hold_hundreds_of_disks(driver: ReflinkDriver, reflink_dir: str) -> None:
    claim = claim_of(driver, disk(reflink_dir))
    target = take(driver, claim, 1)
    many = tag(run_id(1), Role.CHECKPOINT, disks=400)
    assert driver.retag(target, many) == replace(target, tag=many)
    assert driver.retag(target, many) == replace(target, tag=many)
    (found,) = ReflinkDriver(MemoryPlaces()).list_targets([claim.volume])
    assert found == replace(target, tag=many)
    driver.delete(target)
    with pytest.raises(TargetLost):
        driver.retag(target, many)


@lab.root_test
def test_damaged_and_foreign_entries_are_reported_and_left(driver: ReflinkDriver, reflink_dir: str) -> None:
    claim = claim_of(driver, disk(reflink_dir))
    target, hurt = take(driver, claim, 1), take(driver, claim, 2)
    os.setxattr(hurt.id, reflink_store.ATTRIBUTE, b"{damaged")
    folder = os.path.dirname(target.id)
    foreign = os.path.join(folder, "somebody's")
    lab.write_at(foreign, (0, b"precious"))
    link = os.path.join(folder, f"{'0' * 16}.x.target")
    os.symlink(foreign, link)
    assert [one.id for one in driver.list_targets([claim.volume])] == [target.id]
    assert {one.path for one in driver.list_strays([claim.volume])} == {hurt.id, foreign, link}
    assert isinstance(driver.changed(hurt, target), Unknown)
    assert driver.delete(target) == Deleted()
    assert set(os.listdir(folder)) == {os.path.basename(path) for path in (hurt.id, foreign, link)}


@lab.root_test
def test_folder_of_somebody_else_is_not_trusted(driver: ReflinkDriver, reflink_dir: str) -> None:
    claim = claim_of(driver, disk(reflink_dir))
    folder = os.path.join(reflink_dir, reflink_store.FOLDER)
    os.mkdir(folder)
    os.chown(folder, 65534, 65534)
    with pytest.raises(SnapshotFailed, match="another user"):
        driver.create_targets([claim.volume], tag())
    assert os.listdir(folder) == []


def test_places_are_durable_in_one_file_and_forgive_a_torn_end(tmp_path: object) -> None:
    path = os.path.join(str(tmp_path), "new", "state", "places")
    places = FilePlaces(path)
    assert places.all() == ()
    odd = os.fsdecode(b"/a b\n\xff")
    for directory in (odd, "/x", odd):
        places.note(directory)
    assert FilePlaces(path).all() == (odd, "/x")
    with open(path, "ab") as file:
        file.write(b"/torn")
    assert FilePlaces(path).all() == (odd, "/x")
    places.note("/y")
    assert {odd, "/x", "/y"} <= set(FilePlaces(path).all())


@lab.root_test
def test_paths_of_any_bytes(driver: ReflinkDriver, reflink_dir: str) -> None:
    folder = os.path.join(reflink_dir, os.fsdecode(b"sp ace\nline\xfe"))
    os.mkdir(folder)
    claim = claim_of(driver, disk(folder, os.fsdecode(b"d\xffisk " + b"n" * 240)))
    target = take(driver, claim, 1)
    assert driver.list_targets([claim.volume]) == (target,)
    assert driver.delete(target) == Deleted()


@lab.root_test
@pytest.mark.parametrize("folder_flag", ["+C", "-C"])
@pytest.mark.parametrize("file_flag", ["+C", "-C"])
def test_nodatacow_files_are_cloned_too(
    driver: ReflinkDriver, btrfs_dir: str, folder_flag: str, file_flag: str
) -> None:
    path = os.path.join(btrfs_dir, "disk")
    lab.write_at(path, (0, b""))
    lab.run("chattr", file_flag, path)
    lab.write_at(path, (0, os.urandom(SIZE)))
    lab.run("chattr", folder_flag, btrfs_dir)
    claim = claim_of(driver, path)
    base = take(driver, claim, 1)
    lab.write_at(path, (8 * 4096, b"in place?"))
    dirty, before, after = dirty_between(driver, base, take(driver, claim, 2), claim)
    assert before != after and dirty == blocks(8)


@lab.root_test
def test_ordinary_user_clones_files_of_his_own(reflink_dir: str) -> None:
    os.chmod(reflink_dir, 0o755)
    folder = os.path.join(reflink_dir, "home")
    os.mkdir(folder)
    path = disk(folder)
    foreign = disk(reflink_dir, "root's")
    os.chown(path, 65534, 65534)
    os.chown(folder, 65534, 65534)
    assert _as_nobody(reflink_dir, lambda: _own_file_works(path))
    assert _as_nobody(reflink_dir, lambda: _foreign_file_is_refused(foreign))
    assert everything_below(folder) == [path]


def _as_nobody(folder: str, work: Callable[[], None]) -> bool:
    """Run ``work`` in a child that is an ordinary user; the folders above are passable for it meanwhile."""
    modes: dict[str, int] = {}
    while folder != "/":
        modes[folder] = os.stat(folder).st_mode & 0o7777
        folder = os.path.dirname(folder)
    for each, mode in modes.items():
        os.chmod(each, mode | 0o055)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            work()
            status = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for each, mode in modes.items():
        os.chmod(each, mode)
    return status == 0


def _own_file_works(path: str) -> None:
    mine = ReflinkDriver(MemoryPlaces())
    claim = claim_of(mine, path)
    base = take(mine, claim, 1)
    lab.write_at(path, (4096, b"new"))
    now = take(mine, claim, 2)
    dirty, before, after = dirty_between(mine, base, now, claim)
    assert before != after and dirty == blocks(1)
    assert mine.delete(base) == mine.delete(now) == Deleted()


def _foreign_file_is_refused(path: str) -> None:
    refusal = ReflinkDriver(MemoryPlaces()).resolve(path)
    assert isinstance(refusal, Refusal) and "permission" in refusal.reason


# --- LUN images -----------------------------------------------------------------------------------

SHAPES = [("ext4", False), ("ext4", "offset"), ("ext4", True), ("xfs", False), ("xfs", "offset")]


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def lun(request: pytest.FixtureRequest, xfs_dir: str) -> Iterator[lab.Lun]:
    inner, partitioned = request.param
    size = 520 * lab.MIB if inner == "ext4" else 320 * lab.MIB  # ext4 below 512 MiB has blocks of 1 KiB
    with lab.Lun(xfs_dir, size=size, inner=inner, partitioned=partitioned) as made:
        yield made


@pytest.fixture
def small_lun(reflink_dir: str) -> Iterator[lab.Lun]:
    with lab.Lun(reflink_dir, size=64 * lab.MIB) as made:
        yield made


@lab.root_test
def test_lun_from_file_to_dirty_blocks(driver: ReflinkDriver, lun: lab.Lun) -> None:
    path = disk(lun.path)
    neighbour = disk(lun.path, "neighbour.raw")
    claim = claim_of(driver, path)
    assert (claim.volume, claim.mount) == (f"reflink:{lun.image}", lun.path)
    assert (claim.inner_path, claim.fs_type, claim.fs_offset) == ("disk.raw", lun.inner, lun.offset)
    folder = os.path.dirname(lun.image)
    loops = loops_below(folder)
    base = take(driver, claim, 1)
    assert base.size == lun.size
    lab.write_at(path, (3 * 4096, b"changed"), sync=False)
    lab.write_at(neighbour, (0, os.urandom(SIZE)))
    now = take(driver, claim, 2)
    lab.write_at(path, (9 * 4096, b"after the instant"))
    dirty, before, after = dirty_between(driver, base, now, claim)
    assert unequal(before, after) == blocks(3)
    assert dirty == blocks(3)
    with driver.open(base, claim) as image, open(lun.image, "rb") as volume:
        (start, *_), (place, *_) = image.placement().starts, image.placement().volume
        volume.seek(place)
        assert volume.read(4096) == before[start : start + 4096]
    for target in (base, now):
        assert driver.delete(target) == Deleted()
    assert loops_return_to(loops, folder)
    assert reflink_store.FOLDER not in os.listdir(folder)


@lab.root_test
def test_lun_operations_inside_are_found(driver: ReflinkDriver, small_lun: lab.Lun) -> None:
    path = disk(small_lun.path, size=SIZE)
    claim = claim_of(driver, path)
    number = iter(range(1, 99))
    base = take(driver, claim, next(number))
    for change in (
        _fallocate("--zero-range", "--offset", "8192", "--length", "8192"),
        _fallocate("--punch-hole", "--offset", "40960", "--length", "4096"),
        _fallocate("--collapse-range", "--offset", "40960", "--length", "8192"),
        _fallocate("--insert-range", "--offset", "40960", "--length", "8192"),
        _fallocate("--offset", str(SIZE), "--length", "65536"),
        lambda path: lab.write_at(path, (SIZE + 8192, b"into the preallocation"), sync=False),
        _truncate_down_and_up,
        lambda path: os.replace(disk(small_lun.path, "new"), path),
    ):
        change(path)
        now = take(driver, claim, next(number))
        dirty, before, after = dirty_between(driver, base, now, claim)
        assert dirty.covers(unequal(before, after, 512))
        driver.delete(base)
        base = now


@lab.root_test
def test_files_of_one_target_share_an_attachment(driver: ReflinkDriver, small_lun: lab.Lun) -> None:
    claims = [claim_of(driver, disk(small_lun.path, name)) for name in ("a", "b")]
    target = take(driver, claims[0], 1)
    folder = os.path.dirname(small_lun.image)
    loops = loops_below(folder)
    with driver.open(target, claims[0]) as one:
        with driver.open(target, claims[1]) as other:
            assert len(loops_below(folder)) == len(loops) + 1
            assert one.size == other.size
        buffer = bytearray(4096)
        one.readinto(0, memoryview(buffer))
        assert any(buffer)
    assert loops_return_to(loops, folder)
    missing = replace(claims[0], inner_path="no/such", path="/no/such")
    with pytest.raises(SourceChanged), driver.open(target, missing):
        pass
    assert loops_return_to(loops, folder)


@lab.root_test
@pytest.mark.parametrize("inner", ["ext4", "xfs"])
def test_lun_that_was_not_frozen_is_replayed_aside_and_compared(
    driver: ReflinkDriver, xfs_dir: str, inner: str
) -> None:
    with lab.Lun(xfs_dir, size=64 * lab.MIB if inner == "ext4" else 320 * lab.MIB, inner=inner) as lun:
        path = disk(lun.path)
        claim = claim_of(driver, path)
        lab.run("fallocate", "--punch-hole", "--offset", "8192", "--length", "8192", path)
        os.sync()
        (target,) = driver.create_targets([claim.volume], tag())
        with open(path, "rb") as live, open(target.id, "rb") as clone:
            expected, was = live.read(), clone.read()
        loops = loops_below(xfs_dir)
        content, placement = image_of(driver, target, claim)
        assert content == expected
        assert placement.in_state(State.WRITTEN) == Extents.empty()
        assert placement.in_state(State.OPAQUE)
        with open(target.id, "rb") as clone:
            assert clone.read() == was
        assert loops_return_to(loops, xfs_dir)
        driver.delete(target)


@lab.root_test
def test_whole_loop_device_is_its_image_and_unsynced_raw_writes_are_in_the_target(
    driver: ReflinkDriver, reflink_dir: str
) -> None:
    image = disk(reflink_dir, "raw.img", 1 << 20)
    device = lab.bind(image)
    try:
        claim = claim_of(driver, device)
        assert claim.identity and claim.volume == f"reflink:{image}"
        fd = os.open(device, os.O_WRONLY)
        try:
            group = driver.prepare([claim.volume], tag())
            os.pwrite(fd, b"still in the page cache of the device", 8192)
            (target,) = driver.settle(driver.snapshot(group))
        finally:
            os.close(fd)
        content, _ = image_of(driver, target, claim)
        assert content[8192:].startswith(b"still in the page cache")
    finally:
        lab.unbind(device)


@lab.root_test
def test_part_of_an_image_is_no_volume(driver: ReflinkDriver, reflink_dir: str) -> None:
    device = lab.bind(disk(reflink_dir, "raw.img", 1 << 20), "--offset", "65536")
    try:
        refusal = driver.resolve(device)
    finally:
        lab.unbind(device)
    assert isinstance(refusal, Refusal) and "part of" in refusal.reason and refusal.remedy


@lab.root_test
def test_out_of_space_for_a_target_is_said_and_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    with lab.ReflinkFs(tmp_path_factory.mktemp("full"), "xfs", 320 * lab.MIB) as small:
        driver = ReflinkDriver(MemoryPlaces())
        claims = [claim_of(driver, disk(small.path, name)) for name in ("a", "b")]
        group = driver.prepare([claims[0].volume], tag())
        filler = os.path.join(small.path, "filler")
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64K"], capture_output=True, timeout=60, check=False)
        with pytest.raises(OSError, match="No space left"):  # no blocks; and then no inodes either
            for number in range(10_000):
                os.close(os.open(f"{filler}{number}", os.O_CREAT | os.O_WRONLY))
        before = everything_below(small.path)
        with pytest.raises(TargetNoSpace):
            driver.prepare([claims[0].volume, claims[1].volume], tag(run_id(2)))
        assert everything_below(small.path) == before
        assert driver.delete(group.targets[0]) == Deleted()
