"""What the configuration says about a subsystem: ``[subsystem.NAME]`` (stage 2)."""

from __future__ import annotations

import msgspec

from graincopy.model.workload import Consistency


class Subsystem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Named files and directories, and the commands that bring them to rest and let them go on."""

    kind: str = "plain"  # "plain"; or "libvirt", "postgresql": these know by themselves what belongs to it
    files: tuple[str, ...] = ()  # each must be there
    directories: tuple[str, ...] = ()  # with everything in them
    exclude: tuple[str, ...] = ()  # patterns of paths below a directory that are left out; * also matches /
    quiesce: tuple[str, ...] = ()  # program and arguments; no shell
    resume: tuple[str, ...] = ()  # must be harmless when nothing is quiesced
    timeout: float = 30.0  # seconds that each command may take
    hold: float = 0.0  # seconds that it may stay quiesced at most; 0: as freeze.deadline
    consistency: Consistency = Consistency.APPLICATION  # what quiesce reaches
    pauses: bool = False  # between quiesce and resume nobody writes: files may be cloned one after the other
    one_instant: bool = False  # refuse a backup whose files would not all show one instant


KINDS = ("plain", "libvirt", "postgresql")


def wrong(spec: Subsystem) -> str:
    """What cannot be meant in ``spec``: one clause, beginning with the key; empty when it is fine."""
    if spec.kind not in KINDS:
        return f"kind is one of {', '.join(KINDS)}, not {spec.kind}"
    if spec.kind == "plain" and not spec.files and not spec.directories:
        return "files or directories must name something"
    if spec.timeout <= 0:
        return "timeout must be more than 0"
    if spec.hold < 0:
        return "hold must not be less than 0"
    if spec.resume and not spec.quiesce:
        return "resume without quiesce has nothing to resume"
    if spec.pauses and not spec.quiesce:
        return "pauses needs a quiesce command that makes the writers stand still"
    relative = [path for path in (*spec.files, *spec.directories) if not path.startswith("/")]
    return f"{relative[0]} is no absolute path" if relative else ""
