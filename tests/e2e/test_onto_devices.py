"""Onto other storage: what was a file becomes a whole block device, is backed up there, and becomes a file again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import lab
import pytest
import story
from story import MIB, Cli, Stage, noise

pytestmark = pytest.mark.root


@pytest.fixture
def device(stage: Stage) -> Iterator[str]:
    """A LUN as a block device, with somebody's old bytes on it."""
    image = f"{stage.outer.path}/raw.img"
    lab.sparse(image, 4 * MIB)
    lab.write_at(image, (0, noise(9, 4 * MIB)))
    found = lab.bind(image)
    yield found
    lab.unbind(found)
    os.unlink(image)


def test_from_a_file_onto_a_device_and_back_to_a_file(stage: Stage, cli: Cli, device: str) -> None:
    path = story.make_disk(stage.path(0, "web.raw"), 4 * MIB, (0, noise(1, MIB)), (3 * MIB, b"end"))
    other = story.make_disk(stage.path(0, "db.raw"), MIB, (0, noise(2, MIB)))
    point = cli.backup(path, other)["restore_point"]
    planned = cli.ok("restore", point, "--to", f"{cli.folder}/out", "--onto", f"web.raw={device}", "--dry-run")
    assert planned["plan"]["notes"] == [f"web.raw is written onto all of {device}"]
    assert story.read(device) == noise(9, 4 * MIB)

    document = cli.ok("restore", point, "--to", f"{cli.folder}/out", "--onto", f"web.raw={device}")
    assert {disk["name"]: disk["target"] for disk in document["disks"]} == {
        "web.raw": device,
        "db.raw": f"{cli.folder}/out/db.raw",
    }
    assert story.read(device) == story.read(path)  # where the disk has no bytes, the device has zeros
    assert os.listdir(f"{cli.folder}/out") == ["db.raw"]

    again = cli.backup(device)
    assert again["disks"][0]["driver"] == "reflink"
    out = cli.ok("restore", again["restore_point"], "--to", f"{cli.folder}/back")["disks"][0]["target"]
    assert story.read(out) == story.read(path)
    cli.undamaged()


@pytest.mark.parametrize(
    ("onto", "code", "says"),
    [
        ("nothing.raw={device}", 52, "nothing.raw"),
        ("web.raw={folder}/none", 11, "none"),
        ("web.raw={folder}/config.toml", 54, "it is no block device"),
        ("web.raw", 2, "--onto takes DISK=DEVICE, not web.raw"),
        ("large.raw={device}", 55, "{device}"),
    ],
)
def test_devices_that_cannot_take_it(stage: Stage, cli: Cli, device: str, onto: str, code: int, says: str) -> None:
    path = story.make_disk(stage.path(0, "web.raw"), MIB, (0, b"web"))
    large = story.make_disk(stage.path(0, "large.raw"), 5 * MIB, (0, b"large"))
    cli.backup(path, large)
    words = {"device": device, "folder": cli.folder}
    done = cli("restore", "latest", "--to", f"{cli.folder}/out", "--onto", onto.format(**words))
    assert (done.code, says.format(**words) in done.err, len(done.err.splitlines()) <= 3) == (code, True, True), done
    assert story.read(device) == noise(9, 4 * MIB)
    assert not os.path.exists(f"{cli.folder}/out")
