"""What thin_delta, lvs and dmsetup print, as values; and tags. No LVM is needed here."""

from __future__ import annotations

import io
import os
import shutil
import subprocess

import numpy as np
import pytest

from graincopy.core.extent import Extents
from graincopy.core.ids import DiskId, PointId, RepositoryId, WorkloadId
from graincopy.core.placement import Placement
from graincopy.model.snapshot import CheckpointDisk, Owner, Role, TargetTag
from graincopy.volumes import lvm_thin_report as report
from graincopy.volumes.lvm_thin_delta import Garbled, distrusted, parse_delta

BLOCK = 65536

# thin_delta of 0.9.0 and of 1.1.0 about the same metadata, made by thin_restore from METADATA below
BODY = """<superblock uuid="" time="2" transaction="3" {version}data_block_size="128" nr_data_blocks="4096">
  <diff left="1" right="2">
    <same begin="0" length="3"/>
    <different begin="3" length="1"/>
    <same begin="4" length="4"/>
    <left_only begin="20" length="1"/>
    <same begin="21" length="3"/>
    <same begin="40" length="1"/>
    <different begin="41" length="1"/>
    <right_only begin="1000" length="1"/>
  </diff>
</superblock>"""
OLD = BODY.format(version="") + "\n"
NEW = BODY.format(version='version="2" ')
METADATA = """<superblock uuid="" time="2" transaction="3" data_block_size="128" nr_data_blocks="4096">
  <device dev_id="1" mapped_blocks="14" transaction="1" creation_time="0" snap_time="2">
    <range_mapping origin_begin="0" data_begin="0" length="8" time="0"/>
    <range_mapping origin_begin="20" data_begin="100" length="4" time="0"/>
    <single_mapping origin_block="40" data_block="200" time="0"/>
    <single_mapping origin_block="41" data_block="300" time="0"/>
  </device>
  <device dev_id="2" mapped_blocks="14" transaction="2" creation_time="1" snap_time="2">
    <range_mapping origin_begin="0" data_begin="0" length="3" time="0"/>
    <single_mapping origin_block="3" data_block="50" time="1"/>
    <range_mapping origin_begin="4" data_begin="4" length="4" time="0"/>
    <range_mapping origin_begin="21" data_begin="101" length="3" time="0"/>
    <single_mapping origin_block="40" data_block="200" time="0"/>
    <single_mapping origin_block="41" data_block="201" time="1"/>
    <single_mapping origin_block="1000" data_block="400" time="1"/>
  </device>
</superblock>"""


def blocks(*pairs: tuple[int, int]) -> Extents:
    return Extents.of(*pairs).to_bytes(BLOCK)


# --- thin_delta -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [OLD, NEW], ids=["0.9", "1.x"])
def test_both_dialects_say_the_same(text: str) -> None:
    delta = parse_delta(io.BytesIO(text.encode()))
    assert (delta.left, delta.right, delta.block) == (1, 2, BLOCK)
    assert delta.changed == blocks((3, 4), (20, 21), (41, 42), (1000, 1001))
    assert delta.mapped_left == blocks((0, 8), (20, 24), (40, 42))
    assert delta.mapped_right == blocks((0, 8), (21, 24), (40, 42), (1000, 1001))


def test_two_devices_that_are_the_same() -> None:
    text = '<superblock data_block_size="256"><diff left="2" right="2"><same begin="7" length="2"/></diff></superblock>'
    delta = parse_delta(io.BytesIO(text.encode()))
    assert not delta.changed.total
    assert delta.mapped_left == delta.mapped_right == Extents.of((7 * 131072, 9 * 131072))


@pytest.mark.parametrize("cut", range(0, len(NEW) - 1, 23))
def test_half_an_answer_is_none(cut: int) -> None:
    with pytest.raises(Garbled):
        parse_delta(io.BytesIO(NEW[:cut].encode()))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('<different begin="3" length="1"/>', '<different begin="3"/>'),
        ('<different begin="3" length="1"/>', '<different begin="three" length="1"/>'),
        ('<different begin="3" length="1"/>', '<different begin="3" length="0"/>'),
        ('<different begin="3" length="1"/>', '<different begin="-3" length="1"/>'),
        ('<different begin="3" length="1"/>', '<different begin="2" length="2"/>'),
        ('<same begin="4" length="4"/>', '<same begin="2" length="4"/>'),
        ('<different begin="3" length="1"/>', '<altered begin="3" length="1"/>'),
        ('<different begin="3" length="1"/>', '<different begin="3" length="99999999999999999999"/>'),
        ('<different begin="3" length="1"/>', '<different begin="1125899906842624" length="1"/>'),
        ('<different begin="3" length="1"/>', '<different><range begin="3" length="1"/></different>'),
        (' data_block_size="128"', ""),
        ('data_block_size="128"', 'data_block_size="0"'),
        ('left="1" ', ""),
        ("superblock", "something"),
    ],
)
def test_what_thin_delta_cannot_mean(before: str, after: str) -> None:
    with pytest.raises(Garbled):
        parse_delta(io.BytesIO(OLD.replace(before, after).encode()))


def many(count: int) -> str:
    """A long answer, in the words of thin_delta, that takes several pieces to read."""
    kinds = ("same", "different", "left_only", "right_only")
    lines = "\n".join(f'    <{kinds[at % 4]} begin="{3 * at}" length="{1 + at % 3}"/>' for at in range(count))
    return f'<superblock data_block_size="128">\n  <diff left="1" right="2">\n{lines}\n  </diff>\n</superblock>\n'


def test_a_long_answer() -> None:
    count = 100_000
    delta = parse_delta(io.BytesIO(many(count).encode()))
    parts = (delta.same, delta.different, delta.left_only, delta.right_only)
    for at, part in enumerate(parts):
        assert part == blocks(*((3 * one, 3 * one + 1 + one % 3) for one in range(at, count, 4)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (' begin="180000"', ' begin=""'),
        (' begin="180000"', ' begin="-180000"'),
        (' begin="180000"', ' begin="18 0000"'),
        (' begin="180000"', ' begin="180000x"'),
        ('begin="180000" length="1"', 'begin="180000"'),
        ('<same begin="180000" length="1"/>', "<!-- "),
        ('<same begin="180000" length="1"/>', '<same begin="180000" length="9"/>'),
        ('<same begin="180000" length="1"/>', '<sane begin="180000" length="1"/>'),
        ('<same begin="180000" length="1"/>', "</diff>"),
    ],
)
def test_one_wrong_line_in_the_middle_of_a_long_answer(before: str, after: str) -> None:
    text = many(100_000)
    assert text.count(before) == 1
    with pytest.raises(Garbled):
        parse_delta(io.BytesIO(text.replace(before, after).encode()))


@pytest.mark.parametrize("said", [b"", b"device-mapper: busy\n", b"\xff\xfe\x00", b"<superblock/>"])
def test_garbage(said: bytes) -> None:
    with pytest.raises(Garbled):
        parse_delta(io.BytesIO(said))


def test_a_million_extents_meet_a_million_extents() -> None:
    """Every second block changed; every third block of the volume belongs to the file, in reverse."""
    count = 1_000_000
    text = "".join(f'<different begin="{2 * at}" length="1"/>' for at in range(count))
    whole = f'<superblock data_block_size="128"><diff left="1" right="2">{text}</diff></superblock>'
    delta = parse_delta(io.BytesIO(whole.encode()))
    starts = np.arange(count, dtype=np.int64) * BLOCK
    volume = (count - 1 - np.arange(count, dtype=np.int64)) * 3 * BLOCK
    placement = Placement(count * BLOCK, starts, starts + BLOCK, volume, np.ones(count, np.uint8))
    found = placement.to_file(delta.changed)
    below = volume < 2 * count * BLOCK
    expected = starts[below & (volume // BLOCK % 2 == 0)]
    assert np.array_equal(found.starts, expected)


@pytest.mark.skipif(shutil.which("thin_restore") is None, reason="needs thin-provisioning-tools")
def test_the_thin_delta_that_is_installed(tmp_path: os.PathLike[str]) -> None:
    xml, binary = os.path.join(tmp_path, "meta.xml"), os.path.join(tmp_path, "meta.bin")
    with open(xml, "w", encoding="ascii") as file:
        file.write(METADATA)
    with open(binary, "wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["thin_restore", "-i", xml, "-o", binary], check=True, capture_output=True, timeout=60)
    said = subprocess.run(
        ["thin_delta", "--snap1", "1", "--snap2", "2", binary], check=True, capture_output=True, timeout=60
    )
    delta = parse_delta(io.BytesIO(said.stdout))
    assert delta.changed == blocks((3, 4), (20, 21), (41, 42), (1000, 1001))


@pytest.mark.parametrize(
    ("version", "trusted"),
    [
        ("0.9.0\n", True),
        ("1.0.6", True),
        ("1.0.14", True),
        ("thin_delta 1.1.0", True),
        ("1.1", True),
        ("0.8.5", False),
        ("1.0", False),
        ("1.0.0", False),
        ("1.0.5", False),
        ("", False),
        ("unknown", False),
    ],
)
def test_versions_that_lie_are_not_believed(version: str, trusted: bool) -> None:
    assert (distrusted(version) is None) == trusted


# --- lvs and dmsetup --------------------------------------------------------------------------------

ROW = (
    '{"vg_name":"v-g", "vg_uuid":"3OicTx-Nlof-cYra-aREF-y3N1-0OIz-myyaTi", "vg_permissions":"writeable", '
    '"lv_name":"T1", "lv_uuid":"H7nyyt-svTb-Mdpp-oRIK-kQU7-4d6u-j2EjIC", "lv_size":"67108864", "segtype":"thin", '
    '"pool_lv":"pool", "pool_lv_uuid":"lSxYG5-1jjM-7f0R-xob1-CZxh-CvZZ-1ha3j3", "thin_id":"2", "origin":"[vol]", '
    '"origin_uuid":"ayiTGy-ShyV-wYyy-MsAc-VUCO-fHd3-btEWw6", "data_percent":"12.50", "metadata_percent":"", '
    '"chunk_size":"0", "lv_tags":"one,graincopy.1.0.1.abc", "lv_kernel_minor":"-1", "lv_permissions":"read-only", '
    '"metadata_lv":"", "lv_role":"public,snapshot,thinsnapshot"}'
)
REPORT = '{{"report": [{{"lv": [{}]}}]}}'


def test_lvs() -> None:
    (found,) = report.parse_lvs(REPORT.format(f"{ROW}, {ROW}"))  # one row for each segment
    assert (found.path, found.size, found.thin_id, found.data_used) == ("v-g/T1", 67108864, 2, 0.125)
    assert (found.origin, found.metadata_used, found.device) == ("vol", None, None)
    assert found.tags == ("one", "graincopy.1.0.1.abc")
    assert found.volume == "lvm-thin:v-g/T1"
    assert found.dm_uuid == "LVM-3OicTxNlofcYraaREFy3N10OIzmyyaTiH7nyytsvTbMdppoRIKkQU74d6uj2EjIC"
    assert report.uuid_of(found.dm_uuid) == found.uuid
    assert found.read_only and found.vg_writable
    assert report.parse_lvs('{"report": [{"lv": []}]}') == ()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"report": [{"lv": [{"vg_name":"vg"}]}]}', REPORT.format(ROW[:-9])])
def test_what_is_no_report_is_not_taken_for_an_empty_one(text: str) -> None:
    with pytest.raises(ValueError, match="no report"):
        report.parse_lvs(text)


def test_names_of_device_mapper() -> None:
    assert report.dm_name("vg", "lv") == "vg-lv"
    assert report.dm_name("odd-vg", "-a--b", "tpool") == "odd--vg---a----b-tpool"
    dm_uuid = "LVM-3OicTxNlofcYraaREFy3N10OIzmyyaTiH7nyytsvTbMdppoRIKkQU74d6uj2EjIC"
    assert report.uuid_of(dm_uuid) == "H7nyyt-svTb-Mdpp-oRIK-kQU7-4d6u-j2EjIC"
    for other in (f"{dm_uuid}-tpool", f"part1-{dm_uuid}", "CRYPT-LUKS2-abc", "", dm_uuid[:-1]):
        assert report.uuid_of(other) is None


def test_pool_status() -> None:
    line = "0 2097152 thin-pool 2 422/4096 8192/16384 34 rw discard_passdown queue_if_no_space - 1024 "
    status = report.parse_pool_status(line)
    assert (status.data_used, status.held, status.trouble) == (0.5, 34, "")
    assert status.metadata_used == pytest.approx(0.103, abs=0.001)
    assert report.parse_pool_status(line.replace(" 34 ", " - ")).held is None
    assert "read-only" in report.parse_pool_status(line.replace(" rw ", " ro ")).trouble
    assert "data space" in report.parse_pool_status(line.replace(" rw ", " out_of_data_space ")).trouble
    assert "check" in report.parse_pool_status(line.replace(" - 1024", " needs_check 1024")).trouble
    assert "repair" in report.parse_pool_status("0 2097152 thin-pool Fail").trouble
    for wrong in ("", "0 1 linear 8:0 0", "0 2097152 thin-pool 2 422"):
        with pytest.raises(ValueError):
            report.parse_pool_status(wrong)


def test_a_thin_device_with_an_external_origin() -> None:
    assert report.external_device("0 131072 thin 253:2 2") == ""
    assert report.external_device("0 131072 thin 253:2 2 253:7") == "253:7"
    outside = volume("o", segtype="linear")
    source = volume("s", pool_uuid="p", origin_uuid="o")
    snapshot = volume("t", pool_uuid="p", origin_uuid="s")
    every = [outside, source, snapshot]
    assert report.external_origin(snapshot, every) and report.external_origin(source, every)
    assert not report.external_origin(snapshot, [source, snapshot])
    assert report.external_origin(snapshot, [volume("s", pool_uuid="q"), snapshot])


# lvcreate -v of LVM 2.03.16, with the milliseconds at which the lines came on an emulated machine
SAID = """274 Making thin LV t0 in pool p in VG vg using segtype thin.
328 Loading table for vg-s--x (253:4).
419 Suspending vg-s--x (253:4) with filesystem sync with device flush
595 Loading table for vg-s--x (253:4).
595 Suppressed vg-s--x (253:4) identical table reload.
596 Resuming vg-s--x (253:4).
619 Archiving volume group "vg" metadata (seqno 7).
634 Deactivating logical volume vg/t0."""


def test_how_long_lvm_held_the_writers() -> None:
    said = [(int(at) / 1000, f"  {words}\n") for at, _, words in (line.partition(" ") for line in SAID.splitlines())]
    assert report.held_ms(said, "vg-s--x", 0.1, 0.928) == pytest.approx(200)
    assert report.held_ms(said, "vg-s", 0.1, 0.928) == pytest.approx(828)  # of another device: the whole command
    assert report.held_ms(said[:6], "vg-s--x", 0.1, 0.928) == pytest.approx(509)  # it ends with the command
    assert report.held_ms([], "vg-s--x", 0.1, 0.928) == pytest.approx(828)


# --- tags -----------------------------------------------------------------------------------------


def record(disks: int = 1, role: Role = Role.TARGET) -> report.Record:
    owner = Owner(host="h" * 32, boot="b" * 36, pid=1, started=2, hostname="höst, name\n")
    named = tuple(
        CheckpointDisk(workload=WorkloadId(f"{at:032x}"), disk=DiskId(os.urandom(16).hex())) for at in range(disks)
    )
    tag = TargetTag(
        run=PointId("r"), role=role, owner=owner, repository=RepositoryId("f" * 32), disks=named, created=1.5
    )
    return report.Record(volume="lvm-thin:vg/lv", incarnation="a.b.1", tag=tag)


@pytest.mark.parametrize("disks", [0, 1, 40, 400])
def test_a_record_survives_as_tags(disks: int) -> None:
    made = record(disks)
    tags = report.encode_tags(made, 3)
    assert all(len(tag) <= 1024 and set(tag) <= set(ALLOWED) and not tag.startswith("-") for tag in tags)
    assert report.decode_tags(("other", *reversed(tags), "graincopy.x")) == (made, 3)


ALLOWED = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_+.-/=!:&#"  # lvm(8)


def test_the_newest_complete_record_counts() -> None:
    """A retag that was cut off between adding and removing leaves two; one that is incomplete does not count."""
    old, new = record(40), record(40, Role.CHECKPOINT)
    before, after = report.encode_tags(old, 1), report.encode_tags(new, 2)
    assert len(after) > 1
    assert report.decode_tags((*before, *after)) == (new, 2)
    assert report.decode_tags((*before, *after[1:])) == (old, 1)
    assert report.decode_tags(after[1:]) is None
    assert report.decode_tags(()) is None
    assert report.own_tags((*before, "other")) == before


def test_damaged_tags_are_nobodys() -> None:
    (tag,) = report.encode_tags(record(0), 1)
    assert report.decode_tags((tag[:-8],)) is None
    assert report.decode_tags((tag[:40] + "AAAA" + tag[44:],)) is None


def test_the_name_of_a_target_depends_on_volume_and_run() -> None:
    one, other = volume("u1"), volume("u2")
    assert report.target_name(one, "run") == report.target_name(one, "run")
    assert len({report.target_name(source, run) for source in (one, other) for run in ("run", "walk")}) == 4


def volume(uuid: str = "u", **facts: object) -> report.LogicalVolume:
    known = {"vg": "vg", "name": "lv", "uuid": uuid, "size": 1, "segtype": "thin", **facts}
    return report.LogicalVolume(**known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"segtype": "linear"}, "classic (thick)"),
        ({"segtype": "raid1"}, "classic (thick)"),
        ({"segtype": "linear", "roles": ("public", "thicksnapshot")}, "thick) snapshot"),
        ({"segtype": "thin-pool"}, "pool itself"),
        ({"vg_writable": False}, "read-only"),
        ({"tags": report.encode_tags(record(), 1)}, "target that graincopy made"),
    ],
)
def test_what_is_refused_and_why(facts: dict[str, object], reason: str) -> None:
    found = report.unfit(volume(**facts))
    assert found is not None
    assert reason in found[0]
    assert found[1]


def test_a_thin_volume_is_taken() -> None:
    assert report.unfit(volume()) is None
    merged = volume(pool_uuid="p", thin_id=2)
    assert merged.incarnation != volume(pool_uuid="p", thin_id=1).incarnation
    assert merged.incarnation != volume(pool_uuid="q", thin_id=2).incarnation
