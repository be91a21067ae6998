"""The laws of every medium (``media/base.py``), as plain functions over a :class:`MediumLab`."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

from graincopy.core.errors import GraincopyError, ObjectDamaged, ObjectMissing
from graincopy.media.base import Buffer, Medium
from graincopy.model.snapshot import Absent, Created, Deleted, Existing
from graincopy.testing.laws import Law, LawBroken, NotTried, require

MANY = 300  # objects of the complete-list law
LARGE = 20_000_000  # bytes
CREATORS = 6  # threads that race for one name
ROUNDS = 12


class MediumLab(ABC):
    """A medium to try. Names are made under ``home``, so that a user's own medium can be tried and left clean."""

    name: str = "medium"
    home: str = "conformance"

    def __init__(self) -> None:
        self._serial = itertools.count()

    @abstractmethod
    def medium(self) -> Medium:
        """A fresh medium object over the same place."""

    def kill_writer(self, name: str, size: int) -> None:
        """Kill a process (SIGKILL) while it puts an object of ``size`` bytes. Raises NotTried when that is no use."""
        raise NotTried(f"{self.name}: no other process can write to it")

    def folder(self) -> str:
        """A folder that no other law has used."""
        return f"{self.home}/{next(self._serial):04d}"

    def reset(self) -> None:
        """Delete everything under ``home``."""
        medium = self.medium()
        for entry in tuple(medium.list(self.home)):
            medium.delete(entry.name)


def _raises(error: type[GraincopyError], call: Callable[[], object], what: str) -> None:
    try:
        call()
    except error:
        return
    raise LawBroken(f"{what} does not raise {error.__name__}")


def write_once(lab: MediumLab) -> None:
    medium, name = lab.medium(), f"{lab.folder()}/object"
    require(isinstance(medium.put(name, [b"first"]), Created), "the first put does not say Created")
    require(isinstance(medium.put(name, [b"second, longer"]), Existing), "the second put does not say Existing")
    require(isinstance(lab.medium().put(name, []), Existing), "a put by another object does not say Existing")
    require(medium.get(name) == b"first" and medium.size(name) == 5, "an object was overwritten")
    require(isinstance(medium.delete(name), Deleted), "delete does not say Deleted")
    require(isinstance(medium.put(name, [b"third"]), Created), "a name cannot be used again after delete")
    require(medium.get(name) == b"third", "bytes of a deleted object are read")


def exclusive_create(lab: MediumLab) -> None:
    if not lab.medium().capabilities().exclusive_create:
        raise NotTried(f"{lab.name} does not declare exclusive_create")
    media = [lab.medium() for _ in range(CREATORS)]
    gate = Barrier(CREATORS)

    def create(number: int, name: str) -> bool:
        gate.wait()
        return isinstance(media[number].put(name, [bytes([number]) * 4096] * 20), Created)

    with ThreadPoolExecutor(CREATORS) as pool:
        for _ in range(ROUNDS):
            name = f"{lab.folder()}/new/folder/object"
            winners = list(pool.map(create, range(CREATORS), [name] * CREATORS))
            require(sum(winners) == 1, f"{sum(winners)} of {CREATORS} creators of one name were told that they won")
            found = lab.medium().get(name)
            require(found == bytes([winners.index(True)]) * 81920, "the object does not hold the winner's bytes")


def read_after_write(lab: MediumLab) -> None:
    writer, reader, folder = lab.medium(), lab.medium(), lab.folder()
    require(reader.size(f"{folder}/a") is None and not tuple(reader.list(folder)), "a new folder is not empty")
    writer.put(f"{folder}/a", [b"x" * 10])
    require(reader.get(f"{folder}/a") == b"x" * 10, "another reader does not see the bytes")
    require(reader.size(f"{folder}/a") == 10, "another reader does not see the size")
    require([entry.name for entry in reader.list(folder)] == [f"{folder}/a"], "another reader does not list it")
    reader.delete(f"{folder}/a")
    require(writer.size(f"{folder}/a") is None and not tuple(writer.list(folder)), "a deleted object is still seen")


def no_partial(lab: MediumLab) -> None:
    """While an object is put, and after its writer was killed, it is there whole or not at all."""
    folder = lab.folder()
    killed = 0
    for number in range(3):
        name = f"{folder}/{number}"
        lab.kill_writer(name, LARGE)
        medium = lab.medium()
        size = medium.size(name)
        require(size in (None, LARGE), f"{size} of {LARGE} bytes are visible after the writer was killed")
        killed += size is None
        listed = {entry.name: entry.size for entry in medium.list(folder)}
        require(listed.get(name) == size, "a listing shows what cannot be read")
        again = medium.put(name, [b"again"])
        require(isinstance(again, Created) == (size is None), "after a killed writer the name cannot be used")
    require(bool(killed), "no writer could be killed in time; nothing was tried")


def visible_whole(lab: MediumLab) -> None:
    """A reader that polls while a large object is put never sees a part of it."""
    name = f"{lab.folder()}/object"
    size = LARGE // 4
    seen: set[int | None] = set()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: lab.medium().put(name, [b"x" * size]))
        reader = lab.medium()
        while not writing.done():
            seen.add(reader.size(name))
        writing.result()
    require(seen <= {None, size}, f"sizes seen while it was written: {sorted(map(str, seen))}")
    require(lab.medium().size(name) == size, "the object has another size than what was put")


def complete_list(lab: MediumLab) -> None:
    medium, folder = lab.medium(), lab.folder()
    expected = {f"{folder}/{number % 17:02x}/{number}": number % 50 for number in range(MANY)}
    for name, size in expected.items():
        medium.put(name, [b"x" * size])
    medium.put(f"{folder}x", [b"beside the folder, not in it"])
    listed = [(entry.name, entry.size) for entry in lab.medium().list(folder)]
    require(len(listed) == len(set(listed)), "a name is listed twice")
    require(dict(listed) == expected, f"{len(listed)} objects are listed, {len(expected)} are there")
    inner = {entry.name for entry in medium.list(f"{folder}/03")}
    require(inner == {name for name in expected if name.startswith(f"{folder}/03/")}, "the list of an inner folder")
    everything = {entry.name for entry in medium.list("")}
    require(everything >= {*expected, f"{folder}x"}, "the list of all objects misses some")
    require(not tuple(medium.list(f"{folder}/no")), "a folder that does not exist is not empty")


def exact_ranges(lab: MediumLab) -> None:
    medium, name = lab.medium(), f"{lab.folder()}/object"
    data = random.Random(1).randbytes(100_000)
    parts: list[Buffer] = [data[:1], b"", bytearray(data[1:70_000]), memoryview(data)[70_000:]]
    medium.put(name, parts)
    for offset, length in ((0, 1), (0, 100_000), (1, 69_999), (69_999, 2), (99_999, 1), (100_000, 0), (50, 0)):
        require(medium.get(name, offset, length) == data[offset : offset + length], f"{length} bytes at {offset}")
    require(medium.get(name, 12_345) == data[12_345:] and medium.get(name, 100_000) == b"", "a range to the end")
    beyond: list[tuple[int, int | None]] = [(0, 100_001), (99_999, 2), (100_001, 0), (200_000, 5), (100_001, None)]
    for offset, count in beyond:
        _raises(ObjectDamaged, partial(medium.get, name, offset, count), f"{count} bytes at {offset}")
    missing = f"{name}-missing"
    _raises(ObjectMissing, lambda: medium.get(missing), "a missing object")
    _raises(ObjectMissing, lambda: medium.get(missing, 5, 5), "a range of a missing object")
    require(medium.size(missing) is None, "a missing object has a size")


def sizes(lab: MediumLab) -> None:
    medium, folder = lab.medium(), lab.folder()
    large = random.Random(2).randbytes(1_000_003) * 20
    parts = [memoryview(large)[start : start + 7_001] for start in range(0, len(large), 7_001)]
    medium.put(f"{folder}/large", parts)
    require(lab.medium().get(f"{folder}/large") == large, "a large object of many parts reads differently")
    require(medium.get(f"{folder}/large", 19_000_000, 5_000) == large[19_000_000:19_005_000], "a range of it")
    nothings: list[tuple[str, list[Buffer]]] = [("none", []), ("empty", [b"", b""])]
    for name, nothing in nothings:
        require(isinstance(medium.put(f"{folder}/{name}", nothing), Created), "an empty object is not created")
        require(medium.get(f"{folder}/{name}") == b"" and medium.size(f"{folder}/{name}") == 0, "an empty object")
    require(len(tuple(medium.list(folder))) == 3, "empty objects are not listed")


def names(lab: MediumLab) -> None:
    medium, folder = lab.medium(), lab.folder()
    good = ("a", "a.b-c_d", "0", "-", "_", "tmp/x", "one/two/three/four/five/six", "x" * 64 + "/" + "y" * 64)
    for name in good:
        medium.put(f"{folder}/{name}", [name.encode()])
    require({entry.name for entry in medium.list(folder)} == {f"{folder}/{name}" for name in good}, "names in a list")
    require(all(medium.get(f"{folder}/{name}") == name.encode() for name in good), "objects got each other's bytes")
    for name in ("", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", ".a", "a/.b", "A", "a b", "a\n", "ä", "a\0"):
        for call in (medium.get, medium.size, medium.delete, lambda bad: medium.put(bad, [b""])):
            try:
                call(name)
            except ValueError:
                continue
            raise LawBroken(f"{name!r} is no object name and is taken")


def idempotent_delete(lab: MediumLab) -> None:
    medium, name = lab.medium(), f"{lab.folder()}/object"
    require(isinstance(medium.delete(name), Absent), "deleting what is not there does not say Absent")
    medium.put(name, [b"x"])
    require(isinstance(lab.medium().delete(name), Deleted), "delete does not say Deleted")
    require(isinstance(medium.delete(name), Absent), "the second delete does not say Absent")
    _raises(ObjectMissing, lambda: medium.get(name), "a deleted object")


def medium_laws() -> tuple[Law[MediumLab], ...]:
    """Every law, in the order of the contract."""
    return (
        Law("write-once", "put of a name that exists changes nothing", write_once),
        Law("no-partial-killed", "a killed writer leaves a whole object or none", no_partial),
        Law("no-partial-visible", "no reader sees a part of an object", visible_whole),
        Law("read-after-write", "what was put is seen by everybody at once", read_after_write),
        Law("complete-list", "list misses nothing", complete_list),
        Law("exact-ranges", "get returns exactly what was asked for, or raises", exact_ranges),
        Law("sizes", "objects of 0 and of many bytes", sizes),
        Law("names", "every legal name, and no other", names),
        Law("idempotent-delete", "delete may be repeated and says what it did", idempotent_delete),
        Law("exclusive-create", "of many creators of one name exactly one wins", exclusive_create),
    )
