"""Partition tables against sfdisk's account of them, and against nonsense."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from guest_lab import MIB, lab, make_btrfs, make_ext4, needs, partition, sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from graincopy.views.guest.partitions import Partition, find_partitions

LOGICAL = "size=8MiB, type=83\nsize=16MiB, type=83\ntype=5\nsize=4MiB, type=83\nsize=5MiB, type=7\nsize=6MiB, type=83\n"
GPT = 'size=8MiB, name="EFI system"\nsize=40MiB, name="röot"\nstart=100MiB, size=10MiB\n'


def read_file(path: str) -> tuple[Partition, ...]:
    with open(path, "rb") as file:
        return find_partitions(lambda at, n: os.pread(file.fileno(), n, at), os.path.getsize(path))


def ranges(told: dict[int, object]) -> set[tuple[int, int, int]]:
    return {(n, one["start"] * 512, one["size"] * 512) for n, one in told.items()}  # type: ignore[index]


@needs("sfdisk")
@pytest.mark.parametrize(("label", "script"), [("gpt", GPT), ("dos", LOGICAL)])
def test_tables_are_read_as_sfdisk_reads_them(tmp_path: Path, label: str, script: str) -> None:
    image = f"{tmp_path}/disk"
    told = partition(image, label, script, {}, 128 * MIB)
    extended = {number for number, one in told.items() if one["type"] == "5"}
    expected = {one for one in ranges(told) if one[0] not in extended}
    found = read_file(image)
    assert {(one.number, one.start, one.size) for one in found} == expected
    if label == "gpt":
        assert [one.name for one in found] == ["EFI system", "röot", ""]


@needs("sfdisk")
def test_a_gpt_whose_first_copy_is_damaged_is_read_from_the_second(tmp_path: Path) -> None:
    image = f"{tmp_path}/disk"
    partition(image, "gpt", GPT, {}, 128 * MIB)
    whole = read_file(image)
    for damaged_at in (512 + 60, 1024 + 32):
        with open(image, "r+b") as file:
            file.seek(damaged_at)
            file.write(b"\xa5")
        assert read_file(image) == whole


@needs("sfdisk")
def test_a_partition_that_leads_beyond_the_disk_is_cut(tmp_path: Path) -> None:
    image = f"{tmp_path}/disk"
    partition(image, "dos", "start=1MiB, size=100MiB, type=83\n", {}, 128 * MIB)
    os.truncate(image, 50 * MIB)
    assert [(one.start, one.size) for one in read_file(image)] == [(MIB, 49 * MIB)]


@needs("sfdisk")
def test_an_extended_partition_that_is_chained_in_a_ring_ends(tmp_path: Path) -> None:
    image = f"{tmp_path}/disk"
    told = partition(image, "dos", LOGICAL, {}, 128 * MIB)
    base = next(one["start"] for one in told.values() if one["type"] == "5")
    with open(image, "r+b") as file:
        file.seek(base * 512 + 446 + 16)
        link = file.read(16)
        file.seek(told[6]["start"] * 512 - MIB + 446 + 16)  # the link before partition 6, back to the first
        file.write(link)
    numbers = [one.number for one in read_file(image)]
    assert len(numbers) <= 5 and numbers[:3] == [1, 2, 5]


def test_what_is_in_a_partition(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    made = {"ext4": "tsk", "btrfs": "kernel"}
    make_ext4(f"{tmp_path}/ext4", f"{tmp_path}/tree", 8 * MIB)
    make_btrfs(f"{tmp_path}/btrfs", f"{tmp_path}/tree", 128 * MIB)
    for kind, reader in made.items():
        (one,) = read_file(f"{tmp_path}/{kind}")
        assert (one.number, one.fs_type, one.reader) == (0, kind, reader)
    lab.run("mkswap", sparse(f"{tmp_path}/swap", 2 * MIB))
    (one,) = read_file(f"{tmp_path}/swap")
    assert (one.fs_type, one.reader) == ("swap", "")


@needs("mkntfs")
def test_a_file_system_on_the_whole_disk_is_not_taken_for_a_table(tmp_path: Path) -> None:
    lab.run("mkntfs", "-q", "-F", "-f", sparse(f"{tmp_path}/ntfs", 8 * MIB))
    (one,) = read_file(f"{tmp_path}/ntfs")
    assert (one.number, one.start, one.fs_type) == (0, 0, "ntfs")


def test_features_that_the_reader_does_not_know_go_to_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    make_ext4(f"{tmp_path}/inline", f"{tmp_path}/tree", 8 * MIB, "-O", "inline_data")
    assert read_file(f"{tmp_path}/inline")[0].reader == "kernel"


@given(st.binary(max_size=6000), st.sampled_from([b"", b"EFI PART", b"\x55\xaa"]), st.integers(0, 5000))
@settings(max_examples=300, deadline=None)
def test_nonsense_is_read_without_an_error_and_inside_of_the_disk(data: bytes, magic: bytes, at: int) -> None:
    image = bytearray(data.ljust(8192, b"\1"))
    image[512:520], image[510:512] = b"EFI PART", b"\x55\xaa"
    image[at : at + len(magic)] = magic
    for number in range(4):
        image[446 + 16 * number] &= 0x80
    found = find_partitions(lambda offset, length: bytes(image[offset : offset + length]), len(image))
    assert all(one.start >= 0 and one.size > 0 and one.start + one.size <= len(image) for one in found)
