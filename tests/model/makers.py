"""Short ways to write restore points and targets down in a test."""

from __future__ import annotations

from graincopy.core.ids import DiskId, PieceId, PointId, RepositoryId, VolumeId, WorkloadId
from graincopy.model.restore_point import AuditResult, DiskRecord, MapRoot, RestorePoint
from graincopy.model.snapshot import CheckpointDisk, Owner, Role, Target, TargetTag
from graincopy.model.volume import Claim, SourceVolume
from graincopy.model.workload import Consistency, FileMetadata, Representation, WorkloadFile

REPO = RepositoryId("repo")
OTHER_REPO = RepositoryId("other repo")
WEB = WorkloadId("web")
VOLUME = VolumeId("reflink:/ds1")
LIVE = Owner(host="h", boot="b", pid=1, started=1)
DEAD = Owner(host="h", boot="b", pid=2, started=1)
STRANGE = Owner(host="elsewhere", boot="b", pid=3, started=1)


def disk(name: str = "a", /, checkpoint: str | None = None, **facts: object) -> DiskRecord:
    """A disk record; its path is /ds1/NAME."""
    values: dict[str, object] = {
        "id": DiskId(name),
        "name": name,
        "path": f"/ds1/{name}",
        "size": 1 << 20,
        "root": MapRoot(node=PieceId(b"\0" * 32)),
        "representation": Representation.FILE,
        "format": "raw",
        "metadata": FileMetadata(),
        "volume": VOLUME,
        "driver": "reflink",
        "incarnation": "1",
        "change_map": "extents",
        "checkpoint": checkpoint,
        "audit": AuditResult(),
    }
    return DiskRecord(**{**values, **facts})  # type: ignore[arg-type]


def point(number: int, *disks: DiskRecord, workload: WorkloadId = WEB, **facts: object) -> RestorePoint:
    """Restore point ``p<number>`` of sequence ``number``."""
    values: dict[str, object] = {
        "id": PointId(f"p{number}"),
        "repository": REPO,
        "workload": workload,
        "workload_name": str(workload),
        "kind": "files",
        "sequence": number,
        "time": 1000.0 * number,
        "hostname": "host",
        "base": None,
        "consistency": Consistency.CRASH,
        "instant": "one",
        "disks": disks,
    }
    return RestorePoint(**{**values, **facts})  # type: ignore[arg-type]


def target(
    name: str,
    run: str = "p1",
    role: Role = Role.CHECKPOINT,
    disks: tuple[str, ...] = ("a",),
    owner: Owner = DEAD,
    repository: RepositoryId = REPO,
    workload: WorkloadId = WEB,
    created: float = 0.0,
    **facts: object,
) -> Target:
    """Target ``name`` of run ``run`` that serves ``disks``."""
    served = tuple(CheckpointDisk(workload=workload, disk=DiskId(one)) for one in disks)
    tag = TargetTag(run=PointId(run), role=role, owner=owner, repository=repository, disks=served, created=created)
    values: dict[str, object] = {
        "id": name,
        "driver": "reflink",
        "volume": VOLUME,
        "size": 1 << 30,
        "incarnation": "1",
        "tag": tag,
    }
    return Target(**{**values, **facts})  # type: ignore[arg-type]


def file(name: str = "a", /, **facts: object) -> WorkloadFile:
    """A file of the workload; its path is /ds1/NAME."""
    values: dict[str, object] = {"path": f"/ds1/{name}", "name": name, "disk": DiskId(name)}
    return WorkloadFile(**{**values, **facts})  # type: ignore[arg-type]


def volume(**facts: object) -> SourceVolume:
    """S as it is now."""
    values: dict[str, object] = {"id": VOLUME, "driver": "reflink", "size": 1 << 30, "incarnation": "1"}
    return SourceVolume(**{**values, **facts})  # type: ignore[arg-type]


def claim(name: str = "a", /, **facts: object) -> Claim:
    """Where the file lies now."""
    values: dict[str, object] = {"path": f"/ds1/{name}", "driver": "reflink", "volume": VOLUME, "why": "reflink works"}
    return Claim(**{**values, **facts})  # type: ignore[arg-type]
