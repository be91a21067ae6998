"""The law of the way back: the live file can be opened for restore, by one at a time, and does what is asked of it."""

from __future__ import annotations

from graincopy.core.errors import SourceInUse
from graincopy.core.units import KIB
from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import Law, LawBroken, require
from graincopy.testing.looking import filled, same
from graincopy.testing.oracle import content


def write_back(lab: VolumeLab) -> None:
    disk = filled(lab, 300_123)
    data = content(2, 10_001)
    with lab.driver().open_for_restore(disk.claim) as sink:
        require(
            sink.existed and sink.size == disk.size, "the file that exists is said to be missing, or has lost its size"
        )
        found = bytearray(1000)
        sink.readinto(disk.size - 500, memoryview(found))
        same(bytes(found), disk.expected[-500:] + bytes(500), "read across the end")
        sink.write(70_000, memoryview(data))
        sink.zero(128 * KIB, 64 * KIB)
        sink.zero(1000, 10)
        sink.sync()
        sink.close()
    disk.plain.put(70_000, data)
    disk.plain.clear(128 * KIB, 64 * KIB)
    disk.plain.clear(1000, 10)
    same(lab.read(disk.claim), disk.expected, "after the restore the live file holds something else")


def set_size(lab: VolumeLab) -> None:
    lab.need("truncate")
    for size in (lab.whole(100_001), lab.whole(400_003)):
        disk = filled(lab, 300_123)
        with lab.driver().open_for_restore(disk.claim) as sink:
            sink.resize(size)
            require(sink.size == size, f"the file has {sink.size} bytes after a resize to {size}")
            sink.sync()
        disk.plain.resize(size)
        same(lab.read(disk.claim), disk.expected, f"resized to {size}")


def bring_back(lab: VolumeLab) -> None:
    """A missing file is created, and can be taken away again."""
    lab.need("remove")
    disk = filled(lab)
    lab.remove(disk.claim)
    with lab.driver().open_for_restore(disk.claim) as sink:
        require(not sink.existed and sink.size == 0, "a missing file is said to have existed")
        sink.resize(disk.size)
        sink.write(0, memoryview(disk.expected))
        sink.sync()
    same(lab.read(disk.claim), disk.expected, "the file that was recreated holds something else")
    with lab.driver().open_for_restore(disk.claim) as sink:
        sink.remove()
    require(lab.driver().resolve(disk.claim.path) != disk.claim, "a removed file is still there")


def one_writer(lab: VolumeLab) -> None:
    lab.need("hold")
    disk = filled(lab)
    with lab.hold(disk.claim):
        try:
            with lab.driver().open_for_restore(disk.claim):
                pass
        except SourceInUse:
            pass
        else:
            raise LawBroken("a file that somebody has open for writing is opened for restore")
    with lab.driver().open_for_restore(disk.claim) as sink:
        require(sink.existed, "the file is gone after a refused restore")
    same(lab.read(disk.claim), disk.expected, "opening for restore changed the file")


def restore_laws() -> tuple[Law[VolumeLab], ...]:
    """The way back."""
    return (
        Law("15-restore-write", "what is written and zeroed is there, and nothing else", write_back),
        Law("15-restore-size", "the file gets the size asked for", set_size),
        Law("15-restore-missing", "a missing file is created", bring_back),
        Law("15-restore-in-use", "a file that somebody writes to is refused", one_writer),
    )
