"""New files of a restore: named last, durable, written past the page cache as far as that goes."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
from pathlib import Path

import pytest

from graincopy.core.errors import OutputExists
from graincopy.core.units import MIB
from graincopy.volumes.new_file import NewFiles

ODD = 2 * MIB + 777


def noise(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


def aligned(length: int, seed: int) -> memoryview:
    view = memoryview(mmap.mmap(-1, length))
    view[:] = noise(length, seed)
    return view


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def goes_past_the_cache(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_size_that_is_no_multiple_of_a_block(
    where: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path if where == "disk" else Path("/dev/shm") / tmp_path.name
    wanted = noise(ODD, 1)
    body, tail = aligned(2 * MIB, 0), memoryview(wanted)[2 * MIB :]
    body[:] = wanted[: 2 * MIB]
    try:
        with NewFiles(str(folder)).new_file("a.raw", ODD, False) as file:
            assert is_direct(file.fd) == goes_past_the_cache(folder)
            file.write(0, body)
            file.write(2 * MIB, tail)  # not aligned: most file systems refuse that past the page cache
            file.write(MIB, body[MIB : MIB + 512])
            assert not (folder / "a.raw").exists()
        assert (folder / "a.raw").read_bytes() == wanted
    finally:
        (folder / "a.raw").unlink(missing_ok=True)
        if where == "memory":
            folder.rmdir()


def test_memory_that_is_not_aligned_is_written_all_the_same(tmp_path: Path) -> None:
    content = b"x" + noise(2 * MIB, 2)
    with NewFiles(str(tmp_path)).new_file("a.raw", 2 * MIB, False) as file:
        file.write(0, memoryview(content)[1:])
    assert (tmp_path / "a.raw").read_bytes() == content[1:]


def test_a_small_file_takes_the_page_cache(tmp_path: Path) -> None:
    with NewFiles(str(tmp_path)).new_file("a.raw", 65536, False) as file:
        assert not is_direct(file.fd)


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputExists), NewFiles(str(tmp_path)).new_file("a.raw", MIB, False):
        (tmp_path / "a.raw").write_bytes(b"somebody else's")
    assert (tmp_path / "a.raw").read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == ["a.raw"]
