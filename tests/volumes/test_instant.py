"""One instant over several volumes: the order of things, and that a failure leaves nothing frozen and no target."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lab
import pytest
from instants import CLOCK, everything_below, frozen, image_of, run_id, tag

from graincopy.core.errors import FreezeBroken, FreezeRefused, FreezeTooLong, FrozenElsewhere, SnapshotFailed
from graincopy.core.ids import VolumeId
from graincopy.model.instant import instant_of
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.volumes.base import PreparedGroup
from graincopy.volumes.freeze_plan import FreezeLimits, FreezeReport
from graincopy.volumes.instant import STEPS, Instant, WindowTerms, take_instant
from graincopy.volumes.places import MemoryPlaces
from graincopy.volumes.reflink import ReflinkDriver


@pytest.fixture
def luns(xfs_dir: str) -> Iterator[tuple[lab.Lun, lab.Lun]]:
    with lab.Lun(xfs_dir, "a", 64 * lab.MIB) as one, lab.Lun(xfs_dir, "b", 64 * lab.MIB) as other:
        for lun in (one, other):
            lab.write_at(os.path.join(lun.path, "disk"), (0, b"\0" * 4096))
        yield one, other


def claims_on(driver: ReflinkDriver, luns: Sequence[lab.Lun]) -> list[Claim]:
    found = [driver.resolve(os.path.join(lun.path, "disk")) for lun in luns]
    assert all(isinstance(one, Claim) for one in found), found
    return [one for one in found if isinstance(one, Claim)]


def instant(driver: ReflinkDriver, luns: Sequence[lab.Lun], **more: object) -> Instant:
    volumes = [claim.volume for claim in claims_on(driver, luns)]
    mounts = [lun.path for lun in luns]
    return take_instant([(driver, volumes)], tag(), mounts, clock=CLOCK, **more)  # type: ignore[arg-type]


@lab.root_test
def test_steps_come_in_order_and_the_workload_is_quiesced_around_the_window(luns: tuple[lab.Lun, lab.Lun]) -> None:
    seen: list[str] = []

    @contextmanager
    def quiesce() -> Iterator[None]:
        seen.append("quiesced")
        yield
        seen.append("resumed")

    driver = ReflinkDriver(MemoryPlaces())
    taken = instant(driver, luns, step=seen.append, quiesce=quiesce)
    assert seen == ["prepared", "quiesced", "frozen", "snapshotted", "resumed", "thawed", "settled"]
    assert [name for name in seen if name in STEPS] == list(STEPS)
    assert taken.freeze is not None
    assert 0 < taken.freeze.freeze_ms < 5000
    assert taken.freeze.predicted_ms > 0 and taken.freeze.warnings == ()
    assert {target.volume for target in taken.targets.values()} == {f"reflink:{lun.image}" for lun in luns}


@lab.root_test
def test_without_mounts_nothing_is_frozen(xfs_dir: str) -> None:
    driver = ReflinkDriver(MemoryPlaces())
    path = os.path.join(xfs_dir, "disk")
    lab.write_at(path, (0, b"content"))
    taken = take_instant([(driver, [VolumeId(f"reflink:{path}")])], tag(), clock=CLOCK)
    assert taken.freeze is None and len(taken.targets) == 1


@lab.root_test
def test_ordered_writes_are_never_seen_inverted(luns: tuple[lab.Lun, lab.Lun]) -> None:
    driver = ReflinkDriver(MemoryPlaces())
    claims = claims_on(driver, luns)
    stop = threading.Event()

    def write() -> None:
        fds = [os.open(claim.path, os.O_WRONLY | os.O_DSYNC) for claim in claims]
        count = 0
        while not stop.is_set():
            count += 1
            for fd in fds:
                os.pwrite(fd, count.to_bytes(8, "little"), 0)
        for fd in fds:
            os.close(fd)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = []
        for number in range(4):
            volumes = [claim.volume for claim in claims]
            mounts = [lun.path for lun in luns]
            taken = take_instant([(driver, volumes)], tag(run_id(number)), mounts, clock=CLOCK)
            images = [image_of(driver, taken.targets["reflink", claim.volume], claim)[0] for claim in claims]
            seen.append([int.from_bytes(image[:8], "little") for image in images])
    finally:
        stop.set()
        writer.join(30)
    assert all(first - 1 <= second <= first for first, second in seen), seen
    assert seen[-1][0] > seen[0][0]


class Trouble(Exception):
    """Made by a test."""


@lab.root_test
@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("at", STEPS)
def test_failure_at_every_step_thaws_and_deletes(
    luns: tuple[lab.Lun, lab.Lun], xfs_dir: str, at: str, error: type[BaseException]
) -> None:
    before = everything_below(xfs_dir)

    def step(name: str) -> None:
        if name == at:
            assert frozen(luns[0].path) == (at in ("frozen", "snapshotted"))
            raise error

    with pytest.raises(error):
        instant(ReflinkDriver(MemoryPlaces()), luns, step=step)
    assert not frozen(luns[0].path) and not frozen(luns[1].path)
    assert everything_below(xfs_dir) == before


class Failing(ReflinkDriver):
    """Fails at the instant, and to delete one of its targets."""

    def snapshot(self, group: PreparedGroup) -> tuple[Target, ...]:
        super().snapshot(group)
        raise SnapshotFailed(volume="it", reason="it was asked to")

    def delete(self, target: Target) -> object:  # type: ignore[override]
        answer = super().delete(target)
        if target.volume.endswith("a.img"):
            raise SnapshotFailed(volume=target.volume, reason="no")
        return answer


@lab.root_test
def test_deletions_that_fail_are_noted_and_mask_nothing(luns: tuple[lab.Lun, lab.Lun], xfs_dir: str) -> None:
    before = everything_below(xfs_dir)
    with pytest.raises(SnapshotFailed, match="asked to") as raised:
        instant(Failing(MemoryPlaces()), luns)
    assert len(raised.value.__notes__) == 1 and "could not be deleted" in raised.value.__notes__[0]
    assert not frozen(luns[0].path)
    assert everything_below(xfs_dir) == before


@lab.root_test
def test_refused_before_any_effect(luns: tuple[lab.Lun, lab.Lun], xfs_dir: str) -> None:
    before = everything_below(xfs_dir)
    driver = ReflinkDriver(MemoryPlaces())
    volumes = [claim.volume for claim in claims_on(driver, luns)]
    inside = os.path.join(luns[0].path, "repository")
    cases: list[tuple[Sequence[str], WindowTerms, str]] = [
        (["/"], WindowTerms(), "Python"),
        ([luns[0].path], WindowTerms(precious={"the repository": inside}), "the repository"),
        ([xfs_dir], WindowTerms(), "the target of"),
        ([xfs_dir], WindowTerms(precious={"the repository": inside}), "the repository"),
    ]
    for mounts, terms, what in cases:
        with pytest.raises(FreezeRefused) as refused:
            take_instant([(driver, volumes)], tag(), mounts, clock=CLOCK, terms=terms)
        assert what in str(refused.value)
    with pytest.raises(FreezeTooLong):
        instant(driver, luns, terms=WindowTerms(limits=FreezeLimits(deadline_s=0.02)))
    assert everything_below(xfs_dir) == before


@lab.root_test
def test_freeze_that_is_not_ours_or_not_kept_leaves_no_target(luns: tuple[lab.Lun, lab.Lun], xfs_dir: str) -> None:
    before = everything_below(xfs_dir)
    driver = ReflinkDriver(MemoryPlaces())
    with luns[1].frozen():
        with pytest.raises(FrozenElsewhere):
            _with_syncs_that_return(driver, luns)
        assert frozen(luns[1].path) and not frozen(luns[0].path)

    def thaw(name: str) -> None:
        if name == "snapshotted":
            lab.run("fsfreeze", "--unfreeze", luns[0].path)

    with pytest.raises(FreezeBroken):
        instant(driver, luns, step=thaw)
    assert everything_below(xfs_dir) == before


def _with_syncs_that_return(driver: ReflinkDriver, luns: Sequence[lab.Lun]) -> None:
    """A file system that somebody froze was synced by that; nothing here may wait for it."""
    done = threading.Event()
    problems: list[BaseException] = []

    def work() -> None:
        try:
            instant(driver, luns)
        except BaseException as error:  # noqa: BLE001
            problems.append(error)
        done.set()

    threading.Thread(target=work).start()
    assert done.wait(30), "the sync of a frozen file system hangs"
    raise problems[0]


def test_one_instant_or_one_per_file() -> None:
    def claim(volume: str, mount: str | None = None) -> Claim:
        return Claim(path="/p", driver="reflink", volume=VolumeId(volume), why="", inner_path=mount, mount=mount)

    assert instant_of([claim("a"), claim("a")]) == "one"
    assert instant_of([claim("a"), claim("b")]) == "per file"
    assert instant_of([claim("a"), claim("b")], paused=True) == "one"
    assert instant_of([claim("a", "/a"), claim("b", "/b")], ["/a", "/b"]) == "one"
    assert instant_of([claim("a", "/a"), claim("b", "/b")], ["/a"]) == "one"  # b moves alone
    assert instant_of([claim("a", "/a"), claim("b")], ["/a"]) == "one"
    assert instant_of([claim("a", "/a"), claim("b"), claim("c")], ["/a"]) == "per file"
    assert instant_of([claim("a", "/a"), claim("b", "/b"), claim("c")], ["/a"]) == "per file"


@pytest.mark.parametrize(
    ("window", "own", "held"),
    [(None, (None,), None), (80.0, (None,), 80.0), (None, (30.0, 50.0, None), 50.0), (80.0, (120.0,), 120.0)],
)
def test_writers_were_held_by_the_window_or_by_the_snapshot_itself(
    window: float | None, own: tuple[float | None, ...], held: float | None
) -> None:
    """A driver whose snapshot suspends S (LVM) says for how long; the longest counts."""
    targets = {
        ("lvm-thin", VolumeId(str(number))): Target(
            id=str(number),
            driver="lvm-thin",
            volume=VolumeId(str(number)),
            size=1,
            incarnation="",
            tag=tag(),
            held_ms=one,
        )
        for number, one in enumerate(own)
    }
    freeze = None if window is None else FreezeReport(freeze_ms=window, predicted_ms=0.0, mounts=())
    assert Instant(targets, freeze).held_ms == held
