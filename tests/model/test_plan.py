"""Plans: what people and programs see of what is going to happen."""

from __future__ import annotations

import msgspec
from makers import VOLUME, WEB, claim, disk, file, point, target, volume

from graincopy.core.ids import PointId, VolumeId
from graincopy.model.audit import AuditAmount
from graincopy.model.lineage import Compare, First, Incremental, Lineage
from graincopy.model.plan import BackupPlan, ExpirePlan, RestorePlan
from graincopy.model.planner import FreezeForecast, RestorePlace, plan_backup, plan_expire, plan_restore
from graincopy.model.retention import RetentionPolicy
from graincopy.model.volume import VolumeCapabilities
from graincopy.model.workload import Workload

SECOND, LOCKED = VolumeId("reflink:/ds2"), VolumeId("locked:/home/c")
POWERS = {
    "reflink": VolumeCapabilities(change_map=True, checkpoints=True, freeze="outside"),
    "locked": VolumeCapabilities(snapshots=False),
}
BASE = point(1, disk(checkpoint="t1"))
LINEAGES: list[Lineage] = [Incremental(BASE, BASE.disks[0], target("t1")), First("first backup")]


def workload(*names: str) -> Workload:
    return Workload(id=WEB, name="web", kind="files", files=tuple(file(name) for name in names))


def two_volumes(**facts: object) -> BackupPlan:
    claims = [
        claim("a", inner_path="/a", mount="/ds1"),
        claim("b", inner_path="/b", mount="/ds2", volume=SECOND),
    ]
    volumes = {VOLUME: volume(extents=900), SECOND: volume(id=SECOND)}
    return plan_backup(workload("a", "b"), claims, volumes, LINEAGES, POWERS, **facts)  # type: ignore[arg-type]


def test_a_backup_plan_reads_like_the_method() -> None:
    freeze = FreezeForecast(mounts=("/ds2", "/ds1"), predicted_ms=85.0)
    assert two_volumes(freeze=freeze, audit=AuditAmount.parse("5%")).lines() == (
        "Backup of web: 2 disks, instant: one",
        "  a: /ds1/a on reflink:/ds1 (reflink works); file view; incremental",
        "  b: /ds1/b on reflink:/ds2 (reflink works); file view; first backup",
        "Volumes:",
        "  reflink:/ds1: 1 GiB, 900 extents, snapshot",
        "  reflink:/ds2: 1 GiB, 0 extents, snapshot",
        "Freeze window: /ds2, /ds1 (about 85 ms)",
        "1. provision 2 thin targets",
        "2. freeze 2 file systems, snapshot, thaw",
        "3. a: read the dirty grains and audit 5% of the clean ones",
        "4. b: read every allocated grain",
        "5. publish the restore point",
        "6. keep the checkpoints, delete every other target",
    )


def test_without_a_forecast_the_file_systems_are_listed_and_the_window_is_not_predicted() -> None:
    plan = two_volumes(keep_checkpoint=False)
    assert plan.freeze_mounts == ("/ds1", "/ds2")
    assert "Freeze window: /ds1, /ds2 (not predicted)" in plan.lines()
    assert (plan.instant, plan.keep_checkpoint, plan.steps[-1]) == ("one", False, "delete the targets")


def test_two_volumes_that_nothing_holds_together_are_per_file() -> None:
    assert two_volumes(freeze=FreezeForecast(mounts=("/ds3",))).instant == "per file"
    assert two_volumes(freeze=FreezeForecast(mounts=("/ds1",))).instant == "one"  # one moves alone
    group = {"reflink": VolumeCapabilities(group_instant=True)}
    claims = [claim("a"), claim("b", volume=SECOND)]
    volumes = {VOLUME: volume(), SECOND: volume(id=SECOND)}
    assert plan_backup(workload("a", "b"), claims, volumes, LINEAGES, POWERS).instant == "per file"
    assert plan_backup(workload("a", "b"), claims, volumes, LINEAGES, group).instant == "per file"
    claims = [claim("a", group="array"), claim("b", volume=SECOND, group="array")]
    assert plan_backup(workload("a", "b"), claims, volumes, LINEAGES, POWERS).instant == "per file"
    assert plan_backup(workload("a", "b"), claims, volumes, LINEAGES, group).instant == "one"


def test_files_that_are_volumes_themselves_are_not_held_by_a_freeze_of_what_they_lie_on() -> None:
    claims = [claim("a", mount="/ds"), claim("b", mount="/ds", volume=SECOND)]
    volumes = {VOLUME: volume(), SECOND: volume(id=SECOND)}
    frozen = FreezeForecast(mounts=("/ds",))
    assert plan_backup(workload("a", "b"), claims, volumes, LINEAGES, POWERS, frozen).instant == "per file"
    assert plan_backup(workload("a", "b"), claims, volumes, LINEAGES, POWERS).freeze_mounts == ()


def test_two_disks_on_one_volume_share_its_target() -> None:
    plan = plan_backup(workload("a", "b"), [claim("a"), claim("b")], {VOLUME: volume()}, LINEAGES, POWERS)
    assert [one.id for one in plan.volumes] == [VOLUME]
    assert plan.instant == "one"
    assert plan.steps[0] == "provision 1 thin target"


def test_a_file_read_in_place() -> None:
    held = claim("a", driver="locked", volume=LOCKED, why="no snapshot facility")
    lineage = Compare(BASE, BASE.disks[0], "the driver keeps no change map")
    plan = plan_backup(workload("a"), [held], {LOCKED: volume(id=LOCKED, driver="locked")}, [lineage], POWERS)
    assert plan.steps == ("hold writers off", "a: read every allocated grain and compare", "publish the restore point")
    assert plan.disks[0].base == PointId("p1")
    assert "Freeze window: nothing is frozen" in plan.lines()
    assert not plan.keep_checkpoint


def test_a_restore_plan() -> None:
    wanted = point(4, disk("a", size=3 << 20), disk("b"), disk("c"), missing={"b": [(0, 4096)]})
    places = {
        "a": RestorePlace(path="/ds1/a", size_before=1 << 20, change_map=True, snapshots=True),
        "b": RestorePlace(path="/ds1/b", size_before=1 << 20),
        "c": RestorePlace(path="/ds1/c"),
    }
    plan = plan_restore(wanted, places)
    kept = "overwritten grains kept in the repository"
    assert plan.lines()[:4] == (
        "Restore of web in place from p4: 3 disks",
        "  a: /ds1/a, 1 MiB becomes 3 MiB; change map; undo: snapshot",
        f"  b: /ds1/b, 1 MiB; compared: the driver keeps no change map; undo: {kept}",
        f"  c: /ds1/c, made anew, 1 MiB; everything; undo: {kept}",
    )
    assert plan.lines()[-1] == "Note: b: parts of it are missing in this restore point"
    compared = plan_restore(wanted, {"a": places["a"]}, compare=True)
    assert [one.difference for one in compared.disks] == ["compared: asked for"]


def test_a_restore_to_a_directory_reads_nothing_and_undoes_nothing() -> None:
    plan = plan_restore(point(4, disk()), {"a": RestorePlace(path="/out/a")}, to="/out")
    assert (plan.disks[0].difference, plan.disks[0].undo) == ("everything", "none")
    assert plan.lines()[0] == "Restore of web to /out from p4: 1 disk"


def test_an_expire_plan_removes_the_oldest_first() -> None:
    plan = plan_expire([point(n, disk()) for n in range(4)], RetentionPolicy(keep_last=1), 0.0, {PointId("p2"): "me"})
    assert plan.removed == (PointId("p0"), PointId("p1"))
    assert plan.lines() == (
        "Expire removes 2 of 4 restore points",
        "  keep p3 web: last good point, one of the last 1",
        "  keep p2 web: in use by me",
        "  remove p1 web: no rule keeps it",
        "  remove p0 web: no rule keeps it",
    )


def test_a_line_is_a_line_whatever_the_path_holds() -> None:
    odd = file("a", path="/ds1/\udcff\n\x1b[2Jweb", name="two\nlines")
    plan = plan_backup(
        msgspec.structs.replace(workload(), files=(odd,)),
        [claim()],
        {VOLUME: volume()},
        [First("first backup")],
        POWERS,
    )
    assert r"  two\x0alines: /ds1/\xff\x0a\x1b[2Jweb on" in plan.lines()[1]
    assert not any(set(line) & {"\n", "\x1b"} for line in plan.lines())
    assert plan.disks[0].path == odd.path


def test_plans_travel_as_json() -> None:
    plans = (
        two_volumes(freeze=FreezeForecast(mounts=("/ds1", "/ds2"), predicted_ms=1.5)),
        plan_restore(point(4, disk()), {"a": RestorePlace(path="/out/a")}),
        plan_expire([point(1, disk())], RetentionPolicy(keep_daily=3), 0.0, {}),
    )
    kinds: tuple[type[BackupPlan] | type[RestorePlan] | type[ExpirePlan], ...] = (BackupPlan, RestorePlan, ExpirePlan)
    for plan, kind in zip(plans, kinds, strict=True):
        assert msgspec.json.decode(msgspec.json.encode(plan), type=kind) == plan
