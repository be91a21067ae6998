"""Quiesce and thaw of real guests through a real libvirtd: whatever happens, the guest runs on and can write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from vm_lab import Guest, GuestLab, LabDisk, needs_guests, wait

from graincopy.app.host import SystemClock
from graincopy.core.errors import DomainBusy, DomainUnknown, GuestThawFailed, HypervisorDown
from graincopy.hypervisor.link import Link
from graincopy.model.workload import Consistency, Workload
from graincopy.workloads.combined import CombinedSource
from graincopy.workloads.libvirt import LibvirtSource
from graincopy.workloads.libvirt_guard import GuestGuard, GuestWish

pytestmark = [pytest.mark.root, needs_guests]

MIB = 1 << 20
_TRANSIENT_JOB = 4  # VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
DEADLINE = 20.0  # seconds: generous, the machine may be loaded


@pytest.fixture(scope="module")
def shop(guests: GuestLab) -> Iterator[Guest]:
    """A guest with two disks, a file system on each, and an agent."""
    disks = [LabDisk(dev=dev, path=guests.file(f"shop-{dev}.raw", 64 * MIB)) for dev in ("vda", "vdb")]
    with guests.guest("shop", disks, options={"fs": "vda,vdb"}) as guest:
        yield guest.wait_agent()


@pytest.fixture
def source(guests: GuestLab) -> Iterator[LibvirtSource]:
    with Link(guests.uri, SystemClock()) as link:
        yield LibvirtSource(link, SystemClock(), swtpm=os.path.join(guests.folder, "lib/swtpm"))


def paused(guest: Guest) -> bool:
    return bool(guest.domain().state()[0] == 3)


# --- the agent ----------------------------------------------------------------------------------------


def test_the_agent_freezes_and_the_guest_goes_on(shop: Guest, source: LibvirtSource) -> None:
    workload = source.describe(["shop"])
    quiesced = source.quiesce(workload, DEADLINE)
    assert quiesced.consistency is Consistency.FILE_SYSTEM
    assert quiesced.warnings == ()
    assert paused(shop)
    assert source.thaw(quiesced)
    assert shop.status() == (True, True)
    held = source.held_ms(quiesced)
    assert held is not None and held > 0
    assert not source.thaw(quiesced), "it was thawed already"


def test_file_systems_are_frozen_in_between(shop: Guest, guests: GuestLab) -> None:
    with Link(guests.uri, SystemClock()) as link:
        source = LibvirtSource(link, SystemClock(), pause=lambda _workload: False)
        workload = source.describe(["shop"])
        assert not workload.paused
        quiesced = source.quiesce(workload, DEADLINE)
        assert not paused(shop)
        assert not shop.can_write()
        assert source.thaw(quiesced)
    assert shop.status() == (True, True)


def test_hooks_in_the_guest_make_it_application_consistent(shop: Guest, guests: GuestLab) -> None:
    with Link(guests.uri, SystemClock()) as link:
        source = LibvirtSource(link, SystemClock(), application=["shop"])
        quiesced = source.quiesce(source.describe(["shop"]), DEADLINE)
        assert source.thaw(quiesced)
    assert quiesced.consistency is Consistency.APPLICATION
    assert quiesced.levels == {"shop": Consistency.APPLICATION}


def test_a_guest_thawed_by_somebody_else_is_noticed(shop: Guest, guests: GuestLab) -> None:
    with Link(guests.uri, SystemClock()) as link:
        source = LibvirtSource(link, SystemClock(), pause=lambda _workload: False)
        quiesced = source.quiesce(source.describe(["shop"]), DEADLINE)
        assert shop.domain().fsThaw() > 0
        assert not source.thaw(quiesced)


def test_a_guest_resumed_by_somebody_else_is_noticed(shop: Guest, source: LibvirtSource) -> None:
    quiesced = source.quiesce(source.describe(["shop"]), DEADLINE)
    shop.domain().resume()
    assert not source.thaw(quiesced)
    assert shop.status() == (True, True)


def test_a_guest_that_somebody_else_froze_is_not_thawed(shop: Guest, source: LibvirtSource) -> None:
    assert shop.domain().fsFreeze() > 0
    try:
        quiesced = source.quiesce(source.describe(["shop"]), DEADLINE)
        assert quiesced.consistency is Consistency.CRASH
        assert "frozen" in quiesced.warnings[0]
        assert source.thaw(quiesced)
        assert not shop.can_write(), "it was thawed although it is not ours"
    finally:
        assert shop.domain().fsThaw() > 0


def test_a_guest_that_somebody_else_paused_stays_paused(shop: Guest, source: LibvirtSource) -> None:
    shop.domain().suspend()
    try:
        quiesced = source.quiesce(source.describe(["shop"]), DEADLINE)
        assert quiesced.consistency is Consistency.CRASH
        assert source.thaw(quiesced)
        assert paused(shop)
    finally:
        shop.domain().resume()
    assert shop.status() == (True, True)


def test_an_agent_that_hangs_is_given_up_in_time(shop: Guest, source: LibvirtSource) -> None:
    shop.run("kill -STOP $(cat /run/agent.pid)")
    try:
        began = time.monotonic()
        quiesced = source.quiesce(source.describe(["shop"]), 5.0)
        assert time.monotonic() - began < 60
        assert quiesced.consistency is Consistency.CRASH
        assert "shop is only crash-consistent" in quiesced.warnings[0]
        assert paused(shop), "one instant is wanted all the same"
        assert source.thaw(quiesced)
    finally:
        shop.run("kill -CONT $(cat /run/agent.pid)")
    wait(lambda: shop.status() == (True, True), "it stays frozen")


def test_a_freeze_that_comes_late_is_taken_back(shop: Guest, guests: GuestLab) -> None:
    """The agent has the order, stops before it has done it, and does it when nobody waits any more."""
    with Link(guests.uri, SystemClock()) as link:
        source = LibvirtSource(link, SystemClock(), pause=lambda _workload: False)
        workload = source.describe(["shop"])
        stop, go_on = (f"kill -{signal} $(cat /run/agent.pid)" for signal in ("STOP", "CONT"))
        shop.run(f"( sleep 0.3; {stop}; sleep 8; {go_on}; touch /run/went-on ) &")
        time.sleep(0.1)
        quiesced = source.quiesce(workload, 5.0)
        source.thaw(quiesced)
    # also where the freeze was done before the agent stopped
    wait(lambda: shop.run("ls /run/went-on")[0] == 0, "the agent stays stopped")
    wait(lambda: shop.status() == (True, True), "it stays frozen")
    shop.wait_agent()


def test_a_thaw_that_fails_is_shouted_and_tried_on(shop: Guest, guests: GuestLab) -> None:
    with Link(guests.uri, SystemClock()) as link:
        source = LibvirtSource(link, SystemClock(), pause=lambda _workload: False)
        quiesced = source.quiesce(source.describe(["shop"]), 3.0)
        assert quiesced.consistency is Consistency.FILE_SYSTEM
        shop.run("kill -STOP $(cat /run/agent.pid)")
        try:
            with pytest.raises(GuestThawFailed, match="GUEST shop MAY STILL BE FROZEN"):
                source.thaw(quiesced)
            assert not shop.can_write()
        finally:
            shop.run("kill -CONT $(cat /run/agent.pid)")
    wait(lambda: shop.status() == (True, True), "nobody tries any more")
    shop.wait_agent()


# --- the guard ----------------------------------------------------------------------------------------

_CHILD = """
import os, sys
from graincopy.app.host import SystemClock
from graincopy.hypervisor.link import Link
from graincopy.workloads.libvirt import LibvirtSource
uri, name, deadline, pause = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4] == "pause"
source = LibvirtSource(Link(uri, SystemClock()), SystemClock(), pause=lambda _workload: pause)
workload = source.describe([name])
print("described", flush=True)
quiesced = source.quiesce(workload, deadline)
print("quiesced", flush=True)
sys.stdin.readline()
print("thawed", source.thaw(quiesced), flush=True)
"""


class Child:
    """graincopy as a process that can be killed: it quiesces, and thaws when it is told to."""

    def __init__(self, guest: Guest, deadline: float = DEADLINE, pause: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, guest.lab.uri, guest.name, str(deadline), "pause" if pause else "run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def until(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.decode().startswith(word):
                return line.decode().strip()
        raise RuntimeError(f"the child ended before {word!r}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        self.process.communicate(timeout=90)

    def guard(self) -> int:
        """Pid of its guard."""
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            return int(file.read().split()[0])


@pytest.mark.parametrize("pause", [True, False], ids=["paused", "frozen"])
def test_kill_9_of_graincopy_leaves_the_guest_running(shop: Guest, pause: bool) -> None:
    child = Child(shop, pause=pause)
    child.until("quiesced")
    assert paused(shop) == pause
    child.kill()
    wait(lambda: shop.status() == (True, True), "it still stands")


@pytest.mark.parametrize("after_ms", [0, 30, 60, 120, 250, 400])
def test_kill_9_at_any_moment_leaves_the_guest_running(shop: Guest, after_ms: int) -> None:
    child = Child(shop)
    child.until("described")
    time.sleep(after_ms / 1000)
    child.kill()
    wait(lambda: not _guards(shop.lab.folder), "its guard does not end")
    assert shop.status() == (True, True)


def _guards(folder: str) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    line = file.read()
            except OSError:
                continue
            if b"guest_guard.py" in line and os.fsencode(folder) in line:
                found.append(entry)
    return found


def test_a_guest_that_the_guard_cannot_reach_is_not_taken_for_quiet(guests: GuestLab) -> None:
    wish = GuestWish("0ee1e1ff-7a3e-4b9f-9c1e-3a33f4a6e009", "ghost", freeze=True, pause=True)
    with Link(guests.uri, SystemClock()) as link:
        guard = GuestGuard(link, [wish], DEADLINE, SystemClock())
        with pytest.raises(HypervisorDown, match="ghost is out of reach"):
            guard.start()


def test_the_deadline_thaws_without_being_asked(shop: Guest, source: LibvirtSource) -> None:
    quiesced = source.quiesce(source.describe(["shop"]), 3.0)
    wait(lambda: shop.status() == (True, True), "it still stands")
    assert not source.thaw(quiesced), "the instant is worthless, and must be called so"


def test_a_guard_that_is_killed_is_replaced_by_its_parent(shop: Guest) -> None:
    child = Child(shop)
    child.until("quiesced")
    os.kill(child.guard(), signal.SIGKILL)
    assert child.process.stdin is not None
    child.process.stdin.write(b"go\n")
    child.process.stdin.flush()
    assert child.until("thawed") == "thawed False"
    child.end()
    assert shop.status() == (True, True)


@pytest.mark.parametrize("pause", [True, False], ids=["paused", "frozen"])
def test_a_restart_of_libvirtd_in_between_does_not_keep_the_guest_frozen(
    shop: Guest, guests: GuestLab, pause: bool
) -> None:
    with Link(guests.uri, SystemClock()) as link:
        source = LibvirtSource(link, SystemClock(), pause=lambda _workload: pause)
        quiesced = source.quiesce(source.describe(["shop"]), DEADLINE)
        guests.kill_daemon()
        assert source.thaw(quiesced), "it was held all the time"
    assert shop.status() == (True, True)
    shop.wait_agent()


def test_graincopy_and_libvirtd_killed_together(shop: Guest, guests: GuestLab) -> None:
    child = Child(shop, deadline=4.0)
    child.until("quiesced")
    guests.kill_daemon(stay_down=True)
    child.kill()
    time.sleep(1)
    guests.start_daemon()
    wait(lambda: shop.status() == (True, True), "it still stands")
    shop.wait_agent()


def test_a_guest_that_dies_in_between_spoils_the_instant(guests: GuestLab, source: LibvirtSource) -> None:
    disks = [LabDisk(dev="vda", path=guests.file("dies.raw", 64 * MIB))]
    with guests.guest("dies", disks, options={"fs": "vda"}) as guest:
        guest.wait_agent()
        workload = source.describe(["dies"])
        quiesced = source.quiesce(workload, DEADLINE)
        guest.domain().destroy()
        assert not source.thaw(quiesced)
        # and off it is at rest, so that nothing has to be held
        again = source.quiesce(source.describe(["dies"]), DEADLINE)
        assert source.thaw(again)
    with pytest.raises(DomainUnknown, match="dies"):
        source.quiesce(workload, DEADLINE)


# --- other agents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", ["no", "hook"])
def test_no_agent_or_one_with_a_broken_hook_gives_crash_consistency(
    guests: GuestLab, source: LibvirtSource, agent: str
) -> None:
    disks = [LabDisk(dev="vda", path=guests.file(f"agent-{agent}.raw", 64 * MIB))]
    with guests.guest(f"agent-{agent}", disks, options={"fs": "vda", "agent": agent}) as guest:
        if agent == "hook":
            guest.wait_agent()
        workload = source.describe([guest.name])
        quiesced = source.quiesce(workload, DEADLINE)
        assert quiesced.consistency is Consistency.CRASH
        said = " ".join((*workload.notes, *quiesced.warnings))
        assert "crash-consistent" in said
        assert source.thaw(quiesced)
        assert guest.status() == (True, True)


@pytest.mark.parametrize(("thaws", "held"), [("2", True), ("0", False)])
def test_an_agent_that_lies(guests: GuestLab, source: LibvirtSource, thaws: str, held: bool) -> None:
    """One that says it froze and thawed is believed; one that then finds nothing to thaw is not."""
    disks = [LabDisk(dev="vda", path=guests.file(f"liar-{thaws}.raw", 64 * MIB))]
    options = {"fs": "vda", "agent": "lying", "thaws": thaws}
    with guests.guest(f"liar-{thaws}", disks, options=options) as guest:
        guest.wait_agent()
        quiesced = source.quiesce(source.describe([guest.name]), DEADLINE)
        assert source.thaw(quiesced) is held
        assert guest.status() == (True, True)


def test_two_guests_are_held_together(shop: Guest, guests: GuestLab, source: LibvirtSource) -> None:
    disks = [LabDisk(dev="vda", path=guests.file("depot.raw", 64 * MIB))]
    with guests.guest("depot", disks, options={"fs": "vda", "agent": "no"}) as depot:
        workload = source.describe(["shop", "depot"])
        assert workload == source.describe(["depot", "shop"])
        quiesced = source.quiesce(workload, DEADLINE)
        assert paused(shop) and paused(depot)
        assert quiesced.consistency is Consistency.CRASH
        assert quiesced.levels == {"shop": Consistency.FILE_SYSTEM, "depot": Consistency.CRASH}
        assert source.thaw(quiesced)
        assert shop.status() == depot.status() == (True, True)


def test_vms_of_a_set_are_paused_together_also_with_one_disk_each(shop: Guest, guests: GuestLab) -> None:
    disks = [LabDisk(dev="vda", path=guests.file("single.raw", 64 * MIB))]
    with guests.guest("single", disks, options={"agent": "no"}) as single, Link(guests.uri, SystemClock()) as link:
        source = CombinedSource({"vm": LibvirtSource(link, SystemClock(), exclude=["shop:vdb"])})
        assert not source.describe(["vm:single"]).paused, "one disk is at one instant anyhow"
        workload = source.describe(["vm:shop", "vm:single"])
        assert workload.paused
        quiesced = source.quiesce(workload, DEADLINE)
        assert paused(shop) and paused(single)
        assert source.thaw(quiesced)
        held = source.held_ms(quiesced)
        assert held is not None and held > 0
    assert shop.status() == (True, True)


def test_a_disk_under_another_job_is_refused_and_left_alone(
    shop: Guest, guests: GuestLab, source: LibvirtSource
) -> None:
    workload: Workload = source.describe(["shop"])
    copy = os.path.join(guests.folder, "copy.raw")
    shop.domain().blockCopy(
        "vda", f"<disk type='file'><source file='{copy}'/><driver type='raw'/></disk>", {}, _TRANSIENT_JOB
    )
    try:
        with pytest.raises(DomainBusy, match="block job runs on its disk vda"):
            source.quiesce(workload, DEADLINE)
        assert shop.status() == (True, True)
    finally:
        shop.domain().blockJobAbort("vda", 0)
