"""What the end-to-end tests share: the command line called in this process, disks with known content, exact bills.

The command line is the real one (``graincopy.cli.main.run``); only ``python -m graincopy`` is left out, which
:meth:`Cli.process` has for signals, kills and tracebacks.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lab

from graincopy.cli.main import run
from graincopy.volumes.topology import reflinks

__all__ = ["reflinks"]

MIB = lab.MIB
GRAIN = 65536  # bytes; the default of graincopy init
PASSPHRASE = "correct horse"


@dataclass(frozen=True)
class Done:
    """One finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


class Cli:
    """graincopy with a repository, a configuration and a state directory of its own, all in ``folder``."""

    def __init__(self, folder: str, repo: str | None = None, config: str = "", encrypted: bool = False) -> None:
        self.folder = folder
        self.repo = repo or os.path.join(folder, "repo")
        self.config = os.path.join(folder, "config.toml")
        self.encrypted = encrypted
        os.makedirs(folder, exist_ok=True)
        self.configure(config)

    def configure(self, text: str = "") -> None:
        """Write the configuration: ``text`` and where the state lies."""
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(f"{text}\n[paths]\nstate = {json.dumps(self.folder + '/state')}\n")
            file.write(f"cache = {json.dumps(self.folder + '/cache')}\n")

    @property
    def environ(self) -> dict[str, str]:
        """What the command sees of the environment, besides what is there."""
        secret = {"GRAINCOPY_PASSPHRASE": PASSPHRASE} if self.encrypted else {}
        return {"GRAINCOPY_REPO": self.repo, **secret}

    def __call__(
        self, *arguments: str, step: Callable[[str], None] | None = None, environ: dict[str, str] | None = None
    ) -> Done:
        """Run one command line in this process, whatever it answers."""
        out, err = io.StringIO(), io.StringIO()
        before = signal.getsignal(signal.SIGTERM)
        with environment({**self.environ, **(environ or {})}):
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = run(["--config", self.config, *arguments], step)
            finally:
                signal.signal(signal.SIGTERM, before)
        return Done(code, out.getvalue(), err.getvalue())

    def ok(self, *arguments: str, step: Callable[[str], None] | None = None) -> Any:
        """Run it with ``--json``; it must succeed without a warning. Gives the document."""
        done = self(*arguments, "--json", step=step)
        assert (done.code, done.err) == (0, ""), f"{arguments}: {done}"
        return done.json

    def warned(self, *arguments: str) -> Any:
        """Run it with ``--json``; it must be done with warnings. Gives the document."""
        done = self(*arguments, "--json")
        assert done.code == 3, f"{arguments}: {done}"
        assert "warning: " in done.err
        return done.json

    def init(self, *options: str) -> Cli:
        """Make the repository; unencrypted unless this one is to be encrypted."""
        self.ok("init", *(() if self.encrypted else ("--no-encryption",)), *options)
        return self

    def backup(self, *arguments: str) -> Any:
        """Back up; gives the document, whose bill must be exact to the byte."""
        before = self.size()
        document = self.ok("backup", *arguments)
        assert self.size() - before == bill(document)
        return document

    def undamaged(self) -> None:
        """``check --data`` has no findings."""
        assert self.ok("check", "--data")["findings"] == []

    def size(self) -> int:
        """Bytes of all objects of the repository."""
        return sum(os.path.getsize(path) for path in files_below(self.repo))

    def command(self, *arguments: str) -> list[str]:
        """The command as a process would run it."""
        return [sys.executable, "-m", "graincopy", "--config", self.config, *arguments]

    def process(self, *arguments: str, timeout: float = 60) -> Done:
        """Run it as a process of its own."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **self.environ},
        )
        return Done(done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))


@contextlib.contextmanager
def environment(more: dict[str, str]) -> Iterator[None]:
    """The environment with ``more`` in it, as it was afterwards, whatever the block did to it."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def bill(document: Any) -> int:
    """What a backup says that the repository grew by."""
    return sum(disk["stored_bytes"] for disk in document["disks"]) + document["metadata_bytes"]


def files_below(folder: str) -> list[str]:
    """Every regular file below ``folder``."""
    return sorted(os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)


def digest(path: str) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def noise(seed: int, size: int) -> bytes:
    """``size`` bytes that do not compress and are the same for the same ``seed``."""
    return random.Random(seed).randbytes(size)


def make_disk(path: str, size: int, *pieces: tuple[int, bytes]) -> str:
    """A new sparse disk of ``size`` bytes with ``(offset, bytes)`` pieces in it, durable."""
    lab.sparse(path, size)
    lab.write_at(path, *pieces)
    return path


def write(path: str, *pieces: tuple[int, bytes]) -> None:
    """Ordinary writes, not synced: they sit in the page cache when the backup begins."""
    lab.write_at(path, *pieces, sync=False)


def read(path: str) -> bytes:
    """The whole file."""
    with open(path, "rb") as file:
        return file.read()


def allocated(path: str) -> int:
    """Bytes that the file takes on its file system."""
    return os.stat(path).st_blocks * 512


@dataclass
class Stage:
    """LUN images on one XFS, each with a datastore: ext4, XFS, and ext4 in a partition."""

    folder: str
    outer: lab.ReflinkFs
    luns: list[lab.Lun]

    def path(self, lun: int, name: str = "") -> str:
        """Where a disk lies on datastore ``lun``."""
        return os.path.join(self.luns[lun].path, name)

    @property
    def targets(self) -> list[str]:
        """What graincopy has on the storage now."""
        return files_below(os.path.join(self.outer.path, ".graincopy"))

    def clear(self) -> None:
        """Empty datastores, no targets."""
        shutil.rmtree(os.path.join(self.outer.path, ".graincopy"), ignore_errors=True)
        for lun in self.luns:
            for name in set(os.listdir(lun.path)) - {"lost+found"}:
                path = os.path.join(lun.path, name)
                shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)


def large_blocks(lun: lab.Lun) -> None:
    """4 KiB blocks, as on LUNs of real size: with the 1 KiB of small ones neighbours share blocks of the LUN image."""
    lun.unmount()
    lab.make_fs("ext4", lun.device, "-b", "4096")
    lun.mount()
