"""A kept overlay when the power fails: at every sync, with either file as it was synced last and the other as it is.

What a file had at its last fsync(2) is all that is sure to be there afterwards; what was written since may be there.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_overlay import BOOT, CONTENT, SIZE, changed, crash, kept, put, whole

from graincopy.views.overlay import BLOCK

AFTER = "the boot after"


class PowerCut:
    """Keeps what each file had when it was synced; ``at_data_sync`` is called in the middle of a sync of the data."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.folder = path, Path(path).parent
        self.synced: dict[str, bytes] = {}
        self.at_data_sync: Callable[[], None] = lambda: None
        self._fsync, self._fdatasync = os.fsync, os.fdatasync
        monkeypatch.setattr(os, "fsync", lambda fd: self._sync(fd, self._fsync))
        monkeypatch.setattr(os, "fdatasync", lambda fd: self._sync(fd, self._fdatasync))
        self.cuts = 0
        self.flushed: list[tuple[int, bytes]] = []  # writes of which a flush has said that they are there
        self.ever: list[tuple[int, bytes]] = []

    def _sync(self, fd: int, sync: Callable[[int], None]) -> None:
        name = os.readlink(f"/proc/self/fd/{fd}").removesuffix(".new")
        if name not in (self.path, f"{self.path}.map"):
            sync(fd)
            return
        self.cut()  # just before
        sync(fd)
        self.synced[name] = Path(f"/proc/self/fd/{fd}").read_bytes()
        if name == self.path:
            act, self.at_data_sync = self.at_data_sync, lambda: None
            act()
        self.cut()

    def cut(self) -> None:
        """The power fails now: whichever of the two files made it to the disk."""
        maps = f"{self.path}.map"
        if not os.path.exists(maps) or maps not in self.synced:
            return
        now = {name: Path(name).read_bytes() for name in (self.path, maps)}
        self._check({**now, self.path: self.synced.get(self.path, bytes(SIZE))})
        self._check({**now, maps: self.synced[maps]})
        self._check({self.path: self.synced.get(self.path, bytes(SIZE)), maps: self.synced[maps]})
        self.cuts += 1

    def _check(self, files: dict[str, bytes]) -> None:
        copy = self.folder / "after"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name, data in files.items():
            (copy / os.path.basename(name)).write_bytes(data)
        overlay = kept(os.fspath(copy / os.path.basename(self.path)), AFTER)
        shown = whole(overlay)
        crash(overlay)
        must, may = changed(*self.flushed), changed(*self.ever)
        for start in range(0, SIZE, BLOCK):
            block = slice(start, min(start + BLOCK, SIZE))
            if must[block] != CONTENT[block]:
                assert shown[block] == must[block], f"block {start // BLOCK} was flushed and is lost"
            else:
                assert shown[block] in (CONTENT[block], may[block]), f"block {start // BLOCK} is nobody's"


@pytest.mark.parametrize("rewritten", [False, True])
def test_whenever_the_power_fails_flushed_writes_are_there_and_no_others_by_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewritten: bool
) -> None:
    if rewritten:
        monkeypatch.setattr("graincopy.views.overlay_map.COMPACT_FROM", 3)
        monkeypatch.setattr("graincopy.views.overlay_map.COMPACT_WHEN", 0)
    path = os.fspath(tmp_path / "overlay")
    power = PowerCut(path, monkeypatch)
    overlay = kept(path)

    def write(block: int) -> None:
        power.ever.append((block * BLOCK, bytes([100 + block]) * BLOCK))
        put(overlay, *power.ever[-1])

    for block in (1, 7, 3):
        write(block)
        sure = list(power.ever)
        power.at_data_sync = lambda block=block: write(block + 10)  # type: ignore[misc]
        overlay.flush()
        power.flushed = sure
        power.cut()
    assert power.cuts > 9
    crash(overlay)


def test_a_record_of_the_map_that_found_no_room_hides_nothing(tmp_path: Path) -> None:
    """A limit of the kernel cuts the record in half: what is written later must be found again all the same."""
    path = os.fspath(tmp_path / "overlay")
    overlay = kept(path)
    put(overlay, BLOCK, b"x" * BLOCK)
    for _ in range(BLOCK // 32):  # the limit is to stop the map, not the data at the beginning of the disk
        overlay._journal.add(1, 2)  # type: ignore[union-attr]
    size = os.stat(f"{path}.map").st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            put(overlay, 0, b"a" * BLOCK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    put(overlay, 0, b"b" * BLOCK)
    put(overlay, 2 * BLOCK, b"c" * BLOCK)
    crash(overlay)
    overlay = kept(path, BOOT)
    assert whole(overlay)[:BLOCK] == b"b" * BLOCK
    assert whole(overlay)[2 * BLOCK : 3 * BLOCK] == b"c" * BLOCK
    overlay.close()
