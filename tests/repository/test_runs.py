"""Fencing: of a run that publishes and somebody who fences it, exactly one wins, whoever is how late."""

from __future__ import annotations

import pytest
from shelves import OWNER, back_up, content_of, grain, make, objects, point_of, reopen, store_grains

from graincopy.core.errors import PointUnknown, RunFenced, RunsOpen
from graincopy.core.ids import PointId, WorkloadId
from graincopy.media.base import MediumCapabilities
from graincopy.media.memory import MemoryMedium
from graincopy.model.restore_point import MapRoot


def test_who_publishes_first_cannot_be_fenced() -> None:
    repository = make()
    point = back_up(repository, {1: grain(1)})
    assert not reopen(repository).fence(point.id)
    assert reopen(repository).points() == (point,)


def test_who_is_fenced_first_cannot_publish() -> None:
    repository = make()
    run = repository.open_run("backup", WorkloadId("w"))
    assert reopen(repository).fence(run.id)
    assert reopen(repository).fence(run.id)
    with pytest.raises(RunFenced, match=run.id):
        repository.publish(point_of(run, repository, MapRoot(), 0, 1))
    assert repository.points() == ()
    assert repository.is_fenced(run.id)
    assert [stone.owner for stone in repository.tombstones()] == [OWNER]
    with pytest.raises(PointUnknown):
        repository.find_point(run.id)
    with pytest.raises(PointUnknown):
        repository.delete_point(run.id)  # a tombstone is not to be removed that way
    assert repository.is_fenced(run.id)


def test_publishing_again_after_a_lost_answer_is_no_loss() -> None:
    repository = make()
    run = repository.open_run("backup", WorkloadId("w"))
    point = point_of(run, repository, MapRoot(), 0, 1)
    size = repository.publish(point)
    repository.publish(point)
    assert repository.medium.size(f"points/{point.id}") == size
    with pytest.raises(RunFenced):
        repository.publish(point_of(run, repository, MapRoot(), 0, 2))


def test_a_run_is_open_from_open_run_to_its_end() -> None:
    repository = make()
    other = reopen(repository)
    first, second = repository.open_run("backup", WorkloadId("w")), repository.open_run("view", None)
    assert set(other.open_runs()) == {first, second}
    repository.close_run(second)
    repository.close_run(second)
    assert other.open_runs() == (first,)
    repository.publish(point_of(first, repository, MapRoot(), 0, 1))
    assert other.open_runs() == ()


def test_a_run_that_died_right_after_publishing_is_not_open_and_is_tidied() -> None:
    repository = make()
    run = repository.open_run("backup", WorkloadId("w"))
    repository.beat(run)
    left = {name: repository.medium.get(name) for name in objects(repository) if name.startswith(("runs/", "beats/"))}
    repository.publish(point_of(run, repository, MapRoot(), 0, 1))
    for name, data in left.items():
        repository.medium.put(name, [data])
    assert len(left) == 2
    later = reopen(repository)
    assert later.open_runs() == ()
    later.forget_ended_runs()
    assert not [name for name in objects(repository) if name.startswith(("runs/", "beats/"))]


def test_beats_are_counted_and_only_the_last_is_kept() -> None:
    repository = make()
    run = repository.open_run("backup", WorkloadId("w"))
    other = reopen(repository)
    assert other.heartbeat(run.id) == 0
    for number in range(1, 4):
        repository.beat(run)
        assert other.heartbeat(run.id) == number
    other.beat(run)  # the run in another process: it goes on counting
    assert other.heartbeat(run.id) == 4
    assert len([name for name in objects(repository) if name.startswith("beats/")]) in (1, 2)
    repository.close_run(run)
    assert not [name for name in objects(repository) if name.startswith("beats/")]


def test_sequence_is_one_more_than_any_that_is_seen() -> None:
    repository = make()
    assert repository.sequence() == 1
    run = repository.open_run("backup", None)
    repository.publish(point_of(run, repository, MapRoot(), 0, 41))
    assert reopen(repository).sequence() == 42


def test_segments_of_a_fenced_run_are_not_believed() -> None:
    """The zombie: fenced, its packs swept, it wakes up and still puts the segment that lists them."""
    repository = make()
    run = repository.open_run("backup", WorkloadId("w"))
    session = repository.session(run)
    store_grains(session, {1: grain(1)})
    session.finish()
    later = reopen(repository)
    assert len(later.load_index(fresh=True)) == 1
    later.fence(run.id)
    assert len(later.load_index(fresh=True)) == 0
    point = back_up(later, {1: grain(1)})
    assert content_of(later, point) == {1: grain(1)}


class Sequential(MemoryMedium):
    def capabilities(self) -> MediumCapabilities:
        return MediumCapabilities()


def test_a_medium_without_exclusive_create_admits_one_run() -> None:
    repository = make(Sequential())
    run = repository.open_run("backup", None)
    with pytest.raises(RunsOpen):
        repository.open_run("backup", None)
    assert repository.open_runs() == (run,)


def test_unknown_runs_can_be_fenced_for_good() -> None:
    repository = make()
    nobody = PointId("f" * 32)
    assert repository.fence(nobody)
    assert [stone.owner for stone in repository.tombstones()] == [None]
