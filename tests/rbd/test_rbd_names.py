"""Names, paths and answers that need no Ceph: what names an image, which image a device shows, what is refused."""

from __future__ import annotations

import os
from array import array

import numpy as np
import pytest
import story

from graincopy.app.host import SystemClock
from graincopy.core.errors import StorageUnreachable, ToolMissing
from graincopy.core.extent import Extents
from graincopy.model.volume import Refusal
from graincopy.model.workload import FileMetadata
from graincopy.volumes.loop import LoopBacking
from graincopy.volumes.mounts import Mount
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.rbd import RbdDriver
from graincopy.volumes.rbd_c import libraries
from graincopy.volumes.rbd_name import ImageName, Located, locate, parse
from graincopy.volumes.rbd_open_image import extents_of
from graincopy.volumes.stack import Broken, Device, Facts, Floor, Stack
from graincopy.volumes.topology import HostFiles
from graincopy.workloads.files import FilesSource


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rbd:pool/image", ImageName("pool", "image")),
        ("rbd:pool/tenant/image", ImageName("pool", "image", "tenant")),
        ("rbd:pool/with space", ImageName("pool", "with space")),
        *((text, None) for text in ("rbd:image", "pool/image", "rbd:a/b/c/d", "rbd:/image", "rbd:p/", "rbd:p/i@s")),
    ],
)
def test_names(text: str, name: ImageName | None) -> None:
    assert parse(text) == name
    assert name is None or name.volume == text


def mapped(sys: str, **attributes: str) -> HostFiles:
    """A recorded /sys with one device of the kernel client."""
    folder = f"{sys}/bus/rbd/devices/3"
    os.makedirs(folder)
    shown = {"pool": "vms", "name": "web", "pool_ns": "", "current_snap": "-", "cluster_fsid": "abc"} | attributes
    for name, value in shown.items():
        with open(f"{folder}/{name}", "w") as file:
            file.write(f"{value}\n")
    return HostFiles(sys=sys)


RBD3 = Device("250:48", "rbd3", "disk", 1 << 30)
PART = Device("250:49", "rbd3p1", "partition", 1 << 29, 1 << 20)


def file_on(*devices: Device, fs_type: str = "xfs", trouble: str = "") -> Stack:
    mount = Mount(1, devices[0].number, "/", "/srv", fs_type, "/dev/x", frozenset(), frozenset())
    floor = Floor("/srv/a/disk.raw", "a/disk.raw", mount, Facts(trouble=trouble), devices)
    return Stack("/srv/a/disk.raw", 4096, (), (floor,))


def test_a_device_of_the_kernel_client(tmp_path: object) -> None:
    host = mapped(f"{tmp_path}/sys")
    web = ImageName("vms", "web")
    assert locate(Stack("/dev/rbd3", 1 << 30, (RBD3,), ()), host, {}) == Located(web, 0, 0, fsid="abc")
    inside = locate(file_on(RBD3), host, {})
    assert inside == Located(web, 0, 0, "a/disk.raw", "xfs", "/srv", "abc")
    parted = locate(file_on(PART, RBD3), host, {})
    assert parted == Located(web, 1 << 20, 1 << 29, "a/disk.raw", "xfs", "/srv", "abc")


def test_a_namespace_and_an_older_kernel(tmp_path: object) -> None:
    host = mapped(f"{tmp_path}/sys", pool_ns="tenant")
    os.unlink(f"{tmp_path}/sys/bus/rbd/devices/3/cluster_fsid")
    found = locate(file_on(RBD3), host, {})
    assert isinstance(found, Located) and (found.image, found.fsid) == (ImageName("vms", "web", "tenant"), "")


@pytest.mark.parametrize(
    ("stack", "attributes", "reason"),
    [
        (Stack("/dev/rbd3p1", 1 << 29, (PART, RBD3), ()), {}, "only a part"),
        (file_on(RBD3), {"current_snap": "monday"}, "shows a snapshot"),
        (file_on(RBD3, fs_type="btrfs"), {}, "cannot be attached"),
        (file_on(RBD3, trouble="its XFS log lies on another device"), {}, "XFS log"),
        (file_on(Device("8:0", "sda", "disk", 1 << 30)), {}, "no device of Ceph"),
        (file_on(Device("250:64", "rbd4", "disk", 1 << 30)), {}, "does not tell"),
    ],
)
def test_what_leads_to_no_image(tmp_path: object, stack: Stack, attributes: dict[str, str], reason: str) -> None:
    found = locate(stack, mapped(f"{tmp_path}/sys", **attributes), {})
    assert isinstance(found, Broken) and reason in found.reason


def test_a_loop_device_over_a_file_of_rbd_fuse() -> None:
    backing = LoopBacking("/run/images/web")
    stack = file_on(Device("7:1", "loop1", "loop", 1 << 30, 0, backing))
    found = locate(stack, HostFiles(), {"/run/images": "vms/tenant"})
    assert isinstance(found, Located) and found.image == ImageName("vms", "web", "tenant")
    assert isinstance(locate(stack, HostFiles(), {"/run": "vms"}), Broken)


def test_a_host_without_ceph(tmp_path: object) -> None:
    driver = RbdDriver(None, MemoryPlaces(), SystemClock())
    with open(f"{tmp_path}/disk.raw", "wb"):
        pass
    assert isinstance(driver.resolve(f"{tmp_path}/disk.raw"), Refusal)
    assert driver.list_targets() == ()
    with pytest.raises(StorageUnreachable, match=r"no ceph\.conf"):
        driver.resolve("rbd:pool/image")


def test_the_files_source_takes_names_of_images(tmp_path: object) -> None:
    def unread(path: str) -> FileMetadata:
        raise AssertionError(f"{path} has no metadata")

    source = FilesSource(f"{tmp_path}", unread, ("rbd:",))
    workload = source.describe(["rbd:vms/web", "rbd:other/web", "rbd:vms/db", "rbd:vms/db"])
    assert [file.path for file in workload.files] == ["rbd:other/web", "rbd:vms/db", "rbd:vms/web"]
    names = [file.name for file in workload.files]
    assert names[1] == "db" and names[0] != names[2]
    assert all(name.endswith("web") and "/" not in name for name in (names[0], names[2]))


def test_what_the_library_calls_back_with() -> None:
    there, gone = extents_of(array("q", [8, 4, 1, 0, 4, 1, 4, 4, 1, 100, 50, 0]))
    assert (there, gone) == (Extents.of((0, 12)), Extents.of((100, 150)))
    assert extents_of(array("q")) == (Extents.empty(), Extents.empty())
    assert there.bounds.dtype == np.int64


def test_a_missing_library_is_named_with_its_package(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, *_: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    cli = story.Cli(f"{tmp_path}/graincopy", config=f'[rbd]\nconf = "{tmp_path}/ceph.conf"\n')
    monkeypatch.setattr("ctypes.CDLL", absent)
    libraries.cache_clear()
    done = cli("volumes", "rbd:pool/image")
    assert done.code == ToolMissing.exit_code and "apt-get install librbd1" in done.err, done
    row = next(one for one in cli.ok("doctor")["checks"] if one["name"] == "librbd.so.1")
    assert (row["there"], row["remedy"]) == (False, "apt-get install librbd1")
    libraries.cache_clear()
