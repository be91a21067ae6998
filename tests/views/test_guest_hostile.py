"""Guest file systems that were made to do harm, readers that die, hang or lie, and what the reader may not do."""

from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import guest_lab
import pytest
from guest_lab import MIB, file_disk, lab, needs, root_test
from hypothesis import given, settings
from hypothesis import strategies as st

from graincopy.app.host import SystemClock
from graincopy.core.errors import GuestUnreadable, OutputUnfit
from graincopy.views.guest import directories, process, wire
from graincopy.views.guest.extract import extract_into
from graincopy.views.guest.locate import partitions_of
from graincopy.views.guest.metadata import Allowed
from graincopy.views.guest.partitions import Partition
from graincopy.views.guest.session import GuestReader

READER_MEMORY = 64 * MIB


def debugfs(image: str, *commands: str) -> None:
    for command in commands:
        lab.run("debugfs", "-w", "-R", command, image)


def patch(image: str, old: bytes, new: bytes) -> None:
    """Rename behind the back of the file system: everywhere in the image, same length."""
    with open(image, "r+b") as file:
        data = file.read()
        assert old in data and len(old) == len(new)
        file.seek(0)
        file.write(data.replace(old, new))


def extract(image: str, to: str) -> list[tuple[bytes, str]]:
    with file_disk(image) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        return extract_into(reader.fetch(b"/"), to, b"", Allowed()).problems


def plain_ext4(tmp_path: Path, *more: str) -> str:
    """A file system of what lies in ``tree``, without checksums, so that it can be tampered with."""
    return guest_lab.make_ext4(f"{tmp_path}/ext4", f"{tmp_path}/tree", 16 * MIB, "-O", "^metadata_csum", *more)


# --- trees that lead astray ---------------------------------------------------------------------------


def test_names_that_lead_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tree" / "UPUP-escaped-dir").mkdir(parents=True)
    (tmp_path / "tree" / "UPUP-escaped-dir" / "below").write_bytes(b"evil")
    (tmp_path / "tree" / "AAAAAAAAAAAAevil").write_bytes(b"evil")
    (tmp_path / "tree" / "good").write_bytes(b"good")
    image = plain_ext4(tmp_path)
    patch(image, b"AAAAAAAAAAAAevil", b"../../../../evil")
    patch(image, b"UPUP-escaped-dir", b"../escaped/x/y/z")
    out = tmp_path / "deep" / "er" / "out"
    problems = extract(image, os.fspath(out))
    assert len(problems) == 2 and all("no file can have this name" in reason for _, reason in problems)
    assert sorted(os.listdir(out)) == ["good", "lost+found"]
    assert os.listdir(tmp_path / "deep") == ["er"] and os.listdir(tmp_path / "deep" / "er") == ["out"]


@pytest.mark.parametrize("link_first", [True, False])
def test_a_link_and_a_directory_of_one_name_lead_nowhere(tmp_path: Path, link_first: bool) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "tree" / "dirB").mkdir(parents=True)
    (tmp_path / "tree" / "dirB" / "evil").write_bytes(b"evil")
    os.symlink(outside, tmp_path / "tree" / "lnkA")
    image = plain_ext4(tmp_path)
    patch(image, *((b"dirB", b"lnkA") if link_first else (b"lnkA", b"dirB")))
    out = tmp_path / "out"
    problems = extract(image, os.fspath(out))
    assert problems, "one of the two had to be refused"
    assert os.listdir(outside) == [], "nothing was written through the link"


def test_links_that_lead_out_are_made_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "tree").mkdir()
    os.symlink("../outside", tmp_path / "tree" / "a")
    os.symlink(outside, tmp_path / "tree" / "b")
    image = plain_ext4(tmp_path)
    assert extract(image, f"{tmp_path}/out") == []
    assert os.readlink(f"{tmp_path}/out/a") == "../outside" and os.listdir(outside) == []


def test_a_directory_inside_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a" / "b").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "file").write_bytes(b"x")
    image = plain_ext4(tmp_path)
    debugfs(image, "link a a/b/loop", "link <2> a/b/root")
    problems = extract(image, f"{tmp_path}/out")
    assert {path for path, _ in problems} == {b"a/b/loop", b"a/b/root"}
    assert (tmp_path / "out" / "a" / "file").read_bytes() == b"x"


def test_names_come_in_the_order_of_their_inodes_and_a_fault_after_what_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directories, "_SORTED", 3)

    def broken() -> Iterator[tuple[int, bytes]]:
        yield from ((number, b"%d" % number) for number in (5, 9, 2, 8, 7, 1, 4))
        raise ValueError("a broken directory block")

    found: list[int] = []
    with pytest.raises(ValueError, match="broken"):
        for number, _ in directories.in_disk_order(broken()):
            found.append(number)
    assert found == [2, 5, 9, 1, 4, 7, 8], "the second stretch may be twice as long"
    assert list(directories.in_disk_order(iter([]))) == []


def test_the_inodes_of_a_large_directory_are_gone_through_a_few_times_whatever_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directories, "_SORTED", 100)

    def passes(names: int) -> int:
        mixed = ((number * 7919 % names, b"name-%d" % number) for number in range(names))
        numbers = [number for number, _ in directories.in_disk_order(mixed)]
        assert sorted(numbers) == list(range(names))
        return 1 + sum(after < before for before, after in itertools.pairwise(numbers))

    assert passes(2_000) == 5 and passes(20_000) == 8
    monkeypatch.setattr(directories, "_SORTED_BYTES", 100 * 100)
    assert passes(20_000) > 100, "and no more is held than there is room for"


def test_a_very_deep_tree_is_cut_and_told(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(wire.DEPTH + 20):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    image = plain_ext4(tmp_path)
    problems = extract(image, f"{tmp_path}/out")
    assert len(problems) == 1 and "deeper than" in problems[0][1]


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.symlink("self", tmp_path / "tree" / "self")
    image = plain_ext4(tmp_path)
    with (
        file_disk(image) as disk,
        GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader,
        pytest.raises(GuestUnreadable, match="too many links"),
    ):
        list(reader.list(b"/self/x"))


def test_directory_entries_of_inodes_that_are_not_in_use(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "gone").write_bytes(b"x")
    (tmp_path / "tree" / "freed").write_bytes(b"y")
    (tmp_path / "tree" / "good").write_bytes(b"good")
    image = plain_ext4(tmp_path)
    debugfs(image, "clri gone", "freei freed")
    assert sorted(path for path, _ in extract(image, f"{tmp_path}/out")) == [b"freed", b"gone"]
    assert (tmp_path / "out" / "good").read_bytes() == b"good"


@root_test
def test_a_directory_of_a_hundred_thousand_names(tmp_path: Path) -> None:
    """Names are passed on as they come: the reader's memory is bounded, and so is the keeper's."""
    (tmp_path / "tree").mkdir()
    image = guest_lab.make_ext4(f"{tmp_path}/ext4", f"{tmp_path}/tree", 64 * MIB)
    with guest_lab.mounted(image, os.fspath(tmp_path)) as point:
        os.mkdir(f"{point}/many")
        many = os.open(f"{point}/many", os.O_RDONLY)
        for number in range(100_000):
            if number % 50_000 == 0:
                os.close(os.open(f"file-{number}", os.O_WRONLY | os.O_CREAT, dir_fd=many))
                first = f"file-{number}"
            else:
                os.link(first, f"name-{number:07}", src_dir_fd=many, dst_dir_fd=many)
        os.close(many)
    with file_disk(image) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        assert sum(1 for _ in reader.list(b"/many")) == 100_000
        assert isinstance(reader.look(b"/many/name-0099999"), wire.Entry)
        assert guest_lab.memory_of(reader.pid) < READER_MEMORY


def test_a_million_names_are_not_held() -> None:
    """The reader of directory blocks, over a directory that is made up as it is read."""
    block = bytearray(4096)
    for at in range(0, 4096, 16):
        block[at : at + 16] = (11).to_bytes(4, "little") + bytes([16, 0, 5, 1]) + b"entry123"
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + 32 * MIB, hard))
    try:
        found = directories.ext_names(lambda _offset, _length: bytes(block), 4096 * 4096, 4096)
        assert sum(1 for _ in found) == 1 << 20
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- broken file systems --------------------------------------------------------------------------------


def _fuzzed(image: str, seeds: range, tmp_path: Path, first: int = 0) -> int:
    """Extract from copies with bytes changed; how many could be opened. Only GuestUnreadable may come of it."""
    opened = 0
    with open(image, "rb") as file:
        good = file.read()
    used = [at for at in range(first, len(good), 4096) if any(good[at : at + 4096])]
    for seed in seeds:
        chance, data = random.Random(seed), bytearray(good)
        for _ in range(chance.choice((1, 10, 200))):
            at = chance.choice(used) + chance.randrange(4096)
            data[at % len(data)] = chance.choice((0, 0xFF, chance.randrange(256)))
        path = f"{tmp_path}/fuzzed"
        Path(path).write_bytes(data)
        with file_disk(path) as disk:
            one = Partition(0, 0, disk.size, "", partitions_of(disk)[0].fs_type or "ext4", "tsk")
            try:
                with GuestReader(disk, one, SystemClock(), patience=20) as reader:
                    opened += 1
                    extract_into(reader.fetch(b"/"), f"{tmp_path}/fuzzed-{seed}", b"", Allowed())
            except GuestUnreadable:
                continue
    return opened


def test_ext4_with_bytes_changed(tmp_path: Path) -> None:
    guest_lab.make_tree(f"{tmp_path}/tree")
    os.unlink(tmp_path / "tree" / "etc" / "deep" / "er" / "random")
    assert _fuzzed(plain_ext4(tmp_path, "-b", "1024"), range(25), tmp_path) > 5


@root_test
@needs("ntfs-3g")
def test_ntfs_with_bytes_changed(tmp_path: Path) -> None:
    (tmp_path / "tree" / "many").mkdir(parents=True)
    for number in range(200):
        (tmp_path / "tree" / "many" / f"file {number}").write_bytes(b"content %d" % number * number)
    image = guest_lab.make_ntfs(f"{tmp_path}/ntfs", f"{tmp_path}/tree", os.fspath(tmp_path), 16 * MIB)
    assert _fuzzed(image, range(25), tmp_path, 8192) > 5


@root_test
def test_xfs_that_the_kernel_refuses(tmp_path: Path) -> None:
    image = guest_lab.sparse(f"{tmp_path}/xfs", 320 * MIB)
    lab.run("mkfs.xfs", "-q", image)
    with open(image, "r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 300)
    with file_disk(image) as disk, pytest.raises(GuestUnreadable, match="does not mount"):
        GuestReader(disk, partitions_of(disk)[0], SystemClock()).__enter__()
    assert "/proc/self/fd" not in lab.run("losetup", "--all")


@root_test
def test_a_kernel_mount_with_a_range_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "bad").write_bytes(os.urandom(2 * MIB))
    (tmp_path / "tree" / "good").write_bytes(b"good" * 5000)
    image = guest_lab.make_xfs(f"{tmp_path}/xfs", f"{tmp_path}/tree", os.fspath(tmp_path))
    at = Path(image).read_bytes().index((tmp_path / "tree" / "bad").read_bytes()[:4096])
    with file_disk(image) as disk:
        disk.broken = [(at + MIB, at + MIB + 4096)]
        with GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
            done = extract_into(reader.fetch(b"/"), f"{tmp_path}/out", b"", Allowed())
    assert [path for path, _ in done.problems] == [b"bad"]
    assert (tmp_path / "out" / "good").read_bytes() == b"good" * 5000


# --- readers that die, hang or lie ------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> str:
    (tmp_path / "tree").mkdir()
    for number in range(100):
        (tmp_path / "tree" / f"file{number}").write_bytes(b"x" * 100)
    return plain_ext4(tmp_path)


def test_a_reader_that_is_killed(small: str) -> None:
    with file_disk(small) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        os.kill(reader.pid, signal.SIGKILL)
        with pytest.raises(GuestUnreadable, match="SIGKILL"):
            reader.look(b"/")


def test_a_reader_that_hangs(small: str) -> None:
    with file_disk(small) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        os.kill(reader.pid, signal.SIGSTOP)
        reader._patience = 0.3
        with pytest.raises(GuestUnreadable, match="no answer"):
            reader.look(b"/")
        pid = reader.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_answers_that_nobody_waits_for_do_not_reach_the_next_request(small: str) -> None:
    with file_disk(small) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        answers = reader.list(b"/")
        for _ in range(100):
            next(answers)  # one more is left, and would do as the answer to what is asked next
        answers.close()  # type: ignore[attr-defined]
        with pytest.raises(GuestUnreadable):
            reader.look(b"/file1")


LIAR = (
    "import os, sys; os.write(int(sys.argv[1]), bytes.fromhex({!r})); os.read(int(sys.argv[1]), 100000); os.read(0, 1)"
)


def _frame(kind: bytes, body: bytes) -> bytes:
    return wire.HEADER.pack(kind[0], len(body)) + body


@pytest.mark.parametrize(
    "said",
    [
        b"garbage that is no frame at all",
        _frame(b"m", b"\xc1 no message"),
        wire.HEADER.pack(b"d"[0], 0xFFFFFFFF),
        _frame(b"r", wire.WANTED.pack(1 << 40, 512)),
        _frame(b"r", wire.WANTED.pack(0, wire.PIECE + 1)),
        _frame(b"r", b"short"),
        _frame(b"h", b"short"),
        _frame(b"?", b""),
    ],
)
def test_a_reader_that_lies(small: str, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START", LIAR.format(said.hex()))
    with file_disk(small) as disk, pytest.raises(GuestUnreadable):
        GuestReader(disk, partitions_of(disk)[0], SystemClock(), 5).__enter__()


def test_a_reader_that_asks_and_does_not_read_the_answer(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = "import os, sys, time; os.write(int(sys.argv[1]), bytes.fromhex({!r})); time.sleep(60)"
    said = _frame(b"r", wire.WANTED.pack(0, wire.PIECE))
    monkeypatch.setattr(process, "START", asks.format(said.hex()))
    with file_disk(small) as disk, pytest.raises(GuestUnreadable, match="no answer"):
        GuestReader(disk, partitions_of(disk)[0], SystemClock(), 0.5).__enter__()


def test_a_reader_that_was_started_ahead_is_used_once_and_ends_with_its_user(small: str) -> None:
    with file_disk(small) as disk, process.Spare() as spare:
        readers = [GuestReader(disk, partitions_of(disk)[0], SystemClock(), spare=spare) for _ in range(2)]
        with readers[0] as first, readers[1] as second:
            assert first.pid != second.pid
            assert isinstance(second.look(b"/file1"), wire.Entry)
            pids = first.pid, second.pid
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_a_reader_that_was_started_ahead_in_vain_ends() -> None:
    with process.Spare() as spare:
        pid = spare._process.pid  # type: ignore[union-attr]
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@given(st.binary(max_size=200), st.sampled_from(wire.KINDS), st.integers(-(2**70), 2**70))
@settings(max_examples=200, deadline=None)
def test_entries_are_believed_only_when_a_file_system_could_hold_them(path: bytes, kind: str, number: int) -> None:
    entry = wire.Entry(path=path, kind=kind, mode=0o644, size=abs(number), uid=number, mtime=number)
    try:
        wire.checked(entry)
    except wire.WireBroken:
        return
    assert not any(part in (b"", b".", b"..") or b"\0" in part for part in path.split(b"/")) or path == b""
    assert -1 <= number < 2**32


def test_a_writer_that_is_told_of_files_below_no_directory(tmp_path: Path) -> None:
    """Whatever order a reader makes up: nothing is written but below directories that it made itself."""
    os.mkdir(tmp_path / "elsewhere")
    os.mkdir(tmp_path / "out")
    os.symlink(tmp_path / "elsewhere", tmp_path / "out" / "there")
    answers = [
        wire.Entry(path=b"there/file", kind="file", mode=0o644),
        wire.Data(b"evil"),
        wire.FileEnd(),
        wire.Entry(path=b"there", kind="directory", mode=0o755),
        wire.Entry(path=b"there/again", kind="file", mode=0o644),
        wire.Data(b"evil"),
        wire.FileEnd(),
        wire.Entry(path=b"x", kind="file", mode=0o644, same_as=b"there/host-file"),
        wire.Entry(path=b"good", kind="file", mode=0o644, size=4),
        wire.Data(b"good"),
        wire.FileEnd(),
    ]
    (tmp_path / "elsewhere" / "host-file").write_bytes(b"secret")
    done = extract_into(iter(answers), f"{tmp_path}/out", b"", Allowed())
    assert os.listdir(tmp_path / "elsewhere") == ["host-file"]
    assert sorted(os.listdir(tmp_path / "out")) == ["good", "there"] and done.failed == 4


def test_a_reader_that_ends_in_the_middle_of_a_file_leaves_no_half_of_it(tmp_path: Path) -> None:
    answers = [wire.Entry(path=b"half", kind="file", mode=0o644, size=4), wire.Data(b"ha")]
    done = extract_into(iter(answers), f"{tmp_path}/out", b"", Allowed())
    assert done.failed == 1 and os.listdir(tmp_path / "out") == []


def test_a_directory_to_extract_to_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputUnfit):
        extract_into(iter(()), f"{tmp_path}/file", b"", Allowed())


# --- what the reader may not do -----------------------------------------------------------------------------


@root_test
def test_the_reader_has_given_up_everything(small: str) -> None:
    with file_disk(small) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        list(reader.list(b"/"))
        status = guest_lab.status_of(reader.pid)
        limits = Path(f"/proc/{reader.pid}/limits").read_text(encoding="ascii")
        assert guest_lab.memory_of(reader.pid) < READER_MEMORY
    assert status["Uid"].split() == ["65534"] * 4 and status["Groups"] == ""
    assert (status["CapPrm"], status["CapEff"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert status["Seccomp"] == "2"
    assert f"{512 * MIB}" in next(line for line in limits.splitlines() if line.startswith("Max address space"))


@root_test
def test_the_reader_of_a_kernel_mount_may_read_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "private").write_bytes(b"x")
    os.chmod(tmp_path / "tree" / "private", 0)
    image = guest_lab.make_btrfs(f"{tmp_path}/btrfs", f"{tmp_path}/tree")
    with file_disk(image) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        assert [one.path for one in reader.list(b"/") if isinstance(one, wire.Entry)] == [b"private"]
        status = guest_lab.status_of(reader.pid)
        assert os.listdir(f"/proc/{reader.pid}/root") == ["private"], "the guest's files are all there is"
    assert status["Uid"].split() == ["65534"] * 4
    assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 1 << 2, "CAP_DAC_READ_SEARCH alone"
    assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "1")


ATTEMPTS = """
import os, socket, sys, ctypes, signal
sys.path[:] = sys.argv[1:]
from graincopy.views.guest.sandbox import Bounds, give_up
target, parent = os.environ["TARGET"], os.getppid()
libc = ctypes.CDLL(None, use_errno=True)
give_up(Bounds(memory=256 << 20))
def attempt(name, call):
    try:
        call()
    except (OSError, MemoryError) as failure:
        print(name, type(failure).__name__)
    else:
        print(name, "DONE")
attempt("open", lambda: os.open(target, os.O_RDONLY))
attempt("create", lambda: os.open(target + ".new", os.O_WRONLY | os.O_CREAT))
attempt("fork", os.fork)
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("socket", lambda: socket.socket())
attempt("kill", lambda: os.kill(parent, 0))
attempt("memory", lambda: bytearray(400 << 20))
attempt("unlink", lambda: os.unlink(target))
attempt("setuid", lambda: os.setuid(0))
sys.stdout.flush()
os._exit(0)
"""


def test_what_is_given_up_cannot_be_done(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"secret")
    os.chmod(target, 0o666)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ATTEMPTS, *sys.path],
        env={"TARGET": os.fspath(target)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    attempts = dict(line.split() for line in done.stdout.splitlines())
    assert len(attempts) == 9 and "DONE" not in attempts.values(), attempts
    assert attempts["memory"] == "MemoryError"
    assert target.read_bytes() == b"secret" and not os.path.exists(f"{target}.new")


def test_a_reader_that_takes_too_long_is_ended() -> None:
    spins = (
        "import sys; sys.path[:] = sys.argv[1:]; from graincopy.views.guest.sandbox import Bounds, give_up\n"
        "give_up(Bounds(processor=1))\nwhile True: pass"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", spins, *sys.path], timeout=120, check=False)
    assert done.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_the_socket_is_the_only_thing_that_is_inherited(small: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, file_disk(small) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        held = [os.readlink(f"/proc/{reader.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{reader.pid}/fd")]
    assert sorted(set(held))[0] == "/dev/null" and len(set(held)) == 2


@root_test
def test_a_slow_disk_below_a_kernel_mount_is_no_reader_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(os.urandom(MIB))
    image = guest_lab.make_xfs(f"{tmp_path}/xfs", f"{tmp_path}/tree", os.fspath(tmp_path))
    with file_disk(image) as disk, GuestReader(disk, partitions_of(disk)[0], SystemClock()) as reader:
        fast, reads, never = disk.readinto, itertools.count(), threading.Event()
        reader._patience = 2  # now that it has started, which may take long on a busy machine

        def readinto(offset: int, buffer: memoryview) -> None:
            if next(reads) < 2:
                never.wait(5)
            fast(offset, buffer)

        disk.readinto = readinto  # type: ignore[method-assign]
        chunks = [one.data for one in reader.fetch(b"/file") if isinstance(one, wire.Data)]
    assert b"".join(chunks) == (tmp_path / "tree" / "file").read_bytes()
