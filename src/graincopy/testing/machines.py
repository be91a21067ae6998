"""Random operations between snapshots, against the soundness and reconstruction laws. Needs hypothesis.

One machine for every lab: it makes disks of odd sizes, does to them whatever the lab can, snapshots now and then,
and compares any two of the snapshots. ``derandomize`` keeps it the same on every run; more examples are a parameter.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from graincopy.core.units import KIB
from graincopy.testing.lab import VolumeLab
from graincopy.testing.looking import Moment, check_change, powers
from graincopy.testing.oracle import LARGEST, Disk, Operation, appends, fit, kinds

MOMENTS = 3  # snapshots kept at once
SIZES = [512 * KIB, 300_123, 128 * KIB, 1000]  # bytes


def soundness_machine(lab: VolumeLab) -> type[RuleBasedStateMachine]:
    """A machine that works on ``lab``; each example makes its own disk and cleans up after itself."""
    number = st.integers(0, LARGEST - 1)
    operations = st.builds(
        lambda kind, offset, length, source, seed: Operation(kind[0], offset, length, source, seed, kind[1]),
        st.sampled_from(kinds(lab.powers)),
        number,
        number,
        number,
        st.integers(0, 999),
    )

    class Soundness(RuleBasedStateMachine):
        @initialize(size=st.sampled_from(SIZES), compressed=st.booleans())
        def start(self, size: int, compressed: bool) -> None:
            self.disk = Disk(lab, size, compressed=compressed and "compress" in lab.powers)
            self.disk.write(0, size, seed=2)
            self.moments = [Moment(lab, self.disk)]
            self.calm = True  # nothing happened since the last of them

        @rule(batch=st.lists(operations, min_size=1, max_size=4))
        def operate(self, batch: list[Operation]) -> None:
            self.calm = False
            for raw in batch:
                operation = fit(raw, self.disk.size, lab.block)
                if operation is not None and not (lab.fixed_size and appends(operation, self.disk.size)):
                    self.disk.do(operation)

        @precondition(lambda self: not self.calm and len(self.moments) < MOMENTS)
        @rule()
        def snapshot(self) -> None:
            self.calm = True
            self.moments.append(Moment(lab, self.disk))
            check_change(lab, self.moments[-2], self.moments[-1], self.disk)

        @precondition(lambda self: len(self.moments) > 2)
        @rule()
        def forget_the_middle(self) -> None:
            first, middle, last = self.moments
            lab.driver().delete(middle.target(self.disk))
            check_change(lab, first, last, self.disk)
            self.moments = [last]

        def teardown(self) -> None:
            try:
                if hasattr(self, "moments"):
                    self.moments.append(Moment(lab, self.disk))
                    check_change(lab, self.moments[0], self.moments[-1], self.disk)
            finally:
                lab.reset()

    return Soundness


def run_soundness(
    lab: VolumeLab, examples: int = 8, steps: int = 12, derandomize: bool = True, shrink: bool = False
) -> None:
    """Run the machine. Raises LawBroken, whose text tells what happened to the disk, or NotTried.

    ``shrink`` looks for the shortest sequence that fails, which takes minutes on real storage.
    """
    powers(lab, "change_map", "snapshots")
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=derandomize,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(soundness_machine(lab), settings=profile)
