"""The whole method where the disk is a Ceph image: backup, increments, restore in place, undo, several images."""

from __future__ import annotations

import os

import pytest
import scene
import story
from guests import MIB, Guest
from story import GRAIN, Cli, noise


def test_an_increment_reads_what_changed_and_a_restore_writes_it_back(guest: Guest, cli: Cli) -> None:
    path = guest.make("web", 64 * MIB)
    guest.write("web", (0, noise(1, 3 * MIB)), (40 * MIB + 777, noise(2, 300_000)))
    first = cli.backup(path)
    assert first["disks"][0]["allocated"] <= 8 * MIB  # the rest of the image is never read
    before = guest.read("web")
    guest.write("web", (MIB, b"A" * 4096), (50 * MIB, noise(3, 100)))
    guest.discard("web", 40 * MIB, MIB)
    after = guest.read("web")
    second = cli.backup(path)
    disk = second["disks"][0]
    assert (second["base"], disk["change_map"]) == (first["restore_point"], "rbd fast-diff")
    assert disk["dirty_bytes"] <= 2 * GRAIN + MIB and disk["read_bytes"] <= 2 * GRAIN
    assert len(guest.traces()) == 2  # one checkpoint: the snapshot and its record
    cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert story.read(f"{cli.folder}/out/web") == after
    restored = cli.ok("restore", "latest~1", "--in-place")
    assert guest.read("web") == before
    assert restored["disks"][0]["written_bytes"] <= disk["dirty_bytes"]
    cli.ok("undo", restored["restore"])
    assert guest.read("web") == after
    cli.undamaged()


def test_zeros_of_a_trim_are_brought_back_as_zeros(guest: Guest, cli: Cli) -> None:
    path = guest.make("db", 16 * MIB)
    guest.write("db", (0, noise(1, 8 * MIB)))
    cli.backup(path)
    guest.discard("db", 2 * MIB, 4 * MIB)
    trimmed = guest.read("db")
    assert trimmed[2 * MIB : 6 * MIB] == bytes(4 * MIB)
    document = cli.backup(path)
    assert document["disks"][0]["read_bytes"] == 0 and document["disks"][0]["dirty_bytes"] == 4 * MIB
    guest.write("db", (3 * MIB, noise(2, MIB)))
    cli.ok("restore", "latest", "--in-place")
    assert guest.read("db") == trimmed


def test_volumes_says_what_an_image_is(guest: Guest, cli: Cli) -> None:
    path = guest.make("seen", 8 * MIB)
    (answer,) = cli.ok("volumes", path)
    assert (answer["driver"], answer["volume"], answer["source"]["size"]) == ("rbd", path, 8 * MIB)
    assert answer["source"]["incarnation"].startswith(guest.cluster.fsid())


def test_volumes_says_what_a_huge_image_costs(guest: Guest, cli: Cli) -> None:
    """Its map of objects is not small; larger objects are the way out."""
    tib = 1 << 40
    with guest.empty("huge", 128 * tib, 22) as fine, guest.empty("coarse", 128 * tib, 25) as coarse:
        answers = [one["claim"]["why"] for one in cli.ok("volumes", fine, coarse)]
    assert "copies its map of objects, 8 MiB: larger objects" in answers[0] and "map of objects" not in answers[1]


def test_no_checkpoint_leaves_nothing(guest: Guest, cli: Cli) -> None:
    path = guest.make("once", 8 * MIB)
    guest.write("once", (0, b"x" * MIB))
    cli.backup("--no-checkpoint", path)
    assert guest.traces() == []


def test_an_image_without_object_map_has_increments_too(guest: Guest, cli: Cli) -> None:
    path = guest.make("slow", 16 * MIB, features=5)
    guest.write("slow", (0, noise(1, 4 * MIB)))
    cli.backup(path)
    guest.write("slow", (2 * MIB + 5, b"B" * 10))
    second = cli.backup(path)["disks"][0]
    assert (second["change_map"], second["dirty_bytes"]) == ("rbd diff", GRAIN)


def test_several_images_and_a_namespace(guest: Guest, cli: Cli) -> None:
    guest.rbd("namespace", "create", "rbd/tenant", check=False)
    paths = [guest.make("one", 8 * MIB), guest.make("two", 8 * MIB)]
    guest.rbd("create", "--size", "8M", "rbd/tenant/three")
    try:
        paths.append("rbd:rbd/tenant/three")
        guest.write("one", (0, noise(1, 100)))
        guest.write("two", (MIB, noise(2, 100)))
        document = cli.backup(*paths)
        assert [disk["name"] for disk in document["disks"]] == ["one", "three", "two"]
        assert document["instant"] == "per file"  # a group is of one namespace, and nothing held the writers
        assert [disk["change_map"] for disk in cli.backup(*paths)["disks"]] == ["rbd fast-diff"] * 3
        targets = cli.ok("targets")["targets"]
        assert sorted(one["volume"] for one in targets) == sorted(paths)
        for one in guest.rbd("snap", "ls", "rbd/tenant/three", "--format", "json").split('"name":"')[1:]:
            guest.rbd("snap", "rm", f"rbd/tenant/three@{one.split(chr(34))[0]}")
    finally:
        guest.rbd("snap", "purge", "rbd/tenant/three", check=False)
        guest.rbd("rm", "rbd/tenant/three")
        guest.command("rados", "-p", "rbd", "--namespace", "tenant", "rm", "graincopy.targets", check=False)


def test_a_clone_shows_what_its_parent_has(guest: Guest, cli: Cli) -> None:
    guest.make("golden", 16 * MIB)
    guest.write("golden", (0, noise(1, 5 * MIB)), (9 * MIB, noise(2, MIB)))
    guest.rbd("snap", "create", "golden@v1")
    guest.rbd("clone", "--rbd-default-clone-format", "2", "golden@v1", "leaf")
    path = guest.own("leaf")
    first = cli.backup(path)["disks"][0]
    assert first["allocated"] >= 6 * MIB
    before = guest.read("leaf")
    assert before[: 5 * MIB] == noise(1, 5 * MIB)
    guest.write("leaf", (4 * MIB, b"own"), (12 * MIB, b"new"))
    with guest.open("leaf") as image:
        image.write_zeros(9 * MIB, MIB)  # hides the parent's bytes
    after = guest.read("leaf")
    second = cli.backup(path)["disks"][0]
    assert second["change_map"] == "rbd fast-diff" and second["read_bytes"] <= 3 * MIB
    cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert story.read(f"{cli.folder}/out/leaf") == after
    cli.ok("restore", "latest~1", "--in-place")
    assert guest.read("leaf") == before
    cli.undamaged()


@pytest.mark.parametrize("size", [12 * MIB, 6 * MIB + 4096])
def test_a_resized_image(guest: Guest, cli: Cli, size: int) -> None:
    path = guest.make("grows", 8 * MIB)
    guest.write("grows", (0, noise(1, 8 * MIB)))
    cli.backup(path)
    before = guest.read("grows")
    with guest.open("grows") as image:
        image.resize(size)
    guest.write("grows", (size - 100, noise(2, 100)))
    after = guest.read("grows")
    second = cli.backup(path)["disks"][0]
    assert (second["size"], second["change_map"]) == (size, "rbd fast-diff")
    cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert story.read(f"{cli.folder}/out/grows") == after
    restored = cli.ok("restore", "latest~1", "--in-place")
    assert guest.read("grows") == before
    cli.ok("undo", restored["restore"])
    assert guest.read("grows") == after


def test_an_image_made_anew_under_the_same_name_is_compared(guest: Guest, cli: Cli) -> None:
    path = guest.make("same", 8 * MIB)
    guest.write("same", (0, noise(1, MIB)))
    cli.backup(path)
    guest.rbd("rename", "same", "was")
    guest.own("was")
    guest.make("same", 8 * MIB)
    guest.write("same", (0, noise(2, MIB)))
    disk = cli.backup(path)["disks"][0]
    assert disk["change_map"].startswith("compared: the volume was recreated")
    cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    assert story.read(f"{cli.folder}/out/same") == guest.read("same")


def test_killed_at_every_point_and_reaped(guest: Guest, cli: Cli) -> None:
    path = guest.make("cut", 8 * MIB)
    guest.write("cut", (0, noise(1, MIB)))
    points = scene.steps_of(cli, "backup", path)
    assert len(points) >= 10
    for number, point in enumerate(points):
        guest.write("cut", (number * 100_000, noise(number, 5000)))
        scene.cut(cli, point, "backup", path)
        cli("targets", "--reap")
        assert len(guest.traces()) <= 2, f"{point}: {guest.traces()}"
        disk = cli("backup", path, "--json").json["disks"][0]
        assert disk["change_map"] == "rbd fast-diff"
        cli.ok("restore", "latest", "--to", f"{cli.folder}/{number}")
        assert story.read(f"{cli.folder}/{number}/cut") == guest.read("cut"), point
        os.unlink(f"{cli.folder}/{number}/cut")


def test_a_restore_that_was_killed_is_finished(guest: Guest, cli: Cli, long_watches: None) -> None:
    """The image is free again at once."""
    path = guest.make("back", 8 * MIB)
    guest.write("back", (0, noise(1, 4 * MIB)))
    cli.backup(path)
    before = guest.read("back")
    guest.write("back", (MIB, noise(2, 2 * MIB)))
    scene.cut(cli, "recorded", "restore", "latest", "--in-place")
    guest.await_alone("back")
    cli.ok("restore", "latest", "--in-place")
    assert guest.read("back") == before
