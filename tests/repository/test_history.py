"""Histories: trials lie beside their restore point, say what they said, and go with it."""

from __future__ import annotations

from shelves import back_up, grain, make, objects, reopen

from graincopy.core.ids import PointId
from graincopy.model.restore_point import RestorePoint, Trial
from graincopy.repository.check import check
from graincopy.repository.collect import collect
from graincopy.repository.repository import Repository


def trial_of(point: RestorePoint, number: int) -> Trial:
    return Trial(
        id=PointId(f"{number:032x}"),
        point=point.id,
        machine="web \udcff",
        time=float(number),
        duration_s=2.5,
        sign="agent",
        alive=number % 2 == 0,
        reason="" if number % 2 == 0 else "it went away",
        picture=b"\x89PNG" + bytes(number),
    )


def two_points(repository: Repository) -> list[RestorePoint]:
    return [back_up(repository, {0: grain(name)}) for name in ("first", "second")]


def of_history(repository: Repository) -> list[str]:
    return [name for name in objects(repository) if name.startswith("history/")]


def test_trials_come_back_oldest_first_also_to_another_host() -> None:
    repository = make(passphrase=b"secret")
    first, second = two_points(repository)
    trials = [trial_of(first, number) for number in (3, 1, 2)]
    for trial in [*trials, *trials, trial_of(second, 4)]:
        repository.history.put(trial)
    again = reopen(repository, passphrase=b"secret")
    assert again.history.of(first.id) == tuple(sorted(trials, key=lambda trial: trial.time))
    assert again.history.of(second.id) == (trial_of(second, 4),)
    assert check(again, data=True) == ()


def test_expire_takes_the_history_of_its_point_and_no_other() -> None:
    repository = make()
    first, second = two_points(repository)
    for point in (first, second):
        repository.history.put(trial_of(point, 1))
    repository.delete_point(first.id)
    assert of_history(repository) == [f"history/{second.id}/{1:032x}"]


def test_collect_takes_what_an_expire_that_was_cut_off_left() -> None:
    repository = make()
    first, second = two_points(repository)
    for point in (first, second):
        repository.history.put(trial_of(point, 1))
    repository.medium.delete(f"points/{first.id}")
    collect(repository, alive=lambda _: True, clock=repository.clock, patience=0)
    assert of_history(repository) == [f"history/{second.id}/{1:032x}"]


def test_a_damaged_trial_is_a_finding_and_hides_no_other() -> None:
    repository = make()
    first, _ = two_points(repository)
    for number in (1, 2):
        repository.history.put(trial_of(first, number))
    name = f"history/{first.id}/{1:032x}"
    wounded = bytearray(repository.medium.get(name))
    wounded[-1] ^= 1
    repository.medium.delete(name)
    repository.medium.put(name, [bytes(wounded)])
    assert repository.history.of(first.id) == (trial_of(first, 2),)
    assert [finding.name for finding in check(repository)] == [name]
