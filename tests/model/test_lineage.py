"""Lineage as pictures: what there is → what the next point builds on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from makers import OTHER_REPO, REPO, WEB, claim, disk, file, point, target, volume

from graincopy.core.ids import PointId, VolumeId, WorkloadId
from graincopy.model.lineage import Compare, Deletion, First, Incremental, Lineage, Retag, choose_base, superseded
from graincopy.model.restore_point import RestorePoint
from graincopy.model.snapshot import Role, Target
from graincopy.model.workload import Representation


def base_of(points: Sequence[RestorePoint], checkpoints: Sequence[Target], **facts: object) -> Lineage:
    asked: dict[str, object] = {"file": file(), "volume": volume(), "claim": claim(), "repository": REPO}
    return choose_base(points, WEB, checkpoints=checkpoints, **{**asked, **facts})  # type: ignore[arg-type]


P1, P2 = point(1, disk(checkpoint="t1")), point(2, disk(checkpoint="t2"))
T1, T2 = target("t1", "p1"), target("t2", "p2")


def test_the_newest_point_and_the_checkpoint_that_it_names() -> None:
    assert base_of([P2, P1], [T1, T2]) == Incremental(P2, P2.disks[0], T2)


def test_the_order_in_which_points_come_does_not_matter() -> None:
    assert base_of([P1, P2], [T2, T1]) == Incremental(P2, P2.disks[0], T2)


def test_clocks_that_disagree_do_not_make_an_older_point_the_base() -> None:
    behind = msgspec.structs.replace(P2, time=-5000.0)
    assert base_of([P1, behind], [T1, T2]) == Incremental(behind, behind.disks[0], T2)


def test_a_target_whose_promotion_was_cut_off_after_the_publish_is_a_base() -> None:
    cut_off = target("t2", "p2", role=Role.TARGET)
    assert base_of([P2], [cut_off]) == Incremental(P2, P2.disks[0], cut_off)


@pytest.mark.parametrize(
    "points",
    [[], [point(1, disk("b"))], [point(1, disk(), workload=WorkloadId("db"))], [point(1, disk(), incomplete=True)]],
    ids=["no point", "another disk", "another workload", "incomplete"],
)
def test_nothing_to_build_on(points: list[RestorePoint]) -> None:
    assert base_of(points, [T1]) == First("first backup")


def test_an_incomplete_point_is_passed_over_and_the_one_before_it_serves() -> None:
    partial = point(2, disk(checkpoint="t2"), incomplete=True)
    assert base_of([partial, P1], [T1, T2]) == Incremental(P1, P1.disks[0], T1)


def test_a_point_without_this_disk_is_passed_over() -> None:
    assert base_of([point(2, disk("b")), P1], [T1]) == Incremental(P1, P1.disks[0], T1)


@pytest.mark.parametrize("other", [{"representation": Representation.GUEST}, {"format": "qcow2"}])
def test_lineage_never_crosses_representation_or_format(other: dict[str, object]) -> None:
    crossed = point(2, disk(checkpoint="t2", **other))
    assert base_of([crossed], [T2]) == First("representation changed")
    assert base_of([crossed, P1], [T1, T2]) == Incremental(P1, P1.disks[0], T1)


@pytest.mark.parametrize(
    ("points", "checkpoints", "facts", "reason"),
    [
        ([P1], [T1], {"changes": False}, "the driver keeps no change map"),
        ([point(1, disk())], [T1], {}, "no checkpoint was kept"),
        ([P1], [], {}, "the checkpoint was deleted"),
        ([P2, P1], [T1], {}, "the checkpoint was deleted"),
        ([P1], [target("t1", role=Role.UNDO)], {}, "the checkpoint was deleted"),
        ([P1], [target("t1", "p7", role=Role.TARGET)], {}, "the checkpoint was deleted"),
        ([P1], [target("t1", driver="qemu")], {}, "the checkpoint was deleted"),
        ([P1], [T1], {"volume": volume(incarnation="2")}, "the volume was recreated"),
        ([P1], [target("t1", incarnation="0")], {}, "the volume was recreated"),
        ([point(1, disk(checkpoint="t1", incarnation="0"))], [T1], {}, "the volume was recreated"),
        ([P1], [T1], {"volume": volume(id=VolumeId("reflink:/ds2"))}, "the file moved to another volume"),
        ([P1], [T1], {"claim": claim(volume=VolumeId("reflink:/ds2"))}, "the file moved to another volume"),
        ([P1], [target("t1", volume=VolumeId("reflink:/ds2"))], {}, "the file moved to another volume"),
        ([P1], [T1], {"file": file(path="/ds1/swapped")}, "the file was renamed"),
        ([P1], [target("t1", repository=OTHER_REPO)], {}, "the checkpoint belongs to another repository"),
        ([P1], [target("t1", disks=("b",))], {}, "the checkpoint no longer serves this disk"),
        ([P1], [target("t1", workload=WorkloadId("db"))], {}, "the checkpoint no longer serves this disk"),
    ],
)
def test_in_any_doubt_it_compares_and_says_why(
    points: list[RestorePoint], checkpoints: list[Target], facts: dict[str, object], reason: str
) -> None:
    assert base_of(points, checkpoints, **facts) == Compare(points[0], points[0].disks[0], reason)


def test_two_repositories_do_not_take_each_others_base() -> None:
    ours, theirs = target("t1"), target("t9", "q1", repository=OTHER_REPO)
    newer_theirs = target("t10", "q2", repository=OTHER_REPO)
    assert superseded([ours, theirs], newer_theirs, OTHER_REPO) == (Deletion(theirs),)
    assert base_of([P1], [ours, newer_theirs]) == Incremental(P1, P1.disks[0], ours)


def test_an_old_checkpoint_goes_only_when_the_newer_serves_all_of_its_disks() -> None:
    newer = target("t3", "p3", disks=("a", "b"))
    alone, both, shared = target("t1"), target("t2", disks=("b", "a")), target("t4", disks=("b", "c"))
    assert superseded([alone, both, shared, newer], newer, REPO) == (
        Deletion(alone),
        Deletion(both),
        Retag(shared, target("", disks=("c",)).tag.disks),
    )


def test_a_checkpoint_of_other_disks_stays_as_it_is() -> None:
    other_workload = target("t2", workload=WorkloadId("db"))
    assert superseded([target("t1", disks=("b",)), other_workload], target("t3"), REPO) == ()


@pytest.mark.parametrize(
    "kept",
    [
        target("t1", role=Role.TARGET),
        target("t1", role=Role.UNDO),
        target("t1", role=Role.VIEW),
        target("t1", repository=OTHER_REPO),
        target("t1", volume=VolumeId("reflink:/ds2")),
        target("t1", driver="qemu"),
    ],
)
def test_superseded_touches_only_checkpoints_of_this_repository_on_this_volume(kept: Target) -> None:
    assert superseded([kept], target("t3"), REPO) == ()


def test_nothing_is_superseded_in_the_name_of_a_repository_that_did_not_publish() -> None:
    assert superseded([T1], target("t3", repository=OTHER_REPO), REPO) == ()


def test_after_each_publish_one_checkpoint_serves_each_disk() -> None:
    """A night in which the disks of one volume are backed up in turn, then together."""
    held: list[Target] = []
    for number, served in enumerate([("a", "b"), ("a",), ("b", "c"), ("a", "b", "c")]):
        newer = target(f"t{number}", f"p{number}", disks=served)
        for move in superseded(held, newer, REPO):
            held = [one for one in held if one.id != move.target.id]
            if isinstance(move, Retag):
                tag = msgspec.structs.replace(move.target.tag, disks=move.disks_left)
                held.append(msgspec.structs.replace(move.target, tag=tag))
        held.append(newer)
        serving = [one.disk for checkpoint in held for one in checkpoint.tag.disks]
        assert len(serving) == len(set(serving))
    assert [one.id for one in held] == ["t3"]
    assert PointId("p3") == held[0].tag.run
