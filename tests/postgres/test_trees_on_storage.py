"""Directories of a subsystem on real storage: whole again after a restore, and as they were at the instant."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable

import lab
import pytest
import story
from story import GRAIN, MIB, Cli, noise


def grow(root: str) -> str:
    """A tree with everything that a tree can have."""
    os.makedirs(f"{root}/deep/er/still")
    os.makedirs(f"{root}/empty")
    for number in range(40):
        write_new(f"{root}/deep/f{number}", noise(number, 100 + 997 * number))
    write_new(f"{root}/deep/er/large", noise(77, 3 * MIB + 5))
    write_new(f"{root}/nothing", b"")
    write_new(os.fsdecode(os.fsencode(root) + b"/odd \xff\n%"), b"odd")
    os.symlink("deep/er", f"{root}/link")
    os.symlink("/no/where", f"{root}/dangling")
    os.link(f"{root}/deep/f1", f"{root}/deep/er/f1-too")
    os.chmod(f"{root}/deep/f2", 0o600)
    os.chmod(f"{root}/empty", 0o1777)
    if os.geteuid() == 0:
        os.chown(f"{root}/deep/f3", 12, 34)
        os.chown(f"{root}/deep/er", 56, 78)
        os.setxattr(f"{root}/deep/er", "user.note", b"x") if _takes_xattrs(root) else None
    os.chmod(f"{root}/deep/er/still", 0o500)
    return root


def write_new(path: str, data: bytes) -> str:
    """A new file."""
    with open(path, "xb") as file:
        file.write(data)
    return path


def _takes_xattrs(root: str) -> bool:
    try:
        os.setxattr(root, "user.try", b"")
        os.removexattr(root, "user.try")
    except OSError:
        return False
    return True


def shape(root: str) -> dict[str, tuple[object, ...]]:
    """Everything below ``root`` that a restore has to bring back."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != ".graincopy"]
        for name in ("", *folders, *files):
            path = os.path.join(folder, name) if name else folder
            at = os.lstat(path)
            what: object = None
            if stat.S_ISLNK(at.st_mode):
                what = os.readlink(path)
            elif stat.S_ISREG(at.st_mode):
                what = (story.digest(path), at.st_nlink)
            found[os.path.relpath(path, root)] = (oct(at.st_mode), at.st_uid, at.st_gid, what)
    return found


def subsystem(name: str, *folders: str, **more: object) -> str:
    """A section of the configuration."""
    lines = [f"[subsystem.{name}]", f"directories = {json.dumps(folders)}"]
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in more.items())])


def at_step(name: str, action: Callable[[], None]) -> Callable[[str], None]:
    """Calls ``action`` when the step is reached."""
    return lambda step: action() if step == name else None


@pytest.fixture(params=["lun", "in place", "plain"])
def root(request: pytest.FixtureRequest) -> str:
    """A tree on a LUN, on a file system that clones files, and on one that can do nothing."""
    if request.param == "plain":
        return grow(f"{request.getfixturevalue('plain')}/etc")
    stage = request.getfixturevalue("stage")
    home = stage.path(0) if request.param == "lun" else f"{stage.outer.path}/trees"
    if request.param == "in place":
        request.addfinalizer(lambda: lab.run("rm", "-rf", home))
    return grow(f"{home}/etc")


@pytest.mark.root
def test_a_tree_comes_back_whole(root: str, cli: Cli, tmp_path: os.PathLike[str]) -> None:
    cli.configure(subsystem("etc", root))
    before = shape(root)
    first = cli.backup("subsystem:etc")
    assert first["notes"] == []
    assert first["consistency"] == "crash"
    cli.ok("restore", "latest", "--to", f"{tmp_path}/out")
    assert shape(f"{tmp_path}/out/etc") == before
    story.write(f"{root}/deep/er/large", (MIB, b"changed"))
    os.unlink(f"{root}/deep/f5")
    os.unlink(f"{root}/link")
    os.rmdir(f"{root}/empty")
    os.chmod(f"{root}/deep", 0o700)
    write_new(f"{root}/deep/new", b"new")
    changed = shape(root)
    again = cli.backup("subsystem:etc")
    assert again["base"] == first["restore_point"]
    assert sum(disk["stored_bytes"] for disk in again["disks"]) < 3 * GRAIN
    document = cli.warned("restore", "latest~1", "--in-place")
    assert any("1 entries that the restore point does not" in warning for warning in document["warnings"])
    now = shape(root)
    assert now.pop("deep/new")[3] == changed["deep/new"][3]
    assert now == before
    cli.undamaged()


@lab.root_test
def test_what_comes_and_goes_before_the_instant_is_as_it_was_then(
    root: str, cli: Cli, tmp_path: os.PathLike[str]
) -> None:
    cli.configure(subsystem("etc", root))

    def churn() -> None:
        write_new(f"{root}/deep/er/came", noise(5, 70000))
        os.unlink(f"{root}/deep/f7")
        os.rename(f"{root}/deep/f8", f"{root}/f8-moved")
        os.mkdir(f"{root}/later")
        write_new(f"{root}/deep/f9.new", b"replaced")
        os.rename(f"{root}/deep/f9.new", f"{root}/deep/f9")

    document = cli.ok("backup", "subsystem:etc", step=at_step("prepared", churn))
    assert any("2 files went before the instant" in note for note in document["notes"])
    assert any("2 files came before the instant" in note for note in document["notes"])
    cli.ok("restore", "latest", "--to", f"{tmp_path}/out")
    assert shape(f"{tmp_path}/out/etc") == shape(root)


@lab.root_test
def test_a_named_file_that_goes_fails_the_backup(stage: story.Stage, cli: Cli) -> None:
    root, named = grow(stage.path(0, "etc")), write_new(stage.path(0, "named"), b"x")
    cli.configure(subsystem("etc", root, files=[named]))
    done = cli("backup", "subsystem:etc", step=at_step("prepared", lambda: os.unlink(named)))
    assert (done.code, cli.ok("points"), stage.targets) == (24, [], []) or "named" in done.err
    assert cli.ok("points") == []


@lab.root_test
def test_a_lun_keeps_one_checkpoint_and_an_increment_reads_little(stage: story.Stage, cli: Cli) -> None:
    root = grow(stage.path(0, "etc"))
    cli.configure(subsystem("etc", root))
    cli.backup("subsystem:etc")
    story.write(f"{root}/deep/er/large", (2 * MIB, b"changed"))
    document = cli.backup("subsystem:etc")
    assert {disk["change_map"] for disk in document["disks"]} == {"extents"}
    assert sum(disk["read_bytes"] for disk in document["disks"]) <= 4 * GRAIN
    assert len(stage.targets) == 1
    assert len(document["targets_left"]) == 1
    assert document["instant"] == "one"


@lab.root_test
def test_a_set_of_disk_and_subsystem_is_one_point(stage: story.Stage, cli: Cli, tmp_path: os.PathLike[str]) -> None:
    root = grow(stage.path(0, "etc"))
    disk = story.make_disk(stage.path(1, "a.raw"), MIB, (0, noise(1, 5000)))
    cli.configure(subsystem("etc", root) + f'\n[set.all]\nmembers = ["subsystem:etc", {json.dumps(disk)}]\n')
    document = cli.backup("set:all")
    assert (document["workload_name"], document["instant"]) == ("all", "one")
    assert cli.ok("points", "--workload", "all")[0]["restore_point"] == document["restore_point"]
    before = shape(root)
    cli.ok("restore", "latest", "--to", f"{tmp_path}/out")
    assert sorted(os.listdir(f"{tmp_path}/out")) == ["a.raw", "etc_etc"]
    assert shape(f"{tmp_path}/out/etc_etc") == before
    assert story.read(f"{tmp_path}/out/a.raw") == story.read(disk)


@lab.root_test
def test_files_one_after_the_other_are_refused_where_one_instant_is_needed(stage: story.Stage, cli: Cli) -> None:
    root = grow(f"{stage.outer.path}/trees/etc")
    try:
        cli.configure(subsystem("etc", root, one_instant=True))
        for more in ((), ("--dry-run",)):
            done = cli("backup", "subsystem:etc", *more)
            assert done.code == 77
            assert "one after the other" in done.err
        still = {"quiesce": ["true"], "resume": ["true"], "pauses": True}
        cli.configure(subsystem("etc", root, one_instant=True, **still))
        assert cli.ok("backup", "subsystem:etc")["instant"] == "one"
    finally:
        lab.run("rm", "-rf", f"{stage.outer.path}/trees")


@lab.root_test
@pytest.mark.parametrize("step", ["prepared", "frozen", "snapshotted", "thawed", "copied"])
def test_a_kill_leaves_the_subsystem_resumed(stage: story.Stage, cli: Cli, step: str) -> None:
    root, log = grow(stage.path(0, "etc")), f"{cli.folder}/log"
    write_new(log, b"")
    commands = {word: ["sh", "-c", f"echo {word} >>{log}"] for word in ("quiesce", "resume")}
    cli.configure(subsystem("etc", root, **commands))
    harness = [sys.executable, "-m", "graincopy.testing.crash", "--at", step, "--", "--config", cli.config]
    argv = [*harness, "backup", "subsystem:etc"]
    done = subprocess.run(argv, env={**os.environ, **cli.environ}, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done
    wanted = b"" if step == "prepared" else b"quiesce\nresume\n"
    until = time.monotonic() + 60
    while story.read(log) != wanted:
        assert time.monotonic() < until, story.read(log)
        time.sleep(0.05)
    assert cli.ok("points") == []
    cli.ok("targets", "--reap")
    assert stage.targets == []
    assert cli.ok("backup", "subsystem:etc")["consistency"] == "application"


@lab.root_test
def test_a_resume_that_fails_is_shouted_about(stage: story.Stage, cli: Cli) -> None:
    cli.configure(subsystem("etc", grow(stage.path(0, "etc")), quiesce=["true"], resume=["false"]))
    done = cli("backup", "subsystem:etc")
    assert done.code == 78
    assert "MAY STILL BE STANDING STILL" in done.err
    assert "Resume it now: false" in done.err
    assert (cli.ok("points"), stage.targets) == ([], [])
