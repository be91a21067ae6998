"""Writes over a view: the overlay against a plain bytearray, kept ones over crashes, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import threading

import nbd_client as nbd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_client import Client
from nbd_disks import MemoryDisk
from test_nbd_server import Serving, tool

from graincopy.core.errors import OverlayUnfit
from graincopy.views.overlay import BLOCK, Overlay
from graincopy.views.overlay_map import COMPACT_FROM, RECORD, OverlayMap, Whose

SIZE = 40 * BLOCK + 100
CONTENT = random.Random(1).randbytes(20 * BLOCK) + bytes(10 * BLOCK) + random.Random(2).randbytes(10 * BLOCK + 100)
POINT, BOOT = "ab" * 16, "this boot"


def base(content: bytes = CONTENT) -> MemoryDisk:
    return MemoryDisk(content, "disk.raw")


def kept(path: str, boot: str = BOOT, point: str = POINT, disk: MemoryDisk | None = None) -> Overlay:
    return Overlay.kept(disk or base(), path, point, boot)


def whole(overlay: Overlay) -> bytes:
    buffer = bytearray(overlay.size)
    overlay.readinto(0, memoryview(buffer))
    return bytes(buffer)


def put(overlay: Overlay, offset: int, data: bytes) -> None:
    overlay.write(offset, memoryview(data))


def crash(overlay: Overlay) -> None:
    """Let go of the files as a process that is killed does: without a flush."""
    assert overlay._journal is not None
    overlay._journal.close()
    os.close(overlay._fd)


def changed(*writes: tuple[int, bytes]) -> bytes:
    model = bytearray(CONTENT)
    for offset, data in writes:
        model[offset : offset + len(data)] = data
    return bytes(model)


# --- one that is thrown away ----------------------------------------------------------------------

places = st.one_of(st.integers(0, SIZE - 1), st.integers(0, 40).map(lambda block: block * BLOCK))
sizes = st.one_of(st.integers(1, 300), st.integers(1, 6).map(lambda blocks: blocks * BLOCK), st.integers(1, SIZE))
changes = st.tuples(st.sampled_from(["write", "write", "zero"]), places, sizes, st.integers(0, 255))


@settings(max_examples=150, deadline=None)
@given(st.lists(changes, max_size=12), places, sizes)
def test_an_overlay_is_a_bytearray(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[str, int, int, int]], at: int, length: int
) -> None:
    folder = os.fspath(tmp_path_factory.getbasetemp() / "scratch")
    overlay = Overlay.scratch(base(), folder)
    model = bytearray(CONTENT)
    for what, offset, size, fill in made:
        stop = min(offset + size, SIZE)
        if what == "write":
            put(overlay, offset, bytes([fill]) * (stop - offset))
            model[offset:stop] = bytes([fill]) * (stop - offset)
        else:
            overlay.zero(offset, stop - offset)
            model[offset:stop] = bytes(stop - offset)
    assert whole(overlay) == model
    part = bytearray(b"\xff" * length)
    overlay.readinto(at, memoryview(part))
    assert part == (model + bytes(length))[at : at + length]
    reached = at
    for span in overlay.extents(at, length):
        assert span.start == reached < span.stop
        assert not span.zero or not any(model[span.start : span.stop])
        reached = span.stop
    assert reached == min(at + length, SIZE)
    overlay.close()
    assert os.listdir(folder) == []


def test_nothing_is_left_of_a_scratch_overlay_even_while_it_lives(tmp_path: os.PathLike[str]) -> None:
    folder = os.path.join(tmp_path, "private")
    overlay = Overlay.scratch(base(), folder)
    put(overlay, 0, b"x")
    assert os.listdir(folder) == []
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    overlay.close()


def test_whole_blocks_are_not_copied_up_and_what_is_written_is_local(tmp_path: os.PathLike[str]) -> None:
    reads = []
    disk = MemoryDisk(CONTENT, hook=lambda offset, length: reads.append((offset, length)))
    overlay = Overlay.scratch(disk, os.fspath(tmp_path))
    put(overlay, BLOCK, b"n" * 3 * BLOCK)
    put(overlay, 40 * BLOCK, b"e" * 100)  # the short block at the end is whole as well
    overlay.zero(8 * BLOCK, 2 * BLOCK)
    assert reads == []
    put(overlay, 6 * BLOCK + 5, b"half")
    assert reads == [(6 * BLOCK, BLOCK)]
    spans = {
        (span.start // BLOCK, -(-span.stop // BLOCK)): (span.zero, span.local) for span in overlay.extents(0, SIZE)
    }
    assert spans[1, 4] == (False, True)
    assert spans[8, 10] == (True, True)
    overlay.close()


def test_writers_of_one_block_at_once_lose_nothing(tmp_path: os.PathLike[str]) -> None:
    gate = threading.Barrier(8)
    overlay = Overlay.scratch(MemoryDisk(CONTENT, hook=lambda _at, _length: gate.wait(10)), os.fspath(tmp_path))
    threads = [threading.Thread(target=put, args=(overlay, at * 100, bytes([at]) * 100)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    block = bytearray(BLOCK)
    overlay.readinto(0, memoryview(block))
    assert block == b"".join(bytes([at]) * 100 for at in range(8)) + CONTENT[800:BLOCK]
    overlay.close()


def test_a_write_that_needs_what_cannot_be_read_fails_and_changes_nothing(tmp_path: os.PathLike[str]) -> None:
    bad = [True]

    def hook(_offset: int, _length: int) -> None:
        if bad[0]:
            raise OSError(errno.EIO, "damaged")

    overlay = Overlay.scratch(MemoryDisk(CONTENT, hook=hook), os.fspath(tmp_path))
    with pytest.raises(OSError, match="damaged"):
        put(overlay, 5, b"half")
    put(overlay, BLOCK, b"w" * BLOCK)
    bad[0] = False
    assert whole(overlay) == changed((BLOCK, b"w" * BLOCK))
    overlay.close()


# --- one that is kept -----------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: os.PathLike[str]) -> str:
    return os.path.join(tmp_path, "kept overlay")


def test_what_was_kept_is_there_again(path: str) -> None:
    overlay = kept(path)
    put(overlay, 100, b"hello")
    overlay.zero(3 * BLOCK, BLOCK)
    overlay.close()
    overlay = kept(path, "another boot")
    put(overlay, 50, b"more")
    overlay.close()
    overlay = kept(path)
    assert whole(overlay) == changed((100, b"hello"), (3 * BLOCK, bytes(BLOCK)), (50, b"more"))
    overlay.close()
    assert sorted(os.listdir(os.path.dirname(path))) == ["kept overlay", "kept overlay.map"]
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_crash_of_the_process_loses_no_write_that_was_answered(path: str) -> None:
    overlay = kept(path)
    put(overlay, 100, b"one")
    overlay.flush()
    put(overlay, 9 * BLOCK, b"two")
    crash(overlay)
    overlay = kept(path)
    assert whole(overlay) == changed((100, b"one"), (9 * BLOCK, b"two"))
    overlay.close()


def test_after_a_crash_of_the_host_only_what_was_flushed_counts(path: str) -> None:
    overlay = kept(path)
    put(overlay, 100, b"one")
    overlay.flush()
    put(overlay, 9 * BLOCK, b"two")
    crash(overlay)
    with open(path, "r+b") as file:  # the page cache is gone: data of what was not flushed may be anything
        file.seek(9 * BLOCK)
        file.write(b"\xee" * BLOCK)
    overlay = kept(path, "next boot")
    assert whole(overlay) == changed((100, b"one"))
    overlay.close()


def test_a_write_between_sync_and_marker_is_not_called_flushed(path: str) -> None:
    journal = OverlayMap(f"{path}.map", Whose(POINT, "disk.raw", SIZE, BLOCK), BOOT)
    kept(path).close()
    overlay = kept(path)
    assert overlay._journal is not None
    put(overlay, 0, b"early")
    count = overlay._journal.count
    put(overlay, 5 * BLOCK, b"late")
    overlay._journal.flushed(count)  # as if the second write had come while the first was being synced
    crash(overlay)
    journal = OverlayMap(f"{path}.map", Whose(POINT, "disk.raw", SIZE, BLOCK), "next boot")
    blocks = journal.load()
    assert blocks is not None
    assert list(blocks) == [(0, 1)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_torn_tail_of_the_map_costs_only_what_was_not_flushed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = os.fspath(tmp_path_factory.mktemp("torn") / "overlay")
    overlay = kept(path)
    put(overlay, 0, b"safe" * 1024)
    overlay.flush()
    safe = os.stat(f"{path}.map").st_size
    for block in range(2, 8):
        put(overlay, block * BLOCK, bytes([block]) * BLOCK)
    crash(overlay)
    size = os.stat(f"{path}.map").st_size
    assert size == safe + 6 * RECORD.size
    with open(f"{path}.map", "r+b") as file:
        file.truncate(data.draw(st.integers(safe, size)))
        at = data.draw(st.integers(safe, size))
        file.seek(at)
        file.write(data.draw(st.binary(max_size=size - at)))
    overlay = kept(path, "next boot")
    assert whole(overlay) == changed((0, b"safe" * 1024))
    overlay.close()


def test_damage_before_the_last_flush_is_refused(path: str) -> None:
    overlay = kept(path)
    for block in range(8):
        put(overlay, block * BLOCK, bytes([block]) * BLOCK)
    overlay.close()
    with open(f"{path}.map", "rb") as file:
        good = file.read()
    for at in range(0, len(good) - RECORD.size, 7):
        with open(f"{path}.map", "wb") as file:
            file.write(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(OverlayUnfit):
            kept(path)
    with open(f"{path}.map", "wb") as file:
        file.write(good)
    kept(path).close()


@pytest.mark.parametrize(
    ("point", "disk", "reason"),
    [
        ("cd" * 16, base(), "belongs to restore point abab"),
        (POINT, MemoryDisk(CONTENT, "other.raw"), "belongs to disk disk.raw"),
        (POINT, MemoryDisk(CONTENT + b"x", "disk.raw"), "made for another size"),
    ],
)
def test_the_overlay_of_another_point_or_disk_is_refused(path: str, point: str, disk: MemoryDisk, reason: str) -> None:
    overlay = kept(path)
    put(overlay, 0, b"mine")
    overlay.close()
    with pytest.raises(OverlayUnfit, match=reason):
        kept(path, point=point, disk=disk)
    overlay = kept(path)
    assert whole(overlay) == changed((0, b"mine"))
    overlay.close()


def test_files_that_are_no_overlays_are_left_alone(path: str, tmp_path: os.PathLike[str]) -> None:
    with open(path, "wb") as file:
        file.write(b"precious")
    with pytest.raises(OverlayUnfit, match="exists and is no overlay"):
        kept(path)
    with pytest.raises(OverlayUnfit, match="directory"):
        kept(os.fspath(tmp_path))
    fifo = os.path.join(tmp_path, "fifo")
    os.mkfifo(fifo)
    with pytest.raises(OverlayUnfit, match="no regular file"):
        kept(fifo)
    with open(path, "rb") as file:
        assert file.read() == b"precious"
    assert not os.path.exists(f"{path}.map")
    os.unlink(path)
    with open(f"{path}.map", "wb") as file:
        file.write(b"precious")
    with pytest.raises(OverlayUnfit, match="no map of an overlay"):
        kept(path)


def test_an_overlay_that_was_cut_short_is_refused(path: str) -> None:
    overlay = kept(path)
    put(overlay, 0, b"mine")
    overlay.close()
    os.truncate(path, 5)
    with pytest.raises(OverlayUnfit, match="it has 5 bytes"):
        kept(path)


def test_an_overlay_is_served_by_one_process_only(path: str) -> None:
    overlay = kept(path)
    with pytest.raises(OverlayUnfit, match="another graincopy serves it"):
        kept(path)
    overlay.close()
    kept(path).close()


def test_a_journal_that_grew_is_rewritten_at_a_flush(path: str) -> None:
    blocks = COMPACT_FROM + 10
    disk = MemoryDisk(bytes(blocks * BLOCK), "disk.raw")
    overlay = kept(path, disk=disk)
    overlay.zero(0, BLOCK)
    for block in range(1, blocks):
        overlay._journal.add(block, block + 1)  # type: ignore[union-attr]
    overlay._written.add_range(0, blocks)
    overlay._changes += 1
    grown = os.stat(f"{path}.map").st_size
    overlay.flush()
    assert os.stat(f"{path}.map").st_size < 1000 < grown
    put(overlay, 7, b"after")
    overlay.close()
    overlay = kept(path, "next boot", disk=disk)
    assert whole(overlay)[:20] == bytes(7) + b"after" + bytes(8)
    assert overlay._written.range_cardinality(0, blocks) == blocks
    overlay.close()


def test_after_a_flush_that_failed_no_later_one_is_believed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = kept(path)
    put(overlay, 0, b"x")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", _no_sync)
        with pytest.raises(OSError, match="lost"):
            overlay.flush()
    with pytest.raises(OSError, match="an earlier flush failed"):
        overlay.flush()
    with pytest.raises(OSError, match="an earlier flush failed"):
        overlay.close()


def _no_sync(_fd: int) -> None:
    raise OSError(errno.EIO, "lost")


# --- through the server ---------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: os.PathLike[str]) -> str:
    path = os.path.join(tmp_path, "disk.raw")
    with open(path, "wb") as file:
        file.write(CONTENT)
    return path


def test_qemu_io_and_nbdcopy_write_and_the_image_stays_as_it_was(image: str, tmp_path: os.PathLike[str]) -> None:
    with Serving(os.fspath(tmp_path), "--scratch", os.path.join(tmp_path, "s"), files=(image,)) as server:
        commands = ["write -P 7 5000 9000", "read -P 7 5000 9000", "write -z 20480 40960", "read -P 0 20480 40960",
                    "discard 81920 8192", "write -f -P 9 0 4096", "flush"]  # fmt: skip
        words = [word for command in commands for word in ("-c", command)]
        out = tool("qemu-io", "-f", "raw", *words, server.uri)
        assert "Pattern verification failed" not in out
        (found,) = json.loads(tool("nbdinfo", "--json", server.uri))["exports"]
        assert not found["is_read_only"] and found["can_trim"] and found["can_zero"] and found["can_fua"]
        model = bytearray(CONTENT)
        model[5000:14000] = b"\7" * 9000
        model[20480:61440] = bytes(40960)
        model[81920:90112] = bytes(8192)
        model[:4096] = b"\11" * 4096
        with Client(server.path) as client:
            assert client.open().ask(nbd.READ, 0, SIZE).content(0, SIZE) == model
        new = os.path.join(tmp_path, "new")
        with open(new, "wb") as file:
            file.write(random.Random(3).randbytes(SIZE))
        tool("nbdcopy", new, server.uri)
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", new, server.uri)
        assert server.end() == 0
    with open(image, "rb") as file:
        assert file.read() == CONTENT


def test_a_killed_server_is_taken_up_again_with_every_write_it_answered(
    image: str, path: str, tmp_path: os.PathLike[str]
) -> None:
    model = bytearray(CONTENT)
    chance = random.Random(4)
    for _ in range(3):
        with Serving(os.fspath(tmp_path), "--overlay", path, files=(image,)) as server, Client(server.path) as client:
            assert client.open().ask(nbd.READ, 0, SIZE).content(0, SIZE) == model
            for number in range(40):
                offset = chance.randrange(SIZE - 5000)
                data = chance.randbytes(chance.choice((100, 4096, 5000)))
                assert client.ask(nbd.WRITE, offset, len(data), data=data, flags=number % 7 == 0).error == 0
                model[offset : offset + len(data)] = data
            server.process.send_signal(signal.SIGKILL)
            server.process.wait(20)
    with Serving(os.fspath(tmp_path), "--overlay", path, files=(image,)) as server:
        with Client(server.path) as client:
            assert client.open().ask(nbd.READ, 0, SIZE).content(0, SIZE) == model
        assert server.end() == 0
    words = ("--overlay", path, "--boot", "next boot")
    with Serving(os.fspath(tmp_path), *words, files=(image,)) as server, Client(server.path) as client:
        assert client.open().ask(nbd.READ, 0, SIZE).content(0, SIZE) == model


@pytest.mark.root
def test_no_space_is_told_and_what_was_there_stays(image: str, tmp_path: os.PathLike[str]) -> None:
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root")
    small = os.path.join(tmp_path, "small")
    os.mkdir(small)
    tool("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small)
    try:
        with Serving(os.fspath(tmp_path), "--overlay", os.path.join(small, "o"), files=(image,)) as server:
            with Client(server.path) as client:
                client.open()
                assert client.ask(nbd.WRITE, 0, 4096, data=b"a" * 4096).error == 0
                assert client.ask(nbd.WRITE, 8192, 81920, data=b"b" * 81920).error == nbd.ENOSPC
                got = client.ask(nbd.READ, 0, SIZE).content(0, SIZE)
                assert got == changed((0, b"a" * 4096))
            server.end()
    finally:
        tool("umount", small)
