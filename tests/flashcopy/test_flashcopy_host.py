"""A LUN on this host: recorded sysfs and by-id trees of a SAN host, and what is refused with which reason."""

from __future__ import annotations

import os

import lab
import pytest
from array_world import QuickClock, World

from graincopy.core.errors import ArrayUnreachable, AttachFailed
from graincopy.model.volume import Claim, Refusal
from graincopy.volumes.flashcopy.claims import claim_path
from graincopy.volumes.flashcopy.host import HostDevices
from graincopy.volumes.mounts import Mount
from graincopy.volumes.stack import Facts
from graincopy.volumes.topology import HostFiles

UID = "6005076810810258a8000000000000ab"


class San:
    """A host with a LUN on two paths and a multipath device over them, and a local disk."""

    def __init__(self, folder: str) -> None:
        self.folder, self.flushed, self.clock = folder, [], QuickClock()
        self.dev, self.sys, self.by_id = f"{folder}/dev", f"{folder}/sys", f"{folder}/by-id"
        for name, wwid in (("sda", f"naa.{UID}\n"), ("sdb", f"naa.{UID}\n"), ("sdz", "naa.5000c500a1b2c3d4\n")):
            self.put(f"{self.dev}/{name}")
            self.put(f"{self.sys}/block/{name}/device/wwid", wwid)
            self.put(f"{self.sys}/block/{name}/device/delete")
        self.put(f"{self.dev}/dm-3")
        self.put(f"{self.sys}/block/dm-3/dm/uuid", f"mpath-3{UID}\n")
        self.put(f"{self.sys}/block/dm-3/dm/name", "mpatha\n")
        self.put(f"{self.sys}/block/dm-3/slaves/sda")
        self.put(f"{self.sys}/block/dm-3/slaves/sdb")
        self.put(f"{self.sys}/class/scsi_host/host0/scan")
        self.put(f"{self.sys}/class/scsi_host/host7/scan")
        os.makedirs(self.by_id)

    def put(self, path: str, text: str = "") -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def get(self, path: str) -> str:
        with open(f"{self.sys}/{path}", encoding="utf-8") as file:
            return file.read()

    def link(self, name: str, device: str) -> None:
        os.symlink(f"{self.dev}/{device}", f"{self.by_id}/{name}")

    def devices(self) -> HostDevices:
        return HostDevices(self.clock, (self.by_id,), self.sys, patience=5.0, flush_multipath=self.flushed.append)


@pytest.fixture
def san(tmp_path: os.PathLike[str]) -> San:
    return San(os.fspath(tmp_path))


def test_whose_lun_a_device_is(san: San) -> None:
    devices = san.devices()
    assert [devices.uid_of(name) for name in ("sda", "dm-3", "sdz", "nothing")] == [UID, UID, None, None]


def test_a_partition_of_a_multipath_device_is_not_the_lun(san: San) -> None:
    san.put(f"{san.sys}/block/dm-4/dm/uuid", f"part1-mpath-3{UID}\n")
    assert san.devices().uid_of("dm-4") is None


def test_a_device_of_which_sysfs_says_nothing_is_known_by_its_link(san: San) -> None:
    san.put(f"{san.dev}/loop9")
    san.link(f"wwn-0x{UID}", "loop9")
    assert san.devices().uid_of("loop9") == UID
    assert san.devices().uid_of("loop8") is None


def test_the_multipath_device_is_preferred(san: San) -> None:
    assert san.devices().find(UID) is None
    san.link(f"scsi-3{UID}", "sdb")
    assert san.devices().find(UID) == f"{san.dev}/sdb"
    san.link(f"wwn-0x{UID}", "sda")
    san.link(f"dm-uuid-mpath-3{UID}", "dm-3")
    assert san.devices().find(UID) == f"{san.dev}/dm-3"


def test_new_luns_are_looked_for_on_every_scsi_host(san: San) -> None:
    with pytest.raises(AttachFailed, match=f"no device with the WWN {UID} appeared within 5 s"):
        san.devices().attach(UID, 4096, "S")
    assert [san.get(f"class/scsi_host/host{n}/scan") for n in (0, 7)] == ["- - -", "- - -"]


def test_a_link_that_leads_to_another_lun_is_not_believed(san: San) -> None:
    other = UID.replace("ab", "ff")
    san.link(f"wwn-0x{other}", "sda")
    with pytest.raises(AttachFailed, match=f"no device with the WWN {other} appeared"):
        san.devices().attach(other, 4096, "S")


def test_a_multipath_device_goes_before_its_paths(san: San) -> None:
    san.link(f"dm-uuid-mpath-3{UID}", "dm-3")
    san.devices().drop(UID)
    assert san.flushed == ["mpatha"]
    assert [san.get(f"block/{name}/device/delete") for name in ("sda", "sdb", "sdz")] == ["1", "1", ""]


def test_a_single_path_goes_by_itself(san: San) -> None:
    san.link(f"wwn-0x{UID}", "sda")
    san.devices().drop(UID)
    assert (san.flushed, san.get("block/sda/device/delete"), san.get("block/sdb/device/delete")) == ([], "1", "")


def test_a_lun_that_this_host_does_not_see_is_gone_already(san: San) -> None:
    san.devices().drop(UID)
    san.devices().flush(UID)
    assert san.flushed == []


# --- stage 3 ----------------------------------------------------------------------------------------


class SanFiles(HostFiles):
    """A file on ``fs_type`` over a device of the recorded tree."""

    def __init__(self, san: San, device: str, fs_type: str = "xfs", trouble: str = "") -> None:
        super().__init__(sys=san.sys)
        self._mount = Mount(1, "253:3", "/", "/ds", fs_type, device, frozenset(), frozenset())
        self._trouble = trouble
        folder = f"{san.sys}/devices/{device}"
        os.makedirs(f"{san.sys}/dev/block", exist_ok=True)
        os.symlink(folder, f"{san.sys}/dev/block/253:3")
        os.makedirs(folder)
        for name in os.listdir(f"{san.sys}/block/{device}"):
            os.symlink(f"{san.sys}/block/{device}/{name}", f"{folder}/{name}")
        san.put(f"{folder}/size", "2097152")

    def real(self, path: str) -> str:
        return path

    def stat(self, path: str) -> os.stat_result:
        return os.stat(__file__)

    def mount_of(self, path: str) -> Mount | None:
        return self._mount

    def facts(self, mount: Mount, directory: str, devices: object) -> Facts:
        return Facts(trouble=self._trouble)


def claim(san: San, files: HostFiles, array: str | None = "lab") -> Claim | Refusal:
    return claim_path("/ds/vm/disk.raw", files, san.devices(), lambda uid: array if uid == UID else None)


@lab.root_test
@pytest.mark.parametrize("device", ["sda", "dm-3"])
def test_a_file_on_a_lun(san: San, device: str) -> None:
    found = claim(san, SanFiles(san, device))
    assert isinstance(found, Claim)
    assert (found.volume, found.inner_path, found.fs_type) == (f"flashcopy:lab/{UID}", "vm/disk.raw", "xfs")
    assert (found.mount, found.fs_offset, found.fs_size) == ("/ds", 0, 0)


@lab.root_test
@pytest.mark.parametrize(
    ("device", "fs_type", "trouble", "array", "reason"),
    [
        ("sdz", "xfs", "", "lab", "sdz is no LUN with a WWN, nor a multipath device over one"),
        ("sda", "xfs", "", None, f"sda ({UID}) is a LUN of none of the configured arrays"),
        ("sda", "zfs", "", "lab", "zfs at /ds cannot be attached from a target"),
        ("sda", "xfs", "its XFS log lies on another device", "lab", "/ds: its XFS log lies on another device"),
    ],
)
def test_what_is_refused_and_why(
    san: San, device: str, fs_type: str, trouble: str, array: str | None, reason: str
) -> None:
    found = claim(san, SanFiles(san, device, fs_type, trouble), array)
    assert isinstance(found, Refusal)
    assert found.reason == reason


def test_a_missing_file_is_said_to_be_missing(world: World) -> None:
    found = world.driver().resolve("/no/such/file")
    assert isinstance(found, Refusal)
    assert found.missing


def test_no_array_is_asked_about_a_local_disk(world: World, tmp_path: os.PathLike[str]) -> None:
    world.line.dead = True
    path = os.path.join(tmp_path, "disk.raw")
    with open(path, "xb") as file:
        file.truncate(1 << 20)
    assert isinstance(world.driver().resolve(path), Refusal)
    assert world.array.log == []


def test_an_array_that_is_down_is_no_refusal(world: World) -> None:
    """Else another driver would take a disk that the array ought to snapshot."""
    driver = world.driver()
    world.line.dead = True
    with pytest.raises(ArrayUnreachable):
        driver._array_of(world.uids[0])
