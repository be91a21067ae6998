"""Files of real file systems through the locked-away reader, against the trees that they were made from."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import guest_lab
import pytest
from guest_lab import MIB, FileDisk, file_disk, lab, needs, root_test

from graincopy.app.host import SystemClock
from graincopy.core.errors import GuestPathMissing, GuestUnreadable, OutputExists, UsageWrong
from graincopy.views.guest import wire
from graincopy.views.guest.extract import extract_into, extract_stream
from graincopy.views.guest.locate import Place, located, parse_place, partitions_of
from graincopy.views.guest.metadata import Allowed, Extracted
from graincopy.views.guest.session import GuestReader

LATEST = (2**31 - 1 + 3 * 2**32) * 10**9  # nanoseconds that ext4 can hold: more than 63 bits


@contextmanager
def reading(image: str, number: int | None = None) -> Iterator[tuple[FileDisk, GuestReader]]:
    with file_disk(image) as disk:
        parts = partitions_of(disk)
        one = parts[0] if number is None else next(part for part in parts if part.number == number)
        with GuestReader(disk, one, SystemClock()) as reader:
            yield disk, reader


def extracted(image: str, path: bytes, to: str, name: bytes = b"", allowed: Allowed | None = None) -> Extracted:
    with reading(image) as (_, reader):
        return extract_into(reader.fetch(path), to, name, allowed or Allowed())


def names(reader: GuestReader, path: bytes) -> set[bytes]:
    return {one.path for one in reader.list(path) if isinstance(one, wire.Entry)}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> str:
    return guest_lab.make_tree(os.fspath(tmp_path_factory.mktemp("tree") / "tree"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, tree: str) -> dict[str, str]:
    """One disk of each kind that holds ``tree``."""
    folder = os.fspath(tmp_path_factory.mktemp("images"))
    made = {
        "ext4": guest_lab.make_ext4(f"{folder}/ext4", tree),
        "ext3": guest_lab.make_ext4(f"{folder}/ext3", tree, 96 * MIB, "-O", "^extents,^64bit,^flex_bg", "-b", "1024"),
        "ext4-4K": guest_lab.make_ext4(f"{folder}/ext4-4K", tree, 96 * MIB, "-b", "4096", "-O", "^dir_index"),
    }
    if os.geteuid() == 0:
        made["btrfs"] = guest_lab.make_btrfs(f"{folder}/btrfs", tree)
        made["xfs"] = guest_lab.make_xfs(f"{folder}/xfs", tree, folder)
        made["ext4-inline"] = guest_lab.make_ext4(f"{folder}/inline", tree, 96 * MIB, "-O", "inline_data")
    return made


KINDS = ["ext4", "ext3", "ext4-4K", *(pytest.param(kind, marks=pytest.mark.root) for kind in ("xfs", "btrfs"))]


@pytest.fixture
def image(images: dict[str, str], kind: str) -> str:
    if kind not in images:
        pytest.skip("needs root")
    return images[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_tree_comes_out_as_it_went_in(image: str, tree: str, tmp_path: Path) -> None:
    done = extracted(image, b"/", f"{tmp_path}/out", allowed=Allowed(setuid=True))
    expected = guest_lab.describe(tree, times=False)
    found = guest_lab.describe(f"{tmp_path}/out", times=False)
    assert {path for path in found if path != b"lost+found"} == expected.keys()
    for path, facts in expected.items():
        assert found[path] == facts, path
    assert done.failed == 0 and done.skipped == 0
    assert os.stat(f"{tmp_path}/out/sparse").st_blocks * 512 < 2 * MIB, "holes are holes"
    assert os.path.samefile(f"{tmp_path}/out/zhard", f"{tmp_path}/out/etc/hosts"), "one file with two names"


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.root)])
def test_times_come_with_it(image: str, tree: str, tmp_path: Path) -> None:
    extracted(image, b"/etc", f"{tmp_path}/out", b"etc")
    for name in ("etc/hosts", "etc"):
        assert os.stat(f"{tmp_path}/out/{name}").st_mtime_ns // 10**9 == 1_500_000_000, name


@pytest.mark.parametrize("kind", KINDS)
def test_setuid_and_setgid_come_only_when_asked_for(image: str, tree: str, tmp_path: Path) -> None:
    done = extracted(image, b"/", f"{tmp_path}/out")
    expected = guest_lab.without_privileges(guest_lab.describe(tree, times=False))
    found = guest_lab.describe(f"{tmp_path}/out", times=False)
    assert {path: found[path] for path in expected} == expected
    assert done.stripped == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_listing_has_every_name_whatever_its_bytes(image: str, tree: str) -> None:
    with reading(image) as (_, reader):
        assert names(reader, b"/") - {b"lost+found"} == set(os.listdir(os.fsencode(tree)))
        entries = {one.path: one for one in reader.list(b"/etc") if isinstance(one, wire.Entry)}
    facts = os.stat(f"{tree}/etc/hosts")
    assert (entries[b"hosts"].size, entries[b"hosts"].mode, entries[b"hosts"].kind) == (20, 0o644, "file")
    assert (entries[b"hosts"].uid, entries[b"hosts"].gid) == (facts.st_uid, facts.st_gid)
    assert entries[b"link"].target == b"hosts"


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.root)])
def test_links_lead_where_they_would_in_the_guest(image: str, tree: str) -> None:
    with reading(image) as (_, reader):
        chunks: list[bytes] = []
        for path in (b"/up", b"/etc/link", b"/folder/link", b"/etc/../etc/./hosts", b"etc/hosts"):
            chunks.clear()
            answers = reader.fetch(path, follow=True)
            extract_stream(answers, chunks.append, "it")
            assert b"".join(chunks) == b"127.0.0.1 localhost\n", path
        assert isinstance(reader.look(b"/up"), wire.Entry)
        assert names(reader, b"/folder") == names(reader, b"/etc")


@pytest.mark.parametrize("kind", ["ext4", pytest.param("xfs", marks=pytest.mark.root)])
def test_near_names_are_told_for_one_that_is_not_there(image: str) -> None:
    with reading(image) as (_, reader):
        assert reader.look(b"/etc/hosst") == wire.Missing(b"/etc", (b"hosts",))
        assert reader.look(b"/ETC/hosts") == wire.Missing(b"/", (b"etc",))
        assert reader.look(b"/etc/hosts/below") == wire.Missing(b"/etc/hosts", ())
        assert reader.look(b"/etc/" + b"x" * 300) == wire.Missing(b"/etc", ())


@root_test
def test_data_inside_inodes_is_read_by_the_kernel(images: dict[str, str], tree: str, tmp_path: Path) -> None:
    extracted(images["ext4-inline"], b"/etc", f"{tmp_path}/out", b"etc")
    with open(f"{tmp_path}/out/etc/hosts", "rb") as file:
        assert file.read() == b"127.0.0.1 localhost\n"


@root_test
def test_reading_through_the_kernel_leaves_nothing(images: dict[str, str]) -> None:
    before = (_loops(), _mounts())
    for kind in ("xfs", "btrfs"):
        with reading(images[kind]) as (_, reader):
            assert b"etc" in names(reader, b"/")
            assert _mounts() == before[1], "nobody else sees the mount"
    assert (_loops(), _mounts()) == before


@root_test
def test_reading_leaves_the_disk_as_it_is(images: dict[str, str], tmp_path: Path) -> None:
    """Also one whose log is not empty: it is neither replayed nor written."""
    dirty = f"{tmp_path}/dirty"
    with guest_lab.mounted(images["xfs"], os.fspath(tmp_path)) as point:
        with open(f"{point}/fresh", "wb") as file:
            file.write(b"fresh")
        lab.run("cp", "--sparse=always", images["xfs"], dirty)  # as after a power cut
    before = lab.run("sha256sum", dirty)
    with reading(dirty) as (_, reader):
        assert b"etc" in names(reader, b"/")
    assert lab.run("sha256sum", dirty) == before


def _loops() -> str:
    return "\n".join(line for line in lab.run("losetup", "--all").splitlines() if "fuse" in line or "/proc/" in line)


def _mounts() -> str:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return "".join(line for line in file if "graincopy" in line)


# --- ext4 written by the kernel -----------------------------------------------------------------------


@root_test
def test_what_only_a_mounted_ext4_makes(tmp_path: Path) -> None:
    """Unwritten extents over old data, extended attributes, lists, owners beyond 16 bits, devices, capabilities."""
    (tmp_path / "empty").mkdir()
    image = guest_lab.make_ext4(f"{tmp_path}/ext4", f"{tmp_path}/empty")
    with guest_lab.mounted(image, os.fspath(tmp_path)) as point:
        with open(f"{point}/old", "wb") as file:
            file.write(b"secret" * MIB)
        lab.run("sync", "-f", point)
        os.unlink(f"{point}/old")
        lab.run("sync", "-f", point)
        lab.run("fallocate", "--length", str(4 * MIB), f"{point}/unwritten")
        with open(f"{point}/unwritten", "r+b") as file:
            file.seek(MIB)
            file.write(b"written")
        lab.run("setfattr", "-n", "user.note", "-v", "x" * 500, f"{point}/unwritten")
        lab.run("setfattr", "-n", "user.small", "-v", "y", f"{point}/unwritten")
        os.chown(f"{point}/unwritten", 70000, 80000)
        for name, nanoseconds in (
            ("later", 5_000_000_000_123_456_789),
            ("earlier", -1_234_567_890_876_543_211),
            ("latest", LATEST),
        ):
            with open(f"{point}/{name}", "wb"):
                os.utime(f"{point}/{name}", ns=(nanoseconds, nanoseconds))
        os.mknod(f"{point}/disk", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
        os.mknod(f"{point}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        attribute = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep
        os.setxattr(f"{point}/unwritten", "security.capability", attribute)
        acl = bytes.fromhex("0200000001000600ffffffff02000600e803000004000400ffffffff10000600ffffffff20000000ffffffff")
        os.setxattr(f"{point}/unwritten", "system.posix_acl_access", acl)
    done = extracted(image, b"/", f"{tmp_path}/out")
    facts = os.stat(f"{tmp_path}/out/unwritten")
    with open(f"{tmp_path}/out/unwritten", "rb") as file:
        assert file.read() == bytes(MIB) + b"written" + bytes(3 * MIB - 7)
    assert (facts.st_uid, facts.st_gid) == (70000, 80000)
    with reading(image) as (_, reader):
        told = {one.path: one for one in reader.list(b"/") if isinstance(one, wire.Entry)}
    assert (told[b"later"].mtime, told[b"later"].atime) == (5_000_000_000_123_456_789,) * 2
    assert told[b"earlier"].mtime == -1_234_567_890_876_543_211
    assert told[b"latest"].mtime == LATEST
    assert os.stat(f"{tmp_path}/out/latest").st_mtime_ns // 10**9 in (LATEST // 10**9, 2**31 - 1)  # what it can hold
    assert os.getxattr(f"{tmp_path}/out/unwritten", "user.note") == b"x" * 500
    assert os.getxattr(f"{tmp_path}/out/unwritten", "user.small") == b"y"
    assert os.getxattr(f"{tmp_path}/out/unwritten", "system.posix_acl_access") == acl
    assert "security.capability" not in os.listxattr(f"{tmp_path}/out/unwritten")
    assert not os.path.lexists(f"{tmp_path}/out/disk") and done.skipped == 2
    extracted(image, b"/", f"{tmp_path}/all", allowed=Allowed(devices=True, setuid=True))
    assert os.stat(f"{tmp_path}/all/disk").st_rdev == os.makedev(259, 70000)
    assert stat.S_ISCHR(os.stat(f"{tmp_path}/all/null").st_mode)
    assert os.getxattr(f"{tmp_path}/all/unwritten", "security.capability") == attribute


# --- NTFS ---------------------------------------------------------------------------------------------


@root_test
@needs("ntfs-3g")
def test_ntfs_with_what_windows_makes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "Users" / "Zoë").mkdir(parents=True)
    (source / "Users" / "Zoë" / "Übung 😀.txt").write_bytes(b"hello")
    (source / "big").write_bytes(os.urandom(5 * MIB + 3))
    image = guest_lab.make_ntfs(f"{tmp_path}/ntfs", os.fspath(source), os.fspath(tmp_path))
    with guest_lab.ntfs(image, os.fspath(tmp_path)) as point:
        os.mkdir(f"{point}/packed")
        lab.run("setfattr", "-h", "-n", "system.ntfs_attrib", "-v", "0x00080000", f"{point}/packed")
        with open(f"{point}/packed/text", "wb") as file:
            file.write(b"the same again " * 40000)
        with open(f"{point}/holes", "wb") as file:
            file.truncate(30 * MIB)
            file.seek(10 * MIB)
            file.write(b"data")
        os.symlink("big", f"{point}/link")
        os.mkdir(f"{point}/many")
        for number in range(3000):
            with open(f"{point}/many/file number {number}", "wb"):
                pass
    done = extracted(image, b"/", f"{tmp_path}/out")
    assert done.failed == 0
    out = tmp_path / "out"
    assert (out / "Users" / "Zoë" / "Übung 😀.txt").read_bytes() == b"hello"
    assert (out / "big").read_bytes() == (source / "big").read_bytes()
    assert (out / "packed" / "text").read_bytes() == b"the same again " * 40000
    assert (out / "holes").read_bytes() == bytes(10 * MIB) + b"data" + bytes(20 * MIB - 4)
    assert (out / "holes").stat().st_blocks * 512 < MIB
    assert os.readlink(out / "link") == "big"
    assert len(os.listdir(out / "many")) == 3000
    with reading(image) as (disk, reader):
        assert isinstance(reader.look("/users/ZOË/übung 😀.TXT".encode()), wire.Entry), "Windows does not mind case"
        assert not any(name.startswith(b"$") for name in names(reader, b"/"))
        assert disk.read_bytes < 4 * MIB, "the MFT is not read as a whole"


@root_test
@needs("ntfs-3g")
def test_reparse_points_that_hide_content_are_told_not_read_as_zeros(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "packed.exe").write_bytes(b"what Windows would unpack" * 1000)
    image = guest_lab.make_ntfs(f"{tmp_path}/ntfs", f"{tmp_path}/source", os.fspath(tmp_path))
    with guest_lab.ntfs(image, os.fspath(tmp_path)) as point:
        by_windows = bytes.fromhex("17000080") + (16).to_bytes(4, "little") + bytes([1, 0, 0, 0, 2, 0, 0, 0]) + bytes(8)
        os.setxattr(f"{point}/packed.exe", "system.ntfs_reparse_data", by_windows, follow_symlinks=False)
    done = extracted(image, b"/", f"{tmp_path}/out")
    assert [(path, "reparse point" in reason) for path, reason in done.problems] == [(b"packed.exe", True)]
    assert not os.path.exists(f"{tmp_path}/out/packed.exe")


# --- partitions, paths, refusals ------------------------------------------------------------------------


@needs("sfdisk")
def test_the_partition_that_has_the_path_is_found(images: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "other" / "boot").mkdir(parents=True)
    small = guest_lab.make_ext4(f"{tmp_path}/small", f"{tmp_path}/other", 8 * MIB)
    image = f"{tmp_path}/disk"
    script = "size=8MiB\nsize=96MiB\nsize=4MiB, type=0657FD6D-A4AB-43C4-84E5-0933C84B4F4F\n"
    guest_lab.partition(image, "gpt", script, {1: small, 2: images["ext4"]})
    with file_disk(image, "a:b@c") as disk:
        with located(disk, parse_place("a:b@c:/etc/hosts", ["a:b@c"]), SystemClock()) as found:
            assert (found.partition.number, found.entry.size) == (2, 20)
        with located(disk, parse_place("a:b@c@1:/boot", ["a:b@c"]), SystemClock()) as found:
            assert found.partition.number == 1
        with pytest.raises(UsageWrong, match="a:b@c@1, a:b@c@2"), located(disk, _place("/lost+found"), SystemClock()):
            pass
        with pytest.raises(GuestPathMissing, match="/etc/hosts"), located(disk, _place("/etc/hots"), SystemClock()):
            pass
        with pytest.raises(GuestPathMissing, match="1, 2, 3"), located(disk, _place("/etc", 9), SystemClock()):
            pass
        with pytest.raises(GuestUnreadable, match="no file system"), located(disk, _place("/", 3), SystemClock()):
            pass


def _place(path: str, partition: int | None = None) -> Place:
    return Place("a:b@c", partition, os.fsencode(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vm.img", Place("vm.img", None, None)),
        ("vm.img:/etc", Place("vm.img", None, b"/etc")),
        ("vm.img@2:/a:b@c", Place("vm.img", 2, b"/a:b@c")),
        ("vm.img@2", Place("vm.img", 2, None)),
        ("vm.img:odd:/x", Place("vm.img:odd", None, b"/x")),
        ("vm.img@3x:/y", Place("vm.img@3x", None, b"/y")),
        ("unknown:/etc", Place("unknown", None, b"/etc")),
        ("vm.img:", Place("vm.img", None, b"")),
        ("vm.img:/\udcff", Place("vm.img", None, b"/\xff")),
    ],
)
def test_disks_whose_names_hold_signs(text: str, expected: Place) -> None:
    assert parse_place(text, ["vm.img", "vm.img:odd", "vm.img@3x"]) == expected


def test_nothing_that_is_there_is_overwritten(images: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "etc").write_bytes(b"mine")
    with pytest.raises(OutputExists):
        extracted(images["ext4"], b"/etc", os.fspath(out), b"etc")
    assert (out / "etc").read_bytes() == b"mine" and os.listdir(out) == ["etc"]


def test_a_range_that_cannot_be_read_costs_only_the_file_in_it(
    images: dict[str, str], tree: str, tmp_path: Path
) -> None:
    with file_disk(images["ext4"]) as disk:
        with open(f"{tree}/etc/deep/er/random", "rb") as file:
            wanted = file.read(4096)
        with open(images["ext4"], "rb") as file:
            at = file.read().index(wanted)
        disk.broken = [(at + 512 * 1024, at + 512 * 1024 + 4096)]
        with GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
            done = extract_into(reader.fetch(b"/"), f"{tmp_path}/out", b"", Allowed())
    assert [path for path, _ in done.problems] == [b"etc/deep/er/random"]
    assert "Input/output error" in done.problems[0][1]
    expected = guest_lab.without_privileges(guest_lab.describe(tree, times=False))
    del expected[b"etc/deep/er/random"]
    found: dict[bytes, Any] = guest_lab.describe(f"{tmp_path}/out", times=False)
    assert {path: found.get(path) for path in expected} == expected
    assert not os.path.exists(f"{tmp_path}/out/etc/deep/er/random"), "half a file is no file"


def test_one_small_file_takes_few_bytes_of_a_large_disk(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "wanted").write_bytes(os.urandom(MIB))
    image = guest_lab.make_ext4(f"{tmp_path}/ext4", f"{tmp_path}/tree", 100 << 30, "-E", "lazy_itable_init=1")
    with reading(image) as (disk, reader):
        chunks: list[bytes] = []
        assert extract_stream(reader.fetch(b"/wanted"), chunks.append, "it") == MIB
        assert b"".join(chunks) == (tmp_path / "tree" / "wanted").read_bytes()
        assert disk.read_bytes < 3 * MIB
