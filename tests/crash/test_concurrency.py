"""Several processes on one repository: the races that are known, one by one, and all at once for a while."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lab
import pytest
import scene
import story

from graincopy.app.host import SystemChance, SystemClock
from graincopy.media.directory import DirectoryMedium
from graincopy.model.snapshot import Owner
from graincopy.repository.collect import collect
from graincopy.repository.repository import Repository

SECONDS = 20.0  # how long everybody works at once
STRANGER = Owner(host="another", boot="another", pid=1, started=1, hostname="another")


def _expire(*more: str) -> tuple[str, ...]:
    return ("expire", "--keep-last", "1", *more)


def _packs(cli: story.Cli) -> set[str]:
    return set(story.files_below(f"{cli.repo}/data") + story.files_below(f"{cli.repo}/node"))


def _as_another_host(cli: story.Cli) -> Repository:
    """The repository, opened by somebody who cannot tell whether a process of ours lives."""
    return Repository.open(
        DirectoryMedium(cli.repo), passphrase=None, clock=SystemClock(), chance=SystemChance(), owner=STRANGER
    )


def _open_run(repository: Repository) -> Any:
    (run,) = [run for run in repository.open_runs() if run.kind == "backup"]
    return run


# --- a chunk that is reused while its last reference goes -----------------------------------------


@contextmanager
def _reusing(stage: scene.Storage, cli: story.Cli, at: str) -> Iterator[scene.Stopped]:
    """A backup, stopped ``at`` a step, of a disk whose content only an older point of another workload has.

    While it stands still that point, the last old reference to the chunks that it reuses, is expired.
    """
    first, second = stage.disks
    lab.write_at(second, (0, story.read(first)))
    cli.ok("backup", first)
    stage.renew(first)
    cli.ok("backup", first)
    with scene.stopped(cli, at, "backup", second) as backup:
        cli.ok(*_expire())
        assert len(scene.point_ids(cli)) == 1
        yield backup


@lab.root_test
@pytest.mark.parametrize("at", ["opened", "copied", "indexed"])
def test_collect_refuses_to_sweep_under_a_backup(
    stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str], at: str
) -> None:
    content = {stage.disks[1]: story.digest(stage.disks[0])}
    with _reusing(stage, cli, at) as backup:
        before = _packs(cli)
        done = cli("collect", "--patience", "1")
        assert (done.code, before - _packs(cli)) == (42, set()), done
        answer = backup.go_on()
    assert answer.code == 0, answer
    cli.undamaged()
    scene.must_hold(cli, "latest", content, os.path.join(tmp_path, "out"))
    cli.ok("collect")
    cli.undamaged()
    scene.must_hold(cli, "latest", content, os.path.join(tmp_path, "out"))


@lab.root_test
def test_collect_waits_for_a_backup(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    """It has condemned the chunks already when the backup that reuses them publishes: they stay."""
    content = {stage.disks[1]: story.digest(stage.disks[0])}
    with _reusing(stage, cli, "indexed") as backup:
        collecting = scene.start(cli, "collect", "--patience", "50")
        assert scene.wait_until(30, lambda: story.files_below(f"{cli.repo}/condemned"))
        time.sleep(0.5)
        assert collecting.poll() is None
        answer = backup.go_on()
        assert answer.code == 0, answer
        out, err = collecting.communicate(timeout=scene.LONG)
        assert collecting.returncode == 0, (out, err)
    cli.undamaged()
    scene.must_hold(cli, "latest", content, os.path.join(tmp_path, "out"))
    assert scene.open_runs(cli) == []


@lab.root_test
@pytest.mark.parametrize("at", ["mark", "unindex", "sweep:2"])
def test_backup_during_a_sweep(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str], at: str) -> None:
    """A backup that opens after the condemnation is not waited for, so it must not reuse what is condemned."""
    first, second = stage.disks
    lab.write_at(second, (0, story.read(first)))
    content = {second: story.digest(second)}
    cli.ok("backup", first)
    stage.renew(first)
    cli.ok("backup", first)
    cli.ok(*_expire())
    before = _packs(cli)
    with scene.stopped(cli, at, "collect", "--patience", "0") as collecting:
        assert cli("collect").code == 42, "two collects at once"
        cli.ok("backup", second)
        answer = collecting.go_on()
    assert answer.code == 0, answer
    assert before - _packs(cli), "nothing was swept"
    cli.undamaged()
    scene.must_hold(cli, "latest", content, os.path.join(tmp_path, "out"))
    assert len(scene.point_ids(cli)) == 2
    assert scene.open_runs(cli) == []


# --- fenced ---------------------------------------------------------------------------------------


@lab.root_test
@pytest.mark.parametrize("at", ["copied", "indexed"])
def test_a_fenced_backup_loses(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str], at: str) -> None:
    """Another host's collect loses patience with it and sweeps; it wakes, publishes nothing and takes T away."""
    stranger = _as_another_host(cli)
    with _reusing(stage, cli, at) as backup:
        kept = scene.point_ids(cli)
        before, run = _packs(cli), _open_run(stranger)
        outcome = collect(stranger, alive=lambda owner: None, clock=SystemClock(), patience=scene.LONG, silence=0.2)
        assert outcome.fenced == (run.id,)
        assert before - _packs(cli), "nothing was swept"
        answer = backup.go_on()
    assert answer.code == 40, answer
    assert len(answer.err.splitlines()) == 2
    assert scene.point_ids(cli) == kept
    scene.must_be_tidy(cli, stage)
    cli.undamaged()
    content = {stage.disks[1]: story.digest(stage.disks[1])}
    cli.ok("backup", stage.disks[1])
    scene.must_hold(cli, "latest", content, os.path.join(tmp_path, "out"))
    cli.ok("collect")
    cli.undamaged()
    scene.must_hold(cli, "latest", content, os.path.join(tmp_path, "out"))
    assert len(story.files_below(f"{cli.repo}/points")) == 2, "the tombstone stays although its run is dead"


@lab.root_test
def test_fenced_before_its_session(stage: scene.Storage, cli: story.Cli) -> None:
    with scene.stopped(cli, "opened", "backup", *stage.disks) as backup:
        stranger = _as_another_host(cli)
        assert stranger.fence(_open_run(stranger).id)
        answer = backup.go_on()
    assert answer.code == 40, answer
    assert (scene.point_ids(cli), stage.targets()) == ([], [])


@lab.root_test
def test_a_fence_that_comes_too_late(stage: scene.Storage, cli: story.Cli) -> None:
    with scene.stopped(cli, "published", "backup", *stage.disks) as backup:
        stranger = _as_another_host(cli)
        (point,) = scene.point_ids(cli)
        assert not stranger.fence(point)  # type: ignore[arg-type]
        assert backup.go_on().code == 0
    assert scene.point_ids(cli) == [point]
    cli.undamaged()


# --- one workload, two runs -----------------------------------------------------------------------


@lab.root_test
def test_the_second_backup_of_a_workload_is_refused(stage: scene.Storage, cli: story.Cli) -> None:
    for at in ("opened", "copied", "indexed"):
        with scene.stopped(cli, at, "backup", *stage.disks) as backup:
            done = cli("backup", *reversed(stage.disks))
            assert done.code == 41, f"{at}: {done}"
            assert str(backup.process.pid) in done.err
            assert backup.go_on().code == 0
    assert len(scene.point_ids(cli)) == 3
    scene.must_be_tidy(cli, stage)


@lab.root_test
def test_a_restore_and_a_backup_of_one_workload(stage: scene.Storage, cli: story.Cli) -> None:
    """Neither begins while the other is at work; a restore to a directory keeps nobody from anything."""
    cli.ok("backup", *stage.disks)
    with scene.stopped(cli, "copied", "backup", *stage.disks) as backup:
        assert cli("restore", "latest", "--in-place").code == 41
        assert backup.go_on().code == 0
    for at, refusals in (("opened", (41, 41)), ("saved", (41, 41)), ("written", (17, 45))):
        with scene.stopped(cli, at, "restore", "latest~1", "--in-place") as restore:
            assert (cli("backup", *stage.disks).code, cli("restore", "latest", "--in-place").code) == refusals, at
            assert restore.go_on().code == 0
    out = os.path.join(cli.folder, "out")
    with scene.stopped(cli, "written:1", "restore", "latest", "--to", out) as export:
        cli.ok("backup", *stage.disks)
        assert export.go_on().code == 0


BACKUP, RESTORE = ("backup",), ("restore", "latest~1", "--in-place")


@lab.root_test
@pytest.mark.parametrize("kinds", [(BACKUP, BACKUP), (BACKUP, RESTORE), (RESTORE, BACKUP), (BACKUP,) * 3])
def test_all_at_the_same_moment(
    stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str], kinds: tuple[tuple[str, ...], ...]
) -> None:
    """All have put their record when the first of them looks at the others': one goes on, the others are refused."""
    for _ in range(2):
        stage.scribble()
        cli.ok("backup", *stage.disks)
    contents, before = stage.scribble(), scene.point_ids(cli)
    with contextlib.ExitStack() as held:
        commands = [(*kind, *stage.disks) if kind == BACKUP else kind for kind in kinds]
        runs = [held.enter_context(scene.stopped(cli, "opened", *command)) for command in commands]
        for run in runs:
            run.process.send_signal(signal.SIGCONT)
        answers = [run.go_on() for run in runs]
    assert sorted(answer.code for answer in answers) == [0] + [41] * (len(kinds) - 1), answers
    assert all(len(answer.err.splitlines()) == 2 for answer in answers if answer.code)
    winner = kinds[[answer.code for answer in answers].index(0)]
    assert len(scene.point_ids(cli)) - len(before) == (winner == BACKUP)
    if winner == BACKUP:
        scene.must_hold(cli, "latest", contents, os.path.join(tmp_path, "out"))
        cli.ok("backup", *stage.disks)
        scene.must_be_tidy(cli, stage)
    cli.undamaged()


@lab.root_test
def test_two_workloads_on_one_datastore(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    """Only one of them can freeze it at a time; the other one waits for that and does not give up."""
    pair = (stage.disks[0], stage.neighbour)
    for _ in range(4):
        stage.scribble(*pair)
        both = [scene.start(cli, "backup", path) for path in pair]
        for process in both:
            err = process.communicate(timeout=scene.LONG)[1]
            assert process.returncode == 0, err
    for point in cli.ok("points")[:2]:
        (path,) = [disk["path"] for disk in cli.ok("show", point["restore_point"])["disks"]]
        scene.must_hold(cli, point["restore_point"], {path: stage.written[path]}, os.path.join(tmp_path, "out"))
    cli.ok("targets", "--reap")
    assert len(stage.targets()) == 2  # a checkpoint each


# --- everybody at once ----------------------------------------------------------------------------


class Crowd:
    """Threads of the test that each run one kind of command again and again, as processes of their own."""

    def __init__(self, cli: story.Cli, seconds: float) -> None:
        self._cli, self._end = cli, time.monotonic() + seconds
        self._threads: list[threading.Thread] = []
        self.codes: dict[str, list[int]] = {}
        self.wrong: list[str] = []

    def run(self, allowed: tuple[int, ...], *arguments: str) -> Any:
        """One command; its document, or None when it was refused with one of the codes that are ``allowed``."""
        process = scene.start(self._cli, *arguments, "--json")
        out, err = process.communicate(timeout=scene.LONG)
        self.codes.setdefault(arguments[0], []).append(process.returncode)
        if process.returncode not in (0, *allowed):
            self.wrong.append(f"{arguments}: {process.returncode}: {os.fsdecode(err)}")
        return json.loads(out) if process.returncode == 0 else None

    def add(self, work: Callable[[], None]) -> None:
        """Somebody who does ``work`` until the time is over."""

        def loop() -> None:
            while time.monotonic() < self._end and not self.wrong:
                try:
                    work()
                except Exception as failure:  # noqa: BLE001 - a thread has nobody else to tell
                    self.wrong.append(repr(failure))

        self._threads.append(threading.Thread(target=loop))

    def work(self) -> None:
        """All of them, to the end."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        assert not self.wrong, "\n".join(self.wrong)


@lab.root_test
def test_everybody_at_once(stage: scene.Storage, cli: story.Cli, tmp_path: os.PathLike[str]) -> None:
    recorded: dict[str, tuple[str, str]] = {}  # restore point → its disk and what that held
    crowd = Crowd(cli, SECONDS)
    shared = [story.noise(seed, 65536) for seed in range(40)]

    def backing_up(path: str, chance: random.Random) -> Callable[[], None]:
        def work() -> None:
            for _ in range(4):  # grains that others have too, so that chunks are reused, lost and stored again
                story.write(path, (chance.randrange(32) * 65536, chance.choice(shared)))
            digest = story.digest(path)
            done = crowd.run((), "backup", path)
            if done:
                recorded[done["restore_point"]] = (path, digest)

        return work

    def restoring() -> None:
        known = dict(recorded)
        if not known:
            return time.sleep(0.1)
        point = random.Random(len(known)).choice(list(known)[-3:])
        out = os.path.join(tmp_path, "restored", point, str(time.monotonic_ns()))
        if crowd.run((50,), "restore", point, "--to", out):  # 50: expired meanwhile
            (file,) = story.files_below(out)
            if story.digest(file) != known[point][1]:
                crowd.wrong.append(f"{point} was restored wrongly")
        return None

    in_place = os.path.join(stage.outer.path, "in-place.raw")
    lab.write_at(in_place, (0, story.noise(99, scene.SIZE)))

    def going_back() -> None:
        digest = story.digest(in_place)
        done = crowd.run((), "backup", in_place)
        if done is None:
            return
        recorded[done["restore_point"]] = (in_place, digest)
        story.write(in_place, (65536, os.urandom(9000)))
        if crowd.run((), "restore", done["restore_point"], "--in-place") and story.digest(in_place) != digest:
            crowd.wrong.append("a restore in place is wrong")

    for path, seed in zip(stage.disks, (1, 2), strict=True):
        crowd.add(backing_up(path, random.Random(seed)))
    crowd.add(restoring)
    crowd.add(going_back)
    crowd.add(lambda: crowd.run((), "expire", "--keep-last", "2") and None)
    crowd.add(lambda: crowd.run((42,), "collect", "--patience", "1") and None)
    crowd.add(lambda: crowd.run((), "check", "--data") and None)
    crowd.work()
    os.unlink(in_place)
    assert all(0 in codes for codes in crowd.codes.values()), crowd.codes
    listed = scene.point_ids(cli)
    assert set(listed) <= set(recorded)
    for point in listed:
        path, digest = recorded[point]
        scene.must_hold(cli, point, {path: digest}, os.path.join(tmp_path, "out"))
    cli.undamaged()
    cli.ok("collect")
    cli.undamaged()
