"""Every medium keeps the laws; media that lie are caught."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from graincopy.core.errors import MediumFailed
from graincopy.media.base import Buffer, Medium, ObjectEntry
from graincopy.media.memory import MemoryMedium, MemoryStore
from graincopy.model.snapshot import Absent, Created, Deleted, Existing
from graincopy.testing.laws_medium import MediumLab
from graincopy.testing.medium_labs import DirectoryLab, MemoryMediumLab
from graincopy.testing.medium_suite import MediumSuite
from graincopy.testing.validate import FAILED, validate_medium


class TestMemory(MediumSuite):
    @pytest.fixture
    def place(self) -> MediumLab:
        return MemoryMediumLab()


class TestDirectory(MediumSuite):
    @pytest.fixture(params=[True, False], ids=["nameless", "named"])
    def place(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MediumLab]:
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"a b\nc\xff"))
        os.mkdir(path)
        yield DirectoryLab(path, nameless=request.param)
        assert os.listdir(path) == []


def broken(lab: MediumLab) -> set[str]:
    return {verdict.law for verdict in validate_medium(lab) if verdict.outcome == FAILED}


# --- media that lie -------------------------------------------------------------------------------


class Overwrites(MemoryMedium):
    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        existed = self.delete(name)
        super().put(name, parts)
        return Existing() if isinstance(existed, Deleted) else Created()


class LooksBeforeItLeaps(MemoryMedium):
    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        if self.size(name) is not None:
            return Existing()
        time.sleep(0.001)  # lets the other creators in
        self.delete(name)
        return super().put(name, parts)


class ShowsParts(MemoryMedium):
    def put(self, name: str, parts: Sequence[Buffer]) -> Created | Existing:
        answer = super().put(name, parts)
        whole = self.store.objects[name]
        if isinstance(answer, Created) and len(whole) > 1_000_000:
            self.store.objects[name] = whole[: len(whole) // 2]
            time.sleep(0.05)  # lets the reader look
            self.store.objects[name] = whole
        return answer


class ListsAPage(MemoryMedium):
    def list(self, prefix: str) -> Iterator[ObjectEntry]:
        return iter(tuple(super().list(prefix))[:250])


class ListsByBeginning(MemoryMedium):
    def list(self, prefix: str) -> Iterator[ObjectEntry]:
        return (entry for entry in super().list("") if entry.name.startswith(prefix))


class ReadsShort(MemoryMedium):
    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        whole = super().get(name)
        return whole[offset:] if length is None else whole[offset : offset + length]


class Remembers(MemoryMedium):
    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.sizes: dict[str, int | None] = {}

    def size(self, name: str) -> int | None:
        return self.sizes.setdefault(name, super().size(name))


class DeletesTwice(MemoryMedium):
    def delete(self, name: str) -> Deleted | Absent:
        super().delete(name)
        return Deleted()


class DropsEmptyObjects(MemoryMedium):
    def list(self, prefix: str) -> Iterator[ObjectEntry]:
        return (entry for entry in super().list(prefix) if entry.size)


class TakesAnyName(MemoryMedium):
    def size(self, name: str) -> int | None:
        return None if not name else super().size(name.lower())


LIARS: list[tuple[Callable[[MemoryStore], Medium], str]] = [
    (Overwrites, "write-once"),
    (LooksBeforeItLeaps, "exclusive-create"),
    (ShowsParts, "no-partial-visible"),
    (ListsAPage, "complete-list"),
    (ListsByBeginning, "complete-list"),
    (ReadsShort, "exact-ranges"),
    (Remembers, "read-after-write"),
    (DeletesTwice, "idempotent-delete"),
    (DropsEmptyObjects, "sizes"),
    (TakesAnyName, "names"),
]


@pytest.mark.parametrize(("liar", "law"), LIARS, ids=lambda value: getattr(value, "__name__", value))
def test_a_lie_is_caught(liar: Callable[[MemoryStore], Medium], law: str) -> None:
    class Lab(MemoryMediumLab):
        def medium(self) -> Medium:
            return liar(self.store)

    assert law in broken(Lab())


class InPlaceLab(DirectoryLab):
    """The writer that is killed writes under the object's own name."""

    def kill_writer(self, name: str, size: int) -> None:
        path = os.path.join(self.path, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        program = (
            "import os, signal, sys; open(sys.argv[1], 'wb').write(b'x' * 9999); os.kill(os.getpid(), signal.SIGKILL)"
        )
        subprocess.run([sys.executable, "-c", program, path], timeout=30, check=False)


def test_a_partial_object_is_caught(tmp_path: Path) -> None:
    assert broken(InPlaceLab(str(tmp_path))) == {"no-partial-killed"}


def test_a_medium_that_fails_is_reported_and_every_law_is_tried() -> None:
    class Broken(MemoryMedium):
        def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
            raise MediumFailed(url=self.url, reason="on strike")

    class Lab(MemoryMediumLab):
        def medium(self) -> Medium:
            return Broken(self.store)

    verdicts = list(validate_medium(Lab()))
    assert len(verdicts) == len(list(validate_medium(MemoryMediumLab())))
    assert any("on strike" in verdict.message for verdict in verdicts)
