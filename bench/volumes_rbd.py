"""The rbd driver's figures: T of huge images, a change map of a million extents. Needs Ceph (scripts/lab-ceph.sh).

    python bench/volumes_rbd.py CEPH_CONF [million] [huge] [--extents N] [--pool POOL]

Images are sparse and are removed again. What librbd and the cluster take by themselves is shown beside the whole: a
diff of a huge image costs Ceph time for every object that the image could have. Without a map of objects that is an
answer of the cluster for each: T of such an image is made, but nothing is asked of it. Images are removed by hand:
librbd would look at every object that they could have.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import time
import uuid
from collections.abc import Callable
from ctypes import c_void_p

import numpy as np

from graincopy.app.host import SystemClock
from graincopy.core.ids import PointId, RepositoryId
from graincopy.core.placement import Placement, State
from graincopy.model.change_map import Changed, dirty_file
from graincopy.model.snapshot import Owner, Role, Target, TargetTag
from graincopy.model.volume import Claim
from graincopy.testing.rbd_images import FAST, SLOW, create_image
from graincopy.volumes import rbd_c
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.rbd import RbdDriver
from graincopy.volumes.rbd_c import done, keys_array
from graincopy.volumes.rbd_cluster import Cluster, Pool, RbdSettings
from graincopy.volumes.rbd_open_image import Image
from graincopy.volumes.rbd_records import parts_of

TIB = 1 << 40
EXTENT = 512  # bytes; a block device writes no less
KINDS = (
    (25, FAST, "32 MiB objects"),
    (22, FAST, "4 MiB objects"),
    (22, SLOW, "4 MiB objects without a map of them"),
)  # log2 of the object size, features


def tag() -> TargetTag:
    """A tag of nobody."""
    owner = Owner(host="bench", boot="bench", pid=os.getpid(), started=0)
    run = PointId(uuid.uuid4().hex)
    return TargetTag(run=run, role=Role.TARGET, owner=owner, repository=RepositoryId("0" * 32), disks=(), created=0.0)


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def claim_of(driver: RbdDriver, pool: str, name: str) -> Claim:
    found = driver.resolve(f"rbd:{pool}/{name}")
    assert isinstance(found, Claim)
    return found


def huge(cluster: Cluster, pool_name: str) -> None:
    """Making T, and what it takes, for images of the method's own sizes."""
    for size in (64 * TIB, 128 * TIB, 256 * TIB):
        for order, features, kind in KINDS:
            name = f"bench-{uuid.uuid4().hex[:8]}"
            with cluster.pool(pool_name) as pool:
                create_image(pool, name, size, features, order)
                try:
                    told = one_huge(cluster, pool, name, size, features == FAST)
                    kept = size >> order >> 12 if features == FAST else 0
                    print(f"{size // TIB:4d} TiB, {kind}: {told}, map of objects {kept} KiB")
                finally:
                    remove(pool, name, (size // 2 >> order, size // 3 >> order))


def one_huge(cluster: Cluster, pool: Pool, name: str, size: int, mapped: bool) -> str:
    """Two targets of an image, one object written before each; how long the second took, and what is asked of it."""
    driver, block = RbdDriver(cluster, MemoryPlaces(), SystemClock()), memoryview(b"x" * 4096)
    claim = claim_of(driver, pool_name_of(pool), name)
    with pool.image(name, writable=True) as image:
        image.write(size // 2, block)
    base = driver.create_targets([claim.volume], tag())
    with pool.image(name, writable=True) as image:
        image.write(size // 3, block)
    group = driver.prepare([claim.volume], tag())
    instant = seconds(lambda: driver.snapshot(group))
    now = driver.settle(group.targets)
    told = f"T in {instant * 1000:6.0f} ms"
    if mapped:
        changed = seconds(lambda: driver.changed(base[0], now[0]))
        _, _, snap = parts_of(base[0].id)
        with pool.image(name, snap=parts_of(now[0].id)[2]) as image:
            alone = seconds(lambda: image.diff(snap, 0, size, whole_objects=True))
        with driver.open(now[0], claim) as shown:
            placed = seconds(shown.placement)
        told += f", changed {changed:.2f} s (one diff by objects alone {alone:.2f} s), placement {placed:.2f} s"
    for target in (*base, *now):
        driver.delete(target)
    return told


def pool_name_of(pool: Pool) -> str:
    """The name behind an open pool."""
    buffer = ctypes.create_string_buffer(256)
    pool.rados.rados_ioctx_get_pool_name(pool.handle, buffer, ctypes.c_uint(256))
    return buffer.value.decode()


def remove(pool: Pool, name: str, written: tuple[int, ...]) -> None:
    """The image, by its parts: what was written, its header, its map and its name."""
    with pool.image(name) as image:
        image_id = image.id()
    parts = [f"rbd_data.{image_id}.{number:016x}" for number in written]
    for part in (*parts, f"rbd_object_map.{image_id}", f"rbd_header.{image_id}", f"rbd_id.{name}"):
        pool.rados.rados_remove(pool.handle, part.encode())
    operation = c_void_p(pool.rados.rados_create_write_op())
    keys = keys_array([f"name_{name}".encode(), f"id_{image_id}".encode()])
    pool.rados.rados_write_op_omap_rm_keys(operation, keys, 2)
    done(pool.rados.rados_write_op_operate(operation, pool.handle, b"rbd_directory", None, 0))
    pool.rados.rados_release_write_op(operation)


def million(cluster: Cluster, pool_name: str, count: int) -> None:
    """A change map of ``count`` extents of a real image, every second EXTENT bytes, and a file of as many extents."""
    driver, name = RbdDriver(cluster, MemoryPlaces(), SystemClock()), f"bench-{uuid.uuid4().hex[:8]}"
    with cluster.pool(pool_name) as pool:
        create_image(pool, name, count * 2 * EXTENT, FAST, 22)
        try:
            claim = claim_of(driver, pool_name, name)
            fill(pool, name)
            base = driver.create_targets([claim.volume], tag())
            scatter(pool, name)
            now = driver.create_targets([claim.volume], tag())
            told_of(driver, pool, name, base[0], now[0])
            for target in (*base, *now):
                driver.delete(target)
        finally:
            pool.remove(name)


def told_of(driver: RbdDriver, pool: Pool, name: str, base: Target, now: Target) -> None:
    """What that many extents cost."""
    placed, found = file_of(now.size), []
    whole = both(lambda: found.append(driver.changed(base, now)))
    answer = found[0]
    assert isinstance(answer, Changed)
    rest = both(lambda: dirty_file(placed, placed, answer.extents))
    with pool.image(name, snap=parts_of(now.id)[2]) as image:
        alone = both(lambda: unheard(image, parts_of(base.id)[2]))
    print(f"rbd fast-diff of {len(answer.extents)} extents, seconds (CPU of this process):")
    for what, took in (
        ("diff and parsing", whole),
        ("  of which Ceph alone, nobody listening", alone),
        (f"intersected with {len(placed.starts)} file extents", rest),
        ("sum", (whole[0] + rest[0], whole[1] + rest[1])),
    ):
        print(f"  {what:44s} {took[0]:5.2f} ({took[1]:.2f})")


def both(work: Callable[[], object]) -> tuple[float, float]:
    """How long ``work`` takes, and how much of the processor's time."""
    began = time.process_time()
    took = seconds(work)
    return took, time.process_time() - began


def fill(pool: Pool, name: str) -> None:
    """In a new object all would be new, up to its last byte."""
    piece = memoryview(b"o" * (4 << 20))
    with pool.image(name, writable=True) as image:
        for at in range(0, image.size, len(piece)):
            image.write(at, piece[: image.size - at])


def scatter(pool: Pool, name: str) -> None:
    """Every second EXTENT bytes written anew: many writes in one operation of RADOS, one through librbd for its map."""
    rados, block = pool.rados, b"x" * EXTENT
    rados.rados_write_op_write.argtypes = (c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64)
    rados.rados_write_op_write.restype = None
    with pool.image(name, writable=True) as image:
        image_id, size, snaps = image.id(), image.size, sorted((one.id for one in image.snaps()), reverse=True)
        for at in range(0, size, 4 << 20):
            image.write(at, memoryview(block))
    with pool.cluster.pool(pool_name_of(pool)) as direct:
        numbers = (ctypes.c_uint64 * len(snaps))(*snaps)
        seen = (ctypes.c_uint64(snaps[0]), numbers, len(snaps))
        done(rados.rados_ioctx_selfmanaged_snap_set_write_ctx(direct.handle, *seen))
        for number in range(-(-size >> 22)):
            here = range(0, min(4 << 20, size - (number << 22)), 2 * EXTENT)
            for batch in (here[first : first + 512] for first in range(0, len(here), 512)):
                operation = c_void_p(rados.rados_create_write_op())
                for at in batch:
                    rados.rados_write_op_write(operation, block, EXTENT, at)
                target = f"rbd_data.{image_id}.{number:016x}".encode()
                done(rados.rados_write_op_operate(operation, direct.handle, target, None, 0))
                rados.rados_release_write_op(operation)


def unheard(image: Image, since: str) -> None:
    """The same diff with a callback in C that does nothing: what of it is not ours."""
    nobody = ctypes.cast(ctypes.CDLL(None).getppid, rbd_c.DIFF)  # any function that gives no negative number
    done(rbd_c.libraries()[1].rbd_diff_iterate2(image._handle, since.encode(), 0, image.size, 1, 0, nobody, None))


def file_of(size: int) -> Placement:
    """A file of as many extents as the volume has pairs of EXTENT, in no order."""
    count = size // (2 * EXTENT)
    return Placement(
        size,
        np.arange(count, dtype=np.int64) * 2 * EXTENT,
        np.arange(1, count + 1, dtype=np.int64) * 2 * EXTENT,
        np.random.default_rng(1).permutation(count).astype(np.int64) * 2 * EXTENT,
        np.full(count, State.WRITTEN, np.uint8),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("conf")
    parser.add_argument("what", nargs="*", default=["million", "huge"])
    parser.add_argument("--pool", default="rbd")
    parser.add_argument("--extents", type=int, default=1_000_000, help="of the change map")
    wanted = parser.parse_args()
    cluster = Cluster(RbdSettings(timeout=300), wanted.conf)
    if "million" in wanted.what:
        million(cluster, wanted.pool, wanted.extents)
    if "huge" in wanted.what:
        huge(cluster, wanted.pool)
    print(f"largest resident set: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


if __name__ == "__main__":
    main()
