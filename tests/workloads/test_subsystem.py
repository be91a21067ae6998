"""Subsystems with real commands: quiesced, resumed whatever happens, and looked at again before the instant counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from graincopy.app.host import SystemClock
from graincopy.core.errors import PathMissing, ResumeFailed, SubsystemFailed, ToolMissing, WorkloadWrong
from graincopy.model.subsystem import Subsystem
from graincopy.model.workload import Consistency, FileMetadata
from graincopy.workloads.files import FilesSource
from graincopy.workloads.guarded import Commands, Guarded
from graincopy.workloads.known_subsystems import resolve
from graincopy.workloads.subsystem import SubsystemSource

PATIENCE = 60  # seconds; for a loaded machine


class Service:
    """A folder, a log of what was done to the service, and the commands that do it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "service"
        self.folder.mkdir()
        (self.folder / "state").write_bytes(b"state")
        self.log_path = folder / "log"
        self.log_path.touch()

    def says(self, word: str, then: str = "") -> tuple[str, ...]:
        return ("sh", "-c", f'echo {word} >>"$1"; {then}', "sh", str(self.log_path))

    @property
    def log(self) -> list[str]:
        return self.log_path.read_text().split()

    def wait_for(self, *log: str) -> None:
        until = time.monotonic() + PATIENCE
        while self.log != list(log):
            assert time.monotonic() < until, self.log
            time.sleep(0.02)

    def spec(self, **more: object) -> Subsystem:
        usual = Subsystem(
            directories=(str(self.folder),), quiesce=self.says("stop"), resume=self.says("go"), timeout=PATIENCE
        )
        return replace(usual, **more)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


def metadata_of(fd: int) -> FileMetadata:
    return FileMetadata(mode=os.fstat(fd).st_mode & 0o7777)


def source_of(**specs: Subsystem) -> SubsystemSource:
    return SubsystemSource(specs, FilesSource(cwd="/"), metadata_of, SystemClock())


def test_files_and_directories_are_one_workload(tmp_path: Path, service: Service) -> None:
    other = tmp_path / "x" / "service"  # a file that is called as the directory is
    other.parent.mkdir()
    other.write_bytes(b"file")
    source = source_of(mail=service.spec(files=(str(other),)))
    workload = source.describe(["mail"])
    assert (workload.name, workload.kind) == ("mail", "subsystem")
    assert [tree.path for tree in workload.trees] == [str(service.folder)]
    assert [file.path for file in workload.files] == [str(other), f"{service.folder}/state"]
    names = {file.name for file in workload.files} | {tree.name for tree in workload.trees}
    assert len(names) == 3
    assert list(workload.definitions) == [f"tree/{workload.trees[0].name}"]
    assert source.list() == ("mail",)


def test_two_subsystems_are_one_workload_in_any_order(service: Service) -> None:
    source = source_of(a=service.spec(), b=service.spec())
    both = source.describe(["a", "b"])
    assert both == source.describe(["b", "a"])
    assert source.describe(["a"]).id != source.describe(["b"]).id


def test_a_folder_inside_another_is_listed_once(service: Service) -> None:
    (service.folder / "inner").mkdir()
    spec = service.spec(directories=(str(service.folder), f"{service.folder}/inner"))
    assert [tree.path for tree in source_of(a=spec).describe(["a"]).trees] == [str(service.folder)]


def test_it_is_quiesced_and_resumed_once(service: Service) -> None:
    source = source_of(a=service.spec())
    quiesced = source.quiesce(source.describe(["a"]), PATIENCE)
    assert quiesced.consistency is Consistency.APPLICATION
    assert service.log == ["stop"]
    assert source.thaw(quiesced)
    assert not source.thaw(quiesced)  # it is not quiesced any more
    assert service.log == ["stop", "go"]


def test_without_commands_it_is_as_after_a_power_cut(service: Service) -> None:
    source = source_of(a=service.spec(quiesce=(), resume=()))
    quiesced = source.quiesce(source.describe(["a"]), PATIENCE)
    assert quiesced.consistency is Consistency.CRASH
    assert source.thaw(quiesced)


def test_a_quiesce_that_fails_is_resumed_and_said(service: Service) -> None:
    source = source_of(
        a=service.spec(quiesce=service.says("stop", "echo because; exit 7")),
        b=service.spec(resume=service.says("go-b")),
    )
    with pytest.raises(SubsystemFailed, match="sh ended with 7: because"):
        source.quiesce(source.describe(["a", "b"]), PATIENCE)
    assert sorted(service.log) == ["go", "go-b", "stop", "stop"]


def test_a_program_that_is_not_there_changes_nothing(service: Service) -> None:
    source = source_of(a=service.spec(quiesce=("/no/such/program",)))
    with pytest.raises(SubsystemFailed, match="cannot be run: No such file"):
        source.quiesce(source.describe(["a"]), PATIENCE)
    assert service.log == []


def test_a_quiesce_that_hangs_is_ended_and_resumed(service: Service) -> None:
    source = source_of(a=service.spec(quiesce=service.says("stop", "sleep 1000"), timeout=0.5))
    with pytest.raises(SubsystemFailed, match=r"did not end within 0\.5 s"):
        source.quiesce(source.describe(["a"]), PATIENCE)
    assert service.log == ["stop", "go"]


def test_the_deadline_resumes_and_the_instant_does_not_count(service: Service) -> None:
    source = source_of(a=service.spec(hold=0.2))
    quiesced = source.quiesce(source.describe(["a"]), PATIENCE)
    service.wait_for("stop", "go")
    assert not source.thaw(quiesced)
    assert service.log == ["stop", "go"]


def test_a_resume_that_fails_is_tried_again_and_shouted_about(service: Service) -> None:
    source = source_of(a=service.spec(resume=service.says("go", "echo no; exit 1")))
    quiesced = source.quiesce(source.describe(["a"]), PATIENCE)
    with pytest.raises(ResumeFailed, match="SUBSYSTEM a MAY STILL BE STANDING STILL: sh ended with 1: no") as heard:
        source.thaw(quiesced)
    assert service.log == ["stop", "go", "go", "go"]
    assert "sh -c" in heard.value.next_move


def test_a_killed_guard_is_replaced_by_the_parent(service: Service) -> None:
    commands = Commands("a", (service.says("stop"),), (service.says("go"),), PATIENCE, PATIENCE)
    guard = Guarded(commands, SystemClock())
    guard.begin()
    guard.settle()
    assert guard._process is not None
    guard._process.kill()
    assert not guard.resume()
    assert service.log == ["stop", "go"]


PARENT = """
    import json, signal, sys, time
    from graincopy.app.host import SystemClock
    from graincopy.workloads.guarded import Commands, Guarded
    order = json.loads(sys.argv[1])
    guard = Guarded(Commands("a", (tuple(order["quiesce"]),), (tuple(order["resume"]),), 60, 600), SystemClock())
    guard.begin()
    if order["when"] == "held":
        guard.settle()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("when", ["held", "quiescing"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_leaves_it_resumed(service: Service, when: str, how: signal.Signals) -> None:
    slowly = "" if when == "held" else "sleep 1"
    order = {"quiesce": service.says("stop", slowly), "resume": service.says("go"), "when": when}
    argv = [sys.executable, "-c", textwrap.dedent(PARENT), json.dumps(order)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        parent.send_signal(how)
        parent.wait(PATIENCE)
    service.wait_for("stop", "go")


def test_a_daemon_that_resume_starts_does_not_hold_anybody_up(service: Service) -> None:
    pid_file = service.folder.parent / "pid"
    source = source_of(a=service.spec(resume=service.says("go", f"sleep 1000 & echo $! >{pid_file}")))
    quiesced = source.quiesce(source.describe(["a"]), PATIENCE)
    try:
        assert source.thaw(quiesced)
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("text", "error"), [("nothing", WorkloadWrong), ("lost", PathMissing)])
def test_what_is_not_there_is_said(service: Service, text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        source_of(lost=service.spec(directories=("/no/such/folder",))).describe([text])


# --- what it knows by itself ----------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """What a data directory looks like from outside."""
    data = tmp_path / "main"
    for folder in ("pg_tblspc", "base"):
        (data / folder).mkdir(parents=True)
    (tmp_path / "space").mkdir()
    (data / "PG_VERSION").write_text("15\n")
    (data / "pg_tblspc/16385").symlink_to(tmp_path / "space")
    (tmp_path / "wal").mkdir()
    (data / "pg_wal").symlink_to(tmp_path / "wal")
    return data


@pytest.fixture
def running(cluster: Path) -> Iterator[Callable[[], None]]:
    """The pid file of a server; called, it stops."""
    pid_file = cluster / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{cluster}\n1\n5433\n/run/x\n\n")
    yield pid_file.unlink
    pid_file.unlink(missing_ok=True)


def test_postgresql_is_found_with_its_tablespaces(cluster: Path, running: Callable[[], None]) -> None:
    lines = f"15 main 5433 online postgres {cluster} /var/log/x\n"
    found = resolve("postgresql", Subsystem(kind="postgresql"), lambda argv: lines)
    assert found.spec.directories == (str(cluster), f"{cluster.parent}/wal", f"{cluster.parent}/space")
    assert found.one_instant
    assert found.quiesce[0][-1] == "CHECKPOINT"
    assert "5433" in found.quiesce[0]
    running()
    stopped = resolve("postgresql", Subsystem(kind="postgresql"), lambda argv: lines)
    assert (stopped.one_instant, stopped.quiesce) == (False, ())


def test_a_server_that_was_stopped_or_a_new_tablespace_spoils_the_instant(
    cluster: Path, running: Callable[[], None]
) -> None:
    spec = Subsystem(kind="postgresql", directories=(str(cluster),), quiesce=("true",), exclude=("*.pid",))
    source = source_of(pg=spec)
    workload = source.describe(["pg"])
    assert "main" in [tree.name for tree in workload.trees]
    quiesced = source.quiesce(workload, PATIENCE)
    assert source.thaw(quiesced)
    quiesced = source.quiesce(source.describe(["pg"]), PATIENCE)
    (cluster.parent / "other").mkdir()
    (cluster / "pg_tblspc/16390").symlink_to(cluster.parent / "other")
    with pytest.raises(SubsystemFailed, match="changed while"):
        source.thaw(quiesced)
    workload = source.describe(["pg"])
    running()
    with pytest.raises(SubsystemFailed, match="changed while"):
        source.quiesce(workload, PATIENCE)


def test_postgresql_that_is_not_there_is_said(tmp_path: Path) -> None:
    def missing(_argv: object) -> str:
        raise FileNotFoundError

    for spec, run, error in (
        (Subsystem(kind="postgresql"), missing, ToolMissing),
        (Subsystem(kind="postgresql"), lambda argv: "", SubsystemFailed),
        (Subsystem(kind="postgresql", directories=(str(tmp_path),)), missing, SubsystemFailed),
    ):
        with pytest.raises(error):
            resolve("postgresql", spec, run)


def test_libvirt_without_disks_and_sockets(tmp_path: Path) -> None:
    folder = tmp_path / "libvirt"
    (folder / "qemu/networks").mkdir(parents=True)
    (folder / "qemu/web.xml").write_text("<domain/>")
    (folder / "virtqemud.pid").write_text("1")
    source = source_of(libvirt=Subsystem(kind="libvirt", directories=(str(folder),)))
    workload = source.describe(["libvirt"])
    assert [file.path for file in workload.files] == [f"{folder}/qemu/web.xml"]
    assert source.quiesce(workload, PATIENCE).consistency is Consistency.CRASH
