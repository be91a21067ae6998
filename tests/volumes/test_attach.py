"""T attached on real storage: right bytes, untouched T, and nothing left however the process ends."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest
from blake3 import blake3

from graincopy.core.errors import AttachFailed, SourceChanged
from graincopy.core.extent import Extents
from graincopy.core.placement import State
from graincopy.volumes import loop, superblock
from graincopy.volumes.attach import AttachedFileSystem, attach, replay, unclean
from graincopy.volumes.mounts import MountRefused, mount_detached

NAME = "sub/disk \udcff\n1.raw"
CONTENT = hashlib.shake_128(b"content").digest(300_001)


def hash_of(path: str) -> str:
    return blake3().update_mmap(path).hexdigest()


def read(fs: AttachedFileSystem, name: str, size: int, offset: int = 0) -> bytes:
    buffer = bytearray(b"\xee" * size)
    with fs.open_file(name) as image:
        image.readinto(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture(params=[("ext4", False), ("ext4", True), ("xfs", False), ("xfs", "offset")], ids=str)
def lun(request: pytest.FixtureRequest, xfs_dir: str, tmp_path: Path) -> Iterator[lab.Lun]:
    inner, partitioned = request.param
    with lab.Lun(xfs_dir, size=400 * lab.MIB, inner=inner, partitioned=partitioned, mount_at=tmp_path / "m") as made:
        os.mkdir(os.path.join(made.path, "sub"))
        lab.write_at(os.path.join(made.path, NAME), (0, CONTENT), (600_000, b"end"), sync=False)
        yield made


def snapshot(lun: lab.Lun) -> str:
    """T of the frozen LUN; afterwards S goes on changing."""
    target = lun.image + ".T"
    with lun.frozen():
        lab.reflink(lun.image, target)
    lab.write_at(os.path.join(lun.path, NAME), (0, b"written after the instant"))
    return target


@lab.root_test
def test_files_read_and_lie_as_at_the_instant(lun: lab.Lun, traces: lab.Traces) -> None:
    target = snapshot(lun)
    before = hash_of(target)
    with attach(target, lun.inner, lun.offset) as fs:
        assert read(fs, NAME, 300_001) == CONTENT
        assert read(fs, NAME, 10, 599_998) == b"\0\0end" + bytes(5)
        assert read(fs, NAME, 4, 10**12) == bytes(4)
        with fs.open_file("/" + NAME) as image:
            assert image.size == 600_003
            placed = image.placement()
        written = placed.in_state(State.WRITTEN)
        assert written.covers(Extents.of((0, 300_001)))
        with open(target, "rb") as volume:
            for start, stop in written.clip(0, 300_001):
                ((at, _),) = placed.to_volume(Extents.of((start, stop)))
                volume.seek(at)
                assert volume.read(stop - start) == CONTENT[start:stop]
    assert traces.gone()
    assert hash_of(target) == before
    os.unlink(target)


@lab.root_test
def test_files_outlive_their_attachment(lun: lab.Lun, traces: lab.Traces) -> None:
    target = snapshot(lun)
    with attach(target, lun.inner, lun.offset) as fs:
        image = fs.open_file(NAME)
        fs.close()
        fs.close()
    buffer = bytearray(100)
    image.readinto(0, memoryview(buffer))
    assert bytes(buffer) == CONTENT[:100]
    assert not traces.gone(patience=0)
    image.close()
    image.close()
    assert traces.gone()


@lab.root_test
def test_what_is_no_file_in_the_target_is_said_so(lun: lab.Lun) -> None:
    os.symlink("disk.raw", os.path.join(lun.path, "link"))
    os.symlink("/etc", os.path.join(lun.path, "etc"))
    os.mkfifo(os.path.join(lun.path, "fifo"))
    target = snapshot(lun)
    with attach(target, lun.inner, lun.offset) as fs:
        for name in ("nope", "sub", "link", "etc/passwd", "fifo", "../../etc/passwd", NAME + "/x", ""):
            with pytest.raises(SourceChanged):
                fs.open_file(name)


@lab.root_test
def test_not_frozen_is_refused_and_can_be_replayed_on_a_clone(lun: lab.Lun, traces: lab.Traces) -> None:
    lab.run("sync")  # the log now holds what is not in place yet
    target = lun.image + ".T"
    lab.reflink(lun.image, target)
    before = hash_of(target)
    assert unclean(target, lun.inner, lun.offset) is not None
    with pytest.raises(AttachFailed, match=r"freeze|frozen"):
        attach(target, lun.inner, lun.offset)
    lab.reflink(target, target + ".replayed")
    replay(target + ".replayed", lun.inner, lun.offset)
    with attach(target + ".replayed", lun.inner, lun.offset) as fs:
        assert read(fs, NAME, 300_001) == CONTENT
    assert traces.gone()
    assert hash_of(target) == before


@lab.root_test
def test_frozen_again_and_again_stays_clean(lun: lab.Lun) -> None:
    """The XFS log goes round its ring: head and tail are found wherever they are."""
    for turn in range(12):
        for name in range(40):
            path = os.path.join(lun.path, f"f{name}")
            lab.write_at(path, (0, b"%d" % turn), sync=name == 0)
            os.rename(path, path + ".b")
            os.truncate(path + ".b", turn)
        assert unclean(lun.image, lun.inner, lun.offset) is not None
        with lun.frozen():
            assert unclean(lun.image, lun.inner, lun.offset) is None
        os.chmod(os.path.join(lun.path, NAME), 0o600 + turn)  # one small transaction is enough
        lab.run("sync", "-f", lun.path)
        assert unclean(lun.image, lun.inner, lun.offset) is not None
    lun.unmount()
    assert unclean(lun.image, lun.inner, lun.offset) is None
    lun.mount()


SMALL_LOG = ("env", "TEST_DIR=x", "TEST_DEV=x", "QA_CHECK_FS=x", "mkfs.xfs", "-q", "-f")  # lets logs be below 64 MiB


@lab.root_test
@pytest.mark.parametrize("log", ["size=6m", "size=6m,su=32k", "size=20m,sunit=512"])
def test_xfs_logs_that_wrap_are_read_right(xfs_dir: str, tmp_path: Path, log: str) -> None:
    with lab.Lun(xfs_dir, size=400 * lab.MIB, inner="xfs", mount_at=tmp_path / "m") as lun:
        lun.unmount()
        lab.run(*SMALL_LOG, "-l", log, lun.device)
        lun.mount()
        cycles = set()
        for turn in range(60):
            for name in range(150 + turn):  # so that the head comes to lie anywhere
                os.symlink("t" * 1000, os.path.join(lun.path, f"{turn}-{name}"))
            lab.run("sync", "-f", lun.path)
            assert unclean(lun.image, "xfs") is not None
            with lun.frozen():
                assert unclean(lun.image, "xfs") is None
            cycles.add(cycle_of(lun.image))
        assert max(cycles) >= 3


def cycle_of(image: str) -> int:
    with open(image, "rb") as file:
        found = superblock.read_xfs(file.fileno(), 0)
        assert found is not None
        return superblock._Log(file.fileno(), found.log_start, found.log_blocks).cycle(0)


@lab.root_test
def test_a_held_deleted_file_does_not_make_it_unclean(lun: lab.Lun) -> None:
    path = os.path.join(lun.path, "held")
    with open(path, "wb") as held:
        held.write(b"x" * 100_000)
        os.unlink(path)
        target = snapshot(lun)
        with attach(target, lun.inner, lun.offset) as fs:
            assert read(fs, NAME, 300_001) == CONTENT


@lab.root_test
def test_refusals_have_no_effect(xfs_dir: str, traces: lab.Traces) -> None:
    path = os.path.join(xfs_dir, "junk")
    lab.write_at(path, (0, b"junk" * 100_000))
    for fs_type, why in {"btrfs": "only ext4 and XFS", "ext4": "no ext4", "xfs": "no XFS"}.items():
        with pytest.raises(AttachFailed, match=why):
            attach(path, fs_type)
    with pytest.raises(AttachFailed, match="No such file"):
        attach(path + ".nope", "ext4")
    assert traces.gone(patience=0)


@lab.root_test
def test_the_kernels_own_words_reach_the_error(xfs_dir: str, traces: lab.Traces) -> None:
    with lab.Lun(xfs_dir, inner="ext4") as lun:
        lun.unmount()
        with loop.attach_read_only(lun.image) as device, pytest.raises(MountRefused, match="nonsense"):
            mount_detached("ext4", device.path, ("noload", "nonsense"))
        lab.write_at(lun.image, (1024 + 0x18, b"\xff"))  # a block size that no ext4 has: ext4 says so elsewhere
        with pytest.raises(AttachFailed, match="Invalid argument"):
            attach(lun.image, "ext4")
    assert traces.gone()


@lab.root_test
def test_a_size_limit_is_kept(xfs_dir: str) -> None:
    path = os.path.join(xfs_dir, "f")
    lab.write_at(path, (0, bytes(4096) + b"seen" + bytes(8188)))
    with loop.attach_read_only(path, 4096, 4096) as device:
        backing = loop.backing_of(device.name)
        assert backing == loop.LoopBacking(path, 4096, 4096, False)
        with open(device.path, "rb") as file:
            assert file.read() == b"seen" + bytes(4092)
        with pytest.raises(PermissionError):
            lab.write_at(device.path, (0, b"no"))
        assert loop.is_read_only(device.name)
        os.rename(path, path + " (deleted)")
        assert loop.backing_of(device.name) == loop.LoopBacking(path + " (deleted)", 4096, 4096, False)
        os.unlink(path + " (deleted)")
        gone = loop.backing_of(device.name)
        assert gone is not None and gone.deleted
    assert loop.backing_of(device.name) != gone


CHILD = """
import sys, time
from graincopy.volumes.attach import attach
fs = attach(sys.argv[1], sys.argv[2], int(sys.argv[3]))
image = fs.open_file(sys.argv[4])
print("attached", flush=True)
time.sleep(60)
"""


@lab.root_test
def test_sigkill_leaves_nothing(lun: lab.Lun, traces: lab.Traces) -> None:
    target = snapshot(lun)
    command = [sys.executable, "-c", CHILD, target, lun.inner, str(lun.offset), NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"attached\n"
            loops, mounts = traces.now()
            assert target in loops  # it is attached …
            assert mounts == traces.before[1]  # … and nobody sees a mount
        finally:
            child.send_signal(signal.SIGKILL)
    assert traces.gone()
    os.unlink(target)
