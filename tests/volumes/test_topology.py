"""How paths lie on storage: from recorded trees of proc and sysfs, and live."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import lab
import pytest

from graincopy.volumes import mounts, topology
from graincopy.volumes.mounts import Mount
from graincopy.volumes.topology import Broken, Facts, HostFiles, Lun, Stack, trace

REFLINK = Facts(reflinks=True)


def mount_above(path: str, found: Sequence[Mount]) -> Mount | None:
    """The mount with the longest point above ``path``; of equals the last."""
    above = [mount for mount in found if f"{path}/".startswith(f"{mount.point.rstrip('/')}/")]
    return max(reversed(above), key=lambda mount: len(mount.point), default=None)


class Recorded(HostFiles):
    """A host made of files below a folder, and of answers for what only live objects can tell."""

    def __init__(self, folder: Path, mountinfo: str) -> None:
        super().__init__(str(folder / "proc"), str(folder / "sys"), str(folder / "dev"))
        self.folder = folder
        (folder / "proc/self").mkdir(parents=True)
        (folder / "proc/self/mountinfo").write_text(mountinfo)
        (folder / "sys/dev/block").mkdir(parents=True)
        (folder / "sys/block").mkdir()
        self.paths: dict[str, int | tuple[int, int]] = {}  # path → size, or device number
        self.facts_of: dict[str, Facts] = {}  # by mount point

    def device(self, name: str, number: str, sectors: int, parent: str = "", **attributes: str) -> None:
        home = self.folder / "sys/devices" / parent / name
        home.mkdir(parents=True)
        (home / "dev").write_text(number + "\n")
        (home / "size").write_text(f"{sectors}\n")
        for key, value in attributes.items():
            file = home / key.replace("__", "/")
            file.parent.mkdir(exist_ok=True)
            file.write_text(value + "\n")
        (self.folder / "sys/dev/block" / number).symlink_to(home)
        if not parent:
            (self.folder / "sys/block" / name).symlink_to(home)

    def loop(self, name: str, number: str, sectors: int, file: str, offset: int = 0, limit: int = 0) -> None:
        more = {"loop__backing_file": file, "loop__offset": str(offset), "loop__sizelimit": str(limit)}
        self.device(name, number, sectors, **more)

    def real(self, path: str) -> str:
        return path

    def stat(self, path: str) -> os.stat_result:
        if path not in self.paths:
            raise FileNotFoundError(2, "No such file or directory", path)
        found = self.paths[path]
        mode, size, device = (
            (stat.S_IFREG, found, 0) if isinstance(found, int) else (stat.S_IFBLK, 0, os.makedev(*found))
        )
        return os.stat_result((mode, 1, 1, 1, 0, 0, size, 0, 0, 0), {"st_rdev": device})

    def mount_of(self, path: str) -> Mount | None:
        return mount_above(path, mounts.read_mounts(self.proc))

    def facts(self, mount: Mount, directory: str, devices: Sequence[topology.Device]) -> Facts:
        return self.facts_of.get(mount.point, Facts())


MOUNTINFO = r"""27 1 254:0 / / rw - ext4 /dev/vda rw
40 27 8:16 / /outer rw - xfs /dev/sdb rw
41 27 7:0 / /ds1 rw,relatime shared:1 master:2 - ext4 /dev/loop0 rw
42 27 259:0 /images /ds\0402 rw - xfs /dev/loop1p1 rw
43 27 0:40 /@vm /pool rw - btrfs /dev/sdc rw,subvol=/@vm
44 27 0:41 / /shared rw - nfs4 server:/x rw
45 27 253:3 / /lv rw - xfs /dev/mapper/vg-lv rw
46 27 7:2 / /dead rw - ext4 /dev/loop2 rw
47 27 7:3 / /onb rw - btrfs /dev/loop3 rw
48 27 0:42 / /over rw - overlay overlay rw
49 27 0:43 / /wide rw - btrfs /dev/sdd rw
50 27 9:0 / /raid rw - ext4 /dev/md0 rw
"""


@pytest.fixture
def host(tmp_path: Path) -> Recorded:
    made = Recorded(tmp_path, MOUNTINFO)
    for name, number in (("vda", "254:0"), ("sdb", "8:16"), ("sdc", "8:32"), ("sdd", "8:48"), ("sde", "8:64")):
        made.device(name, number, 8_000_000)
    made.loop("loop0", "7:0", 4096, "/outer/lun0.img")
    made.loop("loop1", "7:1", 9000, "/outer/lun 1\nx.img", offset=512)
    made.device("loop1p1", "259:0", 6000, parent="loop1", partition="1", start="2048")
    made.loop("loop2", "7:2", 4096, "/outer/gone.img (deleted)")
    made.loop("loop3", "7:3", 4096, "/outer/b.img")
    made.device("loop4", "7:4", 0)
    made.device("dm-3", "253:3", 4096, dm__uuid="LVM-abcdef", dm__name="vg-lv")
    made.device("dm-4", "253:4", 4096, dm__uuid="mpath-36005076", dm__name="mpatha")
    made.device("md0", "9:0", 4096, md__level="raid1")
    for uuid, names in (("aaaa", ["sdc"]), ("bbbb", ["sdd", "sde"])):
        folder = tmp_path / "sys/fs/btrfs" / uuid / "devices"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).symlink_to(tmp_path / "sys/devices" / name)
    made.facts_of = {"/outer": REFLINK, "/pool": REFLINK, "/lv": REFLINK, "/wide": REFLINK}
    for path in ("/outer/lun0.img", "/outer/lun 1\nx.img", "/outer/b.img", "/ds1/a/web.raw", "/ds 2/db.raw"):
        made.paths[path] = 1000
    for path in ("/pool/x", "/shared/x", "/lv/x", "/dead/x", "/onb/x", "/over/x", "/wide/x", "/raid/x", "/etc/x"):
        made.paths[path] = 1000
    for path, number in {
        "/dev/loop0": (7, 0), "/dev/loop1p1": (259, 0), "/dev/loop4": (7, 4), "/dev/vda": (254, 0),
        "/dev/dm-4": (253, 4), "/dev/md0": (9, 0), "/dev/odd": (99, 9),
    }.items():  # fmt: skip
        made.paths[path] = number
    return made


def stack(path: str, host: HostFiles | None = None) -> Stack:
    found = trace(path, host)
    assert isinstance(found, Stack), found
    return found


def lun(path: str, host: HostFiles | None = None) -> Lun:
    found = stack(path, host).lun()
    assert isinstance(found, Lun), found
    return found


def broken(found: object) -> Broken:
    assert isinstance(found, Broken), found
    return found


def test_a_file_on_a_whole_loop_device_lies_in_its_image(host: Recorded) -> None:
    found = lun("/ds1/a/web.raw", host)
    assert (found.volume, found.offset, found.size) == ("/outer/lun0.img", 0, 0)
    assert (found.inner_path, found.fs_type, found.mount) == ("a/web.raw", "ext4", "/ds1")
    assert found.home.mount.point == "/outer"


def test_loop_offset_partition_start_and_bind_mount_add_up(host: Recorded) -> None:
    found = lun("/ds 2/db.raw", host)
    assert found.volume == "/outer/lun 1\nx.img"
    assert (found.offset, found.size) == (512 + 2048 * 512, 6000 * 512)
    assert found.inner_path == "images/db.raw"


def test_a_device_path_lies_in_the_image_without_inner_path(host: Recorded) -> None:
    whole, part = lun("/dev/loop0", host), lun("/dev/loop1p1", host)
    assert (whole.offset, whole.size, whole.inner_path) == (0, 0, None)
    assert (part.offset, part.size, part.inner_path) == (512 + 2048 * 512, 6000 * 512, None)


def test_a_size_limit_is_the_size(host: Recorded) -> None:
    host.loop("loop9", "7:9", 100, "/outer/lun0.img", limit=51_200)
    host.paths["/dev/loop9"] = (7, 9)
    assert lun("/dev/loop9", host).size == 51_200


def test_btrfs_subvolume_can_be_cloned_in_place(host: Recorded) -> None:
    found = stack("/pool/x", host)
    assert found.floors[0].inner_path == "@vm/x"
    assert found.floors[0].devices[0].name == "sdc"
    assert found.in_place() is found.floors[0]
    assert "disk sdc" in broken(found.lun()).reason


def test_in_place_does_not_ask_what_lies_below(host: Recorded) -> None:
    for path, why in (("/lv/x", "LVM"), ("/wide/x", "2 devices")):
        found = stack(path, host)
        assert found.in_place() is found.floors[0]
        assert why in broken(found.lun()).reason


@pytest.mark.parametrize(
    "path,why",
    [
        ("/etc/x", "disk vda"),
        ("/shared/x", "nfs4"),
        ("/over/x", "overlay"),
        ("/dead/x", "/outer/gone.img of loop2 was deleted"),
        ("/onb/x", "btrfs"),
        ("/raid/x", "MD array"),
    ],
)
def test_files_without_a_snapshot_say_why_and_stay_files(host: Recorded, path: str, why: str) -> None:
    found = stack(path, host)
    answer = broken(found.lun())
    assert why in answer.reason
    assert answer.regular_file and found.regular_file
    assert broken(found.in_place()).remedy == "move the file to XFS or Btrfs"


@pytest.mark.parametrize(
    "path,why",
    [
        ("/dev/loop4", "nothing is bound to loop4"),
        ("/dev/dm-4", "multipath"),
        ("/dev/md0", "MD array"),
        ("/dev/odd", "99:9 is not known"),
        ("/nope", "does not exist"),
    ],
)
def test_what_is_no_way_at_all(host: Recorded, path: str, why: str) -> None:
    found = broken(trace(path, host))
    assert why in found.reason
    assert not found.regular_file


def test_a_plain_disk_is_refused_with_a_remedy(host: Recorded) -> None:
    found = broken(stack("/dev/vda", host).lun())
    assert "disk" in found.reason and found.remedy


def test_image_on_a_file_system_without_clones(host: Recorded) -> None:
    host.facts_of["/outer"] = Facts()
    found = broken(stack("/ds1/a/web.raw", host).lun())
    assert "/outer/lun0.img" in found.reason and "reflink=1" in found.remedy and found.regular_file


def test_trouble_of_the_inner_file_system_is_the_answer(host: Recorded) -> None:
    host.facts_of["/ds1"] = Facts(trouble="its ext4 journal lies on another device")
    assert "journal" in broken(stack("/ds1/a/web.raw", host).lun()).reason


def test_loops_that_lie_on_themselves_end(host: Recorded) -> None:
    host.loop("loop8", "7:8", 4096, "/self/img")
    host.paths["/self/img"] = 1
    (host.folder / "proc/self/mountinfo").write_text("1 0 7:8 / /self rw - xfs /dev/loop8 rw\n")
    host.facts_of["/self"] = REFLINK
    assert "8 loop devices" in broken(stack("/self/img", host).deep).reason


# --- mountinfo --------------------------------------------------------------------------------------


def test_mountinfo_escapes_bytes_and_optional_fields() -> None:
    line = b"36 35 98:0 /mnt1 /mnt\\040\\0112\\134\xff rw,noatime master:1 shared:2 - ext3 /ro\\043ot rw,errors=x\n"
    (found,) = mounts.parse_mountinfo(line)
    assert found.point == "/mnt \t2\\\udcff"
    assert (found.root, found.fs_type, found.source) == ("/mnt1", "ext3", "/ro#ot")
    assert found.options == {"rw", "noatime"}
    assert found.super_options == {"rw", "errors=x"}


def test_inside_of_a_bind_mounted_single_file() -> None:
    (found,) = mounts.parse_mountinfo(b"1 0 8:1 /images/web.raw /srv/web.raw rw - xfs /dev/sda1 rw\n")
    assert found.inside("/srv/web.raw") == "images/web.raw"


# --- live -------------------------------------------------------------------------------------------


@lab.root_test
@pytest.mark.parametrize("partitioned", [False, True, "offset"])
@pytest.mark.parametrize("outer,inner", [("xfs", "ext4"), ("btrfs", "xfs")])
def test_live_lun(
    request: pytest.FixtureRequest, tmp_path: Path, outer: str, inner: str, partitioned: bool | str
) -> None:
    folder = request.getfixturevalue(f"{outer}_dir")
    with lab.Lun(folder, size=512 * lab.MIB, inner=inner, partitioned=partitioned, mount_at=tmp_path / "m") as made:
        path = os.path.join(made.path, "sub dir/disk\n1.raw")
        os.mkdir(os.path.dirname(path))
        lab.write_at(path, (0, b"x"))
        found = lun(path)
        assert (found.volume, found.offset, found.inner_path) == (made.image, made.offset, "sub dir/disk\n1.raw")
        assert (found.fs_type, found.mount) == (inner, made.path)
        assert found.home.mount.fs_type == outer
        assert lun(made.device).offset == made.offset
        assert [mount.point for mount in topology.mounts_on(made.image)] == [made.path]
        assert stack(path).in_place() if inner == "xfs" else broken(stack(path).in_place())


@lab.root_test
def test_live_bind_mount_and_subvolume(btrfs_dir: str, tmp_path: Path) -> None:
    sub, bound = os.path.join(btrfs_dir, "sub"), str(tmp_path / "bound")
    lab.run("btrfs", "subvolume", "create", sub)
    os.mkdir(bound)
    lab.write_at(os.path.join(sub, "f"), (0, b"x"))
    lab.run("mount", "--bind", sub, bound)
    try:
        direct, through = stack(os.path.join(sub, "f")), stack(os.path.join(bound, "f"))
        assert through.floors[0].inner_path == direct.floors[0].inner_path
        assert through.floors[0].mount.point == bound
        assert isinstance(through.in_place(), topology.Floor)
    finally:
        lab.unmount(bound)


@lab.root_test
def test_live_external_logs_are_seen(xfs_dir: str, tmp_path: Path) -> None:
    log = os.path.join(xfs_dir, "log.img")
    lab.sparse(log, 64 * lab.MIB)
    device = lab.bind(log)
    try:
        lab.run("mke2fs", "-q", "-F", "-O", "journal_dev", "-b", "4096", device)
        with lab.Lun(xfs_dir, mount_at=tmp_path / "m") as made:
            made.unmount()
            lab.make_fs("ext4", made.device, "-b", "4096", "-J", f"device={device}")
            made.mount()
            lab.write_at(os.path.join(made.path, "f"), (0, b"x"))
            assert "journal lies on another device" in broken(stack(os.path.join(made.path, "f")).lun()).reason
        lab.run("wipefs", "-a", device)
        with lab.Lun(xfs_dir, name="x", size=512 * lab.MIB, inner="xfs", mount_at=tmp_path / "x") as made:
            made.unmount()
            lab.run("mkfs.xfs", "-q", "-f", "-l", f"logdev={device},size=64m", made.device)
            lab.run("mount", "-o", f"logdev={device}", made.device, made.path)
            lab.write_at(os.path.join(made.path, "f"), (0, b"x"))
            assert "log lies on another device" in broken(stack(os.path.join(made.path, "f")).lun()).reason
    finally:
        lab.unbind(device)


@lab.root_test
def test_live_xfs_without_reflink_and_deleted_image(xfs_dir: str, tmp_path: Path) -> None:
    with lab.Lun(xfs_dir, size=512 * lab.MIB, inner="xfs", mount_at=tmp_path / "m") as made:
        made.unmount()
        lab.run("mkfs.xfs", "-q", "-f", "-m", "reflink=0", made.device)
        made.mount()
        path = os.path.join(made.path, "f")
        lab.write_at(path, (0, b"x"))
        assert "without reflink" in broken(stack(path).in_place()).reason
        assert isinstance(stack(path).lun(), Lun)
        os.unlink(made.image)
        assert "was deleted" in broken(stack(path).lun()).reason


def test_live_paths_that_are_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"x")
    with socket.socket(socket.AF_UNIX) as sock:
        monkeypatch.chdir(tmp_path)  # a socket's own path must be short
        sock.bind("sock")
    for name, why in {
        "fifo": "a FIFO", "sock": "a socket", "a": "a loop of symbolic links", ".": "a directory",
        "../../../../../../../dev/null": "a character device", "file/x": "does not exist",
    }.items():  # fmt: skip
        assert why in broken(trace(str(tmp_path / name))).reason
    assert stack(str(tmp_path / "link")).path == os.path.realpath(tmp_path / "file")
