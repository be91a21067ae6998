"""What the configuration makes workloads of: sets and subsystems, for ``graincopy workloads``."""

from __future__ import annotations

from graincopy.app.wiring import Wiring
from graincopy.workloads.known_subsystems import BUILT_IN


def sets_and_subsystems(wiring: Wiring) -> tuple[dict[str, object], ...]:
    """One document for each, by name: what ``graincopy backup`` calls it, its kind, what is in it. No effect."""
    sets: list[dict[str, object]] = [
        {"workload": f"set:{name}", "kind": "set", "members": list(found.members)}
        for name, found in sorted(wiring.config.set.items())
    ]
    subsystems: list[dict[str, object]] = [
        {
            "workload": f"subsystem:{name}",
            "kind": "subsystem",
            "members": [*spec.files, *spec.directories] or [f"found by itself ({spec.kind})"],
        }
        for name, spec in sorted({**BUILT_IN, **wiring.config.subsystem}.items())
    ]
    return (*sets, *subsystems)
