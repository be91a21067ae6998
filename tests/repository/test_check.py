"""Check: each wound is found, named, and said to affect exactly the restore points that it affects."""

from __future__ import annotations

import itertools

import pytest
from shelves import Hooked, back_up, content_of, grain, make, objects, reopen, store_grains

from graincopy.core.errors import MediumFailed, ObjectDamaged, ObjectMissing
from graincopy.media.memory import MemoryMedium
from graincopy.repository.check import Finding, check
from graincopy.repository.collect import collect
from graincopy.repository.pack import list_packs
from graincopy.repository.records import PieceKind
from graincopy.repository.repository import Repository


def replace(repository: Repository, name: str, data: bytes | None) -> None:
    repository.medium.delete(name)
    if data is not None:
        repository.medium.put(name, [data])


def flip(data: bytes, at: int) -> bytes:
    wounded = bytearray(data)
    wounded[at] ^= 0x20
    return bytes(wounded)


def history(repository: Repository) -> list:
    """Two points that share some chunks and all but the changed nodes."""
    first = back_up(repository, {at: grain(at) for at in range(20)})
    return [first, back_up(repository, {at: grain(f"second {at}") for at in range(3)}, base=first)]


def readable(repository: Repository, point) -> bool:
    try:
        content_of(repository, point)
    except (ObjectDamaged, ObjectMissing):
        return False
    return True


def test_a_whole_repository_has_no_findings_and_check_changes_nothing() -> None:
    repository = make(passphrase=b"secret")
    history(repository)
    repository.fence(repository.open_run("backup", None).id)
    repository.beat(repository.open_run("backup", None))
    before = {name: repository.medium.get(name) for name in objects(repository)}
    seen: list[int] = []
    assert check(repository) == ()
    assert check(repository, data=True, progress=seen.append) == ()
    assert sum(seen) == sum(size for name, size in objects(repository).items() if name[:4] in ("data", "node"))
    assert {name: repository.medium.get(name) for name in objects(repository)} == before


def all_objects() -> list[str]:
    repository = make()
    history(repository)
    repository.beat(repository.open_run("backup", None))
    return sorted(objects(repository))


@pytest.mark.parametrize("wound", ["flip first", "flip middle", "flip last", "cut", "empty", "grown"])
@pytest.mark.parametrize("name", all_objects())
def test_every_wound_of_every_object_is_found_and_named(name: str, wound: str) -> None:
    repository = make()
    points = history(repository)
    repository.beat(repository.open_run("backup", None))
    whole = repository.medium.get(name)
    wounded = {
        "flip first": flip(whole, 0),
        "flip middle": flip(whole, len(whole) // 2),
        "flip last": flip(whole, -1),
        "cut": whole[:-7],
        "empty": b"",
        "grown": whole + b"\0",
    }[wound]
    replace(repository, name, wounded)
    findings = check(repository, data=True)
    assert name in [finding.name for finding in findings], findings
    later = None if name.startswith(("config", "keys", "keyring")) else reopen(repository)
    if later is not None and not name.startswith(("runs", "beats")):
        said = {point for finding in findings for point in finding.points}
        listed = {point.id for point in later.points()}
        affected = {point.id for point in points if point.id not in listed or not readable(later, point)}
        assert said >= affected
        if wound == "flip middle":  # elsewhere all of a pack is in doubt, though its pieces may be readable
            assert said == affected


@pytest.mark.parametrize("data", [False, True])
def test_every_missing_pack_is_found(data: bool) -> None:
    for number in range(4):
        repository = make()
        points = history(repository)
        lost = list_packs(repository.medium)[number]
        replace(repository, lost.name, None)
        findings = check(repository, data=data)
        assert [finding.name for finding in findings] == [lost.name]
        assert findings[0].what == "it is missing"
        affected = {point.id for point in points if not readable(reopen(repository), point)}
        assert set(findings[0].points) == affected != set()


def test_structure_alone_reads_no_chunk_and_sees_a_truncated_pack() -> None:
    repository = make()
    history(repository)
    pack = next(pack for pack in list_packs(repository.medium) if pack.kind is PieceKind.CHUNK)
    whole = repository.medium.get(pack.name)
    replace(repository, pack.name, flip(whole, 100))
    assert check(repository) == (), "only --data reads chunks"
    replace(repository, pack.name, whole[:-1])
    (finding,) = check(repository)
    assert (finding.name, "bytes instead of" in finding.what) == (pack.name, True)


def test_chunks_that_nothing_refers_to_are_proven_too() -> None:
    repository = make()
    history(repository)
    killed = repository.session(repository.open_run("backup", None))
    before = set(list_packs(repository.medium))
    store_grains(killed, {1: grain("never published")})
    killed.finish()
    (pack,) = set(list_packs(repository.medium)) - before
    replace(repository, pack.name, flip(repository.medium.get(pack.name), 60))
    (finding,) = check(repository, data=True)
    assert (finding.name, finding.points) == (pack.name, ())


def test_two_points_exchanged_are_found() -> None:
    repository = make()
    names = [f"points/{point.id}" for point in history(repository)]
    first, second = (repository.medium.get(name) for name in names)
    replace(repository, names[0], second)
    replace(repository, names[1], first)
    assert sorted(finding.name for finding in check(repository)) == sorted(names)


def test_one_damaged_chunk_affects_only_the_points_that_have_it() -> None:
    repository = make()
    first, second = history(repository)
    index = repository.load_index(fresh=True)
    found = index.locate(repository.codec.piece_ids(PieceKind.CHUNK, [grain(0), grain(19)]))
    for at, affected in ((0, {first.id}), (1, {first.id, second.id})):
        pack = found.pack_ref(int(found.pack[at]))
        whole = repository.medium.get(pack.name)
        replace(repository, pack.name, flip(whole, int(found.offset[at]) + 5))
        (finding,) = check(repository, data=True)
        assert set(finding.points) == affected
        assert f"at byte {int(found.offset[at])}" in finding.what
        replace(repository, pack.name, whole)


def test_strangers_are_found() -> None:
    repository = make()
    for name in ("notes.txt", "data/ab/not-a-pack", "other/thing"):
        repository.medium.put(name, [b"?"])
    assert {finding.name for finding in check(repository)} == {"notes.txt", "data/ab/not-a-pack", "other/thing"}


class Unreadable(MemoryMedium):
    """One object cannot be read for reasons of the medium."""

    bad = ""

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name == self.bad:
            raise MediumFailed(url=self.url, reason="Input/output error")
        return super().get(name, offset, length)


def test_an_object_that_the_medium_cannot_read_is_a_finding_not_the_end() -> None:
    repository = make()
    history(repository)
    medium = Unreadable(repository.medium.store)
    later = reopen(repository, medium=medium)
    medium.bad = next(pack.name for pack in list_packs(medium) if pack.kind is PieceKind.CHUNK)
    findings = check(later, data=True)
    assert medium.bad in [finding.name for finding in findings]


@pytest.mark.parametrize("data", [False, True])
def test_others_at_work_between_any_two_operations_of_a_check_are_no_findings(data: bool) -> None:
    for at in itertools.count():
        repository = make()
        first, second = history(repository)

        def act(repository=repository, first=first, second=second) -> None:
            somebody = reopen(repository, seed="somebody")
            back_up(somebody, {at: grain(f"third {at}") for at in range(10, 15)}, base=second)
            somebody.delete_point(first.id)
            collect(somebody, alive=lambda owner: None, clock=somebody.clock, patience=0)

        medium = Hooked(repository.medium, at, act)
        assert check(reopen(repository, medium=medium), data=data) == (), f"operation {at}"
        if medium.left >= 0:
            assert at > 30
            return


def test_findings_are_values() -> None:
    assert Finding(name="a", what="b") == Finding(name="a", what="b", points=())
