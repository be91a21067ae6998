"""The main job on real volumes: LUNs with datastores full of disks, of which some belong to the workload."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import lab
import pytest
import story
from story import GRAIN, MIB, Cli, Stage, large_blocks, noise

pytestmark = pytest.mark.root


def three_disks(stage: Stage) -> list[str]:
    """A disk on each datastore, of three different sizes, one of them odd, and a neighbour beside each."""
    paths = []
    for number, size in enumerate((16 * MIB, 8 * MIB + 4097, 12 * MIB)):
        story.make_disk(stage.path(number, "neighbour.raw"), 6 * MIB, (0, noise(90 + number, 6 * MIB)))
        pieces = ((0, noise(number, MIB)), (4 * MIB + 12345, noise(10 + number, 200_000)), (size - 3, b"end"))
        paths.append(story.make_disk(stage.path(number, f"disk{number}.raw"), size, *pieces))
    return paths


def test_one_instant_over_three_volumes_and_no_neighbour(stage: Stage, cli: Cli) -> None:
    paths = three_disks(stage)
    neighbours = {path: story.digest(path) for path in (stage.path(n, "neighbour.raw") for n in range(3))}
    document = cli.backup(*paths)
    assert document["base"] is None
    assert document["instant"] == "one"
    assert document["freeze_ms"] > 0
    assert [disk["name"] for disk in document["disks"]] == ["disk0.raw", "disk1.raw", "disk2.raw"]
    assert [disk["volume"] for disk in document["disks"]] == [f"reflink:{lun.image}" for lun in stage.luns]
    for disk, path in zip(document["disks"], paths, strict=True):
        assert disk["size"] == os.path.getsize(path)
        assert 0 <= story.allocated(path) - disk["allocated"] < 4096  # the last block goes beyond an odd end
        assert disk["read_bytes"] <= disk["dirty_bytes"] <= 24 * GRAIN
    assert story.bill(document) < 5 * MIB  # the neighbours alone are 18 MiB of noise
    assert len(document["targets_left"]) == len(stage.targets) == 3
    assert {path: story.digest(path) for path in neighbours} == neighbours
    restored = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert [story.digest(disk["target"]) for disk in restored["disks"]] == [story.digest(path) for path in paths]


def test_an_incremental_reads_the_dirty_grains_only(stage: Stage, cli: Cli) -> None:
    paths = three_disks(stage)
    first = cli.backup(*paths)
    story.write(paths[0], (0, b"A" * 4096), (70_000, b"B"), (9 * MIB, b"new"))
    story.write(paths[1], (8 * MIB + 4090, b"tail"))
    story.write(stage.path(2, "neighbour.raw"), (0, noise(1, 4 * MIB)))
    second = cli.backup(*paths)
    assert second["base"] == first["restore_point"]
    assert [disk["change_map"] for disk in second["disks"]] == ["extents"] * 3
    assert [disk["dirty_bytes"] for disk in second["disks"]] == [3 * GRAIN, 4097, 0]
    assert [disk["read_bytes"] for disk in second["disks"]] == [3 * GRAIN, 4097, 0]
    assert all(disk["audit_bytes"] > 0 for disk in second["disks"])
    assert len(stage.targets) == 3  # one checkpoint a volume: the older ones are gone
    cli.ok("restore", "latest", "--to", f"{cli.folder}/new")
    assert story.read(f"{cli.folder}/new/disk1.raw") == story.read(paths[1])
    assert story.read(f"{cli.folder}/new/disk0.raw") == story.read(paths[0])


def test_nothing_changed_reads_nothing_and_publishes(stage: Stage, cli: Cli) -> None:
    paths = three_disks(stage)
    cli.backup(*paths)
    again = cli.backup(*paths)
    assert [(disk["dirty_bytes"], disk["read_bytes"], disk["stored_bytes"]) for disk in again["disks"]] == [
        (0, 0, 0)
    ] * 3
    assert len(cli.ok("points")) == 2


def test_everything_is_right_in_an_encrypted_repository_with_other_grains(stage: Stage, tmp_path: object) -> None:
    cli = Cli(f"{tmp_path}/sealed", encrypted=True).init("--grain-size", "256K")
    paths = three_disks(stage)
    cli.backup(*paths)
    before = [story.digest(path) for path in paths]
    story.write(paths[0], (0, b"A" * 4096))
    second = cli.backup(*paths)
    assert [disk["read_bytes"] for disk in second["disks"]] == [256 * 1024, 0, 0]
    cli.ok("restore", "latest~1", "--in-place")
    assert [story.digest(path) for path in paths] == before
    cli.undamaged()


def test_the_order_of_the_paths_makes_no_other_workload(stage: Stage, cli: Cli) -> None:
    paths = three_disks(stage)
    first = cli.backup(*paths)
    link = stage.path(0, "link.raw")
    os.symlink(paths[2], link)
    second = cli.backup(link, f"files:{paths[1]},{paths[0]}")
    assert (second["workload"], second["base"]) == (first["workload"], first["restore_point"])


def test_a_name_keeps_the_workload_when_a_disk_comes_along(stage: Stage, cli: Cli) -> None:
    paths = three_disks(stage)
    first = cli.backup("--name", "shop", *paths[:2])
    second = cli.backup("--name", "shop", *paths)
    assert first["workload_name"] == second["workload_name"] == "shop"
    assert second["workload"] == first["workload"]
    assert [disk["change_map"] for disk in second["disks"]] == ["extents", "extents", "first backup"]
    assert len(cli.ok("points", "--workload", "shop")) == 2
    assert cli.ok("points", "--workload", "sho") == []


def test_two_repositories_in_turn_each_stay_right(stage: Stage, tmp_path: object) -> None:
    nightly, weekly = (Cli(f"{tmp_path}/{name}").init() for name in ("nightly", "weekly"))
    path = three_disks(stage)[0]
    seen: dict[Cli, list[str]] = {nightly: [], weekly: []}
    for turn, cli in enumerate((nightly, weekly, nightly, nightly, weekly, nightly)):
        story.write(path, (turn * 2 * GRAIN, noise(turn, 100)))
        document = cli.backup(path)
        disk = document["disks"][0]
        assert disk["change_map"] == ("extents" if seen[cli] else "first backup")
        seen[cli].append(story.digest(path))
    assert len(stage.targets) == 2  # a checkpoint for each
    for cli, digests in seen.items():
        for back, digest in enumerate(reversed(digests)):
            out = cli.ok("restore", f"latest~{back}", "--to", f"{cli.folder}/{back}")
            assert story.digest(out["disks"][0]["target"]) == digest


def test_five_workloads_on_one_lun_keep_each_others_base(stage: Stage, cli: Cli) -> None:
    paths = [story.make_disk(stage.path(0, f"vm{n}.raw"), 2 * MIB, (0, noise(n, MIB))) for n in range(5)]
    for path in paths:
        cli.backup(path)
    for number, path in enumerate(paths):
        story.write(path, (number * GRAIN, b"changed"))
    for number, path in enumerate(paths):
        disk = cli.backup(path)["disks"][0]
        assert (disk["change_map"], disk["read_bytes"]) == ("extents", GRAIN), number
    assert len(stage.targets) == 5


def test_a_checkpoint_that_somebody_deleted_is_compared_with_the_reason(stage: Stage, cli: Cli) -> None:
    path = three_disks(stage)[0]
    cli.backup(path)
    for target in stage.targets:
        os.unlink(target)
    story.write(path, (0, b"changed"))
    disk = cli.backup(path)["disks"][0]
    assert disk["change_map"] == "compared: the checkpoint was deleted"
    assert (disk["dirty_bytes"], disk["read_bytes"]) == (GRAIN, 21 * GRAIN)  # all that is allocated, in grains
    assert cli.backup(path)["disks"][0]["change_map"] == "extents"


def test_no_checkpoint_leaves_nothing(stage: Stage, cli: Cli) -> None:
    path = three_disks(stage)[0]
    document = cli.backup("--no-checkpoint", path)
    assert document["targets_left"] == []
    assert stage.targets == []
    assert not os.path.exists(os.path.join(stage.outer.path, ".graincopy"))
    story.write(path, (0, b"changed"))
    disk = cli.backup(path)["disks"][0]
    assert (disk["change_map"], disk["dirty_bytes"]) == ("compared: no checkpoint was kept", GRAIN)


def test_a_file_replaced_under_its_path_is_stored_as_it_is_now(stage: Stage, cli: Cli) -> None:
    path = three_disks(stage)[0]
    cli.backup(path)
    shutil.copyfile(path, f"{path}.new")
    story.write(f"{path}.new", (GRAIN, b"not as before"))
    os.rename(f"{path}.new", path)
    cli.backup(path)
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert story.digest(out["disks"][0]["target"]) == story.digest(path)


def test_a_renamed_file_of_a_named_workload_is_a_first_backup(stage: Stage, cli: Cli) -> None:
    path = three_disks(stage)[0]
    cli.backup("--name", "shop", path)
    os.rename(path, stage.path(0, "other.raw"))
    disk = cli.backup("--name", "shop", stage.path(0, "other.raw"))["disks"][0]
    assert (disk["change_map"], disk["stored_bytes"]) == ("first backup", 0)  # its chunks are there already


@pytest.fixture
def lone(stage: Stage) -> Iterator[lab.Lun]:
    """A LUN of its own, for being resized and recreated."""
    with lab.Lun(stage.outer.path, "lone", 64 * MIB, "ext4", mount_at=f"{stage.folder}/lone") as made:
        large_blocks(made)
        yield made


def test_a_recreated_lun_is_compared_with_the_reason(lone: lab.Lun, cli: Cli) -> None:
    path = story.make_disk(f"{lone.path}/a.raw", 4 * MIB, (0, noise(1, MIB)))
    cli.backup(path)
    lone.unmount()
    lab.unbind(lone.disk)
    shutil.copyfile(lone.image, f"{lone.image}.new")
    os.rename(f"{lone.image}.new", lone.image)
    lab.run("losetup", lone.disk, lone.image)
    lone.mount()
    story.write(path, (0, b"changed"))
    disk = cli.backup(path)["disks"][0]
    assert (disk["change_map"], disk["dirty_bytes"]) == ("compared: the volume was recreated", GRAIN)
    assert cli.backup(path)["disks"][0]["change_map"] == "extents"


def test_a_grown_lun_still_shows_the_right_bytes(lone: lab.Lun, cli: Cli) -> None:
    path = story.make_disk(f"{lone.path}/a.raw", 4 * MIB, (0, noise(1, MIB)))
    cli.backup(path)
    os.truncate(lone.image, 96 * MIB)
    lone.unmount()
    lab.run("losetup", "--set-capacity", lone.disk)
    lab.run("e2fsck", "-fy", lone.disk, check=False)
    lab.run("resize2fs", lone.disk)
    lone.mount()
    story.write(path, (3 * MIB, noise(2, MIB)))
    big = story.make_disk(f"{lone.path}/big.raw", 70 * MIB, (0, noise(3, 40 * MIB)))
    document = cli.backup(path)
    assert document["disks"][0]["dirty_bytes"] == MIB
    os.unlink(big)
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert story.digest(out["disks"][0]["target"]) == story.digest(path)


def test_what_somebody_put_into_our_folder_is_not_touched(stage: Stage, cli: Cli) -> None:
    path = three_disks(stage)[0]
    cli.backup(path)
    stray = os.path.join(stage.outer.path, ".graincopy", "stray")
    with open(stray, "xb") as file:
        file.write(b"not yours")
    cli.backup(path)
    cli.ok("targets", "--reap")
    assert story.read(stray) == b"not yours"
