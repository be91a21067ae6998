"""The freeze window: what is decided before it, and that nothing stays frozen whatever happens inside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import lab
import pytest
from instants import CLOCK, eventually_thawed, frozen

from graincopy.core.errors import FreezeBroken, FreezeRefused, FreezeTooLong, FrozenElsewhere
from graincopy.volumes import ioctl
from graincopy.volumes.freeze import FreezeGuard
from graincopy.volumes.freeze_plan import (
    FileSystem,
    FreezeLimits,
    FreezePlan,
    check_prediction,
    devices_under,
    file_system_at,
    own_precious,
    plan_freeze,
    predict_ms,
    refuse,
)

INNER = FileSystem("/lun", "7:0", ("8:1",))
OUTER = FileSystem("/store", "8:1")
OTHER = FileSystem("/other", "8:2")


# --- deciding -------------------------------------------------------------------------------------


def test_inner_file_systems_come_before_what_carries_them() -> None:
    deepest = FileSystem("/deep", "7:1", ("7:0", "8:1"))
    plan = plan_freeze([OUTER, INNER, OTHER, deepest])
    assert plan.waves == ((deepest, OTHER), (INNER,), (OUTER,))


def test_a_file_system_named_twice_is_frozen_once() -> None:
    assert plan_freeze([OTHER, FileSystem("/bound", "8:2")]).waves == ((OTHER,),)
    assert plan_freeze([]).waves == ()


def test_refuses_what_lies_on_a_frozen_file_system_or_is_carried_by_one() -> None:
    plan = plan_freeze([OUTER])
    refuse(plan, {"the repository": "/other/repo"}, lambda path: ("8:2",))
    with pytest.raises(FreezeRefused) as refused:
        refuse(plan, {"the repository": "/lun/repo"}, lambda path: ("7:0", "8:1"))
    assert refused.value.facts == {"mount": "/store", "what": "the repository", "path": "/lun/repo"}


def test_own_files_are_precious_and_on_the_root_file_system_here() -> None:
    precious = own_precious()
    assert {"the running Python", "graincopy itself", "the Python library"} <= set(precious)
    here = file_system_at(precious["graincopy itself"])
    with pytest.raises(FreezeRefused):
        refuse(plan_freeze([here]), precious, devices_under)


def test_prediction_grows_with_extents_and_file_systems() -> None:
    assert predict_ms([], 0) == 0
    assert predict_ms([100], 1) < predict_ms([100], 2) < predict_ms([100, 100], 2) < predict_ms([10**5, 100], 2)
    assert 1500 < predict_ms([150_000], 1) < 3000
    assert predict_ms([], 2, [12, 30]) == predict_ms([], 2) + 42


def test_a_long_window_is_warned_about_and_one_beyond_the_deadline_refused() -> None:
    limits = FreezeLimits(deadline_s=2, warn_ms=500)
    assert check_prediction(499, [10], limits) == ()
    assert "12345 extents" in check_prediction(500, [12345], limits)[0]
    with pytest.raises(FreezeTooLong) as refused:
        check_prediction(2000, [10, 20], limits)
    assert refused.value.facts["why"] == "30 extents in 2 volumes"


# --- freezing -------------------------------------------------------------------------------------


def plan_of(*points: str) -> FreezePlan:
    return plan_freeze([file_system_at(point) for point in points])


def guard_of(*points: str, deadline_s: float = 30) -> FreezeGuard:
    return FreezeGuard(plan_of(*points), deadline_s, CLOCK)


@pytest.fixture
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two small file systems; thawed at the end whatever a test did (lab.unmount does it)."""
    folder = tmp_path_factory.mktemp("two")
    with (
        lab.ReflinkFs(folder, "ext4", 64 * lab.MIB, "one") as one,
        lab.ReflinkFs(folder, "ext4", 64 * lab.MIB, "other") as other,
    ):
        yield one.path, other.path


@pytest.fixture
def nested(xfs_dir: str) -> Iterator[lab.Lun]:
    """An ext4 on a LUN image on an XFS; both are thawed at the end."""
    with lab.Lun(xfs_dir, size=64 * lab.MIB) as lun:
        yield lun
        outer = file_system_at(xfs_dir).point
        subprocess.run(["fsfreeze", "--unfreeze", outer], capture_output=True, timeout=20, check=False)
        subprocess.run(["fsfreeze", "--unfreeze", lun.path], capture_output=True, timeout=20, check=False)


@lab.root_test
def test_frozen_inside_thawed_outside_and_measured(two: tuple[str, str]) -> None:
    with guard_of(*two) as guard:
        guard.sync()
        with guard.window() as window:
            assert frozen(two[0]) and frozen(two[1])
            assert window.report is None
    assert not frozen(two[0]) and not frozen(two[1])
    assert window.report is not None
    assert {one.point for one in window.report.mounts} == set(two)
    assert 0 < window.report.freeze_ms < 5000
    assert all(0 < one.freeze_ms <= one.held_ms <= window.report.freeze_ms for one in window.report.mounts)


@lab.root_test
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_is_raised_inside_thaws_first(two: tuple[str, str], error: type[BaseException]) -> None:
    guard = guard_of(*two)
    with pytest.raises(error), guard:
        try:
            with guard.window():
                raise error
        finally:
            assert not frozen(two[0]) and not frozen(two[1])


_HOLDER = """
import sys, time
sys.path[:0] = [{tests!r}, {source!r}]
from test_freeze import guard_of
with guard_of(*sys.argv[1:], deadline_s=60) as guard, guard.window():
    print("frozen", flush=True)
    time.sleep(60)
"""


@lab.root_test
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_parent_that_is_killed_leaves_nothing_frozen(two: tuple[str, str], number: int) -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    source = os.path.join(here, "..", "..", "src")
    command = [sys.executable, "-c", _HOLDER.format(tests=here, source=source), *two]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"frozen\n"
        assert frozen(two[0]) and frozen(two[1])
        holder.send_signal(number)
        assert holder.wait(20) != 0
    assert eventually_thawed(two[0]) and eventually_thawed(two[1])


@lab.root_test
def test_parent_that_hangs_is_thawed_at_the_deadline(two: tuple[str, str]) -> None:
    guard = guard_of(*two, deadline_s=0.5)
    with pytest.raises(FreezeBroken, match=r"deadline of 0\.5 s"), guard, guard.window():
        assert frozen(two[0])
        assert eventually_thawed(two[0]) and eventually_thawed(two[1])


@lab.root_test
def test_clone_that_hangs_in_the_kernel_is_freed_at_the_deadline(xfs_dir: str) -> None:
    source, target = os.path.join(xfs_dir, "s"), os.path.join(xfs_dir, "t")
    lab.write_at(source, (0, b"x" * 65536))
    lab.write_at(target, (0, b""))

    def clone() -> None:
        with open(source, "rb") as opened, open(target, "r+b") as empty:
            ioctl.clone(opened.fileno(), empty.fileno())

    with pytest.raises(FreezeBroken), guard_of(xfs_dir, deadline_s=1) as guard, guard.window():
        hanging = threading.Thread(target=clone)
        hanging.start()
        hanging.join(20)
        assert not hanging.is_alive()
    assert not frozen(xfs_dir)


@lab.root_test
def test_freeze_of_somebody_else_is_left_and_ours_taken_back(two: tuple[str, str]) -> None:
    lab.run("fsfreeze", "--freeze", two[1])
    try:
        with pytest.raises(FrozenElsewhere) as refused, guard_of(*two) as guard, guard.window():
            pytest.fail("the window opened")
        assert refused.value.facts["mount"] == two[1]
        assert not frozen(two[0])
        assert frozen(two[1])
    finally:
        lab.run("fsfreeze", "--unfreeze", two[1])


@lab.root_test
def test_thaw_by_somebody_else_breaks_the_window(two: tuple[str, str]) -> None:
    guard = guard_of(*two)
    with pytest.raises(FreezeBroken, match="thawed by somebody else"), guard, guard.window():
        lab.run("fsfreeze", "--unfreeze", two[0])
    assert not frozen(two[0]) and not frozen(two[1])


@lab.root_test
def test_guard_that_is_killed_is_replaced_by_the_parent(two: tuple[str, str]) -> None:
    guard = guard_of(*two)
    with pytest.raises(FreezeBroken, match="guard died"), guard, guard.window():
        assert guard._process is not None
        assert os.getsid(guard._process.pid) != os.getsid(0)  # Ctrl-C does not reach it
        guard._process.kill()
        guard._process.wait(10)
        assert frozen(two[0]) and frozen(two[1])
    assert not frozen(two[0]) and not frozen(two[1])


@lab.root_test
def test_inner_is_frozen_first_and_thawed_last(nested: lab.Lun, xfs_dir: str) -> None:
    plan = plan_of(xfs_dir, nested.path)
    assert [[one.point for one in wave] for wave in plan.waves] == [[nested.path], [file_system_at(xfs_dir).point]]
    lab.write_at(os.path.join(nested.path, "dirty"), (0, os.urandom(1 << 20)), sync=False)
    with FreezeGuard(plan, 30, CLOCK) as guard:
        with guard.window() as window:
            pass
        inner, outer = sorted(guard._members.values(), key=lambda one: one.place.point != nested.path)
    assert window.report is not None
    assert inner.frozen and outer.frozen and inner.frozen[2] <= outer.frozen[1]
    assert inner.thawed and outer.thawed and outer.thawed[2] <= inner.thawed[1]
    assert not frozen(nested.path) and not frozen(xfs_dir)


@lab.root_test
def test_wrong_order_hangs_and_the_deadline_ends_it(nested: lab.Lun, xfs_dir: str) -> None:
    right = plan_of(xfs_dir, nested.path)
    lab.write_at(os.path.join(nested.path, "dirty"), (0, os.urandom(1 << 20)), sync=False)
    guard = FreezeGuard(FreezePlan(right.waves[::-1]), 1, CLOCK)
    with pytest.raises(FreezeBroken), guard, guard.window():
        pytest.fail("the window opened")
    assert eventually_thawed(xfs_dir) and eventually_thawed(nested.path)


@lab.root_test
def test_unused_guard_ends_by_itself(two: tuple[str, str]) -> None:
    with guard_of(*two) as guard:
        process = guard._process
        assert process is not None
    assert process.returncode == 0
    assert not frozen(two[0])


@lab.root_test
def test_file_system_on_a_loop_device_knows_what_carries_it(nested: lab.Lun, xfs_dir: str) -> None:
    outer = file_system_at(xfs_dir)
    inner = file_system_at(os.path.join(nested.path, "no", "such", "file"))
    assert inner.point == nested.path
    assert inner.beneath[0] == outer.device
    with pytest.raises(FreezeRefused):
        refuse(plan_freeze([outer]), {"the repository": os.path.join(nested.path, "repo")}, devices_under)


def test_the_guard_speaks_the_kernels_numbers() -> None:
    from graincopy.volumes import freeze_guard

    assert (freeze_guard.FIFREEZE, freeze_guard.FITHAW) == (ioctl.FIFREEZE, ioctl.FITHAW)
