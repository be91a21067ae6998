"""Laws 2 and 4 of every volume driver: what changed is called dirty, and the patch makes one image of the other.

One case per way in which the bytes of a file can change, since each is a trap of its own: a range can move onto blocks
that nobody rewrote, turn into zeros without a volume byte being written, or be dirty only in the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from graincopy.core.units import KIB
from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import Law
from graincopy.testing.looking import DISK_SIZE, Moment, check_change, filled, powers
from graincopy.testing.oracle import Disk, Operation


def _write(offset: int, length: int, seed: int, how: str = "buffered") -> Operation:
    return Operation("write", offset, length, seed=seed, how=how)


def sound(
    lab: VolumeLab, between: Sequence[Operation], before: Sequence[Operation] = (), size: int = DISK_SIZE
) -> None:
    """What ``between`` changes, after ``before`` made the disk, is all called dirty."""
    powers(lab, "change_map", "snapshots")
    disk = filled(lab, size)
    for operation in before:
        disk.do(operation)
    base = Moment(lab, disk)
    for operation in between:
        disk.do(operation)
    check_change(lab, base, Moment(lab, disk), disk)


def sound_compressed(lab: VolumeLab) -> None:
    powers(lab, "change_map", "snapshots")
    lab.need("compress")
    disk = Disk(lab, DISK_SIZE, compressed=True)
    disk.write(0, DISK_SIZE, seed=3)  # odd seeds compress
    base = Moment(lab, disk)
    disk.write(132 * KIB, 4 * KIB, seed=5)
    disk.write(300_000, 70_000, seed=7)
    check_change(lab, base, Moment(lab, disk), disk)


_K = KIB
SOUNDNESS: dict[str, Callable[[VolumeLab], None]] = {
    "write": partial(sound, between=[_write(0, 4 * _K, 4), _write(99_999, 12_345, 6), _write(508 * _K, 4 * _K, 8)]),
    "mmap-write": partial(sound, between=[_write(77_777, 5_000, 4, "mmap")]),
    "direct-write": partial(sound, between=[_write(64 * _K, 16 * _K, 4, "direct")]),
    "unflushed-write": partial(sound, before=[_write(8 * _K, 8 * _K, 4)], between=[_write(8 * _K, 8 * _K, 6)]),
    "append": partial(sound, between=[_write(512 * _K, 100_000, 4)]),
    "zero-range": partial(sound, between=[Operation("zero_range", 64 * _K, 64 * _K)]),
    "zero-range-torn": partial(sound, between=[Operation("zero_range", 64 * _K + 100, 10_000)]),
    "punch": partial(sound, between=[Operation("punch", 128 * _K, 64 * _K)]),
    "punch-then-write": partial(sound, between=[Operation("punch", 0, 64 * _K), _write(16 * _K, 4 * _K, 4)]),
    "collapse": partial(sound, between=[Operation("collapse", 64 * _K, 64 * _K)]),
    "insert": partial(sound, between=[Operation("insert", 64 * _K, 64 * _K)]),
    "collapse-then-insert": partial(
        sound, between=[Operation("collapse", 64 * _K, 64 * _K), Operation("insert", 64 * _K, 64 * _K)]
    ),
    "reflink-within": partial(sound, between=[Operation("reflink_within", 0, 64 * _K, 256 * _K)]),
    "reflink-from": partial(sound, between=[Operation("reflink_from", 128 * _K, 64 * _K, 32 * _K)]),
    "reflink-then-write": partial(
        sound, before=[Operation("reflink_within", 0, 64 * _K, 256 * _K)], between=[_write(256 * _K, 4 * _K, 4)]
    ),
    "rename-over": partial(sound, between=[Operation("rename_over", length=300_000, seed=4)]),
    "truncate-down": partial(sound, between=[Operation("truncate", length=200_001)]),
    "truncate-up": partial(sound, between=[Operation("truncate", length=700_001)]),
    "truncate-down-up": partial(
        sound, between=[Operation("truncate", length=200_001), Operation("truncate", length=512 * _K)]
    ),
    "preallocated-written": partial(
        sound,
        before=[Operation("preallocate", 512 * _K, 256 * _K)],
        between=[_write(600 * _K, 4 * _K, 4), _write(513 * _K, 100, 6)],
    ),
    "preallocate": partial(
        sound, before=[Operation("punch", 64 * _K, 64 * _K)], between=[Operation("preallocate", 64 * _K, 64 * _K)]
    ),
    "inline": partial(sound, size=1000, between=[_write(10, 100, 4)]),
    "inline-grown": partial(sound, size=1000, between=[_write(900, 9_000, 4)]),
    "odd-size": partial(sound, size=300_123, between=[_write(300_000, 123, 4)]),
    "compressed": sound_compressed,
}


def neighbour(lab: VolumeLab) -> None:
    """Two disks on one volume: what happens to one does not hide what happens to the other."""
    powers(lab, "change_map", "snapshots")
    one, other = filled(lab), filled(lab)
    base = Moment(lab, one, other)
    other.write(0, 64 * KIB, seed=30)
    one.write(128 * KIB, 4 * KIB, seed=31)
    now = Moment(lab, one, other)
    check_change(lab, base, now, one)
    check_change(lab, base, now, other)


def soundness_laws() -> tuple[Law[VolumeLab], ...]:
    """One law per case."""
    cases = [
        Law(f"02-soundness-{name}", "every byte that changed lies in changed(a, b)", check)
        for name, check in SOUNDNESS.items()
    ]
    return (*cases, Law("02-soundness-neighbour", "also beside another disk on the same volume", neighbour))
