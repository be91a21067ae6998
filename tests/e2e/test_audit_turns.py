"""The audit of directories: files take turns, each has its own in time, and what is printed is what holds."""

from __future__ import annotations

import json
import os

import pytest
import story
from story import GRAIN, Cli, Stage, noise

pytestmark = pytest.mark.root

FILES, AUDITED = 10, 3


def test_files_take_turns_and_each_has_one_whatever_expires(stage: Stage, cli: Cli) -> None:
    """The count of restore points says nothing: with retention it stands still, and so would the turn."""
    root = stage.path(0, "etc")
    os.mkdir(root)
    for number in range(FILES):
        story.make_disk(f"{root}/f{number}", 4 * GRAIN, (0, noise(number, 4 * GRAIN)))
    cli.configure(f'[backup]\naudit = "{AUDITED}"\n[subsystem.etc]\ndirectories = {json.dumps([root])}')
    cli.ok("backup", "subsystem:etc")
    seen: list[set[str]] = []
    for _ in range(8):
        disks = cli.ok("backup", "subsystem:etc", "--audit", str(AUDITED))["disks"]
        cli.ok("expire", "--keep-last", "1")
        assert {disk["change_map"] for disk in disks} == {"extents"}
        seen.append({disk["name"] for disk in disks if disk["audit_bytes"]})
    assert {len(names) for names in seen} == {AUDITED}
    for start in range(5):
        assert len(set.union(*seen[start : start + 4])) == FILES  # ten files, three a run: four runs

    done = cli("backup", "subsystem:etc")
    assert done.code == 0, done
    assert "audit: 7 of 10 files were not looked at; they have their turn in later runs" in done.out
    # four grains each, of which three are looked at and the cursor takes two: twice four runs
    assert done.out.count("all are covered every 8 runs") == AUDITED
    everything = cli("backup", "subsystem:etc", "--audit", "all")
    assert "not looked at" not in everything.out
    assert everything.out.count("all are covered in each run") == FILES
