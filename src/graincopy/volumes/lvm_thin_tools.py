"""LVM's and device-mapper's commands (stages 3-9): run to their end, whatever happens to us.

A command that is killed between its suspend and its resume leaves a device suspended, and whoever writes to it
stuck. So none has a time limit, none gets our terminal's signals, and an exception here waits for it first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import IO, TypeVar

from graincopy.core.clock import Clock
from graincopy.core.errors import ToolMissing
from graincopy.volumes import lvm_thin_dm
from graincopy.volumes.lvm_thin_report import (
    FIELDS,
    LogicalVolume,
    PoolStatus,
    dm_name,
    held_ms,
    parse_lvs,
    parse_pool_status,
)

PACKAGES = {
    "lvs": "lvm2",
    "lvcreate": "lvm2",
    "lvchange": "lvm2",
    "lvremove": "lvm2",
    "thin_delta": "thin-provisioning-tools",
}
_VERBOSE = ("-v", "--config", 'log/indent=1 log/prefix=""')  # what is only said because of -v is indented
_SEARCHED = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")

Answer = TypeVar("Answer")


class ToolFailed(Exception):
    """A command ended with an error. Its text is the command's own first words."""


def find_tool(name: str) -> str:
    """Its path. Raises ToolMissing, which names the package."""
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *_SEARCHED)))
    if found is None:
        raise ToolMissing(tool=name, install=f"apt-get install {PACKAGES[name]}")
    return found


class Lvm:
    """This host's volumes."""

    def missing(self) -> str | None:
        """The package of a command that is not there; None when all are."""
        for tool, package in PACKAGES.items():
            try:
                find_tool(tool)
            except ToolMissing:
                return package
        return None

    def volumes(self) -> tuple[LogicalVolume, ...]:
        """Every logical volume that LVM sees. Raises ToolMissing, ToolFailed."""
        text = self._run(
            "lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", FIELDS, usable=lambda out: "{" in out
        )
        try:
            return parse_lvs(text)
        except ValueError as error:
            raise ToolFailed(str(error)) from error

    def create_snapshot(self, source: LogicalVolume, name: str, tags: Sequence[str], clock: Clock) -> float:
        """The instant: a read-only thin snapshot, inactive, tagged in the same step. LVM suspends S by itself.

        Answers for how many milliseconds at most writers of S were held (lvm_thin_report.held_ms). Raises ToolFailed.
        """
        added = [part for tag in tags for part in ("--addtag", tag)]
        begun = clock.monotonic()
        said, code = self._listen(
            clock, "lvcreate", *_VERBOSE, "-y", "-s", "-n", name, "-pr", "-ky", "-an", *added, source.path
        )
        if code:
            aloud = "".join(line for _, line in said if not line.startswith(" "))
            raise ToolFailed(_first_words("lvcreate", aloud, code))
        return held_ms(said, dm_name(source.vg, source.name), begun, clock.monotonic())

    def _listen(self, clock: Clock, tool: str, *arguments: str) -> tuple[list[tuple[float, str]], int]:
        """Each line that the command says, with the time when it came; and its code."""
        process = _start([find_tool(tool), *arguments], stderr=subprocess.STDOUT)
        assert process.stdout is not None
        with process.stdout:
            try:
                said = [(clock.monotonic(), os.fsdecode(line)) for line in process.stdout]
            except BaseException:
                process.stdout.read()
                raise
            finally:
                process.wait()
        return said, process.returncode

    def remove(self, volume: LogicalVolume) -> None:
        """Deactivate and remove."""
        self._run("lvremove", "-f", "-y", "-q", volume.path)

    def show(self, volume: LogicalVolume, external: str = "") -> str:
        """Path of a read-only device of the inactive thin ``volume`` that nobody else sees. Raises ToolFailed.

        It is the very device that LVM would make, so that LVM knows it; but what LVM makes, udev looks into, and links
        by UUID move from S to T. ``external`` is the device of its external origin, "major:minor".
        """
        pool = f"/dev/mapper/{dm_name(volume.vg, volume.pool, 'tpool')}"
        try:
            number = os.stat(pool).st_rdev
            words = f"{os.major(number)}:{os.minor(number)} {volume.thin_id} {external}".rstrip()
            return lvm_thin_dm.create_unseen(
                dm_name(volume.vg, volume.name), volume.dm_uuid, volume.size // 512, "thin", words
            )
        except OSError as error:
            raise ToolFailed(_about(volume.vg, volume.name, error)) from error

    def hide(self, volume: LogicalVolume) -> None:
        """Take that device away, if it is there. Raises ToolFailed while somebody has it open."""
        try:
            lvm_thin_dm.remove_unseen(dm_name(volume.vg, volume.name))
        except OSError as error:
            raise ToolFailed(_about(volume.vg, volume.name, error)) from error

    def change_tags(self, volume: LogicalVolume, add: Sequence[str] = (), remove: Sequence[str] = ()) -> None:
        """Put tags on, take tags off; durable on return."""
        words = [part for tag in add for part in ("--addtag", tag)]
        words += [part for tag in remove for part in ("--deltag", tag)]
        self._run("lvchange", "-q", *words, volume.path)

    def pool_status(self, vg: str, pool: str) -> PoolStatus:
        """As the kernel sees the pool now; without LVM's locks. Raises ToolFailed."""
        try:
            return parse_pool_status(lvm_thin_dm.status(dm_name(vg, pool, "tpool")))
        except (OSError, ValueError) as error:
            raise ToolFailed(_about(vg, pool, error)) from error

    def pool_message(self, vg: str, pool: str, message: str) -> None:
        """``dmsetup message POOL 0 MESSAGE``. Raises ToolFailed."""
        try:
            lvm_thin_dm.message(dm_name(vg, pool, "tpool"), message)
        except OSError as error:
            raise ToolFailed(f"{message}: {_about(vg, pool, error)}") from error

    def table(self, volume: LogicalVolume) -> str:
        """The device-mapper table of an active volume. Raises ToolFailed."""
        try:
            return lvm_thin_dm.table(dm_name(volume.vg, volume.name))
        except OSError as error:
            raise ToolFailed(_about(volume.vg, volume.name, error)) from error

    def delta_version(self) -> str:
        """What ``thin_delta -V`` prints."""
        return self._run("thin_delta", "-V")

    def delta(self, metadata: str, left: int, right: int, parse: Callable[[IO[bytes]], Answer]) -> Answer:
        """``parse`` of what thin_delta says about two devices in the metadata snapshot; what it raises goes on."""
        command = [find_tool("thin_delta"), "-m", "--snap1", str(left), "--snap2", str(right), metadata]
        process = _start(command)
        assert process.stdout is not None and process.stderr is not None
        with process.stdout, process.stderr:
            try:
                return parse(process.stdout)
            finally:
                process.stdout.read()  # a parser that gave up must not leave it waiting
                said = os.fsdecode(process.stderr.read())
                code = process.wait()
                if code:  # says more than what the parser thought of half an answer
                    raise ToolFailed(_first_words("thin_delta", said, code))

    def _run(self, tool: str, *arguments: str, usable: Callable[[str], bool] = lambda out: False) -> str:
        """Its output. ``usable`` tells whether output counts although the command complained."""
        process = _start([find_tool(tool), *arguments])
        try:
            out, err = process.communicate()
        except BaseException:
            process.communicate()
            raise
        if process.returncode and not usable(os.fsdecode(out)):
            raise ToolFailed(_first_words(tool, os.fsdecode(err or out), process.returncode))
        return os.fsdecode(out)


def _start(command: Sequence[str], stderr: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "LC_ALL": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        cwd="/",
        start_new_session=True,
    )


def _about(vg: str, name: str, error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"device-mapper says of {vg}/{name}: {said}"


def _first_words(tool: str, said: str, code: int) -> str:
    """The line that tells most: the first one that is no warning."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith("WARNING")] or lines
    return f"{tool} says: {errors[0].rstrip('.')}" if errors else f"{tool} ended with code {code}"
