"""Disks as files through FUSE: read, sought, loop-mounted, unmounted, as root and without; and all refusals."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import guest_lab
import pytest
from guest_lab import MIB, lab, needs, root_test

from graincopy.core.errors import MountPointUnfit, ToolMissing
from graincopy.views import fuse

SERVER = os.path.join(os.path.dirname(__file__), "fuse_server.py")
NOBODY = 65534

usable = pytest.mark.skipif(
    not os.access("/dev/fuse", os.R_OK | os.W_OK) or importlib.util.find_spec("mfusepy") is None,
    reason="needs /dev/fuse and mfusepy",
)


@contextmanager
def serving(directory: Path, *paths: str, broken: str = "") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, SERVER, os.fspath(directory), broken, *paths], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        lab.run("umount", "--lazy", os.fspath(directory), check=False)  # a dead mount is none for os.path.ismount
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """One with holes, one whose size is no multiple of anything, one empty, names that are awkward."""
    (tmp_path / "images").mkdir()
    holes, odd, empty = (f"{tmp_path}/images/{name}" for name in ("disk 1.img", "new\nline", "empty"))
    guest_lab.sparse(holes, 20 * MIB)
    with open(holes, "r+b") as file:
        for at in (0, 5 * MIB, 12 * MIB + 4096):
            file.seek(at)
            file.write(os.urandom(300_000))
    Path(odd).write_bytes(os.urandom(1_000_003))
    guest_lab.sparse(empty, 0)
    return [holes, odd, empty]


@pytest.fixture
def point(tmp_path: Path) -> Path:
    (tmp_path / "mount here").mkdir()
    return tmp_path / "mount here"


def runs(path: Path | str) -> list[tuple[int, int]]:
    """Data as SEEK_DATA and SEEK_HOLE tell it."""
    found, stop = [], 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while True:
            try:
                start = os.lseek(fd, stop, os.SEEK_DATA)
            except OSError as failure:
                assert failure.errno == errno.ENXIO
                return found
            stop = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, stop))
    finally:
        os.close(fd)


@usable
def test_every_disk_is_a_file_with_its_bytes_and_holes(images: list[str], point: Path) -> None:
    with serving(point, *images):
        assert sorted(os.listdir(point)) == sorted(os.path.basename(path) for path in images)
        for path in images:
            seen = point / os.path.basename(path)
            assert seen.stat().st_size == os.path.getsize(path)
            assert seen.stat().st_mode & 0o7777 == 0o400
            assert seen.stat().st_mtime == 1_600_000_000
            assert seen.read_bytes() == Path(path).read_bytes()
            assert runs(seen) == runs(path)
        assert os.statvfs(point).f_bfree == 0


@usable
def test_many_readers_at_once(images: list[str], point: Path) -> None:
    expected = Path(images[0]).read_bytes()

    def read(seed: int) -> bool:
        fd = os.open(point / "disk 1.img", os.O_RDONLY)
        try:
            places = [(seed * 7919 * step) % (len(expected) - 70_000) for step in range(60)]
            return all(os.pread(fd, 70_000, at) == expected[at : at + 70_000] for at in places)
        finally:
            os.close(fd)

    with serving(point, *images), ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(1, 17)))


@usable
def test_nothing_can_be_written(images: list[str], point: Path) -> None:
    with serving(point, *images):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            with pytest.raises(OSError):
                os.close(os.open(point / "disk 1.img", flags))
        with pytest.raises(OSError):
            (point / "more").touch()
        with pytest.raises(OSError):
            os.unlink(point / "empty")


@usable
def test_a_damaged_range_fails_alone(images: list[str], point: Path) -> None:
    with serving(point, images[0], broken=f"{8 * MIB}-{8 * MIB + 4096}"):
        fd = os.open(point / "disk 1.img", os.O_RDONLY)
        try:
            with pytest.raises(OSError) as caught:
                os.pread(fd, 4096, 8 * MIB)
            assert caught.value.errno == errno.EIO
            assert os.pread(fd, 300_000, 12 * MIB + 4096) == Path(images[0]).read_bytes()[12 * MIB + 4096 :][:300_000]
        finally:
            os.close(fd)


@usable
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, "unmount"])
def test_the_end_leaves_nothing(images: list[str], point: Path, how: signal.Signals | str) -> None:
    with serving(point, *images) as process:
        if isinstance(how, signal.Signals):
            process.send_signal(how)
        else:
            lab.run("fusermount3", "-u", os.fspath(point))
        assert process.wait(10) == 0
        assert process.stdout is not None and process.stdout.read() == "ended\n"
    assert not os.path.ismount(point) and os.listdir(point) == []


@usable
def test_sigterm_ends_it_while_a_file_is_open(images: list[str], point: Path) -> None:
    with serving(point, *images) as process:
        fd = os.open(point / "disk 1.img", os.O_RDONLY)
        try:
            process.terminate()
            assert process.wait(10) == 0
            with pytest.raises(OSError):
                os.pread(fd, 4096, 5 * MIB)
        finally:
            with contextlib.suppress(OSError):  # there is nobody left to be told of it
                os.close(fd)
    assert not os.path.ismount(point)


@usable
@root_test
def test_a_file_system_on_it_can_be_loop_mounted(tmp_path: Path, point: Path) -> None:
    guest_lab.make_tree(f"{tmp_path}/tree")
    image = guest_lab.make_ext4(f"{tmp_path}/ext4", f"{tmp_path}/tree")
    os.mkdir(tmp_path / "inner")
    with serving(point, image):
        lab.run("mount", "-o", "loop,ro", os.fspath(point / "ext4"), f"{tmp_path}/inner")
        try:
            assert (tmp_path / "inner" / "etc" / "hosts").read_bytes() == b"127.0.0.1 localhost\n"
        finally:
            lab.unmount(f"{tmp_path}/inner")


# --- refusals ---------------------------------------------------------------------------------------------


def test_what_cannot_be_mounted_on(tmp_path: Path, point: Path) -> None:
    with pytest.raises(MountPointUnfit, match="does not exist"):
        fuse.refuse_unfit(f"{tmp_path}/missing")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MountPointUnfit, match="Not a directory"):
        fuse.refuse_unfit(f"{tmp_path}/file")
    (point / ".hidden").write_bytes(b"")
    with pytest.raises(MountPointUnfit, match="not empty"):
        fuse.refuse_unfit(os.fspath(point))


@root_test
def test_what_is_mounted_on_already(point: Path) -> None:
    lab.run("mount", "-t", "tmpfs", "none", os.fspath(point))
    try:
        with pytest.raises(MountPointUnfit, match="mounted there already"):
            fuse.refuse_unfit(os.fspath(point))
    finally:
        lab.unmount(os.fspath(point))


@usable
@root_test
def test_a_mount_whose_server_died_is_called_by_its_name(images: list[str], point: Path) -> None:
    with serving(point, *images) as process:
        process.kill()
        process.wait(10)
        with pytest.raises(MountPointUnfit, match="dead mount"):
            fuse.refuse_unfit(os.fspath(point))


def test_without_mfusepy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ToolMissing, match="mfusepy") as caught:
        fuse.load()
    assert "graincopy[fuse]" in caught.value.next_move


# --- without root, in a mount namespace of its own, whose /dev/fuse is open or closed ---------------------------

UNPRIVILEGED = """
set -e
mknod "$1/node" c 10 229
chmod "$2" "$1/node"
mount --bind "$1/node" /dev/fuse
shift 2
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""


@contextmanager
def unprivileged(tmp_path: Path, mode: str, *command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", UNPRIVILEGED, "sh", os.fspath(tmp_path), mode, *command],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()


def _for_everybody(*folders: str | Path) -> bool:
    """Whether nobody can come to the Python and the code that run here."""
    command = ["setpriv", "--reuid", str(NOBODY), "--clear-groups", sys.executable, "-c", "import guest_lab"]
    environ = {**os.environ, "PYTHONPATH": os.path.dirname(__file__), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environ, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.fixture
def open_point(images: list[str]) -> Iterator[Path]:
    """A mount point and images that nobody may use: the folders of pytest are closed to others."""
    if not _for_everybody():
        pytest.skip("the code cannot be read without root")
    folder = Path(f"/var/tmp/graincopy-test-{os.getpid()}")
    folder.mkdir()
    try:
        (folder / "point").mkdir()
        os.rename(images[0], folder / "image")
        for path in (folder, folder / "point", folder / "image"):
            os.chown(path, NOBODY, NOBODY)
        yield folder
    finally:
        lab.run("rm", "-rf", "--one-file-system", os.fspath(folder))


@usable
@root_test
@needs("fusermount3")
def test_without_root(tmp_path: Path, open_point: Path) -> None:
    server = f"{shlex.quote(sys.executable)} {shlex.quote(os.fspath(SERVER))}"
    script = f"{server} {open_point}/point '' {open_point}/image & read_it() {{ for n in $(seq 100); do "
    script += f"test -e {open_point}/point/image && cmp {open_point}/point/image {open_point}/image && return; "
    script += f"sleep 0.1; done; }}; read_it && echo same; fusermount3 -u {open_point}/point; wait"
    with unprivileged(tmp_path, "666", "sh", "-c", script) as process:
        said, _ = process.communicate(timeout=60)
    assert said.split() == ["ready", "same", "ended"]
    assert os.listdir(open_point / "point") == []


@usable
@root_test
def test_without_root_a_closed_device_is_named_with_its_remedy(tmp_path: Path, open_point: Path) -> None:
    command = (sys.executable, SERVER, f"{open_point}/point", "", f"{open_point}/image")
    with unprivileged(tmp_path, "600", *command) as process:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == MountPointUnfit.exit_code
    assert "MountPointUnfit" in said and "chmod 666 /dev/fuse" in said
