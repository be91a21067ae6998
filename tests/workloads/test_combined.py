"""Several workloads as one: identity, NAMEs, and that whatever was quiesced is let go again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from graincopy.core.errors import GuestThawFailed, SubsystemFailed, WorkloadWrong
from graincopy.core.ids import DiskId, WorkloadId
from graincopy.model.workload import Consistency, Workload, WorkloadFile
from graincopy.workloads.base import Quiesced
from graincopy.workloads.combined import LEVELS, CombinedSource
from graincopy.workloads.files import FilesSource
from graincopy.workloads.memory import MemorySource


def machine(name: str, *disks: str) -> Workload:
    files = tuple(WorkloadFile(path=f"/vm/{name}/{disk}", name=disk, disk=DiskId(f"{name}-{disk}")) for disk in disks)
    definitions = {f"{name}.xml": b"<domain/>"}
    return Workload(id=WorkloadId(f"uuid-{name}"), name=name, kind="vm", files=files, definitions=definitions)


class Machines(MemorySource):
    """``vm``; it writes down what happens to it, and can be told to fail."""

    prefix = "vm"

    def __init__(self, *workloads: Workload, log: list[str], level: Consistency = Consistency.FILE_SYSTEM) -> None:
        super().__init__(workloads, level)
        self.log = log
        self.fails = ""

    def quiesce(self, workload: Workload, deadline: float) -> Quiesced:
        self.log.append(f"quiesce {self.prefix}")
        if self.fails == "quiesce":
            raise SubsystemFailed(subsystem="it", reason="it was told to")
        return super().quiesce(workload, deadline)

    def thaw(self, quiesced: Quiesced) -> bool:
        self.log.append(f"thaw {self.prefix}")
        if self.fails == "thaw":
            raise GuestThawFailed(domain=self.prefix, reason="it was told to")
        return super().thaw(quiesced)


class Services(Machines):
    prefix = "subsystem"


class Stage:
    def __init__(self, folder: Path, sets: dict[str, tuple[str, ...]] | None = None) -> None:
        self.log: list[str] = []
        self.machines = Machines(machine("web", "vda", "vdb"), machine("db", "vda"), log=self.log)
        self.services = Services(machine("shop", "conf"), log=self.log, level=Consistency.APPLICATION)
        self.files = FilesSource(cwd=str(folder))
        sources = {source.prefix: source for source in (self.services, self.machines, self.files)}
        self.source = CombinedSource(sources, sets or {})


@pytest.fixture
def disk(tmp_path: Path) -> str:
    path = tmp_path / "a.raw"
    path.write_bytes(b"disk")
    return str(path)


def test_files_alone_are_what_they_always_were(tmp_path: Path, disk: str) -> None:
    stage = Stage(tmp_path)
    for selectors, name in (([disk], None), (["files:a.raw"], None), (["a.raw", disk], "shop")):
        assert stage.source.describe(selectors, name) == stage.files.describe([disk], name)
    workload = stage.source.describe([disk])
    quiesced = stage.source.quiesce(workload, 1)
    assert quiesced.consistency is Consistency.CRASH
    assert quiesced.workload == workload
    assert stage.source.thaw(quiesced)
    assert stage.log == []


def test_one_machine_is_what_its_source_says(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert stage.source.describe(["vm:web"]) == stage.machines.describe(["web"])


def test_any_order_is_the_same_set_and_names_differ(tmp_path: Path, disk: str) -> None:
    stage = Stage(tmp_path)
    one = stage.source.describe(["vm:web", disk, "vm:db", "subsystem:shop"])
    other = stage.source.describe(["subsystem:shop", "vm:db", "vm:web", disk, "vm:web"])
    assert one == other
    assert one.kind == "set"
    assert sorted(file.name for file in one.files) == ["a.raw", "db_vda", "shop_conf", "web_vda", "web_vdb"]
    assert set(one.definitions) == {"web.xml", "db.xml", "shop.xml"}
    assert one.id != stage.source.describe(["vm:web", "vm:db"]).id
    assert {file.disk for file in one.files} >= {file.disk for file in stage.machines.describe(["web"]).files}


def test_a_set_of_the_configuration_keeps_its_identity(tmp_path: Path, disk: str) -> None:
    small = Stage(tmp_path, {"shop": ("vm:web",)}).source.describe(["set:shop"])
    large = Stage(tmp_path, {"shop": ("set:vms", disk), "vms": ("vm:db", "vm:web")}).source.describe(["set:shop"])
    assert small.id == large.id
    assert (small.name, small.kind) == ("shop", "set")
    assert len(large.files) == 4
    assert {file.name for file in small.files} <= {file.name for file in large.files}
    assert small.id != Stage(tmp_path, {"other": ("vm:web",)}).source.describe(["set:other"]).id


def test_a_file_of_two_members_is_taken_once(tmp_path: Path, disk: str) -> None:
    stage = Stage(tmp_path)
    twin = WorkloadFile(path=disk, name="vdc", disk=DiskId("twin"))
    stage.machines.workloads["own"] = Workload(id=WorkloadId("uuid-own"), name="own", kind="vm", files=(twin,))
    workload = stage.source.describe([disk, "vm:own"])
    assert [file.name for file in workload.files] == ["own_vdc"]
    assert any("several members" in note for note in workload.notes)


@pytest.mark.parametrize("text", ["set:none", "vm:none", "set:loop"])
def test_what_is_not_there_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(WorkloadWrong):
        Stage(tmp_path, {"loop": ("set:pool",), "pool": ("vm:web", "set:loop")}).source.describe([text])


def test_the_weakest_member_counts_and_each_is_recorded(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    workload = stage.source.describe(["subsystem:shop", "vm:web", "vm:db"])
    quiesced = stage.source.quiesce(workload, 1)
    assert quiesced.consistency is Consistency.FILE_SYSTEM
    assert json.loads(quiesced.workload.definitions[LEVELS]) == {
        "subsystem:shop": "application",
        "vm:db+web": "file-system",
    }
    assert stage.source.thaw(quiesced)
    assert stage.log == ["quiesce subsystem", "quiesce vm", "thaw vm", "thaw subsystem"]


def test_a_quiesce_that_fails_lets_the_others_go(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.machines.fails = "quiesce"
    workload = stage.source.describe(["subsystem:shop", "vm:web"])
    with pytest.raises(SubsystemFailed):
        stage.source.quiesce(workload, 1)
    assert stage.log == ["quiesce subsystem", "quiesce vm", "thaw subsystem"]
    assert not stage.services.quiesced


def test_a_thaw_that_fails_is_heard_after_all_were_thawed(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    quiesced = stage.source.quiesce(stage.source.describe(["subsystem:shop", "vm:web"]), 1)
    stage.machines.fails = "thaw"
    with pytest.raises(GuestThawFailed):
        stage.source.thaw(quiesced)
    assert stage.log[-2:] == ["thaw vm", "thaw subsystem"]
    assert not stage.services.quiesced


def test_one_that_had_not_held_spoils_the_instant(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    quiesced = stage.source.quiesce(stage.source.describe(["subsystem:shop", "vm:web"]), 1)
    stage.services.quiesced.clear()
    assert not stage.source.thaw(quiesced)


def test_all_kinds_are_listed(tmp_path: Path) -> None:
    listed = Stage(tmp_path, {"all": ("vm:web",)}).source.list()
    assert listed == ("set:all", "subsystem:shop", "vm:db", "vm:web")


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "x:y").write_bytes(b"disk")
    (file,) = Stage(tmp_path).source.describe(["x:y"]).files
    assert file.path == os.path.join(tmp_path, "x:y")
