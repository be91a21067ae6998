"""Commands and delimited text ↔ values, against transcripts; and a whole session, word by word."""

from __future__ import annotations

import os

import pytest
from array_world import World
from hypothesis import given
from hypothesis import strategies as st

from graincopy.volumes.flashcopy import names, wire
from graincopy.volumes.flashcopy.wire import FcMap, Garbled, Mapped, Vdisk

HERE = os.path.join(os.path.dirname(__file__), "transcripts")
T = "gc_00112233445566778899aabbccddeeff_01234567"
G = "gc_00112233445566778899aabbccddeeff_g89abcdef"


def transcript(name: str) -> tuple[str, str]:
    """The command and what it answered."""
    with open(os.path.join(HERE, f"{name}.txt"), encoding="utf-8") as file:
        command, _, text = file.read().partition("\n")
    return command.removeprefix("$ "), text


def test_every_vdisk() -> None:
    command, text = transcript("lsvdisk")
    assert wire.line(wire.list_vdisks()) == command
    uid = "6005076810810258a8000000000000a"
    assert wire.read_vdisks(text) == (
        Vdisk("vmfs_prod_01", f"{uid}b", 256 << 30, "online", "Pool0", "0"),
        Vdisk("vm files 2", f"{uid}c", 256 << 40, "degraded", "Pool3", "1"),
        Vdisk(T, f"{uid}d", 256 << 30, "offline", "Pool0", "0"),
    )


def test_the_detailed_view_keeps_the_volumes_own_status() -> None:
    command, text = transcript("lsvdisk-detail")
    assert wire.line(wire.show_vdisk(T)) == command
    found = wire.read_vdisk(text)
    assert (found.name, found.status, found.pool, found.used) == (T, "offline", "many", 786432 + 262144)
    own, copies = wire.read_detail(text)
    assert [copy["status"] for copy in copies] == ["online", "degraded"]
    assert own["copy_count"] == "2"


def test_mappings_groups_and_hosts() -> None:
    command, text = transcript("lsfcmap")
    assert wire.line(wire.list_maps()) == command
    maps = wire.read_maps(text)
    assert maps == (
        FcMap("0", "fcmap0", "vmfs_prod_01", T, G, "copying"),
        FcMap("1", "nightly golden", "vm files 2", "golden", "", "idle_or_copied"),
    )
    assert (wire.states(maps, G), wire.states(maps, "none")) == ({"copying"}, frozenset())
    command, text = transcript("lsfcconsistgrp")
    assert wire.line(wire.list_groups()) == command
    assert wire.read_groups(text) == (G, "empty one")
    command, text = transcript("lsvdiskhostmap")
    assert wire.line(wire.list_hosts_of("vm files 2")) == command
    assert wire.read_mapped(text) == (Mapped("esx01", "vm files 2"), Mapped("backup host", "vm files 2"))


def test_a_whole_session(world: World) -> None:
    """Two sources, prepared, started, and taken down again: every command that changes something."""
    world.delete(world.take(0, 1))
    with open(os.path.join(HERE, "session.txt"), encoding="utf-8") as file:
        expected = file.read().splitlines()
    assert [line for line in world.array.log if not line.startswith("ls")] == expected


def test_columns_are_found_by_name_in_whatever_order() -> None:
    _, text = transcript("lsfcmap")
    turned = "".join("!".join(reversed(line.split("!"))) + "\n" for line in text.splitlines())
    assert wire.read_maps(turned) == wire.read_maps(text)


def test_no_text_is_no_rows_and_so_is_a_header_alone() -> None:
    _, text = transcript("lsfcmap")
    assert wire.read_maps("") == wire.read_maps("\n") == wire.read_maps(text.splitlines()[0]) == ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("group_name", "groupname"), "there is no column group_name"),
        (lambda text: text.replace("!copying!", "!dreaming!"), "there is no mapping state dreaming"),
        (lambda text: text[:-40], "a row has 8 fields, its header 18"),
        (lambda text: "Last login: today\n" + text, "there is no column id"),
    ],
)
def test_what_is_no_answer_is_told_so(change: object, why: str) -> None:
    _, text = transcript("lsfcmap")
    with pytest.raises(Garbled, match=why):
        wire.read_maps(change(text))  # type: ignore[operator]


def test_sizes_must_be_bytes() -> None:
    _, text = transcript("lsvdisk")
    with pytest.raises(Garbled, match=r"256.00GB is no number of bytes"):
        wire.read_vdisks(text.replace("274877906944", "256.00GB"))


@given(st.text())
def test_any_text_is_read_or_garbled(text: str) -> None:
    for read in (wire.read_vdisks, wire.read_vdisk, wire.read_maps, wire.read_groups, wire.read_mapped):
        try:
            read(text)
        except Garbled as garbled:
            assert str(garbled)


@given(st.text("abc !'\"$`;&|\\-", min_size=1, max_size=20))
def test_a_name_cannot_leave_its_place(name: str) -> None:
    import shlex

    assert shlex.split(wire.line(wire.remove_vdisk(name))) == ["rmvdisk", name]


@pytest.mark.parametrize(
    ("out", "err", "said"),
    [
        ("", "CMMVC5753E No such object.\n", "CMMVC5753E No such object."),
        ("CMMVC6372W nearly full\nCMMVC5753E No.\n", "", "CMMVC5753E No."),
        ("", "rbash: lsvdisk: command not found\n", "rbash: lsvdisk: command not found"),
        ("", "", "it gave no reason"),
    ],
)
def test_a_refusal_is_told_in_the_arrays_words(out: str, err: str, said: str) -> None:
    assert wire.error_line(out, err) == said


def test_only_want_of_space_is_want_of_space() -> None:
    assert wire.is_pool_full("CMMVC5860E The action failed because there were not enough extents.")
    assert wire.is_pool_full("CMMVC8710E There is not enough space.")
    assert not wire.is_pool_full("CMMVC5753E The specified object does not exist.")


@given(st.uuids(), st.lists(st.uuids(), min_size=1, max_size=5, unique=True))
def test_names_carry_the_run_and_fit(run: object, uids: list[object]) -> None:
    run_id, sources = run.hex, [uid.hex for uid in uids]  # type: ignore[attr-defined]
    target, group = names.target_name(run_id, sources[0]), names.group_name(run_id, sources)
    assert names.run_of(target) == names.run_of(group) == run_id
    assert names.is_target(target) and not names.is_group(target)
    assert names.is_group(group) and not names.is_target(group)
    assert max(len(target), len(group)) <= names.LONGEST
    assert names.group_name(run_id, reversed(sources)) == group
    assert names.split_volume(names.volume_id("an_array", sources[0])) == ("an_array", sources[0])


@pytest.mark.parametrize("name", ["gc_", "gc_mine", f"{T}x", f"x{T}", T.replace("0011", "zz11"), "lun0"])
def test_nothing_else_is_taken_for_ours(name: str) -> None:
    assert not names.is_target(name)
    assert not names.is_group(name)
    assert names.run_of(name) is None
