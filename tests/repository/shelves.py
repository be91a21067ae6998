"""A repository on a memory medium, with chance and clock that a test can repeat."""

from __future__ import annotations

import hashlib

import numpy as np

from graincopy.core.ids import DiskId, PieceId, VolumeId, WorkloadId
from graincopy.media.memory import MemoryMedium
from graincopy.model.restore_point import AuditResult, DiskRecord, MapRoot, RestorePoint, RunRecord
from graincopy.model.snapshot import Owner
from graincopy.model.workload import Consistency, FileMetadata, Representation
from graincopy.repository.entries import Entries
from graincopy.repository.records import PieceKind
from graincopy.repository.repository import Repository
from graincopy.repository.store import Session

GRAIN = 4096


class Hooked(MemoryMedium):
    """Calls ``hook`` before its operation number ``at``, whichever that is: somebody else acts right then."""

    def __init__(self, medium: MemoryMedium, at: int, hook) -> None:
        super().__init__(medium.store)
        self.left, self.hook = at, hook

    def _tick(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.hook()

    def put(self, name, parts):
        self._tick()
        return super().put(name, parts)

    def get(self, name, offset=0, length=None):
        self._tick()
        return super().get(name, offset, length)

    def size(self, name):
        self._tick()
        return super().size(name)

    def list(self, prefix):
        self._tick()
        return super().list(prefix)

    def delete(self, name):
        self._tick()
        return super().delete(name)


OWNER = Owner(host="host", boot="boot", pid=1, started=1, hostname="here")


class FixedChance:
    """The same bytes every time."""

    def __init__(self, seed: str = "seed") -> None:
        self._seed, self._count = seed, 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._seed} {self._count}".encode()).digest(size)

    def below(self, limit: int) -> int:
        return int.from_bytes(self.token(8), "big") % limit


class FixedClock:
    """Time that passes only when somebody sleeps; ``on_sleep`` is what happens meanwhile."""

    def __init__(self) -> None:
        self.time = 1_000_000.0
        self.on_sleep = lambda: None

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.on_sleep()


def make(medium=None, seed="seed", **wishes) -> Repository:
    wishes = {"passphrase": None, "grain_size": GRAIN, "fan_out": 8, "owner": OWNER} | wishes
    return Repository.create(
        MemoryMedium() if medium is None else medium, clock=FixedClock(), chance=FixedChance(seed), **wishes
    )


def reopen(repository: Repository, seed: str = "another", medium=None, **wishes) -> Repository:
    """As another process would: nothing is known but the medium."""
    wishes = {"passphrase": None, "owner": OWNER} | wishes
    medium = repository.medium if medium is None else medium
    return Repository.open(medium, clock=FixedClock(), chance=FixedChance(seed), **wishes)


def grain(word: object) -> bytes:
    """Content of one grain that does not compress and depends on ``word`` alone."""
    return hashlib.shake_256(str(word).encode()).digest(GRAIN)


def store_grains(session: Session, grains: dict[int, bytes]) -> Entries:
    """Store ``grains`` unless they are known; their entries."""
    ids = [session.piece_id(PieceKind.CHUNK, content) for content in grains.values()]
    table = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 32)
    writer = session.writer(PieceKind.CHUNK)
    for known, piece, content in zip(session.known(table).tolist(), ids, grains.values(), strict=True):
        if not known:
            writer.add(PieceId(piece), content)
    return Entries.chunks(np.array(list(grains), np.int64), table).settled()


def point_of(run: RunRecord, repository: Repository, root: MapRoot, grain_count: int, sequence: int) -> RestorePoint:
    disk = DiskRecord(
        id=DiskId("disk"),
        name="web.raw",
        path="/ds/we\udcff b\n.raw",
        size=grain_count * GRAIN,
        root=root,
        representation=Representation.FILE,
        format="raw",
        metadata=FileMetadata(xattrs={"user.\udce9": b"\x00\xff"}),
        volume=VolumeId("memory:s"),
        driver="memory",
        incarnation="1",
        change_map="first backup",
        checkpoint=None,
        audit=AuditResult(),
    )
    return RestorePoint(
        id=run.id,
        repository=repository.id,
        workload=run.workload or WorkloadId("w"),
        workload_name="web",
        kind="files",
        sequence=sequence,
        time=float(sequence),
        hostname="here",
        base=None,
        consistency=Consistency.CRASH,
        instant="one",
        disks=(disk,),
    )


def back_up(
    repository: Repository, grains: dict[int, bytes], base: RestorePoint | None = None, grain_count: int = 100
) -> RestorePoint:
    """A whole backup of a disk: ``grains`` over ``base``, published."""
    run = repository.open_run("backup", WorkloadId("w"), pins=() if base is None else (base.id,))
    with repository.session(run) as session:
        entries = store_grains(session, grains)
        root = MapRoot() if base is None else base.disks[0].root
        root = session.update_map(root, grain_count, entries)
        session.finish()
    point = point_of(run, repository, root, grain_count, repository.sequence())
    repository.publish(point)
    return point


def content_of(repository: Repository, point: RestorePoint) -> dict[int, bytes]:
    """Every grain of the point's disk that is not zero."""
    found: dict[int, bytes] = {}
    for entries in repository.map.walk(point.disks[0].root):
        found.update(repository.read_chunks(entries))
    return found


def objects(repository: Repository) -> dict[str, int]:
    """Names and sizes of everything on the medium."""
    return {entry.name: entry.size for entry in repository.medium.list("")}


def total(repository: Repository) -> int:
    return sum(objects(repository).values())
