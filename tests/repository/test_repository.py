"""Making and opening a repository, keys, points by name, restore records."""

from __future__ import annotations

import pytest
from shelves import OWNER, FixedChance, FixedClock, back_up, content_of, grain, make, objects, point_of, reopen

from graincopy.core.errors import (
    DiskUnknown,
    KeyUnknown,
    LastKey,
    ObjectDamaged,
    ObjectMissing,
    PassphraseMissing,
    PassphraseWrong,
    PointAmbiguous,
    PointPinned,
    PointUnknown,
    RepositoryExists,
    RepositoryMissing,
    RepositoryTooNew,
    RestoreUnknown,
    RunFenced,
)
from graincopy.core.ids import PointId, WorkloadId
from graincopy.media.directory import DirectoryMedium
from graincopy.media.memory import MemoryMedium
from graincopy.model.restore_point import MapRoot, RestoreRecord
from graincopy.repository import frame
from graincopy.repository.repository import Repository


def replace(repository: Repository, name: str, data: bytes) -> None:
    repository.medium.delete(name)
    repository.medium.put(name, [data])


def test_an_encrypted_repository_in_a_directory_with_any_name(tmp_path) -> None:
    path = str(tmp_path / "a repository\n\udcff")
    repository = make(DirectoryMedium.create(path), passphrase=b"secret")
    point = back_up(repository, {5: grain(5), 99: grain(99)})
    again = reopen(repository, medium=DirectoryMedium(path), passphrase=b"secret")
    assert again.find_point("latest") == point
    assert content_of(again, point) == {5: grain(5), 99: grain(99)}
    assert (again.id, again.grain_size, again.fan_out, again.url) == (repository.id, 4096, 8, path)


@pytest.mark.parametrize("name", ["a", "keys/a", "points/a"])
def test_a_place_that_is_not_empty_is_left_alone(name: str) -> None:
    medium = MemoryMedium()
    medium.put(name, [b"somebody's"])
    with pytest.raises(RepositoryExists):
        make(medium)
    assert [entry.name for entry in medium.list("")] == [name]


@pytest.mark.parametrize(
    "wishes", [{"grain_size": 65535}, {"grain_size": 2048}, {"grain_size": 1 << 23}, {"fan_out": 7}]
)
def test_impossible_sizes_are_refused_before_anything_is_put(wishes: dict) -> None:
    medium = MemoryMedium()
    with pytest.raises(ValueError):
        make(medium, **wishes)
    assert not list(medium.list(""))


def test_no_passphrase_is_not_the_same_as_an_empty_one() -> None:
    with pytest.raises(PassphraseMissing):
        make(passphrase=b"")


def test_opening_says_what_is_wrong() -> None:
    with pytest.raises(RepositoryMissing):
        Repository.open(MemoryMedium(), passphrase=None, clock=FixedClock(), chance=FixedChance())
    repository = make(passphrase=b"secret")
    with pytest.raises(PassphraseMissing):
        reopen(repository)
    with pytest.raises(PassphraseWrong):
        reopen(repository, passphrase=b"Secret")


def test_a_newer_format_is_told_from_damage() -> None:
    repository = make()
    config = repository.medium.get("config")
    newer = config[:8] + b"\x02\x00" + config[10:-16]
    from blake3 import blake3

    replace(repository, "config", newer + blake3(newer).digest(length=16))
    with pytest.raises(RepositoryTooNew) as told:
        reopen(repository)
    assert told.value.facts == {"url": "memory:", "found": 2, "known": 1}
    for at in range(len(config)):
        flipped = bytearray(config)
        flipped[at] ^= 4
        replace(repository, "config", bytes(flipped))
        with pytest.raises(ObjectDamaged):
            reopen(repository)


def test_a_config_of_another_repository_is_noticed_though_it_is_whole() -> None:
    repository, other = make(), make(seed="other")
    replace(repository, "config", other.medium.get("config"))
    with pytest.raises(ObjectDamaged, match="keyring"):
        reopen(repository)


@pytest.mark.parametrize("folder", ["keys", "keyring"])
def test_keys_that_are_damaged_or_gone(folder: str) -> None:
    repository = make()
    (name,) = [name for name in objects(repository) if name.startswith(f"{folder}/")]
    whole = bytearray(repository.medium.get(name))
    whole[50] ^= 1
    replace(repository, name, bytes(whole))
    with pytest.raises(ObjectDamaged, match=folder):
        reopen(repository)
    repository.medium.delete(name)
    with pytest.raises(ObjectMissing):
        reopen(repository)


def test_the_keyring_with_the_highest_number_counts() -> None:
    repository = make()
    name = "keyring/00000002"
    repository.medium.put(name, [b"half a keyring"])
    with pytest.raises(ObjectDamaged, match=name):
        reopen(repository)


# --- keys -----------------------------------------------------------------------------------------


def test_several_passphrases_open_and_a_removed_one_does_not() -> None:
    repository = make(passphrase=b"one")
    (first,) = repository.keys()
    second = repository.add_key(b"two", "the deputy")
    infos = repository.keys()
    assert [info.label for info in infos] == ["first", "the deputy"]
    assert reopen(repository, passphrase=b"two").id == reopen(repository, passphrase=b"one").id
    with pytest.raises(KeyUnknown):
        repository.remove_key("nobody")
    repository.remove_key(first.id)
    with pytest.raises(PassphraseWrong):
        reopen(repository, passphrase=b"one")
    with pytest.raises(LastKey):
        repository.remove_key(second.id)
    assert reopen(repository, passphrase=b"two").keys() == (second,)
    with pytest.raises(PassphraseMissing):
        repository.add_key(b"", "")


def test_one_damaged_key_does_not_lock_out_the_others() -> None:
    repository = make(passphrase=b"one")
    (first,) = repository.keys()
    repository.add_key(b"two", "")
    replace(repository, f"keys/{first.id}", b"rubbish")
    assert reopen(repository, passphrase=b"two").id == repository.id
    with pytest.raises(ObjectDamaged, match=first.id):
        reopen(repository, passphrase=b"one")


def test_two_who_each_remove_the_other_key_do_not_lose_the_repository() -> None:
    repository = make(passphrase=b"one")
    (first,) = repository.keys()
    second = repository.add_key(b"two", "")

    class Racing(MemoryMedium):
        def delete(self, name: str):
            if name == f"keys/{first.id}":
                super().delete(f"keys/{second.id}")
            return super().delete(name)

    with pytest.raises(LastKey):
        reopen(repository, medium=Racing(repository.medium.store), passphrase=b"one").remove_key(first.id)
    assert reopen(repository, passphrase=b"one").id == repository.id


# --- points ---------------------------------------------------------------------------------------


def test_points_are_found_by_id_prefix_and_age() -> None:
    repository = make()
    points = [back_up(repository, {1: grain(number)}) for number in range(3)]
    assert repository.points() == tuple(reversed(points))
    assert [point.sequence for point in points] == [1, 2, 3]
    for text, point in (("latest", points[2]), ("latest~0", points[2]), ("latest~2", points[0])):
        assert repository.find_point(text) == point
    assert repository.find_point(points[1].id) == repository.find_point(points[1].id[:8]) == points[1]
    assert repository.find_point("latest", WorkloadId("w")) == points[2]
    for text in ("latest~3", "", "nothing", "latest~", "latest~x", "LATEST"):
        with pytest.raises(PointUnknown):
            repository.find_point(text)
    with pytest.raises(PointUnknown):
        repository.find_point("latest", WorkloadId("other"))
    with pytest.raises(DiskUnknown, match=r"web\.raw"):
        repository.find_disks(points[0], "no disk")
    assert repository.find_disks(points[0], None) == repository.find_disks(points[0], "web.raw") == points[0].disks


def test_a_prefix_of_two_points_is_ambiguous() -> None:
    repository = make()
    for number in range(17):  # of 17 ids two begin alike
        run = repository.open_run("backup", None)
        repository.publish(point_of(run, repository, MapRoot(), 0, number))
    heads = [point.id[0] for point in repository.points()]
    twice = next(head for head in heads if heads.count(head) > 1)
    with pytest.raises(PointAmbiguous, match=str(heads.count(twice))):
        repository.find_point(twice)


def test_order_follows_the_sequence_not_the_clocks() -> None:
    repository = make()
    back_up(repository, {})
    repository.clock.time -= 100_000
    second = back_up(repository, {})
    assert repository.points()[0] == second


def test_a_damaged_point_hides_no_other_and_is_not_passed_over_in_silence() -> None:
    repository = make()
    points = [back_up(repository, {1: grain(number)}) for number in range(2)]
    name = f"points/{points[1].id}"
    whole = repository.medium.get(name)
    replace(repository, name, whole[:-1])
    later = reopen(repository)
    assert later.points() == (points[0],)
    ((id, _),) = later.unreadable_points()
    assert id == points[1].id
    with pytest.raises(ObjectDamaged):
        later.find_point(points[1].id[:10])
    replace(repository, name, repository.medium.get(f"points/{points[0].id}"))
    assert reopen(repository).points() == (points[0],), "a point at another's name is no point"
    later.delete_point(points[1].id)
    assert later.unreadable_points() == ()


def test_a_pinned_point_is_not_removed() -> None:
    repository = make()
    point = back_up(repository, {1: grain(1)})
    run = repository.open_run("restore", None, pins=(point.id,))
    with pytest.raises(PointPinned, match="restore run"):
        repository.delete_point(point.id)
    assert repository.points() == (point,)
    assert repository.pins(alive=lambda owner: False) == {}
    repository.close_run(run)
    repository.delete_point(point.id)
    with pytest.raises(PointUnknown):
        repository.delete_point(point.id)
    assert not [name for name in objects(repository) if name.startswith("runs/")]


def test_a_pin_that_comes_while_the_point_is_removed_brings_it_back() -> None:
    repository = make()
    point = back_up(repository, {1: grain(1)})
    runs = []

    class Racing(MemoryMedium):
        def delete(self, name: str):
            if name == f"points/{point.id}" and not runs:
                runs.append(reopen(repository, seed="racer").open_run("restore", None, pins=(point.id,)))
                assert reopen(repository).point(point.id) == point  # the restore reads it in this very moment
            return super().delete(name)

    with pytest.raises(PointPinned):
        reopen(repository, medium=Racing(repository.medium.store)).delete_point(point.id)
    assert reopen(repository).points() == (point,)
    assert content_of(reopen(repository), point) == {1: grain(1)}


def test_a_run_cannot_pin_what_is_gone() -> None:
    repository = make()
    with pytest.raises(PointUnknown):
        repository.open_run("restore", None, pins=(PointId("0" * 32),))
    assert repository.open_runs() == ()


# --- restore records ------------------------------------------------------------------------------


def record(id: PointId, point: PointId) -> RestoreRecord:
    return RestoreRecord(id=id, point=point, workload=WorkloadId("w"), owner=OWNER, opened=1.0, expires=2.0, disks=())


def test_a_restore_goes_through_its_states_and_pins_until_it_ends() -> None:
    repository = make()
    point = back_up(repository, {1: grain(1)})
    run = repository.open_run("restore", None, pins=(point.id,))
    repository.put_restore(record(run.id, point.id))
    repository.put_restore(record(run.id, point.id))
    repository.close_run(run)
    for state, pinned in (("open", True), ("done", False), ("undoing", True), ("undone", False)):
        if state != "open":
            repository.mark_restore(run.id, state)
            repository.mark_restore(run.id, state)
        (found,) = reopen(repository).restores()
        assert (found.state, found.record) == (state, record(run.id, point.id))
        assert (point.id in repository.pins()) is pinned
    with pytest.raises(ValueError):
        repository.mark_restore(run.id, "opened")
    repository.forget_restore(run.id)
    repository.forget_restore(run.id)
    assert repository.restores() == ()
    assert not [name for name in objects(repository) if name.startswith("restores/")]


def test_a_fenced_restore_may_not_begin() -> None:
    repository = make()
    point = back_up(repository, {1: grain(1)})
    run = repository.open_run("restore", None, pins=(point.id,))
    assert reopen(repository).fence(run.id)
    with pytest.raises(RunFenced):
        repository.put_restore(record(run.id, point.id))
    assert [state.state for state in repository.restores()] == ["undone"]
    with pytest.raises(RestoreUnknown):
        repository.find_restore("nobody")


def test_frames_know_their_magic() -> None:
    framed = frame.encode_frame(frame.KEY_MAGIC, b"body")
    assert frame.decode_frame(frame.KEY_MAGIC, framed) == b"body"
    for wrong in (b"", framed[:10], framed[:-1]):
        with pytest.raises(frame.Malformed):
            frame.decode_frame(frame.KEY_MAGIC, wrong)
    with pytest.raises(frame.Malformed):
        frame.decode_frame(frame.CONFIG_MAGIC, framed)
