"""Placements of real files, in every state, and where they lie in the image below."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lab
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graincopy.core.extent import Extents
from graincopy.core.placement import Placement, State
from graincopy.volumes import fiemap, ioctl

K64 = 65536


@contextmanager
def opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def placement(path: str, **how: int) -> Placement:
    with opened(path) as fd:
        return fiemap.read_placement(fd, os.fstat(fd).st_size, **how)  # type: ignore[arg-type]


def every_state(path: str) -> None:
    """[0, 64K) written, then a hole, [128K, 192K) unwritten, [192K, 256K) written, a hole up to 300000."""
    lab.write_at(path, (0, b"a" * K64), (3 * K64, b"b" * K64))
    lab.run("fallocate", "--keep-size", "--offset", str(2 * K64), "--length", str(K64), path)
    os.truncate(path, 300_000)


@lab.root_test
def test_states_of_written_hole_and_unwritten(reflink_dir: str) -> None:
    path = os.path.join(reflink_dir, "f")
    every_state(path)
    found = placement(path)
    assert found.size == 300_000
    assert found.in_state(State.WRITTEN) == Extents.of((0, K64), (3 * K64, 4 * K64))
    assert found.in_state(State.UNWRITTEN) == Extents.of((2 * K64, 3 * K64))
    assert found.in_state(State.HOLE) == Extents.of((K64, 2 * K64), (4 * K64, 300_000))


@lab.root_test
def test_zeroed_in_place_is_unwritten_on_ext4(xfs_dir: str, tmp_path: object) -> None:
    with lab.Lun(xfs_dir, mount_at=tmp_path) as lun:
        path = os.path.join(lun.path, "f")
        lab.write_at(path, (0, b"a" * 4 * K64))
        before = placement(path)
        lab.run("fallocate", "--zero-range", "--keep-size", "--offset", str(K64), "--length", str(K64), path)
        after = placement(path)
        assert after.in_state(State.UNWRITTEN) == Extents.of((K64, 2 * K64))
        assert after.differs(before) == Extents.of((K64, 2 * K64))


@lab.root_test
def test_compressed_and_inline_extents_are_opaque(btrfs_dir: str) -> None:
    big, small = os.path.join(btrfs_dir, "big"), os.path.join(btrfs_dir, "small")
    lab.write_at(big)
    lab.run("btrfs", "property", "set", big, "compression", "zstd")
    lab.write_at(big, (0, b"compress me " * 50_000))
    lab.write_at(small, (0, b"inline"))
    assert placement(big).in_state(State.WRITTEN).total == 0
    assert placement(big).in_state(State.OPAQUE).total == 600_000
    assert placement(small).in_state(State.OPAQUE) == Extents.of((0, 6))


@lab.root_test
def test_unsynced_data_is_opaque_and_gets_its_place_by_sync(xfs_dir: str) -> None:
    path = os.path.join(xfs_dir, "f")
    lab.write_at(path, (0, b"x" * K64), sync=False)
    assert placement(path, sync=False).in_state(State.OPAQUE).total == K64
    assert placement(path, sync=True).in_state(State.WRITTEN).total == K64


@lab.root_test
@pytest.mark.parametrize("inner,partitioned", [("ext4", False), ("xfs", "offset"), ("ext4", True)])
def test_inner_placement_points_at_the_same_bytes_of_the_image(
    xfs_dir: str, tmp_path: object, inner: str, partitioned: bool | str
) -> None:
    content = os.urandom(10 * K64)
    with lab.Lun(xfs_dir, size=512 * lab.MIB, inner=inner, partitioned=partitioned, mount_at=tmp_path) as lun:
        path = os.path.join(lun.path, "disk.raw")
        lab.write_at(path, (0, content[: 3 * K64]), (5 * K64, content[5 * K64 :]), sync=False)
        with lun.frozen():
            found = placement(path, sync=False).shift(lun.offset)
            clone = os.path.join(xfs_dir, "clone")
            lab.reflink(lun.image, clone)
        pieces = list(zip(found.starts.tolist(), found.stops.tolist(), found.volume.tolist(), strict=True))
        assert found.in_state(State.WRITTEN) == Extents.of((0, 3 * K64), (5 * K64, 10 * K64))
        with opened(clone) as fd:
            for start, stop, volume in pieces:
                assert os.pread(fd, stop - start, volume) == content[start:stop]


def scattered(path: str, count: int) -> Extents:
    """A file with ``count`` written blocks, every second one; of full size first, else XFS preallocates between."""
    lab.sparse(path, count * 8192)
    lab.write_at(path, *((8192 * i, b"%4096d" % i) for i in range(count)))
    return Extents.of(*((8192 * i, 8192 * i + 4096) for i in range(count)))


@lab.root_test
def test_many_batches_give_the_same_as_one(reflink_dir: str) -> None:
    path = os.path.join(reflink_dir, "f")
    wanted = scattered(path, 300)
    whole, batched = placement(path), placement(path, batch=7)
    assert whole.in_state(State.WRITTEN) == wanted
    for mine, other in zip(
        (whole.starts, whole.stops, whole.volume, whole.states),
        (batched.starts, batched.stops, batched.volume, batched.states),
        strict=True,
    ):
        assert np.array_equal(mine, other)


@lab.root_test
def test_extents_are_counted_and_shared_ones_told(reflink_dir: str) -> None:
    path = os.path.join(reflink_dir, "f")
    scattered(path, 40)
    with opened(path) as fd:
        assert fiemap.count_extents(fd) == 40
        assert fiemap.shared_extents(fd, 40 * 8192) == 0
        lab.reflink(path, path + ".clone")
        assert fiemap.shared_extents(fd, 40 * 8192) == 40 * 4096


@lab.root_test
def test_clones_differ_exactly_where_one_was_written(reflink_dir: str) -> None:
    path = os.path.join(reflink_dir, "f")
    lab.write_at(path, (0, os.urandom(16 * K64)))
    lab.reflink(path, path + ".clone")
    lab.write_at(path, (K64, b"n" * 4096), (7 * K64, b"n" * 8192))
    changed = placement(path).differs(placement(path + ".clone"))
    assert changed == Extents.of((K64, K64 + 4096), (7 * K64, 7 * K64 + 8192))


def test_without_fiemap_data_is_opaque_and_holes_are_holes() -> None:
    with open("/dev/shm/graincopy-seek-test", "xb+") as file:
        os.unlink(file.name)
        file.truncate(10 * K64)
        os.pwrite(file.fileno(), b"x" * K64, 2 * K64)
        with pytest.raises(OSError):
            fiemap.read_placement(file.fileno(), 10 * K64)
        found = fiemap.best_placement(file.fileno(), 10 * K64)
        assert found.in_state(State.OPAQUE) == Extents.of((2 * K64, 3 * K64))
        assert found.zero().total == 9 * K64


# --- what the kernel may answer ---------------------------------------------------------------------

Row = tuple[int, int, int, int]  # logical, physical, length, flags


def kernel(rows: list[Row]) -> Callable[..., int]:
    """An ioctl that answers from ``rows``, which may be any nonsense, the way the kernel hands out batches."""

    def answer(fd: int, request: int, buffer: bytearray) -> int:
        start, length, _, _, count, _ = ioctl.FIEMAP_HEADER.unpack_from(buffer)
        table = np.zeros(len(rows), fiemap._EXTENT)
        for i, (logical, physical, size, flags) in enumerate(rows):
            table[i]["logical"], table[i]["physical"] = logical, physical
            table[i]["length"], table[i]["flags"] = size, flags
        wanted = (table["logical"] + table["length"] > start) & (table["logical"] < start + length)
        chosen = table[wanted][:count]
        ioctl.FIEMAP_HEADER.pack_into(buffer, 0, start, length, 0, len(chosen), count, 0)
        buffer[32 : 32 + chosen.nbytes] = chosen.tobytes()
        return 0

    return answer


rows = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 10_000), st.integers(0, 60), st.sampled_from([0, 0x800, 0x2, 0x1])),
    max_size=12,
)


@given(rows, st.integers(1, 4), st.integers(0, 250))
def test_any_answer_ends_and_gives_a_well_formed_placement(answers: list[Row], batch: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "ioctl", kernel(answers))
        found = fiemap.read_placement(0, size, batch=batch)
    assert found.size == size  # Placement itself refuses what is not ascending, disjoint and inside


@pytest.mark.parametrize(
    "flags,state",
    [
        (0, State.WRITTEN),
        (ioctl.FIEMAP_EXTENT_SHARED, State.WRITTEN),
        (ioctl.FIEMAP_EXTENT_UNWRITTEN, State.UNWRITTEN),
        (ioctl.FIEMAP_EXTENT_UNWRITTEN | ioctl.FIEMAP_EXTENT_DELALLOC, State.OPAQUE),
        (ioctl.FIEMAP_EXTENT_UNKNOWN, State.OPAQUE),
        (ioctl.FIEMAP_EXTENT_ENCODED, State.OPAQUE),
        (ioctl.FIEMAP_EXTENT_DATA_ENCRYPTED, State.OPAQUE),
        (ioctl.FIEMAP_EXTENT_NOT_ALIGNED, State.OPAQUE),
        (ioctl.FIEMAP_EXTENT_DATA_INLINE, State.OPAQUE),
        (ioctl.FIEMAP_EXTENT_DATA_TAIL, State.OPAQUE),
    ],
)
def test_flags_to_states(flags: int, state: State) -> None:
    assert fiemap._states(np.array([flags], np.uint32)).tolist() == [state]
