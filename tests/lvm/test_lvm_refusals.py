"""The lvm-thin driver where it is not needed, not possible, or not believed. No LVM is needed here."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Sequence

import pytest

from graincopy.app.host import SystemClock
from graincopy.core.errors import SnapshotFailed, TargetNoSpace, ToolMissing, VolumeUnsupported
from graincopy.core.ids import VolumeId
from graincopy.model.volume import Claim, Refusal
from graincopy.volumes import lvm_thin_tools
from graincopy.volumes.lvm_thin import LvmThinDriver
from graincopy.volumes.lvm_thin_path import OnVolume, locate
from graincopy.volumes.lvm_thin_report import LogicalVolume, PoolStatus
from graincopy.volumes.lvm_thin_tools import Lvm, ToolFailed, find_tool
from graincopy.volumes.lvm_thin_watch import PoolLimits, PoolWatch, check_pool
from graincopy.volumes.mounts import Mount
from graincopy.volumes.stack import Broken, Facts
from graincopy.volumes.topology import HostFiles

PLAIN = "3OicTxNlofcYraaREFy3N10OIzmyyaTi" + "H7nyytsvTbMdppoRIKkQU74d6uj2EjIC"
UUID = "H7nyyt-svTb-Mdpp-oRIK-kQU7-4d6u-j2EjIC"
NUMBER = "253:4"


class Recorded(HostFiles):
    """A host with one device-mapper device 253:4, a file on the file system on it, and what that says of itself."""

    def __init__(self, folder: str, dm_uuid: str | None, fs_type: str = "xfs", trouble: str = "") -> None:
        super().__init__(sys=os.path.join(folder, "sys"), dev="/dev")
        self.fs_type, self.trouble = fs_type, trouble
        place = os.path.join(self.sys, "dev/block", NUMBER, "dm")
        os.makedirs(place if dm_uuid is not None else os.path.dirname(place))
        if dm_uuid is not None:
            for name, text in (("uuid", dm_uuid), ("name", "v--g-lv")):
                with open(os.path.join(place, name), "w", encoding="ascii") as file:
                    file.write(f"{text}\n")

    def real(self, path: str) -> str:
        return path

    def stat(self, path: str) -> os.stat_result:
        kind = stat.S_IFBLK if path.startswith("/dev/") else stat.S_IFREG
        found = list(os.stat("/"))
        found[0], found[6] = kind | 0o600, 4096
        return os.stat_result(tuple(found), {"st_rdev": os.makedev(253, 4)})

    def mount_of(self, path: str) -> Mount | None:
        return Mount(1, NUMBER, "/", "/ds1", self.fs_type, "/dev/mapper/x", frozenset(), frozenset())

    def facts(self, mount: Mount, directory: str, devices: Sequence[object]) -> Facts:
        return Facts(True, self.trouble)


class StubLvm(Lvm):
    """LVM's answers, given."""

    def __init__(self, *volumes: LogicalVolume, missing: str | None = None, status: PoolStatus | None = None) -> None:
        self._volumes, self._missing, self._status = volumes, missing, status

    def missing(self) -> str | None:
        return self._missing

    def volumes(self) -> tuple[LogicalVolume, ...]:
        return self._volumes

    def pool_status(self, vg: str, pool: str) -> PoolStatus:
        if self._status is None:
            raise ToolFailed("device-mapper says of vg/pool: no such device")
        return self._status


def thin(**facts: object) -> LogicalVolume:
    known = {"vg": "v-g", "name": "lv", "uuid": UUID, "size": 1 << 30, "segtype": "thin", "pool": "p", **facts}
    return LogicalVolume(**known)  # type: ignore[arg-type]


# --- paths ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: os.PathLike[str]) -> str:
    return os.fspath(tmp_path)


def test_a_device_gets_the_name_that_lasts(folder: str) -> None:
    assert locate("/dev/dm-4", Recorded(folder, f"LVM-{PLAIN}")) == OnVolume("/dev/mapper/v--g-lv", UUID)


def test_a_file_on_a_volume(folder: str) -> None:
    found = locate("/ds1/vms/a.raw", Recorded(folder, f"LVM-{PLAIN}"))
    assert isinstance(found, OnVolume)
    assert (found.path, found.uuid, found.size, found.inner_path) == ("/ds1/vms/a.raw", UUID, 4096, "vms/a.raw")


@pytest.mark.parametrize(
    ("dm_uuid", "fs_type", "trouble", "reason"),
    [
        (None, "xfs", "", "no logical volume"),
        (f"part1-LVM-{PLAIN}", "xfs", "", "part of a logical volume"),
        ("CRYPT-LUKS2-0123", "xfs", "", "no logical volume (CRYPT"),
        ("mpath-3600", "xfs", "", "no logical volume (mpath"),
        (f"LVM-{PLAIN}-tpool", "xfs", "", "no logical volume"),
        (f"LVM-{PLAIN}", "btrfs", "", "cannot be attached"),
        (f"LVM-{PLAIN}", "xfs", "its XFS log lies on another device", "another device"),
    ],
)
def test_where_the_way_to_a_volume_ends(
    folder: str, dm_uuid: str | None, fs_type: str, trouble: str, reason: str
) -> None:
    found = locate("/ds1/a.raw", Recorded(folder, dm_uuid, fs_type, trouble))
    assert isinstance(found, Broken)
    assert reason in found.reason


def test_paths_of_this_host_that_lie_on_no_volume(folder: str) -> None:
    driver = LvmThinDriver(SystemClock())
    missing = driver.resolve(os.path.join(folder, "nothing"))
    assert isinstance(missing, Refusal) and missing.missing
    fifo = os.path.join(folder, "fifo")
    os.mkfifo(fifo)
    for path, what in ((folder, "a directory"), (fifo, "neither a file nor a block device")):
        answer = driver.resolve(path)
        assert isinstance(answer, Refusal) and not answer.missing
        assert what in answer.reason


# --- what LVM says of them ----------------------------------------------------------------------------


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="refused earlier without root")


def driver(folder: str, lvm: Lvm) -> LvmThinDriver:
    return LvmThinDriver(SystemClock(), lvm=lvm, host=Recorded(folder, f"LVM-{PLAIN}"))


@needs_root
def test_a_thin_volume_is_claimed(folder: str) -> None:
    claim = driver(folder, StubLvm(thin())).resolve("/ds1/a.raw")
    assert isinstance(claim, Claim)
    assert (claim.volume, claim.mount, claim.fs_type, claim.size) == ("lvm-thin:v-g/lv", "/ds1", "xfs", 4096)


@needs_root
@pytest.mark.parametrize(
    ("lvm", "reason"),
    [
        (StubLvm(thin(segtype="linear")), "classic (thick)"),
        (StubLvm(), "LVM does not list"),
        (StubLvm(thin(), missing="lvm2"), "lvm2 is needed"),
    ],
)
def test_volumes_that_are_refused(folder: str, lvm: Lvm, reason: str) -> None:
    answer = driver(folder, lvm).resolve("/ds1/a.raw")
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert answer.remedy


def test_a_volume_that_is_gone(folder: str) -> None:
    with pytest.raises(SnapshotFailed, match="no such logical volume"):
        driver(folder, StubLvm(thin(name="other"))).describe(VolumeId("lvm-thin:v-g/lv"))


def test_nothing_is_made_anew_in_dev_or_under_a_mount_point(folder: str) -> None:
    absent = Claim(path="/dev/mapper/absent-lv", driver="lvm-thin", volume=VolumeId("lvm-thin:absent/lv"), why="")
    unmounted = Claim(
        path=f"{folder}/ds1/a.raw", driver="lvm-thin", volume=VolumeId("lvm-thin:v-g/lv"), why="", inner_path="a.raw"
    )
    os.mkdir(f"{folder}/ds1")
    for claim in (absent, unmounted):
        with pytest.raises(VolumeUnsupported), LvmThinDriver(SystemClock()).open_for_restore(claim):
            pass
        assert not os.path.lexists(claim.path)


def test_a_host_without_device_mapper_has_no_targets(folder: str) -> None:
    """Not even LVM is asked: this is looked up before every backup of whatever kind."""
    host = HostFiles(sys=os.path.join(folder, "sys"))
    assert LvmThinDriver(SystemClock(), lvm=Lvm(), host=host).list_targets() == ()


# --- tools ----------------------------------------------------------------------------------------


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(lvm_thin_tools, "_SEARCHED", ())
    with pytest.raises(ToolMissing, match="thin_delta") as raised:
        find_tool("thin_delta")
    assert "thin-provisioning-tools" in raised.value.next_move
    assert Lvm().missing() == "lvm2"


@pytest.fixture
def tools(folder: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of one's own commands, searched first."""
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def tool(tools: str, name: str, script: str) -> None:
    path = os.path.join(tools, name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"#!/bin/sh\n{script}\n")
    os.chmod(path, 0o755)


def test_the_first_words_of_a_command_that_fails(tools: str) -> None:
    tool(tools, "lvs", "echo 'WARNING: never mind' >&2; echo '  Device busy.' >&2; echo 'Usage: ...' >&2; exit 5")
    with pytest.raises(ToolFailed, match=r"^lvs says: Device busy$"):
        Lvm().volumes()


def test_what_lvcreate_only_says_because_it_is_asked_to_is_no_error(tools: str) -> None:
    tool(tools, "lvcreate", "echo '  Making thin LV t.' >&2; echo 'WARNING: x'; echo 'Device busy.' >&2; exit 5")
    with pytest.raises(ToolFailed, match=r"^lvcreate says: Device busy$"):
        Lvm().create_snapshot(thin(), "t", (), SystemClock())


def test_a_report_that_is_there_counts_although_another_group_is_broken(tools: str) -> None:
    tool(tools, "lvs", """echo '{"report": [{"lv": []}]}'; echo 'Volume group "x" not found' >&2; exit 5""")
    assert Lvm().volumes() == ()


def test_thin_delta_that_fails_in_the_middle(tools: str) -> None:
    """What it says on the way out counts, not what a parser makes of half an answer; and it is never left waiting."""
    tool(tools, "thin_delta", "yes '<superblock' | head -c 1000000; echo 'metadata contains errors' >&2; exit 1")

    def give_up(stream: io.BufferedReader) -> None:
        raise ValueError(stream.read(10))

    with pytest.raises(ToolFailed, match="metadata contains errors"):
        Lvm().delta("/dev/null", 1, 2, give_up)


# --- the pool -------------------------------------------------------------------------------------


class Stepping(SystemClock):
    """A clock that stands until it is moved."""

    at = 0.0

    def monotonic(self) -> float:
        return self.at


def test_the_pool_is_looked_at_every_two_seconds() -> None:
    clock = Stepping()
    full = StubLvm(status=PoolStatus(metadata_used=0.1, data_used=0.99, held=None))
    watch = PoolWatch(full, "v-g", "p", PoolLimits(), clock)
    with pytest.raises(TargetNoSpace, match=r"v-g/p.*99% of its data"):
        watch.look()
    watch.look()  # at the same moment: not again
    clock.at = 2.5
    with pytest.raises(TargetNoSpace):
        watch.look()


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (PoolStatus(0.95, 0.1, None), TargetNoSpace, "metadata space"),
        (PoolStatus(0.1, 0.95, None), TargetNoSpace, "data space"),
        (PoolStatus(0.1, 0.1, None, "it is read-only"), SnapshotFailed, "read-only"),
        (None, SnapshotFailed, "no such device"),
    ],
)
def test_a_pool_in_which_nothing_may_be_made(status: PoolStatus | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_pool(StubLvm(status=status), "v-g", "p", PoolLimits())
