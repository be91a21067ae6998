"""The rbd driver's figures: T of huge images, a change map of a million extents. Needs Ceph (scripts/lab-ceph.sh).

    python bench/volumes_rbd.py CEPH_CONF [--extents N] [--pool POOL]

Images are sparse and are removed again. With the usual 4 MiB objects the map of objects of a 256 TiB image, which each
snapshot copies, takes 16 MiB by itself; 32 MiB objects make it 2 MiB. Without a map such an image could not be
removed in a day.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import time
import uuid
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from graincopy.core.extent import Extents
from graincopy.core.ids import PointId, RepositoryId
from graincopy.core.placement import Placement, State
from graincopy.model.change_map import Changed, dirty_file
from graincopy.model.snapshot import Owner, Role, TargetTag
from graincopy.model.volume import Claim
from graincopy.testing.rbd_lab import FAST, create_image
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.rbd import RbdDriver
from graincopy.volumes.rbd_cluster import Cluster, RbdSettings
from graincopy.volumes.rbd_open_image import extents_of

TIB = 1 << 40


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
    driver = RbdDriver(cluster, MemoryPlaces())
    for size in (64 * TIB, 128 * TIB, 256 * TIB):
        for order, kind in ((25, "32 MiB objects"), (22, "4 MiB objects")):
            name = f"bench-{uuid.uuid4().hex[:8]}"
            with cluster.pool(pool_name) as pool:
                create_image(pool, name, size, FAST, order)
                try:
                    claim = claim_of(driver, pool_name, name)
                    with pool.image(name, writable=True) as image:
                        image.write(size // 2, memoryview(b"x" * 4096))
                    base = driver.create_targets([claim.volume], tag())
                    with pool.image(name, writable=True) as image:
                        image.write(size // 3, memoryview(b"x" * 4096))
                    group = driver.prepare([claim.volume], tag())
                    instant = seconds(lambda group=group: driver.snapshot(group))
                    now = driver.settle(group.targets)
                    changed = seconds(lambda base=base, now=now: driver.changed(base[0], now[0]))
                    with driver.open(now[0], claim) as shown:
                        placed = seconds(shown.placement)
                    told = f"T in {instant * 1000:6.0f} ms, map of objects {size >> order >> 12:6d} KiB"
                    print(f"{size // TIB:4d} TiB, {kind}: {told}, changed {changed:.2f} s, placement {placed:.2f} s")
                    for target in (*base, *now):
                        driver.delete(target)
                finally:
                    pool.remove(name)


def real(cluster: Cluster, pool_name: str, count: int) -> None:
    """A change map of ``count`` extents of a real image, 4 KiB in every 8."""
    driver, name = RbdDriver(cluster, MemoryPlaces()), f"bench-{uuid.uuid4().hex[:8]}"
    with cluster.pool(pool_name) as pool:
        create_image(pool, name, count * 8192, FAST, 22)
        try:
            claim = claim_of(driver, pool_name, name)
            with pool.image(name, writable=True) as image:
                for at in range(0, count * 8192, 4 << 20):  # in a new object all is new, up to its last byte
                    image.write(at, memoryview(b"o" * min(4 << 20, count * 8192 - at)))
            base = driver.create_targets([claim.volume], tag())
            with pool.image(name, writable=True) as image, ThreadPoolExecutor(16) as workers:
                block = memoryview(b"x" * 4096)
                list(workers.map(lambda at: image.write(at * 8192, block), range(count)))
            now = driver.create_targets([claim.volume], tag())
            begin = time.perf_counter()
            answer = driver.changed(base[0], now[0])
            assert isinstance(answer, Changed)
            print(f"rbd fast-diff of {len(answer.extents)} extents: {time.perf_counter() - begin:.2f} s")
            for target in (*base, *now):
                driver.delete(target)
        finally:
            pool.remove(name)


def parsed(count: int) -> None:
    """What the library calls back with → extents → the dirty ranges of a file of as many extents."""
    chance = random.Random(1)
    starts = np.sort(np.array(chance.sample(range(count * 4), count), np.int64)) * 8192
    triples = [(int(start), 4096, 1) for start in starts]
    order = np.random.default_rng(1).permutation(count)
    placed = Placement(
        count * 4096,
        np.arange(count, dtype=np.int64) * 4096,
        np.arange(1, count + 1, dtype=np.int64) * 4096,
        order.astype(np.int64) * 4 * 8192,
        np.full(count, State.WRITTEN, np.uint8),
    )
    seen = array("q")
    calls = seconds(lambda: [seen.extend(triple) for triple in triples])
    found: list[Extents] = []
    rest = seconds(lambda: found.append(dirty_file(placed, placed, extents_of(seen)[0]).read))
    print(f"{count} extents: collected {calls:.2f} s, parsed and intersected with {count} file extents {rest:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("conf")
    parser.add_argument("--pool", default="rbd")
    parser.add_argument("--extents", type=int, default=100_000, help="of the real change map (a million takes minutes)")
    wanted = parser.parse_args()
    cluster = Cluster(RbdSettings(timeout=300), wanted.conf)
    parsed(1_000_000)
    real(cluster, wanted.pool, wanted.extents)
    huge(cluster, wanted.pool)
    print(f"largest resident set: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


if __name__ == "__main__":
    main()
