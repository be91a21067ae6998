"""The freeze window (stage 5): the parent of the guard process that freezes and thaws.

The freezing is done by :mod:`graincopy.volumes.freeze_guard`, a process of its own, so that a parent that is killed,
or hangs inside a clone, leaves nothing frozen. What is frozen, and whether it may be, was decided before, in
:mod:`graincopy.volumes.freeze_plan`. See docs/freeze.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec

from graincopy.core.clock import Clock
from graincopy.core.errors import FreezeBroken, FrozenElsewhere, SnapshotFailed
from graincopy.volumes import freeze_guard
from graincopy.volumes.freeze_plan import FileSystem, FreezePlan, FreezeReport, MountReport

_GUARD_START = 20.0  # seconds until the guard must be ready
_TURN_PATIENCE = 5.0  # seconds to wait for another window of ours on the same file system
_TURN_PAUSE = 0.02
_GUARD_GRACE = 5.0  # seconds beyond the deadline until the guard must have answered


class Window(msgspec.Struct):
    """Handed to the body of the window; ``report`` is there when it is over and was kept."""

    report: FreezeReport | None = None


class _Member(msgspec.Struct):
    """What the guard said about one file system; times in nanoseconds."""

    place: FileSystem
    fd: int
    frozen: tuple[int, int, int] | None = None  # errno, began, ended
    thawed: tuple[int, int, int] | None = None


class FreezeGuard(msgspec.Struct):
    """The parent's end of the guard. Use it as a context manager: the guard is started on entry, gone on exit."""

    plan: FreezePlan
    deadline_s: float
    clock: Clock
    _members: dict[int, _Member] = msgspec.field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _unread: bytes = b""
    _began: float | None = None

    def __enter__(self) -> FreezeGuard:
        try:
            self._open()
            self._take_turn()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sync(self) -> None:
        """Write everything out, all file systems in parallel, so that the freeze finds little to flush."""
        with ThreadPoolExecutor(max_workers=max(1, len(self._members))) as pool:
            for problem in list(pool.map(_syncfs, self._members)):
                if problem is not None:
                    raise SnapshotFailed(volume=problem[0], reason=f"it cannot be synced: {os.strerror(problem[1])}")

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Frozen inside, thawed outside. ``report`` is set only when every freeze was held to the end.

        Raises FrozenElsewhere or SnapshotFailed when a freeze fails, FreezeBroken when the window was not kept.
        """
        window = Window()
        try:
            self._freeze()
            yield window
        except BaseException:
            self._give_up()
            raise
        window.report = self._thaw()

    def close(self) -> None:
        """End the guard, which thaws what it holds. May be repeated."""
        process, self._process = self._process, None
        if process is not None:
            _close_pipes(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                # one that still waits for a freeze that hangs, to take it back, must not be killed
                process.wait(self.deadline_s + _GUARD_GRACE)
        while self._members:
            os.close(self._members.popitem()[0])

    def _open(self) -> None:
        for place in self.plan.all:
            try:
                fd = os.open(place.point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise SnapshotFailed(volume=place.point, reason=f"it cannot be opened: {error.strerror}") from error
            self._members[fd] = _Member(place, fd)

    def _take_turn(self) -> None:
        """One window of ours at a time on a file system: others wait, a little, for this lock.

        The guard inherits the descriptors, so that the lock lives exactly as long as anything can be frozen by it.
        """
        give_up = self.clock.monotonic() + _TURN_PATIENCE
        for member in sorted(self._members.values(), key=lambda member: member.place.device):
            while True:
                try:
                    fcntl.flock(member.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if self.clock.monotonic() >= give_up:
                        raise FrozenElsewhere(mount=member.place.point) from error
                    self.clock.sleep(_TURN_PAUSE)

    def _start(self) -> None:
        by_place = {member.place: fd for fd, member in self._members.items()}
        waves = "/".join(",".join(str(by_place[place]) for place in wave) for wave in self.plan.waves)
        script = os.path.realpath(freeze_guard.__file__)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-E", script, str(round(self.deadline_s * 1000)), waves],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            pass_fds=list(self._members),
            start_new_session=True,
        )
        if self._line(self.clock.monotonic() + _GUARD_START) != "ready":
            raise SnapshotFailed(volume=self._places(), reason="the freeze guard did not start")

    def _freeze(self) -> None:
        self._say(b"freeze\n")
        self._began = self.clock.monotonic()
        line = self._listen("held")
        if line == "held":
            return
        self._raise_freeze_failure(line)

    def _raise_freeze_failure(self, line: str) -> None:
        for member in self._members.values():
            number = member.frozen[0] if member.frozen else 0
            if number == errno.EBUSY:
                raise FrozenElsewhere(mount=member.place.point)
            if number:
                raise SnapshotFailed(volume=member.place.point, reason=f"it cannot be frozen: {os.strerror(number)}")
        raise FreezeBroken(reason=self._why(line))

    def _thaw(self) -> FreezeReport:
        try:
            self._say(b"thaw\n")
            line = self._listen("")
        except BaseException:
            self._give_up()
            raise
        if not line:
            self._thaw_orphans()
        if line != "done asked":
            raise FreezeBroken(reason=self._why(line))
        for member in self._members.values():
            if member.thawed is None or member.thawed[0]:
                raise FreezeBroken(reason=f"{member.place.point} had been thawed by somebody else")
        return self._report()

    def _give_up(self) -> None:
        """Thaw now, whatever the guard says; used when something else is already being raised."""
        process = self._process
        if process is None or process.stdin is None or process.stdin.closed:
            return
        process.stdin.close()  # the guard takes the end of its input for the parent's death: it thaws
        if not self._listen(""):
            self._thaw_orphans()

    def _thaw_orphans(self) -> None:
        """The guard itself died: thaw what it reported frozen and did not report thawed; nothing else."""
        for member in reversed(self._members.values()):
            if member.frozen and member.frozen[0] == 0 and member.thawed is None:
                try:
                    fcntl.ioctl(member.fd, freeze_guard.FITHAW, 0)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # EINVAL: it is thawed, which is what is wanted
                        raise

    def _why(self, line: str) -> str:
        if line == "done deadline":
            return f"{self._places()} had to be thawed at the deadline of {self.deadline_s:g} s"
        return "the freeze guard died" if not line else f"the freeze guard said {line!r}"

    def _report(self) -> FreezeReport:
        spans = [(one.place.point, one.frozen, one.thawed) for one in self._members.values()]
        known = [(point, frozen, thawed) for point, frozen, thawed in spans if frozen and thawed]
        first = min((frozen[1] for _, frozen, _ in known), default=0)
        last = max((thawed[2] for _, _, thawed in known), default=0)
        mounts = tuple(
            MountReport(point, (frozen[2] - frozen[1]) / 1e6, (thawed[2] - frozen[1]) / 1e6)
            for point, frozen, thawed in known
        )
        return FreezeReport(freeze_ms=(last - first) / 1e6, predicted_ms=0.0, mounts=mounts)

    def _places(self) -> str:
        return ", ".join(place.point for place in self.plan.all)

    # --- the line protocol ------------------------------------------------------------------------

    def _say(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(line)
        except BrokenPipeError:
            return  # it died; reading will tell

    def _listen(self, until: str) -> str:
        """Take in what the guard says up to the line ``until``, or "done …"; "" when it died or is silent too long."""
        limit = (self._began or self.clock.monotonic()) + self.deadline_s + _GUARD_GRACE
        while True:
            line = self._line(limit)
            word, *numbers = line.split(" ") if line else [""]
            if word not in ("frozen", "thawed"):
                if not line or line == until or word == "done":
                    return line
                continue
            fd, *facts = (int(number) for number in numbers)
            setattr(self._members[fd], word, (facts[0], facts[1], facts[2]))

    def _line(self, limit: float) -> str:
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], max(0.0, limit - self.clock.monotonic()))[0]:
                return ""
            more = os.read(pipe, 4096)
            if not more:
                return ""
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _syncfs(fd: int) -> tuple[str, int] | None:
    """syncfs(2); None, or the place and the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd) == 0:
        return None
    return os.readlink(f"/proc/self/fd/{fd}"), ctypes.get_errno()
