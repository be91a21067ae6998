"""Directories: what a listing holds, how files are called, and manifests that cannot lead out of their tree."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from graincopy.core.errors import PathMissing, PathUnfit
from graincopy.model.tree import Entry, Kind, Manifest, definition_of, file_name, manifests
from graincopy.model.workload import FileMetadata, Tree
from graincopy.workloads.tree import differences, list_live, names_below


def read_metadata(fd: int) -> FileMetadata:
    found = os.fstat(fd)
    return FileMetadata(mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "etc"
    (root / "deep/er").mkdir(parents=True)
    (root / "empty").mkdir(mode=0o711)
    (root / "a.conf").write_bytes(b"a")
    (root / "deep/er/b.conf").write_bytes(b"b")
    os.link(root / "a.conf", root / "deep/same.conf")
    (root / "link").symlink_to("../elsewhere")
    (root / ".graincopy").mkdir()
    (root / ".graincopy/x.target").write_bytes(b"ours")
    return root


def listed(root: Path, *exclude: str) -> dict[str, Entry]:
    manifest = list_live(Tree(path=str(root), name="etc", exclude=exclude), read_metadata).manifest
    return {os.fsdecode(entry.path): entry for entry in manifest.entries}


def test_everything_is_in_the_manifest_and_files_are_disks(root: Path) -> None:
    os.chmod(root / "empty", 0o711)
    tree = Tree(path=str(root), name="etc")
    listing = list_live(tree, read_metadata)
    entries = listed(root)
    assert {path: entry.kind for path, entry in entries.items()} == {
        "": Kind.FOLDER,
        "a.conf": Kind.FILE,
        "deep": Kind.FOLDER,
        "deep/er": Kind.FOLDER,
        "deep/er/b.conf": Kind.FILE,
        "deep/same.conf": Kind.SAME,
        "empty": Kind.FOLDER,
        "link": Kind.LINK,
    }
    assert entries["link"].leads == b"../elsewhere"
    assert entries["deep/same.conf"].leads == b"a.conf"
    assert entries["empty"].mode == 0o711
    assert [file.path for file in listing.files] == [f"{root}/a.conf", f"{root}/deep/er/b.conf"]
    assert [file.name for file in listing.files] == ["etc%2Fa.conf", "etc%2Fdeep%2Fer%2Fb.conf"]
    assert {file.tree for file in listing.files} == {str(root)}
    assert manifests(dict([definition_of(listing.manifest)])) == (listing.manifest,)


def test_patterns_leave_out_whole_folders(root: Path) -> None:
    assert "deep/er/b.conf" not in listed(root, "deep/er")
    assert "deep" in listed(root, "deep/er")
    assert set(listed(root, "*.conf")) == {"", "deep", "deep/er", "empty", "link"}
    assert set(names_below(str(root), ("*.conf",))) == {"deep", "deep/er", "empty", "link"}


def test_sockets_and_mounts_are_left_out_and_said(root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(root)  # the path of a socket is short
        server.bind("sock")
        os.chdir("/")
        listing = list_live(Tree(path=str(root), name="etc"), read_metadata, {f"{root}/deep"})
    assert [file.path for file in listing.files] == [f"{root}/a.conf"]
    assert any("1 sockets" in note and "sock" in note for note in listing.notes)
    assert any("mounted at deep" in note for note in listing.notes)


def test_names_are_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"a b\n\xff%")
    with open(tmp_path / name, "wb"):
        pass
    listing = list_live(Tree(path=str(tmp_path), name="t"), read_metadata)
    assert listing.files[0].path == f"{tmp_path}/{name}"
    (manifest,) = manifests(dict([definition_of(listing.manifest)]))
    assert manifest.named(Kind.FILE)[0][0] == name


def test_names_of_files_differ_and_fit(tmp_path: Path) -> None:
    tree = Tree(path="/t", name="t")
    names = [file_name(tree, path) for path in ("a/b", "a%2Fb", "x" * 300 + "/1", "y" * 300 + "/1")]
    assert len(set(names)) == 4
    assert all(len(os.fsencode(name)) <= 255 and "/" not in name for name in names)


def test_what_is_no_directory_is_refused(root: Path) -> None:
    for path, error in ((root / "nothing", PathMissing), (root / "a.conf", PathUnfit), (root / "link", PathUnfit)):
        with pytest.raises(error):
            list_live(Tree(path=str(path), name="t"), read_metadata)


@pytest.mark.parametrize("path", [b"../x", b"/etc", b"a/../../x", b"link/x", b"a//b", b"nowhere/x", b"x\0y"])
def test_a_manifest_that_leads_out_is_refused(path: bytes) -> None:
    folders = [Entry(path=b"", kind=Kind.FOLDER), Entry(path=b"a", kind=Kind.FOLDER)]
    entries = (*folders, Entry(path=b"link", kind=Kind.LINK, leads=b"/"), Entry(path=path, kind=Kind.FILE))
    with pytest.raises(ValueError, match="impossible path"):
        manifests(dict([definition_of(Manifest(path=b"/t", name="t", entries=entries))]))


def test_what_came_and_went_is_said(root: Path) -> None:
    before = list_live(Tree(path=str(root), name="etc"), read_metadata).files
    os.rename(root / "deep/er/b.conf", root / "deep/er/c.conf")
    now = list_live(Tree(path=str(root), name="etc"), read_metadata).files
    went, came = differences(before, now)
    assert "1 files went" in went
    assert "deep/er/c.conf" in came
    assert list(differences(now, now)) == []
