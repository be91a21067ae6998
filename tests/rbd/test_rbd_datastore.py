"""Disks that are some of many files in a file system on a Ceph image: the laws, and the whole method."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
import story
from datastore import Datastore
from guests import MIB, Guest
from story import GRAIN, noise

from graincopy.app.host import SystemClock
from graincopy.testing.file_lab import FileLab
from graincopy.testing.laws_volume import volume_laws
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.rbd import RbdDriver
from graincopy.volumes.rbd_cluster import Cluster

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root, loop devices and /dev/fuse")]

LAWS = {
    *("01-picture", "01-isolation", "02-soundness-write", "02-soundness-zero-range", "02-soundness-punch"),
    *("02-soundness-truncate-down-up", "02-soundness-rename-over", "02-soundness-neighbour"),
    *("06-normal-form", "08-idempotence", "14-no-trace"),
}


@pytest.fixture(scope="module", params=["ext4", "xfs"])
def store(ceph: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Datastore]:
    """A datastore of each kind."""
    home = os.fspath(tmp_path_factory.mktemp(f"store-{request.param}"))
    with Datastore(ceph, home, f"store-{request.param}", request.param) as found:
        yield found


@pytest.fixture
def cli(store: Datastore, tmp_path: os.PathLike[str]) -> story.Cli:
    """An empty repository, and a configuration that knows rbd-fuse."""
    config = f'[rbd]\nconf = "{store.conf}"\nfuse = ["{store.shown}=rbd"]\n'
    return story.Cli(os.path.join(tmp_path, "graincopy"), config=config).init()


@pytest.fixture
def servers() -> Iterator[None]:
    """No server process of a target that was attached in this process is left."""
    yield
    left = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "graincopy.volumes.rbd_serve"], capture_output=True, check=False
    ).stdout
    assert left == b""


def test_laws(store: Datastore, servers: None) -> None:
    """Those that say something about files; the others are about images, and are tried on these."""
    places, cluster = MemoryPlaces(), Cluster(store.settings, store.conf)
    lab = FileLab([store.point], lambda: RbdDriver(cluster, places, SystemClock()), SystemClock(), name=store.fs_type)
    try:
        for law in volume_laws():
            if law.name in LAWS:
                law.check(lab)
                lab.reset()
    finally:
        lab.close()


def test_two_disks_and_a_neighbour(store: Datastore, guest: Guest, cli: story.Cli, servers: None) -> None:
    paths = [os.path.join(store.point, name) for name in ("web.raw", "db.raw")]
    neighbour = story.make_disk(os.path.join(store.point, "neighbour.raw"), 8 * MIB, (0, noise(9, 8 * MIB)))
    story.make_disk(paths[0], 16 * MIB, (0, noise(1, MIB)), (12 * MIB + 5, noise(2, 5000)))
    story.make_disk(paths[1], 8 * MIB + 777, (4 * MIB, noise(3, MIB)))
    first = cli.backup(*paths)
    assert (first["instant"], [disk["driver"] for disk in first["disks"]]) == ("one", ["rbd", "rbd"])
    assert first["freeze_ms"] > 0
    before = [story.read(path) for path in sorted(paths)]
    story.write(paths[0], (MIB, b"A" * 4096))
    story.write(neighbour, (0, noise(8, 4 * MIB)))
    second = cli.backup(*paths)
    assert {disk["name"]: disk["dirty_bytes"] for disk in second["disks"]} == {"db.raw": 0, "web.raw": GRAIN}
    assert {disk["change_map"] for disk in second["disks"]} == {"rbd fast-diff"}
    assert len(guest.snaps(store.name)) == 1
    kept = story.digest(neighbour)
    restored = cli.ok("restore", "latest~1", "--in-place")
    assert [story.read(path) for path in sorted(paths)] == before
    cli.ok("undo", restored["restore"])
    assert story.read(paths[0])[MIB : MIB + 4096] == b"A" * 4096
    assert story.digest(neighbour) == kept
    cli.undamaged()
