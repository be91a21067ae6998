"""Files as a workload: which paths are taken, what they are called, and that order does not matter."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graincopy.core.errors import PathMissing, PathUnfit, PathUnreadable, Unsupported, WorkloadWrong
from graincopy.model.workload import Consistency, FileMetadata, Workload
from graincopy.workloads.files import LONGEST_NAME, FilesSource, disk_names
from graincopy.workloads.memory import MemorySource

parts = st.lists(
    st.text("abA_-. \n", min_size=1, max_size=4).filter(lambda part: part.strip(".")), min_size=1, max_size=4
)


@pytest.fixture
def disks(tmp_path: Path) -> Path:
    for name in ("a/web.raw", "b/web.raw", "db.raw"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"disk")
    return tmp_path


def names(workload: Workload) -> list[str]:
    return [file.name for file in workload.files]


def test_any_order_and_any_spelling_is_the_same_workload(disks: Path) -> None:
    source = FilesSource(cwd=str(disks))
    (disks / "link.raw").symlink_to("b/web.raw")
    first = source.describe(["a/web.raw", "b/web.raw", "db.raw"])
    again = source.describe(["db.raw", f"{disks}/link.raw", "a/../a/./web.raw", "b/web.raw", "link.raw"])
    assert first == again
    assert [file.path for file in first.files] == [f"{disks}/{name}" for name in ("a/web.raw", "b/web.raw", "db.raw")]
    assert names(first) == ["a_web.raw", "b_web.raw", "db.raw"]
    assert first.kind == "files"
    assert first.name == f"files-{first.id[:8]}"
    assert source.describe(["db.raw"]).id != first.id


def test_a_name_is_the_identity_whatever_the_files(disks: Path) -> None:
    source = FilesSource(cwd=str(disks))
    one, other = source.describe(["db.raw"], "shop"), source.describe(["a/web.raw", "db.raw"], "shop")
    assert one.id == other.id
    assert one.name == "shop"
    assert one.files[0].disk == other.files[1].disk
    assert one.id != source.describe(["db.raw"], "shop2").id


def test_metadata_comes_from_the_file_or_from_who_knows_better(disks: Path) -> None:
    os.chmod(disks / "db.raw", 0o640)
    (plain,) = FilesSource(cwd=str(disks)).describe(["db.raw"]).files
    assert plain.metadata.mode == 0o640
    assert plain.metadata.uid == os.stat(disks / "db.raw").st_uid
    rich = FileMetadata(xattrs={"user.x": b"1"}, nodatacow=True)
    (told,) = FilesSource(cwd=str(disks), metadata=lambda path: rich).describe(["db.raw"]).files
    assert told.metadata == rich


def test_paths_are_bytes(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/a b\n\xff,.raw")
    with open(path, "wb"):
        pass
    (file,) = FilesSource(cwd="/").describe([path]).files
    assert file.path == path
    assert file.name == os.path.basename(path)


def test_what_is_missing_is_missing(disks: Path) -> None:
    (disks / "dangling").symlink_to("nowhere")
    for path in ("nothing", "dangling", "db.raw/below", "no/such/folder"):
        with pytest.raises(PathMissing, match="does not exist"):
            FilesSource(cwd=str(disks)).describe(["db.raw", path])


def test_what_is_no_disk_is_refused_by_its_kind(disks: Path) -> None:
    os.mkfifo(disks / "fifo")
    (disks / "loop1").symlink_to("loop2")
    (disks / "loop2").symlink_to("loop1")
    (disks / "to-folder").symlink_to("a")
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(disks)
        bound.bind("socket")
        os.chdir("/")
    kinds = {
        "a": "a directory",
        "to-folder": "a directory",
        "fifo": "a FIFO",
        "socket": "a socket",
        "/dev/null": "a character device",
        "loop1": "a symlink loop",
        "loop1/x": "a symlink loop",
    }
    for path, kind in kinds.items():
        with pytest.raises(PathUnfit, match=kind):
            FilesSource(cwd=str(disks)).describe([path])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to stop being root")
def test_what_cannot_be_read_is_refused(disks: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    os.chmod(disks / "db.raw", 0o600)
    os.chmod(disks / "a", 0o700)
    opened = [disks, *(parent for parent in disks.parents if parent.stat().st_uid == 0 and parent.name)]
    before = {path: path.stat().st_mode for path in opened}
    for path in opened:
        os.chmod(path, before[path] | 0o055)
    os.seteuid(65534)
    try:
        for path in ("db.raw", "a/web.raw"):
            with pytest.raises(PathUnreadable, match=r"[Pp]ermission denied"):
                FilesSource(cwd=str(disks)).describe([path])
        FilesSource(cwd=str(disks)).describe(["b/web.raw"])
    finally:
        os.seteuid(0)
        for path in opened:
            os.chmod(path, before[path])


def test_nothing_is_no_workload() -> None:
    for selectors in ([], [""], ["a\0b"]):
        with pytest.raises(WorkloadWrong):
            FilesSource(cwd="/").describe(selectors)


def test_files_have_no_powers(disks: Path) -> None:
    source = FilesSource(cwd=str(disks))
    workload = source.describe(["db.raw"])
    assert source.list() == ()
    quiesced = source.quiesce(workload, deadline=1.0)
    assert quiesced.consistency is Consistency.CRASH
    assert source.thaw(quiesced)
    with pytest.raises(Unsupported):
        source.define(workload)


# --- names ----------------------------------------------------------------------------------------


def test_names_as_pictures() -> None:
    assert disk_names(["/a/x", "/b/y"]) == {"/a/x": "x", "/b/y": "y"}
    assert disk_names(["/a/x", "/b/x", "/b/y"]) == {"/a/x": "a_x", "/b/x": "b_x", "/b/y": "y"}
    assert disk_names(["/1/a/x", "/2/a/x", "/2/b/x"]) == {"/1/a/x": "1_a_x", "/2/a/x": "2_a_x", "/2/b/x": "b_x"}
    assert disk_names(["/x", "/a/x"]) == {"/x": "x", "/a/x": "a_x"}


@given(st.lists(parts, min_size=1, max_size=6))
def test_names_are_distinct_legal_and_the_same_in_any_order(found: list[list[str]]) -> None:
    paths = list({"/" + "/".join(path) for path in found})
    named = disk_names(paths)
    assert len(set(named.values())) == len(paths)
    assert all(name and "/" not in name and name not in (".", "..") for name in named.values())
    random.Random(1).shuffle(paths)
    assert disk_names(paths) == named


def test_names_that_meet_in_one_are_kept_apart() -> None:
    paths = ["/a_b/c", "/a/b_c", "/x/c", "/x/b_c", "/c", "/b_c", "/a_b_c"]
    named = disk_names(paths)
    assert len(set(named.values())) == len(paths)


def test_long_names_fit() -> None:
    long = "ä" * 127
    named = disk_names([f"/one/{long}", f"/two/{long}", "/one/" + "x" * 255, "/two/" + "x" * 255])
    assert len(set(named.values())) == 4
    assert all(len(os.fsencode(name)) <= LONGEST_NAME for name in named.values())


# --- the reference source -------------------------------------------------------------------------


def test_the_reference_source_keeps_the_contract(disks: Path) -> None:
    shop = FilesSource(cwd=str(disks)).describe(["db.raw"], "shop")
    web = FilesSource(cwd=str(disks)).describe(["a/web.raw"], "web")
    source = MemorySource([shop, web])
    assert source.capabilities().quiesce
    assert source.list() == ("shop", "web")
    assert source.describe(["shop"]) == shop
    assert source.describe(["web", "shop"]) == source.describe(["shop", "web", "shop"])
    assert names(source.describe(["web", "shop"])) == ["db.raw", "web.raw"]
    for selectors in ([], ["shop", "nobody"]):
        with pytest.raises(WorkloadWrong):
            source.describe(selectors)
    quiesced = source.quiesce(shop, deadline=1.0)
    assert quiesced.consistency is Consistency.APPLICATION
    assert source.thaw(quiesced)
    assert not source.thaw(quiesced), "thawed already: the quiesce had not held until the second thaw"
    empty = MemorySource()
    empty.define(shop)
    assert empty.describe(["shop"]) == shop
