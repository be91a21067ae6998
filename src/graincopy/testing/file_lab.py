"""The lab over real files: a directory that somebody names, everything made in one folder of it and removed again.

What the file system can do is tried once, not assumed. Where the driver's volume lies *below* the mounted file system
(a LUN image), snapshots go through the freeze window, as in a backup.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from graincopy.core.clock import Clock
from graincopy.core.errors import VolumeUnsupported
from graincopy.core.ids import VolumeId
from graincopy.model.snapshot import Target, TargetTag
from graincopy.model.volume import Claim, Refusal
from graincopy.testing.file_hands import (
    BLOCK,
    COLLAPSE,
    INSERT,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO,
    clone_range,
    fallocate,
    try_power,
    write_buffered,
    write_direct,
    write_mapped,
)
from graincopy.testing.lab import OPERATIONS, VolumeLab
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.instant import take_instant

_ALWAYS = {"buffered", "mmap", "truncate", "rename_over", "remove", "hold", "two_volumes"}


class FileLab(VolumeLab):
    """Disks are files in ``directories``: one, or two that lie on different volumes.

    ``watched`` are folders besides in which a target might leave something (where the LUN images lie); ``lacking``
    takes powers away, with the reason; ``also`` adds what cannot be tried out: "exact" where the file system maps
    exactly what was written.
    """

    block = BLOCK

    def __init__(
        self,
        directories: Sequence[str],
        make_driver: Callable[[], VolumeDriver],
        clock: Clock,
        *,
        name: str = "files",
        watched: Sequence[str] = (),
        lacking: dict[str, str] | None = None,
        also: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self._make_driver, self._clock = make_driver, clock
        self._homes = [tempfile.mkdtemp(prefix="graincopy-validate-", dir=directory) for directory in directories]
        self._watched = (*self._homes, *watched)
        self._disks: list[str] = []
        self._mounts: dict[VolumeId, str] = {}
        self._serial = itertools.count()
        self._reasons: dict[str, str] = {}
        try:
            self.powers = frozenset(_ALWAYS | set(also) | self._tried())
            self._settle(lacking or {})
        except BaseException:
            self._remove_homes()
            raise

    def _settle(self, lacking: dict[str, str]) -> None:
        """What depends on where the volume lies: the file itself, or something below its file system."""
        claim = self.make(self.block)
        if claim.identity:
            self.powers |= {"resize_volume", "recreate_volume", "rename_volume"}
            self._reasons["one_instant"] = "disk files are cloned one after the other"
        else:
            self._reasons |= dict.fromkeys(
                ("resize_volume", "recreate_volume", "rename_volume"), "disks are mounted on it"
            )
            if self._frozen_outside():
                self.powers |= {"one_instant"}
            self._reasons["one_instant"] = "the driver stops the writers of one volume at a time"
            if len(self._homes) == 1:
                self.powers -= {"two_volumes"}
        self.powers -= set(lacking)
        self._reasons |= lacking
        self.reset()

    def why_not(self, power: str) -> str:
        return self._reasons.get(power, super().why_not(power))

    # --- the driver -------------------------------------------------------------------------------

    def driver(self) -> VolumeDriver:
        return self._make_driver()

    def instant(self, volumes: Sequence[VolumeId], tag: TargetTag) -> Sequence[Target]:
        mounts = [self._mounts[volume] for volume in volumes if volume in self._mounts]
        if not mounts or not self._frozen_outside():
            return super().instant(volumes, tag)
        taken = take_instant([(self.driver(), volumes)], tag, list(dict.fromkeys(mounts)), clock=self._clock)
        return tuple(taken.targets.values())

    def _frozen_outside(self) -> bool:
        return self.driver().capabilities().freeze == "outside"

    def footprint(self) -> frozenset[str]:
        found = {
            os.path.join(folder, name)
            for home in self._watched
            for folder, folders, files in os.walk(home)
            for name in (*folders, *files)
        }
        return frozenset(found.difference(self._disks)) | _loops_over(self._watched) | _mounted_near(self._watched)

    # --- disks ------------------------------------------------------------------------------------

    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        home = self._homes[volume % len(self._homes)]
        path = os.path.join(os.path.realpath(home), f"disk{next(self._serial)}.raw")
        self._disks.append(path)
        with open(path, "xb") as file:
            if compressed:
                os.setxattr(file.fileno(), "btrfs.compression", b"zstd")
            file.truncate(size)
        return self._claim(path)

    def _claim(self, path: str) -> Claim:
        claim = self.driver().resolve(path)
        if isinstance(claim, Refusal):
            raise VolumeUnsupported(path=path, reason=claim.reason)
        if claim.mount is not None:
            self._mounts[claim.volume] = claim.mount
        return claim

    def read(self, claim: Claim) -> bytes:
        with open(claim.path, "rb") as file:
            return file.read()

    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        {"buffered": write_buffered, "mmap": write_mapped, "direct": write_direct}[how](claim.path, offset, data)

    def truncate(self, claim: Claim, size: int) -> None:
        os.truncate(claim.path, size)

    def punch(self, claim: Claim, offset: int, length: int) -> None:
        fallocate(claim.path, PUNCH_HOLE | KEEP_SIZE, offset, length)

    def zero_range(self, claim: Claim, offset: int, length: int) -> None:
        fallocate(claim.path, ZERO | KEEP_SIZE, offset, length)

    def collapse(self, claim: Claim, offset: int, length: int) -> None:
        fallocate(claim.path, COLLAPSE, offset, length)

    def insert(self, claim: Claim, offset: int, length: int) -> None:
        fallocate(claim.path, INSERT, offset, length)

    def preallocate(self, claim: Claim, offset: int, length: int) -> None:
        fallocate(claim.path, 0, offset, length)

    def reflink_within(self, claim: Claim, source: int, target: int, length: int) -> None:
        clone_range(claim.path, claim.path, source, target, length)

    def reflink_from(self, claim: Claim, donor: Claim, source: int, target: int, length: int) -> None:
        clone_range(donor.path, claim.path, source, target, length)

    def rename_over(self, claim: Claim, data: bytes) -> None:
        with open(f"{claim.path}.new", "xb") as file:
            file.write(data)
        os.rename(file.name, claim.path)

    def remove(self, claim: Claim) -> None:
        os.unlink(claim.path)

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        with open(claim.path, "r+b"):
            yield

    def resize_volume(self, claim: Claim, size: int) -> None:
        self.need("resize_volume")
        os.truncate(claim.path, size)

    def recreate_volume(self, claim: Claim) -> None:
        self.need("recreate_volume")
        size = os.stat(claim.path).st_size
        os.unlink(claim.path)
        with open(claim.path, "xb") as file:
            file.truncate(size)

    def rename_volume(self, claim: Claim) -> Claim:
        self.need("rename_volume")
        renamed = f"{claim.path}-renamed"
        os.rename(claim.path, renamed)
        self._disks.append(renamed)
        return self._claim(renamed)

    # --- what the file system can do --------------------------------------------------------------

    def _tried(self) -> set[str]:
        """Which powers work in every home; the reasons of the others are kept."""
        possible = {"direct", "compress", *OPERATIONS} - _ALWAYS
        for home in self._homes:
            with tempfile.NamedTemporaryFile(dir=home) as probe:
                probe.write(bytes(8 * BLOCK))
                probe.flush()
                for power in sorted(possible):
                    try:
                        try_power(power, probe.name)
                    except OSError as error:
                        self._reasons[power] = f"{power} on this file system: {error.strerror}"
                        possible.discard(power)
        return possible

    def reset(self) -> None:
        super().reset()
        while self._disks:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._disks.pop())

    def close(self) -> None:
        """Remove everything that was ever made here."""
        try:
            self.reset()
        finally:
            self._remove_homes()

    def _remove_homes(self) -> None:
        for home in self._homes:
            shutil.rmtree(home, ignore_errors=True)


def _loops_over(folders: Sequence[str]) -> frozenset[str]:
    """``loop device = backing file`` of every loop device over a file in ``folders``."""
    found = set()
    for device in os.listdir("/sys/block"):
        with contextlib.suppress(OSError), open(f"/sys/block/{device}/loop/backing_file", "rb") as file:
            backing = os.fsdecode(file.read().rstrip(b"\n"))
            if any(backing.startswith(f"{folder}/") for folder in folders):
                found.add(f"{device} = {backing}")
    return frozenset(found)


def _mounted_near(folders: Sequence[str]) -> frozenset[str]:
    """Mounts beside and below ``folders``: others may work on this host. One elsewhere would need a loop over them."""
    roots = tuple(os.path.dirname(os.path.realpath(folder)).rstrip("/") + "/" for folder in folders)
    with open("/proc/self/mountinfo", "rb") as file:
        points = [os.fsdecode(line.split()[4]) for line in file]
    return frozenset(f"mount {point}" for point in points if point.startswith(roots))
