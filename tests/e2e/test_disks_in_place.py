"""Disks that are cloned where they lie, on XFS and on Btrfs: of all sizes, names and kinds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import lab
import pytest
import story
from story import GRAIN, MIB, Cli, noise

from graincopy.core.errors import printable
from graincopy.volumes import ioctl

pytestmark = pytest.mark.root

TIB = 1 << 40


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def file_system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.ReflinkFs]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab.ReflinkFs(tmp_path_factory.mktemp("files"), request.param, 512 * MIB) as made:
        yield made


@pytest.fixture
def folder(file_system: lab.ReflinkFs, request: pytest.FixtureRequest) -> str:
    """A fresh folder on it."""
    path = os.path.join(file_system.path, f"t{abs(hash(request.node.name)):x}")
    os.mkdir(path)
    return path


def restored(cli: Cli, point: str = "latest") -> list[str]:
    """The disks of ``point`` as new files, in the order of the point."""
    out = f"{cli.folder}/out-{len(os.listdir(cli.folder))}"
    return [disk["target"] for disk in cli.ok("restore", point, "--to", out)["disks"]]


def test_a_disk_that_is_cloned_in_place(folder: str, cli: Cli) -> None:
    path = story.make_disk(f"{folder}/a.raw", 8 * MIB, (0, noise(1, MIB)), (5 * MIB, noise(2, 70_000)))
    neighbour = story.make_disk(f"{folder}/b.raw", 4 * MIB, (0, noise(3, 4 * MIB)))
    first = cli.backup(path)
    assert (first["disks"][0]["volume"], first["freeze_ms"]) == (f"reflink:{path}", None)
    assert (first["instant"], cli.backup(path, neighbour)["instant"]) == ("one", "per file")
    assert story.bill(first) < 2 * MIB
    before = story.read(path)
    story.write(path, (4 * GRAIN, b"x" * 100))
    story.write(neighbour, (0, noise(4, MIB)))
    second = cli.backup(path)["disks"][0]
    assert (second["change_map"], second["dirty_bytes"], second["read_bytes"]) == ("extents", GRAIN, GRAIN)
    now = story.read(path)
    restore = cli.ok("restore", first["restore_point"], "--in-place")
    assert story.read(path) == before
    assert restore["disks"][0]["written_bytes"] == GRAIN
    cli.ok("undo", restore["restore"])
    assert story.read(path) == now
    cli.undamaged()


@pytest.mark.parametrize("size", [0, 1, 511, 513, GRAIN - 1, GRAIN, GRAIN + 1, 3 * MIB + 12345])
def test_sizes_need_not_be_multiples_of_anything(folder: str, cli: Cli, size: int) -> None:
    path = f"{folder}/odd.raw"
    with open(path, "xb") as file:
        file.write(noise(size, size))
    for content in (noise(size, size), bytes(size), noise(size + 1, size // 2 + 3)):
        with open(path, "r+b") as file:
            file.write(content)
            file.truncate(len(content))
        document = cli.backup(path)
        assert document["disks"][0]["size"] == len(content)
        assert story.read(restored(cli)[0]) == content
    cli.ok("restore", "latest~2", "--in-place")
    assert story.read(path) == noise(size, size)


def test_a_tebibyte_with_a_few_mebibytes_in_it(folder: str, cli: Cli) -> None:
    places = (0, 3 * GRAIN + 5, TIB // 3, TIB - 5)
    path = story.make_disk(f"{folder}/huge.raw", TIB, *((at, b"here" * 1) for at in places))
    lab.write_at(path, (TIB // 2, noise(1, 3 * MIB)))
    disk = cli.backup(path)["disks"][0]
    assert disk["size"] == TIB
    assert disk["read_bytes"] < 4 * MIB
    story.write(path, (TIB // 2 + 7, b"later"))
    disk = cli.backup(path)["disks"][0]
    assert (disk["dirty_bytes"], disk["read_bytes"]) == (GRAIN, GRAIN)
    assert cli.ok("restore", "latest~1", "--in-place")["disks"][0]["written_bytes"] == GRAIN
    out = cli.ok("restore", "latest~1", "--to", f"{folder}/out")["disks"][0]["target"]
    assert os.path.getsize(out) == TIB
    assert story.allocated(out) < 5 * MIB
    for copy in (path, out):
        with open(copy, "rb") as file:
            for at in places:
                file.seek(at)
                assert file.read(4) == b"here"
            file.seek(TIB // 2)
            assert file.read(3 * MIB) == noise(1, 3 * MIB)


def test_what_looks_like_qcow2_is_stored_byte_for_byte(folder: str, cli: Cli) -> None:
    backing = b"/etc/passwd"
    header = b"QFI\xfb" + (3).to_bytes(4, "big") + (104).to_bytes(8, "big") + len(backing).to_bytes(4, "big")
    header += (16).to_bytes(4, "big") + MIB.to_bytes(8, "big") + bytes(72)
    path = story.make_disk(f"{folder}/guest.raw", MIB, (0, header + backing))
    disk = cli.backup(path)["disks"][0]
    assert (disk["format"], disk["representation"], disk["size"]) == ("raw", "file", MIB)
    assert story.read(restored(cli)[0]) == story.read(path)


def test_equal_file_names_get_distinct_names(folder: str, cli: Cli) -> None:
    paths = [f"{folder}/{name}/disk.raw" for name in ("web", "db", "db/disk.raw.d")]
    for number, path in enumerate(paths):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        story.make_disk(path, GRAIN, (0, noise(number, 99)))
    document = cli.backup(*paths)
    names = {disk["path"]: disk["name"] for disk in document["disks"]}
    assert len(set(names.values())) == 3
    assert names[paths[0]].endswith("web_disk.raw")
    out = cli.ok("restore", "latest", "--to", f"{cli.folder}/out")
    for path in paths:
        assert story.read(f"{cli.folder}/out/{names[path]}") == story.read(path)
    assert len(out["disks"]) == 3


def test_names_with_newlines_and_bytes_that_are_no_text(folder: str, cli: Cli) -> None:
    name = os.fsdecode(b"a disk\n\xff\xfe.raw")
    path = story.make_disk(f"{folder}/{name}", MIB, (5, b"content"))
    document = cli.backup(path)
    assert document["disks"][0]["name"] == "a disk\n\\xff\\xfe.raw"
    shown = cli("points", "--json")
    shown.out.encode("utf-8")  # no surrogate gets out
    assert json.loads(shown.out)[0]["disks"][0]["path"].endswith("a disk\n\\xff\\xfe.raw")
    for_people = cli("show", "latest")
    assert printable(name) in for_people.out
    assert "\udcff" not in for_people.out
    target = f"{cli.folder}/out/{name}"
    cli.ok("restore", "latest", "--to", f"{cli.folder}/out", "--disk", name)
    assert story.read(target) == story.read(path)
    os.truncate(path, 3)
    cli.ok("restore", "latest", "--in-place")
    assert story.read(path) == story.read(target)
    missing = cli("backup", f"{path}-not")
    assert (missing.code, missing.err.count("\n")) == (11, 2)
    missing.err.encode("utf-8")


def test_a_repository_at_a_path_of_odd_bytes(folder: str, tmp_path: object) -> None:
    place = os.fsdecode(b"my backups\n\xff of vms")
    cli = Cli(f"{tmp_path}/graincopy", repo=f"{tmp_path}/{place}").init()
    path = story.make_disk(f"{folder}/a.raw", MIB, (5, noise(1, 5000)))
    document = cli.backup(path)
    assert story.read(restored(cli)[0]) == story.read(path)
    cli.undamaged()
    # as an option and as a URL it is the same repository
    assert cli("points", "--repo", f"file://{cli.repo}", environ={"GRAINCOPY_REPO": "/nowhere"}).code == 0
    assert cli.ok("points")[0]["restore_point"] == document["restore_point"]


def test_two_runs_on_one_disk_do_not_need_each_other(folder: str, cli: Cli) -> None:
    """Points go in any order; what is left restores."""
    path = story.make_disk(f"{folder}/a.raw", 4 * MIB, (0, noise(0, MIB)))
    states = []
    for turn in range(6):
        story.write(path, (turn * GRAIN, noise(turn, 200)))
        cli.backup(path)
        states.append(story.read(path))
    assert len(cli.ok("expire", "--keep-last", "4")["removed"]) == 2
    assert len(cli.ok("points")) == 4
    for back in range(4):
        assert story.read(restored(cli, f"latest~{back}")[0]) == states[5 - back]
    difference = cli.ok("diff", "latest~2", "latest")["disks"][0]
    assert difference["extents"] == [[4 * GRAIN, 6 * GRAIN]]
    assert difference["differing_bytes"] == 2 * GRAIN


@pytest.mark.parametrize("file_system", ["btrfs"], indirect=True)
def test_compressed_files_are_compared_and_right(folder: str, cli: Cli) -> None:
    lab.run("btrfs", "property", "set", folder, "compression", "zstd")
    path = story.make_disk(f"{folder}/a.raw", 4 * MIB, (0, b"compressible " * 100_000))
    inline = story.make_disk(f"{folder}/tiny.raw", 100, (0, b"inline"))
    cli.backup(path, inline)
    for turn in range(3):
        story.write(path, (turn * GRAIN * 3, b"another line"))
        story.write(inline, (turn, b"!"))
        cli.backup(path, inline)
        out = cli.ok("restore", "latest", "--to", f"{folder}/out{turn}")["disks"]
        assert [story.read(disk["target"]) for disk in out] == [story.read(path), story.read(inline)]
    before = [story.read(path), story.read(inline)]
    story.write(path, (0, b"gone"))
    story.write(inline, (0, b"gone"))
    cli.ok("restore", "latest", "--in-place")
    assert [story.read(path), story.read(inline)] == before


@pytest.mark.parametrize("file_system", ["btrfs"], indirect=True)
def test_nodatacow_is_kept_and_writes_in_place_are_seen(folder: str, cli: Cli) -> None:
    lab.run("chattr", "+C", folder)
    path = story.make_disk(f"{folder}/a.raw", 4 * MIB, (0, noise(1, MIB)))
    assert has_nocow(path)
    cli.backup(path)
    states = [story.read(path)]
    for turn in range(3):
        story.write(path, (turn * GRAIN, b"in place"))
        states.append(story.read(path))
        assert cli.backup(path)["disks"][0]["dirty_bytes"] == GRAIN
    cli.ok("restore", "latest~3", "--in-place")
    assert story.read(path) == states[0]
    os.unlink(path)
    cli.ok("restore", "latest~1", "--in-place")
    assert story.read(path) == states[2]
    assert has_nocow(path)


def has_nocow(path: str) -> bool:
    with open(path, "rb") as file:
        return bool(ioctl.inode_flags(file.fileno()) & ioctl.FS_NOCOW_FL)


@pytest.mark.parametrize("file_system", ["btrfs"], indirect=True)
def test_what_another_file_system_cannot_keep_is_said_of_which_disk(folder: str, cli: Cli) -> None:
    path = story.make_disk(f"{folder}/a.raw", MIB, (0, b"text"))
    lab.run("btrfs", "property", "set", path, "compression", "zstd")
    cli.backup(path)
    done = cli.warned("restore", "latest", "--to", f"{cli.folder}/out")
    assert done["warnings"][0].startswith("a.raw: extended attribute btrfs.compression could not be set")
    assert story.read(f"{cli.folder}/out/a.raw") == story.read(path)


@pytest.mark.parametrize("file_system", ["btrfs"], indirect=True)
def test_nodatacow_comes_back_where_the_folder_does_not_give_it(folder: str, cli: Cli) -> None:
    path = f"{folder}/a.raw"
    lab.sparse(path, 0)
    lab.run("chattr", "+C", path)
    lab.write_at(path, (0, noise(1, MIB)))
    cli.backup(path)
    os.unlink(path)
    cli.ok("restore", "latest", "--in-place")
    assert has_nocow(path)
    assert story.read(path) == noise(1, MIB)
    out = cli.ok("restore", "latest", "--to", f"{folder}/out")["disks"][0]["target"]
    assert has_nocow(out)
    assert story.read(out) == noise(1, MIB)


def test_a_device_over_an_image_that_can_be_cloned(folder: str, cli: Cli) -> None:
    image = story.make_disk(f"{folder}/lun.img", 8 * MIB, (0, noise(1, MIB)))
    device = lab.bind(image)
    try:
        first = cli.backup(device)["disks"][0]
        assert (first["driver"] in ("reflink", "btrfs"), first["size"]) == (True, 8 * MIB)
        assert first["volume"].startswith(f"{first['driver']}:") and first["volume"].endswith("/lun.img")
        story.write(device, (5 * GRAIN, b"through the device"))
        second = cli.backup(device)["disks"][0]
        assert (second["change_map"], second["dirty_bytes"], second["read_bytes"]) == ("extents", GRAIN, GRAIN)
        assert story.read(restored(cli)[0])[5 * GRAIN :].startswith(b"through the device")
        restore = cli.ok("restore", "latest~1", "--in-place")["restore"]
        assert story.read(device)[5 * GRAIN :].startswith(noise(1, MIB)[5 * GRAIN :])
        cli.ok("undo", restore)
        assert story.read(device)[5 * GRAIN :].startswith(b"through the device")
    finally:
        lab.unbind(device)
