"""A target with several files is attached once for all of them, and so is the checkpoint: on huge LUNs that is dear."""

from __future__ import annotations

import pytest
import story
from story import GRAIN, MIB, Cli, Stage, noise

from graincopy.volumes import reflink_attach

pytestmark = pytest.mark.root


@pytest.mark.parametrize("lun", [0, 1], ids=["ext4", "xfs"])
def test_one_mount_of_each_target_for_many_files(
    stage: Stage, cli: Cli, monkeypatch: pytest.MonkeyPatch, lun: int
) -> None:
    attached: list[str] = []
    usual = reflink_attach.attach
    monkeypatch.setattr(reflink_attach, "attach", lambda *words: (attached.append(words[0]), usual(*words))[1])
    paths = [story.make_disk(stage.path(lun, f"{n}.raw"), MIB, (0, noise(n, MIB))) for n in range(4)]
    cli.backup(*paths)
    assert len(attached) == 1
    attached.clear()
    for path in paths:
        story.write(path, (GRAIN, b"changed"))
    disks = cli.backup(*paths)["disks"]
    assert [(disk["change_map"], disk["dirty_bytes"]) for disk in disks] == [("extents", GRAIN)] * 4
    assert len(attached) == 2  # T and the checkpoint
