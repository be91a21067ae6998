"""Make the golden repositories anew: ``python tests/golden/make.py``. Only for a new format version.

Old ones stay readable for ever; so what lies here is never made again under its old name. Chance and clock are
fixed, so that making one twice gives the same bytes (as long as zstd makes the same of them).
"""

from __future__ import annotations

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "repository"))

from shelves import FixedChance, FixedClock, back_up, store_grains  # noqa: E402
from test_repository import record  # noqa: E402

from graincopy.core.ids import PointId, WorkloadId  # noqa: E402
from graincopy.media.directory import DirectoryMedium  # noqa: E402
from graincopy.model.restore_point import Trial  # noqa: E402
from graincopy.repository.keys import generate_passphrase  # noqa: E402
from graincopy.repository.records import Condemned, ObjectKind  # noqa: E402
from graincopy.repository.repository import Repository  # noqa: E402


def text(number: int) -> bytes:
    """One grain that compresses well: the golden repositories are to stay small."""
    return (f"grain {number} of a golden disk. ".encode() * 400)[:4096]


def new(path: str, passphrase: bytes | None) -> Repository:
    """An empty one, small in all its measures, the same whenever it is made."""
    return Repository.create(
        DirectoryMedium.create(path),
        passphrase=passphrase,
        grain_size=4096,
        fan_out=8,
        clock=FixedClock(),
        chance=FixedChance(os.path.basename(path)),
    )


def make(path: str, passphrase: bytes | None) -> None:
    """Every kind of object once: two points, a tombstone, an open run with a beat, a restore, condemned packs."""
    repository = new(path, passphrase)
    if passphrase is not None:
        repository.add_key(b"deputy", "the deputy")
    first = back_up(repository, {at: text(at) for at in (0, 1, 7, 8, 63, 64, 99)})
    back_up(repository, {1: text(100), 64: text(0)}, base=first)
    repository.fence(repository.open_run("backup", WorkloadId("w")).id)
    restore = repository.open_run("restore", WorkloadId("w"), pins=(first.id,))
    repository.put_restore(record(restore.id, first.id))
    repository.mark_restore(restore.id, "done")
    repository.close_run(restore)
    killed = repository.open_run("backup", WorkloadId("w"))
    repository.beat(killed)
    with repository.session(killed) as session:
        store_grains(session, {5: text(500)})
        session.finish()
    pack = sorted(entry.name for entry in repository.medium.list("data"))[0]
    condemned = Condemned(collect=killed.id, packs=(pack,))
    repository.objects.put(ObjectKind.CONDEMNED, f"condemned/{killed.id}", condemned)


def make_additions(path: str, passphrase: bytes | None) -> None:
    """What the format got after the two above were made: trials of a point, a suspect pack, a resumed restore."""
    repository = new(path, passphrase)
    point = back_up(repository, {at: text(at) for at in (0, 3, 70)})
    for at, alive in enumerate((True, False)):
        run = repository.open_run("trial", WorkloadId("w"), pins=(point.id,))
        repository.history.put(trial(run.id, point.id, at, alive))
        repository.close_run(run)
    restore = repository.open_run("restore", WorkloadId("w"), pins=(point.id,))
    repository.put_restore(record(restore.id, point.id))
    repository.mark_restore(restore.id, "resumed")
    repository.mark_restore(restore.id, "done")
    repository.close_run(restore)
    repository.suspect(sorted(entry.name for entry in repository.medium.list("node"))[0])


def trial(run: PointId, point: PointId, at: int, alive: bool) -> Trial:
    """One trial with every field set."""
    return Trial(
        id=run,
        point=point,
        machine=f"web\udcff {at}",
        time=1_000_000.0 + at,
        duration_s=4.5,
        sign="console:login:",
        alive=alive,
        reason="" if alive else "it said nothing",
        console="Debian\nlogin: \udcfe",
        picture=b"\x89PNG\x00\xff",
        hostname="here",
        version="0.1",
    )


def make_generated(path: str, passphrase: bytes | None) -> None:
    """One point, opened by a generated passphrase or by one that somebody thought of."""
    repository = new(path, passphrase)
    repository.add_key(b"deputy", "the deputy")
    back_up(repository, {at: text(at) for at in (0, 3, 70)})


GOLDEN = {
    "format-1-encrypted": (make, b"golden"),
    "format-1-plain": (make, None),
    "format-1-additions": (make_additions, b"golden"),
    "format-1-generated": (make_generated, generate_passphrase(FixedChance("golden"))),
}

if __name__ == "__main__":
    for name, (maker, passphrase) in GOLDEN.items():
        if os.path.exists(os.path.join(HERE, name)):
            print(f"{name} is there already: golden repositories are not made anew")  # noqa: T201
            continue
        maker(os.path.join(HERE, name), passphrase)
