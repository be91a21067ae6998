"""Fixtures of the end-to-end tests: a storage of LUNs per module, a repository per test, and nothing left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
sys.path.insert(0, os.path.dirname(__file__))

import lab
import story

_count = itertools.count()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[story.Stage]:
    """Real storage, made once per module."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    folder = os.fspath(tmp_path_factory.mktemp("stage"))
    kinds: list[tuple[str, int, bool | str]] = [("ext4", 128, False), ("xfs", 384, False), ("ext4", 96, "offset")]
    with contextlib.ExitStack() as held:
        outer = held.enter_context(lab.ReflinkFs(folder, "xfs", 1024 * lab.MIB))
        luns = [
            held.enter_context(
                lab.Lun(outer.path, f"lun{n}", size * lab.MIB, inner, partitioned, os.path.join(folder, f"ds{n}"))
            )
            for n, (inner, size, partitioned) in enumerate(kinds)
        ]
        for lun in luns:
            if lun.inner == "ext4":
                story.large_blocks(lun)
        yield story.Stage(folder, outer, luns)


@pytest.fixture
def stage(storage: story.Stage) -> Iterator[story.Stage]:
    """The storage, empty at the start; afterwards no loop device or mount is there that was not before."""
    storage.clear()
    traces = lab.Traces(storage.folder)
    yield storage
    assert traces.gone(), "a loop device or mount was left behind"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own graincopy."""
    for name in [name for name in os.environ if name.startswith("GRAINCOPY_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def cli(tmp_path: os.PathLike[str]) -> story.Cli:
    """An empty repository."""
    return story.Cli(os.path.join(tmp_path, "graincopy")).init()


@pytest.fixture
def plain(tmp_path: os.PathLike[str]) -> Iterator[str]:
    """A folder on a file system that cannot clone files, so that disks there are taken by the locked driver."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        clones = story.reflinks(fd)
    finally:
        os.close(fd)
    folder = os.path.join("/dev/shm" if clones else tmp_path, f"graincopy-test-{os.getpid()}-{next(_count)}")
    os.mkdir(folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
