"""A repository truncated, bit-flipped, robbed or mixed up: nothing wrong is restored, and new backups mend it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import story
from story import GRAIN, MIB, Cli, Stage, noise

Damage = Callable[[list[str]], None]


def truncated(paths: list[str]) -> None:
    for path in paths:
        os.truncate(path, os.path.getsize(path) // 2)


def flipped(paths: list[str]) -> None:
    """One bit in the middle of each."""
    for path in paths:
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0x10]))


def missing(paths: list[str]) -> None:
    for path in paths:
        os.unlink(path)


def swapped(paths: list[str]) -> None:
    """The first with the second, and so on in a ring."""
    contents = [story.read(path) for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        with open(path, "wb") as file:
            file.write(content)


@dataclass
class Kept:
    """A repository with two restore points of one disk."""

    cli: Cli
    path: str
    states: list[bytes]

    def objects(self, kind: str) -> list[str]:
        found = story.files_below(f"{self.cli.repo}/{kind}")
        for path in found:
            os.chmod(path, 0o600)
        return found

    def forget_cache(self) -> None:
        shutil.rmtree(f"{self.cli.folder}/cache", ignore_errors=True)

    def restores_right_or_not_at_all(self, back: int) -> int:
        """The exit code; whatever it is, no wrong byte was written under the disk's name."""
        out = f"{self.cli.folder}/out-{back}-{len(os.listdir(self.cli.folder))}"
        done = self.cli("restore", f"latest~{back}", "--to", out)
        made = f"{out}/a.raw"
        if done.code == 0:
            assert story.read(made) in self.states
        else:
            assert done.err.count("\n") <= 3
            assert not os.path.exists(made)
        return done.code


@pytest.fixture
def kept(cli: Cli, plain: str) -> Kept:
    path = story.make_disk(f"{plain}/a.raw", 2 * MIB, (0, noise(1, MIB)))
    states = []
    for turn in range(2):
        story.write(path, (turn * GRAIN, noise(7 + turn, GRAIN)))
        cli.backup(path)
        states.append(story.read(path))
    return Kept(cli, path, states)


@pytest.mark.parametrize("damage", [truncated, flipped, missing, swapped])
@pytest.mark.parametrize("kind", ["data", "node"])
def test_damaged_packs_are_found_and_nothing_wrong_is_restored(kept: Kept, kind: str, damage: Damage) -> None:
    damage(kept.objects(kind))
    found = kept.cli("check", "--data", "--json")
    assert found.code == 63
    affected = {point for finding in found.json["findings"] for point in finding["points"]}
    assert affected == {point["restore_point"] for point in kept.cli.ok("points")}
    assert kept.restores_right_or_not_at_all(0) in (35, 36)
    if kept.cli("restore", "latest~1", "--in-place").code == 0:  # the grains that differ were not hit
        assert story.read(kept.path) == kept.states[0]
    else:
        assert story.read(kept.path) == kept.states[1]


@pytest.mark.parametrize("damage", [truncated, missing])
@pytest.mark.parametrize("kind", ["data", "node"])
def test_a_new_backup_stores_anew_what_packs_have_lost(kept: Kept, kind: str, damage: Damage) -> None:
    damage(kept.objects(kind))
    kept.cli.backup(kept.path)
    assert kept.restores_right_or_not_at_all(0) == 0


@pytest.mark.root
@pytest.mark.parametrize("kind", ["data", "node"])
def test_an_incremental_backup_stores_anew_what_packs_have_lost(stage: Stage, cli: Cli, kind: str) -> None:
    """Nothing changed, so that nothing would be read."""
    path = story.make_disk(stage.path(0, "a.raw"), 2 * MIB, (0, noise(1, MIB)))
    kept = Kept(cli, path, [story.read(path)])
    cli.backup(path)
    missing(kept.objects(kind))
    mended = cli.backup(path)["disks"][0]
    assert mended["change_map"] == "the repository has lost parts of the base"
    assert kept.restores_right_or_not_at_all(0) == 0
    after = cli.backup(path)["disks"][0]
    assert (after["change_map"], after["read_bytes"]) == ("extents", 0)
    assert kept.restores_right_or_not_at_all(0) == 0


@pytest.mark.parametrize("kind", ["data", "node"])
def test_what_a_check_found_flipped_is_stored_anew_by_the_next_backup(kept: Kept, kind: str) -> None:
    flipped(kept.objects(kind))
    assert kept.cli("check", "--data").code == 63
    kept.cli.backup(kept.path)
    assert kept.restores_right_or_not_at_all(0) == 0
    found = kept.cli("check", "--data", "--json")
    newest = kept.cli.ok("points")[0]["restore_point"]
    assert found.code == 63
    assert newest not in {point for finding in found.json["findings"] for point in finding["points"]}


@pytest.mark.parametrize("damage", [truncated, flipped, missing, swapped])
def test_a_damaged_index_is_rebuilt_from_the_packs(kept: Kept, damage: Damage) -> None:
    damage(kept.objects("index"))
    kept.forget_cache()
    assert kept.cli("check", "--data").code == (0 if damage is missing else 63)
    assert [kept.restores_right_or_not_at_all(back) for back in range(2)] == [0, 0]
    kept.cli.ok("backup", kept.path)
    assert kept.restores_right_or_not_at_all(0) == 0


@pytest.mark.parametrize("damage", [truncated, flipped, missing, swapped])
def test_a_damaged_restore_point_takes_no_other_with_it(kept: Kept, damage: Damage) -> None:
    newest, older = (f"{kept.cli.repo}/points/{point['restore_point']}" for point in kept.cli.ok("points"))
    for path in (newest, older):
        os.chmod(path, 0o600)
    damage([newest, older] if damage is swapped else [newest])
    assert kept.cli("check").code == (0 if damage is missing else 63)
    named = kept.cli("show", os.path.basename(newest))
    assert named.code == (50 if damage is missing else 35)
    if damage is not swapped:
        assert kept.restores_right_or_not_at_all(0) == 0
    story.write(kept.path, (0, b"later"))
    kept.states.append(story.read(kept.path))
    kept.cli.ok("backup", kept.path)
    assert kept.restores_right_or_not_at_all(0) == 0


@pytest.mark.parametrize("name", ["config", "keys", "keyring"])
@pytest.mark.parametrize("damage", [truncated, flipped, missing])
def test_without_its_keys_a_repository_is_refused_and_left_alone(kept: Kept, name: str, damage: Damage) -> None:
    path = f"{kept.cli.repo}/{name}"
    if os.path.isdir(path):
        damage(kept.objects(name))
    else:
        os.chmod(path, 0o600)
        damage([path])
    before = {path: story.digest(path) for path in story.files_below(kept.cli.repo)}
    for argv in (("points",), ("backup", kept.path), ("init", "--no-encryption")):
        assert kept.cli(*argv).code in (30, 31, 35, 36)
    assert {path: story.digest(path) for path in story.files_below(kept.cli.repo)} == before
