"""mount, files and extract on a real repository: what people type, what they get, what is left."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import guest_lab
import pytest
from guest_lab import MIB, lab, needs, root_test

from graincopy.app import browsing
from graincopy.app.answer import Answer, decodable
from graincopy.app.listing import listing_answer
from graincopy.app.settings import read_settings
from graincopy.app.wiring import Wiring, wire
from graincopy.cli.main import run
from graincopy.core.errors import (
    DONE,
    WARNED,
    DiskUnknown,
    GuestPathMissing,
    MountPointUnfit,
    OutputExists,
    PointUnknown,
    UsageWrong,
)

MOUNT = """
import sys
from graincopy.app.browsing import mount
from graincopy.app.settings import read_settings
from graincopy.app.wiring import wire
wiring = wire(read_settings(sys.argv[1], sys.argv[2]))
answer = mount(wiring, {"point": "latest", "directory": sys.argv[3], "medium_only": True})
print(answer.exit_code, answer.document["disks"][0]["name"])
"""


class Host:
    """A repository with one restore point of two disks: one with two partitions, one with ext4 all over."""

    def __init__(self, folder: str) -> None:
        self.folder, self.repo, self.config = folder, f"{folder}/repo", f"{folder}/config.toml"
        Path(self.config).write_text(f"[paths]\nstate = '{folder}/state'\ncache = '{folder}/cache'\n", encoding="utf-8")
        self.tree = guest_lab.make_tree(f"{folder}/tree")
        os.makedirs(f"{folder}/small/boot")
        whole = guest_lab.make_ext4(f"{folder}/data.img", self.tree)
        small = guest_lab.make_ext4(f"{folder}/small.img", f"{folder}/small", 8 * MIB)
        guest_lab.partition(f"{folder}/vm.img", "gpt", "size=8MiB\nsize=96MiB\n", {1: small, 2: whole}, 128 * MIB)
        self.cli("init", "--no-encryption")
        self.cli("backup", f"{folder}/vm.img", whole)

    def cli(self, *words: str) -> None:
        """One command that must be done."""
        assert run([*words, "--repo", self.repo, "--config", self.config]) in (DONE, WARNED)

    @property
    def wiring(self) -> Wiring:
        """As the command line makes it."""
        return wire(read_settings(self.config, self.repo))

    def __call__(self, action: Callable[[Wiring, dict[str, Any]], Answer], where: str = "", **values: object) -> Answer:
        """One operation on the latest point."""
        usual = {"point": "latest", "where": where, "medium_only": True, "json": True}
        return action(self.wiring, {**usual, **values})


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(os.fspath(tmp_path_factory.mktemp("host")))


def document(answer: Answer) -> Any:
    json.dumps(answer.document)
    return answer.document


@needs("sfdisk")
def test_files_lists_partitions_and_directories(host: Host) -> None:
    parts = document(host(browsing.files, "vm.img"))["partitions"]
    assert [(one["number"], one["file_system"], one["readable"]) for one in parts] == [
        (1, "ext4", True),
        (2, "ext4", True),
    ]
    found = document(host(browsing.files, "vm.img:/etc"))
    assert found["partition"] == 2
    assert [entry["name"] for entry in found["entries"]] == ["deep", "empty", "hosts", "link"]
    hosts = found["entries"][2]
    assert (hosts["type"], hosts["mode"], hosts["size"], hosts["mtime"]) == (
        "file",
        "0644",
        20,
        pytest.approx(1.5e9, abs=1),
    )
    assert document(host(browsing.files, "data.img:/etc/hosts"))["entries"][0]["name"] == "hosts"


@needs("sfdisk")
def test_files_for_people(host: Host) -> None:
    lines = host(browsing.files, "data.img:/", json=False).lines
    assert any(line.startswith("-rwsr-xr-x") and line.endswith(" setuid") for line in lines)
    assert any(line.endswith(" etc/link") or line.endswith(" up -> /etc/../../../../etc/hosts") for line in lines)
    assert all("\n" not in line for line in lines)
    assert any("bad\\xff\\xfename" in line for line in lines)
    assert "ext4" in "\n".join(host(browsing.files, "vm.img", json=False).lines)


def test_a_long_listing_is_not_held(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = host(browsing.files, "data.img:/").document
    assert isinstance(whole, dict)
    monkeypatch.setattr(browsing, "listing_answer", functools.partial(listing_answer, limit=3))
    answer = host(browsing.files, "data.img:/")
    assert answer.document is None
    streamed = json.loads(capsys.readouterr().out)
    assert len(streamed["entries"]) > 3
    assert sorted(streamed["entries"], key=str) == sorted(decodable(whole["entries"]), key=str)
    assert {**streamed, "entries": []} == {**whole, "entries": []}
    lines = host(browsing.files, "data.img:/", json=False).lines
    assert len(capsys.readouterr().out.splitlines()) + len(lines) == len(streamed["entries"])


@needs("sfdisk")
def test_extract_a_tree(host: Host, tmp_path: Path) -> None:
    answer = host(browsing.extract, "vm.img:/etc/", to=f"{tmp_path}/new/out")
    assert answer.exit_code == DONE, answer.warnings
    expected = guest_lab.without_privileges(guest_lab.describe(f"{host.tree}/etc", times=False))
    assert guest_lab.describe(f"{tmp_path}/new/out/etc", times=False) == expected
    told = document(answer)
    assert (told["files"], told["directories"], told["target"]) == (3, 3, f"{tmp_path}/new/out/etc")
    with pytest.raises(OutputExists):
        host(browsing.extract, "vm.img:/etc", to=f"{tmp_path}/new/out")


@needs("sfdisk")
def test_extract_everything_of_a_partition(host: Host, tmp_path: Path) -> None:
    answer = host(browsing.extract, "vm.img@1:/", to=f"{tmp_path}/out")
    assert answer.exit_code == DONE and sorted(os.listdir(tmp_path / "out")) == ["boot", "lost+found"]


@needs("sfdisk")
def test_extract_a_file_to_standard_output(host: Host, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    answer = host(browsing.extract, "data.img:/etc/link", to="-", json=False)
    assert answer.lines == () and capfdbinary.readouterr().out == b"127.0.0.1 localhost\n"
    with pytest.raises(UsageWrong, match="directory"):
        host(browsing.extract, "data.img:/etc", to="-", json=False)


@needs("sfdisk")
def test_little_is_fetched_for_one_file(host: Host, tmp_path: Path) -> None:
    told = document(host(browsing.extract, "vm.img:/etc/hosts", to=os.fspath(tmp_path)))
    assert told["view"]["fetched_bytes"] < 8 * MIB


@needs("sfdisk")
@pytest.mark.parametrize(
    ("where", "values", "error"),
    [
        ("vm.im", {}, DiskUnknown),
        ("vm.img:/etc/hots", {}, GuestPathMissing),
        ("vm.img@7:/etc", {}, GuestPathMissing),
        ("vm.img:/lost+found", {}, UsageWrong),
        ("vm.img:/etc", {"point": "0123456789"}, PointUnknown),
    ],
)
def test_what_is_not_there(host: Host, where: str, values: dict[str, str], error: type[Exception]) -> None:
    with pytest.raises(error):
        host(browsing.files, where, **values)


@needs("sfdisk")
def test_usage(host: Host, tmp_path: Path) -> None:
    with pytest.raises(UsageWrong, match="DISK:PATH"):
        host(browsing.extract, "vm.img", to=os.fspath(tmp_path))
    with pytest.raises(UsageWrong, match="--to"):
        host(browsing.extract, "vm.img:/etc", to=None)
    with pytest.raises(UsageWrong, match="json"):
        host(browsing.extract, "vm.img:/etc/hosts", to="-")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(MountPointUnfit):
        host(browsing.mount, directory=os.fspath(tmp_path / "full"))


@root_test
@needs("sfdisk")
@needs("fusermount3")
def test_mount_shows_the_disks_until_sigterm(host: Host, tmp_path: Path) -> None:
    (tmp_path / "point").mkdir()
    command = [sys.executable, "-c", MOUNT, host.config, host.repo, f"{tmp_path}/point"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "it ends with: fusermount3 -u" in process.stdout.readline()
        for name in ("vm.img", "data.img"):
            assert (tmp_path / "point" / name).read_bytes() == Path(f"{host.folder}/{name}").read_bytes()
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=20)
        assert said.split() == ["0", "data.img"] and process.returncode == 0
    finally:
        process.kill()
        process.wait()
        lab.run("umount", "--lazy", f"{tmp_path}/point", check=False)
    assert os.listdir(tmp_path / "point") == []
