"""Every bad input of the issue: one sentence that says what is wrong and what to do, its own exit code, nothing lost.

Damaged repositories are in test_damage, storage that runs full in test_no_space, signals in test_signals; S resized or
recreated and deleted checkpoints, which are no errors but reasons to compare, in test_luns; odd paths and sizes in
test_files.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import lab
import pytest
import story
from blake3 import blake3
from story import MIB, PASSPHRASE, Cli, Done, Stage, noise

Step = Callable[[str], None]
Argv = tuple[str, ...]


@dataclass
class Scene:
    """A disk that has been backed up once, and where it lies."""

    cli: Cli
    folder: str
    path: str
    stage: Stage | None = None
    step: Step | None = None

    def at(self, name: str, act: Callable[[], object]) -> None:
        """Do something when the command passes the step ``name`` for the first time."""
        done: list[str] = []

        def step(passed: str) -> None:
            if passed == name and not done:
                done.append(passed)
                act()

        self.step = step


Case = Callable[[Scene], Iterator[Argv]]
CASES: list[object] = []


def bad(code: int, says: str, root: bool = False) -> Callable[[Case], Case]:
    """A case: it prepares, yields a command line that must end in ``code`` and say ``says``, and tidies up."""

    def note(case: Case) -> Case:
        marks = [pytest.mark.root] if root else []
        CASES.append(pytest.param(case, code, says, root, id=f"{code}-{case.__name__}", marks=marks))
        return case

    return note


# --- what the workload is -------------------------------------------------------------------------


@bad(11, "does not exist")
def missing(scene: Scene) -> Iterator[Argv]:
    yield "backup", scene.path, f"{scene.path}-not"


@bad(11, "does not exist")
def below_a_file(scene: Scene) -> Iterator[Argv]:
    yield "backup", f"{scene.path}/disk.raw"


@bad(12, "cannot be opened: permission denied", root=True)
def unreadable(scene: Scene) -> Iterator[Argv]:
    with tempfile.TemporaryDirectory() as folder:  # the folders of pytest are closed to others altogether
        os.chmod(folder, 0o755)
        path = story.make_disk(f"{folder}/disk.raw", MIB)
        os.chmod(path, 0o600)
        os.seteuid(65534)
        try:
            yield "--config", "/dev/null", "backup", path
        finally:
            os.seteuid(0)


@bad(13, "is a directory")
def directory(scene: Scene) -> Iterator[Argv]:
    yield "backup", scene.folder


@bad(13, "is a FIFO")
def fifo(scene: Scene) -> Iterator[Argv]:
    os.mkfifo(f"{scene.folder}/fifo")
    yield "backup", f"{scene.folder}/fifo"


@bad(13, "is a socket")
def unix_socket(scene: Scene) -> Iterator[Argv]:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(scene.folder)
        listener.bind("socket")
        yield "backup", "socket"


@bad(13, "is a symlink loop")
def symlink_loop(scene: Scene) -> Iterator[Argv]:
    os.symlink("loop", f"{scene.folder}/loop")
    yield "backup", f"{scene.folder}/loop"


@bad(13, "is a character device")
def character_device(scene: Scene) -> Iterator[Argv]:
    yield "backup", "/dev/null"


@bad(15, "graincopy volumes", root=True)
def device_that_no_driver_knows(scene: Scene) -> Iterator[Argv]:
    with contextlib.ExitStack() as held, lab.ReflinkFs(scene.cli.folder, "ext4", 16 * MIB, "plain") as plain:
        lab.sparse(f"{plain.path}/image", MIB)
        device = lab.bind(f"{plain.path}/image")
        held.callback(lab.unbind, device)
        yield "backup", device
        held.close()


@bad(14, "names no file")
def nothing_between_the_commas(scene: Scene) -> Iterator[Argv]:
    yield "backup", "files:"


@bad(14, "there is no such set")
def unknown_set(scene: Scene) -> Iterator[Argv]:
    yield "backup", "set:web"


@bad(14, "there is no such subsystem; there are: libvirt, postgresql")
def unknown_subsystem(scene: Scene) -> Iterator[Argv]:
    yield "backup", "subsystem:web"


# --- the freeze window ----------------------------------------------------------------------------


@bad(20, "because the repository lies on it", root=True)
def repository_on_a_volume_to_be_frozen(scene: Scene) -> Iterator[Argv]:
    scene.cli.repo = f"{scene.folder}/repo"
    scene.cli.init()
    yield "backup", scene.path
    scene.cli.repo = f"{scene.cli.folder}/repo"


@bad(20, "because graincopy's state lies on it", root=True)
def state_on_a_volume_to_be_frozen(scene: Scene) -> Iterator[Argv]:
    with open(scene.cli.config, "w", encoding="utf-8") as file:
        file.write(f'[paths]\nstate = "{scene.folder}/state"\ncache = "{scene.cli.folder}/cache"\n')
    yield "backup", scene.path
    scene.cli.configure()


@bad(20, "because the running Python lies on it", root=True)
def python_on_a_volume_to_be_frozen(scene: Scene) -> Iterator[Argv]:
    prefix = sys.prefix
    sys.prefix = f"{scene.folder}/venv"
    try:
        yield "backup", scene.path
    finally:
        sys.prefix = prefix


@bad(21, "already frozen by somebody else", root=True)
def frozen_by_somebody_else(scene: Scene) -> Iterator[Argv]:
    assert scene.stage is not None
    with scene.stage.luns[0].frozen():
        yield "backup", scene.path


# --- between plan and snapshot --------------------------------------------------------------------


@bad(16, "changed while the backup was starting", root=True)
def vanishes(scene: Scene) -> Iterator[Argv]:
    scene.at("opened", lambda: os.rename(scene.path, f"{scene.path}.away"))
    yield "backup", scene.path
    os.rename(f"{scene.path}.away", scene.path)


@bad(24, "Nothing was published")
def vanishes_where_it_is_the_volume(scene: Scene) -> Iterator[Argv]:
    scene.at("opened", lambda: os.rename(scene.path, f"{scene.path}.away"))
    yield "backup", scene.path
    os.rename(f"{scene.path}.away", scene.path)


@bad(41, "is held by run")
def a_backup_of_the_same_workload_runs(scene: Scene) -> Iterator[Argv]:
    others: list[Done] = []
    scene.at("copied", lambda: others.append(Cli(scene.cli.folder)("backup", scene.path)))
    assert scene.cli("backup", scene.path, step=scene.step).code == 0
    assert others[0].code == 41
    yield "nested", others[0].err


# --- the repository -------------------------------------------------------------------------------


@bad(2, "no repository is named")
def no_repository_named(scene: Scene) -> Iterator[Argv]:
    with repository(scene, ""):
        yield "points", "--repo", ""


@bad(30, "is not a graincopy repository")
def repository_that_does_not_exist(scene: Scene) -> Iterator[Argv]:
    with repository(scene, f"{scene.cli.folder}/nowhere"):
        yield "backup", scene.path


@bad(30, "is not a graincopy repository")
def repository_that_is_another_directory(scene: Scene) -> Iterator[Argv]:
    with repository(scene, scene.folder):
        yield "backup", scene.path


@bad(30, "is not a graincopy repository")
def repository_that_is_a_file(scene: Scene) -> Iterator[Argv]:
    with repository(scene, scene.path):
        yield ("points",)


@bad(31, "already is a graincopy repository, or is not empty")
def init_where_there_is_one(scene: Scene) -> Iterator[Argv]:
    yield "init", "--no-encryption"


@bad(31, "already is a graincopy repository, or is not empty")
def init_among_other_files(scene: Scene) -> Iterator[Argv]:
    with repository(scene, scene.folder):
        yield "init", "--no-encryption"


@bad(32, "has format 2; this graincopy reads format 1")
def repository_of_a_newer_format(scene: Scene) -> Iterator[Argv]:
    with changed(f"{scene.cli.repo}/config") as config:
        newer = config[:8] + config[8:-16].replace(b"\x01", b"\x02", 1)  # magic, version, …, checksum
        lab.write_at(f"{scene.cli.repo}/config", (0, newer + blake3(newer).digest(length=16)))
        yield "backup", scene.path


@bad(33, "opens none of the keys")
def wrong_passphrase(scene: Scene) -> Iterator[Argv]:
    with sealed(scene):
        os.environ["GRAINCOPY_PASSPHRASE"] = "wrong"
        yield ("points",)


@bad(34, "no passphrase was given")
def no_passphrase(scene: Scene) -> Iterator[Argv]:
    with sealed(scene):
        yield ("points",)


@bad(34, "no passphrase was given")
def init_without_a_passphrase(scene: Scene) -> Iterator[Argv]:
    with repository(scene, f"{scene.cli.folder}/new"):
        yield ("init",)
    assert not os.path.exists(f"{scene.cli.folder}/new")


@bad(2, "passphrase file /nowhere/pass: No such file or directory")
def passphrase_file_missing(scene: Scene) -> Iterator[Argv]:
    os.environ["GRAINCOPY_PASSPHRASE_FILE"] = "/nowhere/pass"
    yield ("points",)


# --- points, disks, directories, options ----------------------------------------------------------


@bad(50, "there is no restore point latest~9")
def point_that_is_not_there(scene: Scene) -> Iterator[Argv]:
    yield "restore", "latest~9", "--in-place"


@bad(51, "is the beginning of")
def ambiguous_point(scene: Scene) -> Iterator[Argv]:
    seen: set[str] = set()
    digit = scene.cli.ok("points")[0]["restore_point"][0]
    while digit not in seen:  # at most 17
        seen.add(digit)
        digit = scene.cli.backup(scene.path)["restore_point"][0]
    yield "restore", digit, "--in-place"


@bad(52, "has no disk x.raw; it has disk.raw")
def disk_that_is_not_there(scene: Scene) -> Iterator[Argv]:
    yield "restore", "latest", "--disk", "x.raw", "--in-place"


@bad(53, "exists and is not overwritten")
def output_that_exists(scene: Scene) -> Iterator[Argv]:
    yield "restore", "latest", "--to", scene.folder


@bad(54, "cannot take the restored disks")
def output_that_is_no_directory(scene: Scene) -> Iterator[Argv]:
    yield "restore", "latest", "--to", scene.path


@bad(17, "is open for writing")
def restore_onto_a_file_in_use(scene: Scene) -> Iterator[Argv]:
    with open(scene.path, "r+b"):
        yield "restore", "latest", "--in-place"


@bad(56, "there is no restore abc")
def restore_that_is_not_there(scene: Scene) -> Iterator[Argv]:
    yield "undo", "abc"


@bad(2, "one of --in-place and --to")
def restore_without_a_place(scene: Scene) -> Iterator[Argv]:
    yield "restore", "latest"


@bad(2, "--audit")
def audit_of_nothing(scene: Scene) -> Iterator[Argv]:
    yield "backup", scene.path, "--audit", "many"


@bad(2, "at least one rule")
def expire_without_a_rule(scene: Scene) -> Iterator[Argv]:
    yield ("expire",)


@bad(2, "invalid choice")
def unknown_command(scene: Scene) -> Iterator[Argv]:
    yield "bakcup", scene.path


@bad(2, "unrecognized arguments: --fast")
def unknown_option(scene: Scene) -> Iterator[Argv]:
    yield "backup", scene.path, "--fast"


@bad(60, "did you mean audit?")
def configuration_with_an_unknown_key(scene: Scene) -> Iterator[Argv]:
    scene.cli.configure('[backup]\naudti = "3"')
    yield "backup", scene.path
    scene.cli.configure()


@bad(60, "No such file or directory")
def configuration_that_is_not_there(scene: Scene) -> Iterator[Argv]:
    yield "--config", "/nowhere/config.toml", "points"


@bad(38, "is read-only", root=True)
def medium_that_is_read_only(scene: Scene) -> Iterator[Argv]:
    lab.run("mount", "--bind", scene.cli.repo, scene.cli.repo)
    try:
        lab.run("mount", "-o", "remount,ro,bind", scene.cli.repo)
        yield "backup", scene.path
    finally:
        lab.run("umount", scene.cli.repo)


@contextlib.contextmanager
def repository(scene: Scene, path: str) -> Iterator[None]:
    """Another place for the repository, for as long as the block runs."""
    own, scene.cli.repo = scene.cli.repo, path
    yield
    scene.cli.repo = own


@contextlib.contextmanager
def sealed(scene: Scene) -> Iterator[None]:
    """An encrypted repository, of which the scene's own command line does not know the passphrase."""
    Cli(scene.cli.folder, f"{scene.cli.folder}/sealed", encrypted=True).init()
    with repository(scene, f"{scene.cli.folder}/sealed"):
        yield


@contextlib.contextmanager
def changed(path: str) -> Iterator[bytes]:
    """The content of ``path``, which is put back afterwards."""
    content, mode = story.read(path), os.stat(path).st_mode
    os.chmod(path, 0o600)
    yield content
    with open(path, "wb") as file:
        file.write(content)
    os.chmod(path, mode)


# --- what is true of all of them ------------------------------------------------------------------


@pytest.mark.parametrize(("case", "code", "says", "root"), CASES)
def test_bad_input(
    case: Case, code: int, says: str, root: bool, cli: Cli, plain: str, request: pytest.FixtureRequest
) -> None:
    stage: Stage | None = request.getfixturevalue("stage") if root else None
    folder = stage.path(0) if stage else plain
    scene = Scene(cli, folder, story.make_disk(f"{folder}/disk.raw", MIB + 7, (0, noise(1, 70_000))), stage)
    cli.backup(scene.path)
    before, targets = story.digest(scene.path), stage.targets if stage else []
    with contextlib.ExitStack() as held:
        held.callback(os.chdir, os.getcwd())
        held.enter_context(story.environment({}))
        running = case(scene)
        done = command(scene, next(running), code)
        assert next(running, None) is None
    assert done.code == code, done
    assert says in done.err
    lines = done.err.splitlines()
    assert 2 <= len(lines) <= 3
    assert lines[0].startswith("graincopy: ")
    assert done.out == ""
    assert story.digest(scene.path) == before
    if stage:
        assert stage.targets == targets or len(stage.targets) == len(targets)
    assert os.listdir(f"{cli.repo}/runs") == []
    cli.undamaged()
    cli.backup(scene.path)  # and the same command works when the trouble is over
    cli.ok("restore", "latest", "--to", f"{cli.folder}/afterwards")
    assert story.digest(f"{cli.folder}/afterwards/disk.raw") == before


def command(scene: Scene, argv: Argv, code: int) -> Done:
    if argv[0] == "nested":
        return Done(code, "", argv[1])
    return scene.cli(*argv, step=scene.step)


@pytest.mark.parametrize(
    "argv",
    [("backup", "/nowhere/a.raw"), ("points", "--repo", "/nowhere"), ("frobnicate",), ("restore", "x", "--to", "/")],
)
def test_as_a_process_there_is_no_traceback(cli: Cli, argv: Argv) -> None:
    done = cli.process(*argv)
    assert done.code in (2, 11, 30, 50)
    assert done.code == cli(*argv).code
    assert "Traceback" not in done.err
    assert 1 <= done.err.count("\n") <= 3
    assert done.out == ""


def test_json_asked_for_and_refused_prints_no_half_document(cli: Cli) -> None:
    done = cli("points", "--repo", "/nowhere", "--json")
    assert (done.code, done.out) == (30, "")
    assert PASSPHRASE not in done.err
