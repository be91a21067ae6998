"""The directory medium: durability on real file systems, trouble, and what lies about in the directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from graincopy.core.errors import (
    MediumFailed,
    MediumFull,
    MediumReadOnly,
    ObjectMissing,
    RepositoryExists,
    RepositoryMissing,
)
from graincopy.core.units import KIB, MIB
from graincopy.media import directory
from graincopy.media.directory import TEMPORARY, DirectoryMedium
from graincopy.media.temporary import TemporaryFiles, write_all, write_object
from graincopy.model.snapshot import Absent, Created, Existing

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root and loop devices")
MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-J", "size=4"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-m", "single"),
}


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@contextlib.contextmanager
def mounted(image: Path, point: Path, options: str = "loop") -> Iterator[str]:
    point.mkdir(exist_ok=True)
    run("mount", "-o", options, str(image), str(point))
    try:
        yield str(point)
    finally:
        subprocess.run(["umount", str(point)], check=False, capture_output=True, timeout=60)


def made(folder: Path, fs_type: str, size: int) -> Path:
    image = folder / f"{fs_type}.img"
    with open(image, "xb") as file:
        file.truncate(size)
    run(*MKFS[fs_type], str(image))
    return image


# --- durability -----------------------------------------------------------------------------------


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
@pytest.mark.parametrize("fs_type", sorted(MKFS))
def test_what_put_returned_from_survives_a_power_cut(tmp_path: Path, fs_type: str, nameless: bool) -> None:
    """The device's content is copied under the running file system: what was not flushed is not in the copy."""
    image, cut = made(tmp_path, fs_type, 400 << 20), tmp_path / "cut.img"
    objects = {f"data/{number % 3:02x}/{number}": os.urandom(number * 7_001) for number in range(12)}
    with mounted(image, tmp_path / "live") as live:
        path = os.path.join(live, "new", "repository")
        medium = DirectoryMedium(DirectoryMedium.create(path).url, nameless=nameless)
        for name, content in objects.items():
            assert isinstance(medium.put(name, [content]), Created)
        medium.put("gone/for-good", [b"x"])
        run("sync", "-f", live)
        medium.delete("gone/for-good")
        medium.put("last/one", [b"last"])
        run("cp", "--reflink=never", "--sparse=always", str(image), str(cut))
    options = "loop,nouuid" if fs_type == "xfs" else "loop"
    with mounted(cut, tmp_path / "after", options) as after:
        found = DirectoryMedium(os.path.join(after, "new", "repository"))
        listed = {entry.name: entry.size for entry in found.list("")}
        assert listed == {name: len(content) for name, content in objects.items()} | {"last/one": 4}
        assert all(found.get(name) == content for name, content in objects.items())


@pytest.mark.parametrize("others", [False, True], ids=["made here", "made by somebody else"])
def test_every_folder_above_an_object_is_durable_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    """File systems with one log flush the folders with the file, so that no power cut shows it there."""
    medium = DirectoryMedium.create(str(tmp_path / "repository"))
    if others:  # they may not have come to their own fsync
        (tmp_path / "repository" / "data" / "ab").mkdir(parents=True)
    synced: list[str] = []
    real = directory.fsync_folder
    monkeypatch.setattr(directory, "fsync_folder", lambda folder: (real(folder), synced.append(folder))[0])
    medium.put("data/ab/object", [b"x"])
    root = str(tmp_path / "repository")
    assert [folder for folder in synced if not folder.endswith(TEMPORARY)] == [root, f"{root}/data", f"{root}/data/ab"]


# --- trouble --------------------------------------------------------------------------------------


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("nameless", [True, False], ids=["nameless", "named"])
def test_a_full_medium_says_so_and_keeps_nothing_of_the_object(tmp_path: Path, nameless: bool) -> None:
    with mounted(made(tmp_path, "ext4", 16 << 20), tmp_path / "small") as small:
        medium = DirectoryMedium(small, nameless=nameless)
        medium.put("a/first", [b"x" * 1000])
        with pytest.raises(MediumFull):
            medium.put("a/second", [bytes([7]) * (1 << 20)] * 20)
        assert [entry.name for entry in medium.list("")] == ["a/first"]
        assert isinstance(medium.put("a/third", [b"y" * 100_000]), Created)
        assert not os.path.exists(os.path.join(small, TEMPORARY)) or not os.listdir(os.path.join(small, TEMPORARY))


@pytest.mark.root
@needs_root
def test_a_read_only_medium_can_be_read_and_says_so(tmp_path: Path) -> None:
    image = made(tmp_path, "ext4", 16 << 20)
    with mounted(image, tmp_path / "rw") as rw:
        DirectoryMedium(rw).put("a/b", [b"content"])
    with mounted(image, tmp_path / "ro", "loop,ro") as ro:
        medium = DirectoryMedium(ro)
        assert medium.get("a/b") == b"content"
        assert [entry.name for entry in medium.list("")] == ["a/b"]
        for effect in (
            lambda: medium.put("a/c", [b""]),
            lambda: medium.put("c/c", [b""]),
            lambda: medium.delete("a/b"),
        ):
            with pytest.raises(MediumReadOnly):
                effect()


@needs_root
def test_no_permission_to_write_says_so() -> None:
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        medium = DirectoryMedium(path)
        os.seteuid(65534)
        try:
            with pytest.raises(MediumReadOnly, match="Permission denied"):
                medium.put("a", [b""])
            with pytest.raises(MediumReadOnly):
                DirectoryMedium.create(os.path.join(path, "sub"))
        finally:
            os.seteuid(0)


def test_a_medium_that_was_swapped_is_neither_read_nor_filled(tmp_path: Path) -> None:
    root = tmp_path / "medium"
    medium = DirectoryMedium.create(str(root))
    medium.put("a/b", [b"x"])
    root.rename(tmp_path / "away")
    root.mkdir()  # as an unmounted medium leaves its mount point
    for ask in (
        lambda: list(medium.list("")),
        lambda: medium.get("a/b"),
        lambda: medium.size("a/b"),
        lambda: medium.put("new/b", [b""]),
        lambda: medium.put("a/c", [b""]),
        lambda: medium.delete("a/b"),
    ):
        with pytest.raises(MediumFailed):
            ask()
    assert list(root.iterdir()) == []


def test_opening_and_creating(tmp_path: Path) -> None:
    with pytest.raises(RepositoryMissing):
        DirectoryMedium(str(tmp_path / "missing"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RepositoryMissing):
        DirectoryMedium(str(tmp_path / "file"))
    with pytest.raises(MediumFailed):
        DirectoryMedium.create(str(tmp_path / "file"))
    with pytest.raises(RepositoryExists):
        DirectoryMedium.create(str(tmp_path))
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    assert list(DirectoryMedium.create(str(tmp_path / "disk")).list("")) == []
    assert list(DirectoryMedium.create(f"{tmp_path}/one/two/").list("")) == []


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    medium = DirectoryMedium.create("there")
    monkeypatch.chdir("/")
    medium.put("a", [b"x"])
    assert (tmp_path / "there" / "a").read_bytes() == b"x"


# --- what lies about ------------------------------------------------------------------------------


def test_strangers_in_the_directory_are_no_objects(tmp_path: Path) -> None:
    medium = DirectoryMedium(str(tmp_path))
    medium.put("data/real", [b"x"])
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "data" / ".nfs0001").write_bytes(b"x")
    (tmp_path / "data" / "README.TXT").write_bytes(b"x")
    (tmp_path / "data" / "link").symlink_to("real")
    os.mkfifo(tmp_path / "data" / "fifo")
    (tmp_path / "data" / "folder").mkdir()
    assert [entry.name for entry in medium.list("")] == ["data/real"]
    assert medium.size("data/folder") is None
    assert medium.size("data/real/below") is None
    assert isinstance(medium.delete("data/folder"), Absent)
    for name in ("data/folder", "data/link", "data/fifo"):
        with pytest.raises(ObjectMissing):
            medium.get(name)
        with pytest.raises(MediumFailed, match="in the way"):
            medium.put(name, [b"x"])
    with pytest.raises(MediumFailed):
        medium.put("data/real/below", [b"x"])


def test_what_a_killed_writer_left_is_swept_and_what_a_live_one_uses_is_not(tmp_path: Path) -> None:
    home = tmp_path / TEMPORARY
    home.mkdir()
    (home / "1-0").write_bytes(b"left")
    with TemporaryFiles(str(home), nameless=False).new(str(tmp_path)) as (_, used):
        assert os.listdir(home) == [os.path.basename(used)]
        DirectoryMedium(str(tmp_path), nameless=False).put("a", [b"x"])
        assert os.listdir(home) == [os.path.basename(used)]
    assert os.listdir(home) == []
    assert [entry.name for entry in DirectoryMedium(str(tmp_path)).list("")] == ["a"]


def test_a_link_whose_answer_was_lost_is_still_ours(tmp_path: Path) -> None:
    medium = DirectoryMedium(str(tmp_path), nameless=False)
    path = str(tmp_path / "a")
    with TemporaryFiles(str(tmp_path / TEMPORARY), nameless=False).new(str(tmp_path)) as (fd, temporary):
        os.link(temporary, path)
        assert medium._link(fd, temporary, path)
    assert isinstance(medium.put("a", [b"x"]), Existing)


def test_short_writes_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def short(fd: int, views: list[memoryview]) -> int:
        return real(fd, [views[0][: max(1, views[0].nbytes // 3)]])

    monkeypatch.setattr(os, "writev", short)
    parts = [b"a", b"", bytearray(range(256)) * 3, memoryview(b"0123456789")[::1], b"z" * 5]
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    try:
        write_all(fd, parts)
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def _large_object(shift: int) -> tuple[memoryview, bytes]:
    """A part that begins ``shift`` bytes into a page and ends within one."""
    buffer = memoryview(mmap.mmap(-1, 3 * MIB))[shift : shift + 2 * MIB + 777]
    buffer[:] = np.random.default_rng(3).bytes(len(buffer))
    return buffer, bytes(buffer) + b"tail"


@pytest.mark.parametrize("shift", [0, 1])
def test_a_large_part_past_the_page_cache_is_whole(tmp_path: Path, shift: int) -> None:
    part, expected = _large_object(shift)
    medium = DirectoryMedium(str(tmp_path))
    medium.put("a", [part, b"tail"])
    assert medium.get("a") == expected


@pytest.mark.parametrize("refused_from", [1, 2, 3])
def test_direct_writes_may_be_short_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_from: int
) -> None:
    part, expected = _large_object(0)
    real, calls = os.write, itertools.count(1)

    def write(fd: int, data: memoryview) -> int:
        if next(calls) >= refused_from:
            raise OSError(errno.EINVAL, "not here")
        return real(fd, data[: 256 * KIB])

    monkeypatch.setattr(os, "write", write)
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    try:
        write_object(fd, [part, b"tail"])
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    finally:
        os.close(fd)
    assert (tmp_path / "file").read_bytes() == expected


def test_more_parts_than_one_system_call_takes(tmp_path: Path) -> None:
    medium = DirectoryMedium(str(tmp_path))
    medium.put("a", [bytes([number % 251]) for number in range(5_000)])
    assert medium.get("a") == bytes(number % 251 for number in range(5_000))


def test_objects_are_private(tmp_path: Path) -> None:
    for nameless in (True, False):
        medium = DirectoryMedium.create(str(tmp_path / str(nameless)))
        DirectoryMedium(medium.url, nameless=nameless).put("data/a", [b"x"])
        assert os.stat(medium.url).st_mode & 0o777 == 0o700
        assert os.stat(f"{medium.url}/data").st_mode & 0o777 == 0o700
        assert os.stat(f"{medium.url}/data/a").st_mode & 0o777 == 0o600
        shutil.rmtree(medium.url)
