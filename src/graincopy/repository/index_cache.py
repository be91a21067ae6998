"""The index as this host keeps it: sorted runs in one folder, each for some segments.

To read and sort all segments takes seconds and a gigabyte for every few million pieces; runs are open at once. The
folder is disposable: what is not wanted or cannot be read is removed, and read from the medium.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator

from blake3 import blake3

from graincopy.repository.frame import Malformed
from graincopy.repository.index_file import CachedRun, encode_run, open_run
from graincopy.repository.index_run import MemoryRun


class IndexCache:
    """The runs in ``folder``; None: nothing is kept. What cannot be read or written is no error."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder

    def runs(self, wanted: Collection[str]) -> tuple[CachedRun, ...]:
        """Runs of nothing but segments in ``wanted``, none of them in two runs; longest first. Others are removed."""
        found = sorted(self._opened(), key=lambda each: len(each[1].run), reverse=True)
        taken: set[str] = set()
        kept = []
        for path, cached in found:
            if cached.names <= set(wanted) and not cached.names & taken:
                taken |= cached.names
                kept.append(cached)
            else:
                _remove(path)
        return tuple(kept)

    def put(self, names: frozenset[str], run: MemoryRun) -> CachedRun:
        """Keep ``run``, which covers the segments ``names``: from now on in its file, if it is long."""
        if self._folder is None:
            return CachedRun(names, run)
        name = blake3("\n".join(sorted(names)).encode()).hexdigest()[:32]
        path = os.path.join(self._folder, f"{name}.run")
        part = f"{path}.{os.getpid()}"
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.writelines(encode_run(names, run))
            os.replace(part, path)
            return open_run(path)
        except (OSError, Malformed):
            _remove(part)
            return CachedRun(names, run)

    def clear(self) -> None:
        """Forget everything: it turned out not to say what the medium says."""
        for name in self._names():
            _remove(os.path.join(self._folder or "", name))

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._folder)) if self._folder is not None else []
        except OSError:
            return []

    def _opened(self) -> Iterator[tuple[str, CachedRun]]:
        for name in self._names():
            path = os.path.join(self._folder or "", name)
            try:
                yield path, open_run(path)
            except (OSError, Malformed):  # cut off, of another layout, or being written: then its writer does without
                _remove(path)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
