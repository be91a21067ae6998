"""Guest file systems that say what cannot be: each such file is named, and everything beside it comes out."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import guest_lab
import pytest
from guest_lab import MIB, file_disk, lab, needs, root_test
from test_guest_hostile import debugfs, extract, plain_ext4

from graincopy.app.host import SystemClock
from graincopy.core.errors import GuestUnreadable
from graincopy.views.guest import extract as extracting
from graincopy.views.guest import wire
from graincopy.views.guest.ext_blocks import BlockMap
from graincopy.views.guest.extract import extract_into
from graincopy.views.guest.locate import partitions_of
from graincopy.views.guest.metadata import Allowed
from graincopy.views.guest.partitions import Partition
from graincopy.views.guest.session import GuestReader

TIB = 1 << 40


def names(image: str, path: bytes = b"/") -> dict[bytes, wire.Answer]:
    """What a listing says, by name."""
    with file_disk(image) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock(), patience=60) as reader:
        return {one.path: one for one in reader.list(path) if isinstance(one, wire.Entry | wire.Problem)}


# --- sizes, owners and places ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["extent", "^extent,^64bit"])
def test_inodes_that_cannot_be_cost_only_themselves(tmp_path: Path, kind: str) -> None:
    tree = tmp_path / "tree"
    (tree / "dir").mkdir(parents=True)
    (tree / "dir" / "below").write_bytes(b"below")
    for name in ("most", "beyond", "far", "nobody", "attributes", "good", "sparse"):
        (tree / name).write_bytes(b"content" if name != "sparse" else b"")
    image = plain_ext4(tmp_path, "-O", kind, "-b", "4096")
    debugfs(
        image,
        f"sif most size {2**63 - 1}",
        f"sif beyond size {2**63}",
        "sif far size 0xffffffffffffffff",
        "sif nobody uid 0xffffffff",
        "sif attributes file_acl 0xffffff0",
        f"sif sparse size {4 * TIB - 1}",
        *(["sif dir block[0] 0xfffff0"] if kind != "extent" else ["sif dir size 0x7ffff000"]),
    )
    found = names(image)
    assert {name for name, one in found.items() if isinstance(one, wire.Problem)} == {b"beyond", b"far"}
    nobody, most = found[b"nobody"], found[b"most"]
    assert isinstance(nobody, wire.Entry) and (nobody.uid, nobody.gid) == (-1, 0)
    assert isinstance(most, wire.Entry) and most.size == 2**63 - 1
    problems = dict(extract(image, f"{tmp_path}/out"))
    assert problems.keys() == {b"most", b"beyond", b"far", b"dir"}
    assert "larger than" in problems[b"most"]
    for name in ("nobody", "attributes", "good"):
        assert (tmp_path / "out" / name).read_bytes() == b"content"
    assert (tmp_path / "out" / "sparse").stat().st_size == 4 * TIB - 1


def test_files_that_are_too_large_for_where_they_go_cost_only_themselves(tmp_path: Path) -> None:
    answers = [
        wire.Entry(path=b"large", kind="file", mode=0o644, size=2**63 - 1),
        wire.Hole(2**63 - 2),
        wire.Data(b"x"),
        wire.FileEnd(),
        wire.Entry(path=b"hole", kind="file", mode=0o644, size=2**63 - 1),
        wire.Hole(2**63 - 1),
        wire.FileEnd(),
        wire.Entry(path=b"longer", kind="file", mode=0o644, size=3),
        *(wire.Hole(2**64 - 1), wire.Data(b"x"), wire.FileEnd()),
        wire.Entry(path=b"shorter", kind="file", mode=0o644, size=3),
        *(wire.Data(b"x"), wire.FileEnd()),
        wire.Entry(path=b"good", kind="file", mode=0o644, size=4),
        *(wire.Data(b"good"), wire.FileEnd()),
    ]
    done = extract_into(iter(answers), f"{tmp_path}/out", b"", Allowed())
    if os.path.exists(tmp_path / "out" / "hole"):
        pytest.skip("this file system takes files of 8 EiB")
    assert os.listdir(tmp_path / "out") == ["good"]
    assert {path for path, _ in done.problems} == {b"large", b"hole", b"longer", b"shorter"}
    assert (done.files, done.size, done.failed) == (1, 4, 4)


@root_test
def test_owners_and_times_that_are_refused_are_told_and_the_file_stays(tmp_path: Path) -> None:
    entry = wire.Entry(path=b"file", kind="file", mode=0o4777, size=1, uid=2**32 - 1, gid=5)
    late = wire.Entry(path=b"late", kind="file", mode=0o644, size=1, mtime=2**64 - 1)
    data = [wire.Data(b"x"), wire.FileEnd()]
    folder = wire.Entry(path=b"folder", kind="directory", mode=0o755, uid=2**32 - 1)
    link = wire.Entry(path=b"link", kind="symlink", mode=0o777, target=b"x", uid=2**33)
    answers = [entry, *data, late, *data, folder, link]
    done = extract_into(iter(answers), f"{tmp_path}/out", b"", Allowed(setuid=True))
    assert sorted(os.listdir(tmp_path / "out")) == ["file", "folder", "late", "link"]
    assert (tmp_path / "out" / "file").read_bytes() == b"x" and done.files == 2
    assert b"link" in dict(done.problems)
    assert done.failed == len(done.problems) >= 1


def test_everything_is_durable_before_it_is_said_to_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[list[str]] = []
    monkeypatch.setattr(extracting, "_sync", lambda fd: synced.append(os.listdir(fd)))
    answers = [wire.Entry(path=b"file", kind="file", mode=0o644, size=1), wire.Data(b"x"), wire.FileEnd()]
    extract_into(iter(answers), f"{tmp_path}/out", b"", Allowed())
    assert synced == [["file"]]


# --- the older kind of block maps -----------------------------------------------------------------------


@pytest.mark.parametrize("block", [1024, 4096])
def test_block_maps_lead_to_every_byte(tmp_path: Path, block: int) -> None:
    """Direct blocks, and one to three levels of indirect ones, with holes at every level."""
    each = block // 4
    tree = tmp_path / "tree"
    tree.mkdir()
    places = [0, 5, 11, 12, 13, 12 + each - 1, 12 + each, 12 + each + each**2 - 1, 12 + each + each**2 + 7]
    with open(tree / "scattered", "wb") as file:
        for place in places:
            file.seek(place * block)
            file.write(os.urandom(block - 3))
    (tree / "plain").write_bytes(os.urandom(2 * MIB + 5))
    image = plain_ext4(tmp_path, "-O", "^extent,^64bit", "-b", str(block))
    assert extract(image, f"{tmp_path}/out") == []
    for name in ("scattered", "plain"):
        done = subprocess.run(["cmp", tree / name, tmp_path / "out" / name], check=False)
        assert done.returncode == 0
    assert (tmp_path / "out" / "scattered").stat().st_blocks * 512 <= len(places) * (64 << 10)


def test_a_block_map_that_leads_into_itself_ends_with_the_file() -> None:
    """Every table of the map is the map's own block: as many bytes as the file says, and not one more."""
    block, size = 1024, 300 * 1024 - 10
    image = struct.pack("<256L", *[1] * 256) * 2
    inode = bytearray(128)
    inode[0x28 : 0x28 + 60] = struct.pack("<15L", *[1] * 15)
    blocks = BlockMap(lambda offset, length: image[offset : offset + length], bytes(inode), block)
    runs = list(blocks.runs(size))
    assert runs[0][0] == 0 and max(stop for _, stop in runs) == 300 * block
    assert all(before[1] == after[0] for before, after in itertools.pairwise(runs))
    assert blocks.read(299 * block, block) == image[block : 2 * block]
    inode[0x28:0x2C] = struct.pack("<L", 99)
    broken = BlockMap(lambda offset, length: image[offset : offset + length], bytes(inode), block)
    with pytest.raises(ValueError, match="beyond"):
        broken.read(0, block)


# --- other file systems ---------------------------------------------------------------------------------


@root_test
@needs("ntfs-3g")
def test_an_ntfs_directory_that_holds_its_own_parent(tmp_path: Path) -> None:
    (tmp_path / "tree" / "outer" / "cycledir").mkdir(parents=True)
    (tmp_path / "tree" / "outer" / "file").write_bytes(b"good")
    image = guest_lab.make_ntfs(f"{tmp_path}/ntfs", f"{tmp_path}/tree", os.fspath(tmp_path), 16 * MIB)
    name = "cycledir".encode("utf-16-le")
    with open(image, "r+b") as file:
        data = bytearray(file.read())
        changed = 0
        at = data.find(name)
        while at >= 0:
            key = at - 66
            if struct.unpack_from("<H", data, key - 6)[0] == 66 + len(name):  # no record of its own
                data[key - 16 : key - 8] = data[key : key + 8]
                changed += 1
            at = data.find(name, at + 1)
        assert changed
        file.seek(0)
        file.write(data)
    problems = extract(image, f"{tmp_path}/out")
    assert [path for path, reason in problems if "inside itself" in reason] == [b"outer/cycledir"]
    assert (tmp_path / "out" / "outer" / "file").read_bytes() == b"good"


@root_test
@needs("xfs_db")
def test_an_xfs_directory_that_holds_its_own_parent(tmp_path: Path) -> None:
    (tmp_path / "tree" / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "outer" / "file").write_bytes(b"good")
    image = guest_lab.make_xfs(f"{tmp_path}/xfs", f"{tmp_path}/tree", os.fspath(tmp_path))
    with guest_lab.mounted(image, os.fspath(tmp_path)) as point:
        inner, outer = os.stat(f"{point}/outer/inner").st_ino, os.stat(f"{point}/outer").st_ino
        root = os.stat(point).st_ino
    entries = lab.run("xfs_db", "-c", f"inode {outer}", "-c", "print u3.sfdir3", image)
    number = next(n for n in range(4) if f"list[{n}].inumber.i4 = {inner}" in entries)
    lab.run("xfs_db", "-x", "-c", f"inode {outer}", "-c", f"write u3.sfdir3.list[{number}].inumber.i4 {root}", image)
    problems = extract(image, f"{tmp_path}/out")
    assert [path for path, _ in problems] == [b"outer/inner"]
    assert (tmp_path / "out" / "outer" / "file").read_bytes() == b"good"


@root_test
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_ten_thousand_directories_inside_each_other(tmp_path: Path, kind: str) -> None:
    image, depth = f"{tmp_path}/image", 10_000
    options = ("-F", "-N", "12000") if kind == "ext4" else ()
    lab.run(f"mkfs.{kind}", "-q", *options, guest_lab.sparse(image, 320 * MIB))
    with guest_lab.mounted(image, os.fspath(tmp_path)) as point:
        Path(point, "good").write_bytes(b"good")
        fd = os.open(point, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("d", dir_fd=fd)
            inner = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = inner
        os.close(fd)
    problems = extract(image, f"{tmp_path}/out")
    assert len(problems) == 1 and "deeper than" in problems[0][1]
    assert (tmp_path / "out" / "good").read_bytes() == b"good"
    with file_disk(image) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        below = [one.path for one in reader.list(b"/d" * 400) if isinstance(one, wire.Entry)]
    assert below == [b"d"], "what lies deep can be named"


@root_test
def test_more_attributes_than_can_be_passed_on_cost_only_their_file(tmp_path: Path) -> None:
    image = f"{tmp_path}/btrfs"
    lab.run("mkfs.btrfs", "-q", guest_lab.sparse(image, 192 * MIB))
    with guest_lab.mounted(image, os.fspath(tmp_path)) as point:
        for name in ("many", "good"):
            Path(point, name).write_bytes(b"content")
        for number in range(100):
            os.setxattr(f"{point}/many", f"user.{number}", os.urandom(8000))
        os.setxattr(f"{point}/good", "user.x", b"y")
        os.utime(f"{point}/good", ns=(0, 2**62))
    found = names(image)
    assert isinstance(found[b"many"], wire.Problem) and isinstance(found[b"good"], wire.Entry)
    assert [path for path, _ in extract(image, f"{tmp_path}/out")] == [b"many"]
    assert (tmp_path / "out" / "good").read_bytes() == b"content"


# --- somebody else in the directory that is extracted to ----------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_bytes(b"theirs")
    os.chmod(folder / "file", 0o600)
    return folder


def untouched(outside: Path) -> bool:
    facts = os.stat(outside / "file")
    same = (facts.st_mode & 0o7777, facts.st_nlink, facts.st_uid) == (0o600, 1, os.geteuid())
    return same and os.listdir(outside) == ["file"] and (outside / "file").read_bytes() == b"theirs"


def test_names_that_are_taken_meanwhile_are_never_followed(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two system calls of ours: a new directory or pipe is swapped for a link, a file is there before."""
    out = tmp_path / "out"
    mkdir, mkfifo = os.mkdir, os.mkfifo

    def swapped_directory(name: bytes, mode: int, *, dir_fd: int | None = None) -> None:
        mkdir(name, mode, dir_fd=dir_fd)
        os.rename(name, b"moved", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        os.symlink(outside, name, dir_fd=dir_fd)

    def swapped_pipe(name: bytes, mode: int, *, dir_fd: int | None = None) -> None:
        mkfifo(name, mode, dir_fd=dir_fd)
        os.unlink(name, dir_fd=dir_fd)
        os.symlink(outside / "file", name, dir_fd=dir_fd)

    monkeypatch.setattr("graincopy.views.guest.extract.os.mkfifo", swapped_pipe)
    out.mkdir()
    os.symlink(outside / "file", out / "file")
    os.symlink(outside / "new", out / "new")
    monkeypatch.setattr("graincopy.views.guest.extract.os.mkdir", swapped_directory)
    data = [wire.Data(b"evil"), wire.FileEnd()]
    answers = [
        *(wire.Entry(path=b"file", kind="file", mode=0o777, size=4), *data),
        *(wire.Entry(path=b"new", kind="file", mode=0o777, size=4), *data),
        wire.Entry(path=b"linked", kind="file", mode=0o777, size=4, same_as=b"file"),
        wire.Entry(path=b"pipe", kind="fifo", mode=0o777, uid=os.geteuid(), gid=os.getegid()),
        wire.Entry(path=b"dir", kind="directory", mode=0o777),
        *(wire.Entry(path=b"dir/file", kind="file", mode=0o777, size=4), *data),
        *(wire.Entry(path=b"dir/below", kind="file", mode=0o777, size=4), *data),
        wire.Entry(path=b"..", kind="directory", mode=0o777),
        *(wire.Entry(path=b"../escaped", kind="file", mode=0o777, size=4), *data),
    ]
    done = extract_into(iter(answers), os.fspath(out), b"", Allowed(setuid=True))
    assert untouched(outside)
    assert not os.path.lexists(tmp_path / "escaped")
    assert {b"file", b"new", b"dir", b"dir/file", b"dir/below", b"..", b"../escaped"} <= dict(done.problems).keys()


def test_a_neighbour_that_swaps_directories_for_links_all_the_time(tmp_path: Path, outside: Path) -> None:
    out, over = tmp_path / "out", threading.Event()
    out.mkdir()

    def swap() -> None:
        while not over.is_set():
            for name in os.listdir(out):
                try:
                    os.rename(out / name, tmp_path / f"taken-{name}")
                    os.symlink(outside, out / name)
                except OSError:
                    continue

    def answers() -> Iterator[wire.Answer]:
        for number in range(300):
            yield wire.Entry(path=b"d%d" % number, kind="directory", mode=0o777)
            yield wire.Entry(path=b"d%d/file" % number, kind="file", mode=0o777, size=1)
            yield wire.Data(b"x")
            yield wire.FileEnd()
            yield wire.Entry(path=b"d%d/inner" % number, kind="directory", mode=0o777)

    neighbour = threading.Thread(target=swap)
    neighbour.start()
    try:
        extract_into(answers(), os.fspath(out), b"", Allowed())
    finally:
        over.set()
        neighbour.join()
    assert untouched(outside)


@pytest.mark.parametrize("path", [b"..", b"../x", b"a/../x", b"/etc/x", b".", b"a//b", b"a\0b"])
def test_paths_that_lead_elsewhere_are_not_believed(path: bytes) -> None:
    with pytest.raises(wire.WireBroken):
        wire.checked(wire.Entry(path=path, kind="file", mode=0o644))


# --- a reader that wants too much -----------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (8 * 4096 - 512, 1024), (1 << 40, 512), (4096 - 1, 512)])
def test_bytes_of_other_partitions_are_never_handed_over(
    tmp_path: Path, offset: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = "import os, sys; fd = int(sys.argv[1]); os.write(fd, bytes.fromhex({!r})); os.read(fd, 1); os.read(fd, 1)"
    body = wire.WANTED.pack(offset, length)
    said = wire.HEADER.pack(wire.WANT, len(body)) + body
    monkeypatch.setattr("graincopy.views.guest.process.START", asks.format(said.hex()))
    with file_disk(guest_lab.sparse(f"{tmp_path}/disk", MIB)) as disk:
        partition = Partition(1, 4096, 7 * 4096, "", "ext4", "tsk")
        with pytest.raises(GuestUnreadable, match="outside of its partition"):
            GuestReader(disk, partition, SystemClock(), 30).__enter__()
        assert disk.read_bytes == 0
