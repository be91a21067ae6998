"""The live file: nobody else writes it, and it ends up durable with the right bytes, holes, size and metadata."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import lab
import pytest

from graincopy.core.errors import (
    PathUnfit,
    PathUnreadable,
    RestoreNoSpace,
    SourceInUse,
    SourceWritten,
    Unsupported,
)
from graincopy.core.extent import Extents
from graincopy.core.placement import State
from graincopy.model.workload import FileMetadata
from graincopy.volumes import ioctl, leases, live

K64 = 65536


@contextmanager
def opened(path: str | Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> str:
    found = str(tmp_path / "disk \udcff\n.raw")
    lab.write_at(found, (0, bytes(range(256)) * 1024))
    return found


def content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


# --- writing ----------------------------------------------------------------------------------------


def test_write_zero_resize_and_sync(path: str) -> None:
    wanted = bytearray(content(path))
    with live.open_sink(path) as sink:
        assert (sink.existed, sink.size, sink.path) == (True, 4 * K64, path)
        sink.write(10, memoryview(b"new"))
        sink.zero(K64, K64)
        sink.zero(4 * K64 - 5, 100)  # beyond the end: the file does not grow
        sink.zero(0, 0)
        assert sink.size == 4 * K64
        sink.resize(5 * K64)
        sink.write(5 * K64 - 1, memoryview(b"!"))
        sink.sync()
        sink.sync()
        assert sink.size == 5 * K64
        wanted[10:13] = b"new"
        wanted[K64 : 2 * K64] = bytes(K64)
        wanted[-5:] = bytes(5)
        wanted += bytes(K64 - 1) + b"!"
        buffer = bytearray(b"\xee" * (6 * K64))
        sink.readinto(0, memoryview(buffer))
        assert buffer == wanted + bytes(K64)
        sink.resize(3)
    assert content(path) == wanted[:3]
    sink.close()


@lab.root_test
def test_zero_makes_a_hole_and_the_placement_shows_it(reflink_dir: str) -> None:
    path = os.path.join(reflink_dir, "f")
    lab.write_at(path, (0, b"x" * 4 * K64))
    with live.open_sink(path) as sink:
        sink.zero(K64, K64)
        placed = sink.placement()
        assert placed.in_state(State.HOLE) == Extents.of((K64, 2 * K64))
        assert placed.volume.tolist() == placed.starts.tolist()


def test_zero_without_holes_writes_zeros(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that answer EOPNOTSUPP."""
    monkeypatch.setattr(live, "punch", lambda fd, offset, length: False)
    with live.open_sink(path) as sink:
        sink.resize(3 * lab.MIB)
        sink.write(0, memoryview(b"x" * 3 * lab.MIB))
        sink.zero(1, 2 * lab.MIB + 5)
    assert content(path) == b"x" + bytes(2 * lab.MIB + 5) + b"x" * (lab.MIB - 6)


def test_a_missing_file_is_made_private_with_its_folders(tmp_path: Path) -> None:
    path = str(tmp_path / "a/b/new.raw")
    with live.open_sink(path) as sink:
        assert (sink.existed, sink.size) == (False, 0)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        sink.resize(100)
        sink.write(0, memoryview(b"first"))
        sink.sync()
        free = sink.free_bytes()
        assert free is not None and free > 0
    assert content(path) == b"first" + bytes(95)


def test_what_was_made_can_be_taken_away_and_nothing_else(tmp_path: Path) -> None:
    path = str(tmp_path / "new.raw")
    with live.open_sink(path) as sink:
        sink.remove()
        sink.remove()
        assert not os.path.exists(path)
        lab.write_at(path, (0, b"somebody else's"))
        sink.remove()
    assert content(path) == b"somebody else's"


@lab.root_test
def test_no_space_says_how_much(tmp_path: Path) -> None:
    with lab.ReflinkFs(tmp_path, "ext4", 16 * lab.MIB) as small:
        path = os.path.join(small.path, "f")
        with live.open_sink(path) as sink:
            sink.resize(100 * lab.MIB)
            with pytest.raises(RestoreNoSpace) as caught:
                sink.write(0, memoryview(bytes(64 * lab.MIB)))
            assert isinstance(caught.value.facts["free"], int)
            assert 0 < int(str(caught.value.facts["needed"])) <= 64 * lab.MIB


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_what_cannot_be_restored_onto(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    (tmp_path / "target").write_bytes(b"untouched")
    {"directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("target")}[kind]()
    with pytest.raises(PathUnfit):
        live.open_sink(str(path))
    with pytest.raises(PathUnfit), live.lease_read(str(path)):
        pass
    assert (tmp_path / "target").read_bytes() == b"untouched"


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PathUnreadable):
        live.open_sink(str(tmp_path / "file/below"))


# --- others -----------------------------------------------------------------------------------------

WRITER = "import os, sys, time; fd = os.open(sys.argv[1], os.O_RDWR); print('open', flush=True); time.sleep(60)"


def test_somebody_who_writes_is_named(path: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, os.fsencode(path)], stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            for attempt in (lambda: live.open_sink(path), lambda: live.lease_read(path).__enter__()):
                with pytest.raises(SourceInUse, match=f"pid {writer.pid}"):
                    attempt()
        finally:
            writer.kill()
    live.open_sink(path).close()


def test_a_descriptor_of_this_process_counts(path: str) -> None:
    with opened(path, os.O_WRONLY), pytest.raises(SourceInUse, match=f"pid {os.getpid()}"):
        live.open_sink(path)


def test_readers_do_not_stand_in_the_way(path: str) -> None:
    with opened(path, os.O_RDONLY), live.open_sink(path) as sink:
        sink.write(0, memoryview(b"new"))
        sink.sync()
    assert content(path)[:3] == b"new"


@lab.root_test
def test_a_loop_device_is_a_writer_unless_it_is_read_only(xfs_dir: str) -> None:
    path = os.path.join(xfs_dir, "f")
    lab.write_at(path, (0, bytes(K64)))
    device = lab.bind(path)
    try:
        with pytest.raises(SourceInUse, match=device):
            live.open_sink(path)
    finally:
        lab.unbind(device)
    device = lab.bind(path, "--read-only")
    try:
        with live.open_sink(path) as sink:
            sink.write(0, memoryview(b"x"))
    finally:
        lab.unbind(device)


def test_writers_are_held_off_before_and_after_the_first_write(path: str) -> None:
    nonblocking = os.O_NONBLOCK | os.O_CLOEXEC
    with live.open_sink(path) as sink:
        with opened(path, os.O_RDONLY | nonblocking):
            pass  # the undo snapshot must be able to clone it
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | nonblocking)
    with live.open_sink(path) as sink:
        sink.write(0, memoryview(b"x"))
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | nonblocking)
        with pytest.raises(SourceInUse):
            sink.sync()
    os.close(os.open(path, os.O_WRONLY | nonblocking))


def test_a_writer_who_came_before_the_first_write_stops_it(path: str) -> None:
    before = content(path)
    with live.open_sink(path) as sink:
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        for _ in range(2):
            with pytest.raises(SourceWritten):
                sink.write(0, memoryview(b"lost"))
    assert content(path) == before


def test_of_several_that_write_first_one_takes_the_lease(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are held where the file has been opened for writing and the lease has not been taken."""
    real, together = leases.take, threading.Barrier(4)

    def take(fd: int, kind: int) -> object:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.3)
        return real(fd, kind)

    with live.open_sink(path) as sink, ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(leases, "take", take)
        list(pool.map(lambda at: sink.write(at * K64, memoryview(b"w" * K64)), range(4)))
        sink.sync()
    assert content(path) == b"w" * 4 * K64


def test_a_writer_between_the_leases_stops_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reopen = live._reopen

    def meanwhile(fd: int, name: str) -> int:
        lab.write_at(path, (0, b"stranger"))
        return reopen(fd, name)

    monkeypatch.setattr(live, "_reopen", meanwhile)
    with live.open_sink(path) as sink:
        with pytest.raises(SourceWritten):
            sink.write(0, memoryview(b"lost"))
        with pytest.raises(OSError) as caught:
            sink.write(0, memoryview(b"lost"))
        assert caught.value.errno == errno.EBADF
    assert content(path)[:8] == b"stranger"


def test_a_writer_who_stays_between_the_leases_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reopen, before = live._reopen, content(path)
    with contextlib.ExitStack() as stranger:

        def meanwhile(fd: int, name: str) -> int:
            stranger.enter_context(opened(path, os.O_WRONLY))
            return reopen(fd, name)

        monkeypatch.setattr(live, "_reopen", meanwhile)
        with live.open_sink(path) as sink, pytest.raises(SourceInUse, match=f"pid {os.getpid()}"):
            sink.write(0, memoryview(b"lost"))
    assert content(path) == before


def test_a_file_that_was_replaced_is_not_written_through(path: str) -> None:
    """The inode that was held is the one that is written, never a stranger that took its path."""
    with live.open_sink(path) as sink:
        os.rename(path, path + ".old")
        lab.write_at(path, (0, b"other"))
        with pytest.raises(SourceWritten):  # renaming changed its ctime
            sink.write(0, memoryview(b"lost"))
    assert content(path) == b"other"


# --- reading under a lease --------------------------------------------------------------------------


def test_lease_holds_until_somebody_writes(path: str) -> None:
    with live.lease_read(path) as lease:
        assert lease.held
        lease.check()
        content(path)
        lease.check()
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        with pytest.raises(SourceWritten):
            lease.check()
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_a_change_of_metadata_is_noticed(path: str) -> None:
    with live.lease_read(path) as lease:
        os.utime(path, (1, 1))
        with pytest.raises(SourceWritten):
            lease.check()


def test_without_leases_times_and_proc_tell(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on network file systems."""
    monkeypatch.setattr(leases, "take", lambda fd, kind: None)
    with opened(path, os.O_WRONLY), pytest.raises(SourceInUse), live.lease_read(path):
        pass
    with live.lease_read(path) as lease:
        assert not lease.held
        lease.check()
        with opened(path, os.O_WRONLY), pytest.raises(SourceWritten):
            lease.check()
        lease.check()
        os.truncate(path, 5)
        with pytest.raises(SourceWritten):
            lease.check()


def test_no_descriptor_is_left(path: str, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with opened(path, os.O_WRONLY), pytest.raises(SourceInUse):
        live.open_sink(path)
    with live.open_sink(path) as sink:
        sink.write(0, memoryview(b"x"))
    with live.lease_read(path):
        pass
    with pytest.raises(FileNotFoundError), live.lease_read(str(tmp_path / "nope")):
        pass
    assert os.listdir("/proc/self/fd") == before


@lab.root_test
def test_an_ordinary_user_with_files_of_his_own(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(folder, 0o755)
    mine, others = tmp_path / "mine", tmp_path / "others"
    for path, owner in ((mine, 65534), (others, 0)):
        path.write_bytes(b"x" * K64)
        os.chown(path, owner, owner)
        os.chmod(path, 0o644)
    pid = os.fork()
    if pid == 0:  # the venv may not be readable for the user: everything is imported by now
        code = 1
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            code = _as_user(str(mine), str(others))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _as_user(mine: str, others: str) -> int:
    with live.lease_read(mine) as lease, live.lease_read(others) as weak:
        if not lease.held or weak.held:
            return 2
        lease.check()
        weak.check()
    with live.open_sink(mine) as sink:
        sink.write(0, memoryview(b"new"))
        sink.sync()
    with live.open_sink(others) as sink:
        try:
            sink.write(0, memoryview(b"new"))
        except PathUnreadable:
            return 0
    return 3


# --- block devices ----------------------------------------------------------------------------------


@lab.root_test
def test_a_block_device_of_fixed_size(xfs_dir: str, tmp_path: Path) -> None:
    image = os.path.join(xfs_dir, "img")
    lab.write_at(image, (0, b"x" * 16 * K64))
    device = lab.bind(image)
    try:
        with live.open_sink(device) as sink:
            assert (sink.existed, sink.size) == (True, 16 * K64)
            sink.resize(16 * K64)
            for size in (15 * K64, 17 * K64):
                with pytest.raises(Unsupported):
                    sink.resize(size)
            with pytest.raises(Unsupported):
                sink.remove()
            sink.write(5, memoryview(b"new"))
            sink.zero(K64, K64)
            sink.sync()
            assert sink.apply(FileMetadata()) == ()
            assert sink.placement().allocated().total == 16 * K64
        assert content(image) == b"x" * 5 + b"new" + b"x" * (K64 - 8) + bytes(K64) + b"x" * 14 * K64
        lab.make_fs("ext4", device)
        os.mkdir(tmp_path / "m")
        lab.run("mount", device, str(tmp_path / "m"))
        try:
            with pytest.raises(SourceInUse, match="mounted"):
                live.open_sink(device)
        finally:
            lab.unmount(str(tmp_path / "m"))
        with opened(device, os.O_RDWR), pytest.raises(SourceInUse, match=f"pid {os.getpid()}"):
            live.open_sink(device)
    finally:
        lab.unbind(device)


# --- metadata ---------------------------------------------------------------------------------------


@lab.root_test
def test_metadata_comes_back(reflink_dir: str) -> None:
    path, other = os.path.join(reflink_dir, "f"), os.path.join(reflink_dir, "g")
    lab.write_at(path, (0, b"x"))
    os.setxattr(path, "user.note", b"\0\xff")
    os.chown(path, 107, 64055)
    os.chmod(path, 0o640)
    found = live.read_metadata(path)
    assert found == FileMetadata(mode=0o640, uid=107, gid=64055, xattrs={"user.note": b"\0\xff"})
    with live.open_sink(other) as sink:
        assert sink.apply(found) == ()
        assert sink.metadata() == found
        assert sink.apply(found) == ()
    assert live.read_metadata(other) == found


@lab.root_test
def test_nodatacow_needs_an_empty_file(btrfs_dir: str) -> None:
    path = os.path.join(btrfs_dir, "f")
    with live.open_sink(path) as sink:
        assert sink.apply(FileMetadata(nodatacow=True)) == ()
        sink.write(0, memoryview(b"x" * K64))
        assert sink.metadata().nodatacow
        (complaint,) = sink.apply(FileMetadata(nodatacow=False))
        assert "empty file" in complaint
        assert sink.metadata().nodatacow
    with opened(path, os.O_RDONLY) as fd:
        assert ioctl.inode_flags(fd) & ioctl.FS_NOCOW_FL


def test_what_cannot_be_set_is_told_and_the_rest_is_set(path: str) -> None:
    wanted = FileMetadata(mode=0o600, uid=os.getuid(), gid=os.getgid(), xattrs={"nonsense.x": b"1", "user.ok": b"2"})
    with live.open_sink(path) as sink:
        (complaint,) = sink.apply(wanted)
        assert "nonsense.x" in complaint
    assert os.getxattr(path, "user.ok") == b"2"


def test_free_bytes_of_what_does_not_exist_yet(tmp_path: Path) -> None:
    assert abs(live.free_bytes(str(tmp_path / "a/b/c")) - live.free_bytes(str(tmp_path))) < 1 << 30


def test_numbers_are_those_of_the_headers() -> None:
    """From linux/fs.h, linux/fiemap.h and linux/btrfs.h, compiled on x86-64."""
    assert (ioctl.FICLONE, ioctl.FIFREEZE, ioctl.FITHAW) == (0x40049409, 0xC0045877, 0xC0045878)
    assert (ioctl.FS_IOC_FIEMAP, ioctl.BTRFS_IOC_FS_INFO) == (0xC020660B, 0x8400941F)
    assert (ioctl.FS_IOC_GETFLAGS, ioctl.FS_IOC_SETFLAGS) == (0x80086601, 0x40086602)
    assert (ioctl.LOOP_INFO64.size, ioctl.LOOP_CONFIG.size, ioctl.XFS_GEOMETRY.size) == (232, 304, 112)
    assert fcntl.F_SETLEASE == 1024
