"""The power goes where S and its targets lie: what graincopy relies on afterwards was durable before it relied on it.

The backing image of the file system is copied under it: what was not flushed to the device is not in the copy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import lab
import pytest
import scene
import story

SIZE = 3 * lab.MIB + 777  # bytes


@contextlib.contextmanager
def storage(folder: str, outer: str, lun: bool) -> Iterator[tuple[lab.ReflinkFs, str]]:
    """A file system that clones files, and where disks lie: on it, or on a LUN of it."""
    with contextlib.ExitStack() as held:
        made = held.enter_context(lab.ReflinkFs(folder, outer, 512 * lab.MIB))
        if not lun:
            yield made, made.path
            return
        image = held.enter_context(lab.Lun(made.path, "lun", 64 * lab.MIB, "ext4", mount_at=f"{folder}/ds"))
        yield made, image.path


@dataclass
class Cut:
    """What the device held at one moment, and what the file system showed then."""

    image: str
    why: str
    files: dict[str, str]


@contextlib.contextmanager
def found_after(cut: Cut, fs_type: str, folder: str) -> Iterator[str]:
    """Where it is mounted when the power is back. Not beside the file system that it was: they have one UUID."""
    point, device = f"{folder}/cut", lab.bind(cut.image)
    try:
        os.makedirs(point, exist_ok=True)
        lab.run("mount", *(("-o", "nouuid") if fs_type == "xfs" else ()), device, point)
        try:
            yield point
        finally:
            lab.unmount(point)
    finally:
        lab.unbind(device)


def targets(home: str) -> dict[str, str]:
    """Every target below ``home`` by its path there, and its sha256."""
    folders = [os.path.join(home, name) for name in (".graincopy", ".graincopy.btrfs")]
    return {os.path.relpath(path, home): story.digest(path) for each in folders for path in story.files_below(each)}


@lab.root_test
@pytest.mark.parametrize(("outer", "lun"), [("xfs", False), ("btrfs", False), ("xfs", True), ("btrfs", True)])
def test_undo_and_checkpoint_are_there_before_they_are_needed(
    cli: story.Cli, tmp_path: os.PathLike[str], outer: str, lun: bool
) -> None:
    folder = os.fspath(tmp_path)
    cuts: list[Cut] = []

    def cut(home: lab.ReflinkFs, why: str, *paths: str) -> None:
        image = f"{folder}/cut{len(cuts)}.img"
        lab.run("cp", "--reflink=never", "--sparse=always", home.image, image)
        files = targets(home.path) | {os.path.relpath(path, home.path): story.digest(path) for path in paths}
        cuts.append(Cut(image, why, files))

    with storage(folder, outer, lun) as (home, place):
        disk = story.make_disk(f"{place}/a.raw", SIZE, (0, story.noise(1, SIZE)))
        with scene.stopped(cli, "published", "backup", disk) as backup:
            cut(home, "the point names a checkpoint that is not durable")
            assert backup.go_on().code == 0
        assert cuts[0].files
        story.write(disk, (70_000, story.noise(2, 300_000)))
        os.truncate(disk, SIZE + 5000)
        lab.run("sync", "-f", disk)
        before = story.digest(disk)
        with scene.stopped(cli, "recorded", "restore", "latest", "--in-place") as restore:
            cut(home, "S may be written, and what takes it back is not durable")
            assert restore.go_on().code == 0
        assert len(cuts[1].files) > len(cuts[0].files)
        cli.ok("undo", cli.ok("targets")["restores"][0]["restore"])
        assert story.digest(disk) == before
        with scene.stopped(cli, "done", "restore", "latest", "--in-place") as restore:
            cut(home, "it is said to be done, and is not durable", *(() if lun else (disk,)))
            assert restore.go_on().code == 0
    for one in cuts:
        with found_after(one, outer, folder) as home_then:
            assert {name: found(f"{home_then}/{name}") for name in one.files} == one.files, one.why


def found(path: str) -> str:
    return story.digest(path) if os.path.exists(path) else "gone"
