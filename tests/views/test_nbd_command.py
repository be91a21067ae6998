"""``graincopy serve-nbd`` as a user has it: a real repository, other people's clients, exit codes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import nbd_client as nbd
import pytest
from nbd_client import Client
from test_nbd_server import tool

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
import lab

from graincopy.core.errors import MediumFailed

MIB = 1 << 20
SIZE = 6 * MIB + 77


class Cli:
    """A repository of its own, and graincopy processes on it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.repo = os.path.join(folder, "repo")
        state = {"XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "XDG_STATE_HOME": "state"}
        self.env = {
            **os.environ,
            **{name: os.path.join(folder, place) for name, place in state.items()},
            "XDG_RUNTIME_DIR": os.path.join(folder, "run"),
            "GRAINCOPY_REPO": self.repo,
            "GRAINCOPY_PASSPHRASE": "secret",
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        """graincopy, running."""
        command = [sys.executable, "-m", "graincopy", *words]
        return subprocess.Popen(
            command, env=self.env, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        """graincopy, to its end."""
        with self.start(*words) as process:
            out, errors = process.communicate(timeout=60)
        return process.returncode, out, errors

    def json(self, *words: str) -> dict[str, object]:
        """What it reports."""
        code, out, errors = self.run(*words, "--json")
        assert code == 0, errors
        return json.loads(out)  # type: ignore[no-any-return]


class Serve:
    """``graincopy serve-nbd --json``, ready."""

    def __init__(self, cli: Cli, *words: str) -> None:
        self.process = cli.start("serve-nbd", *words, "--json")
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate(timeout=20)[1])
        self.ready = json.loads(line)
        self.uri, self.path = self.ready["uri"], self.ready["socket"]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, the rest of stdout, stderr."""
        self.process.send_signal(number)
        out, errors = self.process.communicate(timeout=20)
        return self.process.returncode, out, errors

    def __enter__(self) -> Serve:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def cli(tmp_path: os.PathLike[str]) -> Cli:
    made = Cli(os.fspath(tmp_path))
    assert made.run("init")[0] == 0
    return made


def write_image(path: str, seed: int, size: int = SIZE) -> bytes:
    """Data, a hole, data."""
    content = (
        random.Random(seed).randbytes(2 * MIB) + bytes(3 * MIB) + random.Random(seed + 1000).randbytes(size - 5 * MIB)
    )
    with open(path, "wb") as file:
        file.write(content)
    return content


def backed_up(cli: Cli) -> str:
    path = os.path.join(cli.folder, "web.raw")
    write_image(path, 1)
    assert cli.run("backup", path)[0] == 0
    return path


@pytest.fixture
def disk(cli: Cli) -> str:
    return backed_up(cli)


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A repository with one restore point, for commands that leave it as it is."""
    made = Cli(os.fspath(tmp_path_factory.mktemp("refusing")))
    assert made.run("init")[0] == 0
    backed_up(made)
    os.mkdir(os.path.join(made.folder, "run"))
    return made


def test_a_restore_point_is_served_whole_and_its_end_is_no_error(cli: Cli, disk: str) -> None:
    copy = os.path.join(cli.folder, "copy")
    with Serve(cli, "latest", "--socket", "here.sock") as server:
        assert server.ready["exports"] == [{"name": "web.raw", "size": SIZE, "uri": server.uri}]
        assert server.path == os.path.join(cli.folder, "here.sock")
        tool("nbdcopy", server.uri, copy)
        tool("cmp", disk, copy)
        found = json.loads(tool("nbdinfo", "--map", "--json", server.uri))
        assert [span["type"] for span in found] == [0, 3, 0]
        code, out, errors = server.end()
    assert (code, out) == (0, "")
    assert json.loads(errors)["sent_bytes"] >= SIZE - 3 * MIB
    assert not os.path.exists(server.path)


def test_people_get_one_line_with_the_uri_and_the_split_at_the_end(cli: Cli, disk: str) -> None:
    with cli.start("serve-nbd", "latest") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        uri = line.split(" at ")[1].strip()
        assert os.path.join(cli.folder, "run", "graincopy") in uri
        assert tool("nbdinfo", "--size", uri).strip() == str(SIZE)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert "FROM MEDIUM" in out
    assert os.listdir(os.path.join(cli.folder, "run", "graincopy")) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("latest", "--socket", "s", "--port", "1"), 2, "--socket"),
        (("latest", "--bind", "127.0.0.1"), 2, "--port"),
        (("latest", "--port", "70000"), 2, "70000"),
        (("latest", "--port", "0", "--bind", "0.0.0.0"), 2, "--tls"),
        (("latest", "--socket", "web.raw"), 64, "no socket"),
        (("latest", "--socket", "no/such/folder/s"), 64, "No such file"),
        (("latest", "--socket", "s" * 200), 64, "too long"),
        (("latest", "--socket", "s", "--tls", "."), 66, "ca-cert.pem is missing"),
        (("latest", "--socket", "s", "--disk", "nothing"), 52, "web.raw"),
        (("latest", "--socket", "s", "--overlay", "web.raw"), 65, "no overlay"),
        (("ffffff", "--socket", "s"), 50, "ffffff"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence_and_leaves_nothing(
    refusing: Cli, words: tuple[str, ...], code: int, said: str
) -> None:
    before = sorted(os.listdir(refusing.folder))
    found, out, errors = refusing.run("serve-nbd", *words)
    assert (found, out) == (code, "")
    assert said in errors
    assert 1 <= len(errors.splitlines()) <= 3
    assert "Traceback" not in errors
    assert sorted(os.listdir(refusing.folder)) == before


def test_an_overlay_is_kept_taken_up_again_and_refused_for_another_point(cli: Cli, disk: str) -> None:
    point = str(cli.json("backup", disk)["restore_point"])
    for number in range(2):
        with Serve(cli, point, "--socket", "s", "--overlay", "o") as server:
            with Client(server.path) as client:
                client.open()
                if number:
                    assert client.ask(nbd.READ, 10, 5).content(10, 5) == b"guest"
                assert client.ask(nbd.WRITE, 10, 5, data=b"guest").error == 0
            assert server.end()[0] == 0
    with open(disk, "ab") as file:
        file.write(b"more")
    other = str(cli.json("backup", disk)["restore_point"])
    code, _, errors = cli.run("serve-nbd", other, "--socket", "s", "--overlay", "o")
    assert code == 65
    assert point[:12] in errors


def test_writes_without_an_overlay_file_are_thrown_away(cli: Cli, disk: str) -> None:
    for _ in range(2):
        with Serve(cli, "latest", "--socket", "s", "--writable") as server:
            with Client(server.path) as client:
                with open(disk, "rb") as file:
                    assert client.open().ask(nbd.READ, 0, 5).content(0, 5) == file.read(5)
                assert client.ask(nbd.WRITE, 0, 5, data=b"guest").error == 0
                assert client.ask(nbd.READ, 0, 5).content(0, 5) == b"guest"
            assert server.end()[0] == 0


def test_several_disks_are_exports_and_one_overlay_needs_one_disk(cli: Cli) -> None:
    paths = [os.path.join(cli.folder, name) for name in ("a b.raw", "c\n\udcff.raw")]
    contents = [write_image(path, number + 5) for number, path in enumerate(paths)]
    assert cli.run("backup", *paths)[0] == 0
    with Serve(cli, "latest", "--socket", "s") as server:
        assert [export["name"] for export in server.ready["exports"]] == ["a b.raw", "c\n\\xff.raw"]
        for name, content in zip((b"a b.raw", b"c\n\\xff.raw"), contents, strict=True):
            with Client(server.path) as client:
                assert client.open(name).ask(nbd.READ, 0, SIZE).content(0, SIZE) == content
        for export in server.ready["exports"]:
            assert tool("nbdinfo", "--size", export["uri"]).strip() == str(SIZE)
        assert server.end()[0] == 0
    code, _, errors = cli.run("serve-nbd", "latest", "--socket", "s", "--overlay", "o")
    assert code == 2
    assert "--disk" in errors


def test_damage_in_the_repository_is_eio_for_its_range_and_a_warning(cli: Cli, disk: str) -> None:
    packs = [os.path.join(at, name) for at, _, names in os.walk(os.path.join(cli.repo, "data")) for name in names]
    pack = max(packs, key=os.path.getsize)
    with open(pack, "r+b") as file:
        file.seek(os.path.getsize(pack) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with open(disk, "rb") as file:
        content = file.read()
    failed = 0
    with Serve(cli, "latest", "--socket", "s", "--medium-only") as server:
        with Client(server.path) as client:
            client.open()
            for at in range(0, SIZE, 65536):
                reply = client.ask(nbd.READ, at, min(65536, SIZE - at))
                failed += reply.error == nbd.EIO
                if not reply.error:
                    assert reply.content(at, min(65536, SIZE - at)) == content[at : at + 65536]
        code, _, errors = server.end()
    assert failed == 1
    assert code == 3
    assert "cannot be read" in errors


def test_a_medium_that_is_gone_is_eio_and_read_again_when_it_is_back(cli: Cli, disk: str) -> None:
    with open(disk, "rb") as file:
        content = file.read()
    away = f"{cli.repo}.away"
    with Serve(cli, "latest", "--socket", "s", "--medium-only") as server:
        with Client(server.path) as client, Client(server.path) as other:
            assert client.open().ask(nbd.READ, 0, 65536).content(0, 65536) == content[:65536]
            other.open()
            os.rename(cli.repo, away)
            assert client.ask(nbd.READ, 5 * MIB, 65536).error == nbd.EIO
            assert other.ask(nbd.READ, 0, 65536).content(0, 65536) == content[:65536]  # remembered
            os.rename(away, cli.repo)
            assert client.ask(nbd.READ, 0, SIZE).content(0, SIZE) == content
            os.rename(cli.repo, away)
            client.send(nbd.request(nbd.READ, 1 * MIB, 512))
            code, _, errors = server.end()  # it ends all the same, and removes its socket
        os.rename(away, cli.repo)
    assert code == MediumFailed.exit_code  # the medium could not be told that the view is over
    assert "cannot be read" in errors
    assert not os.path.lexists(server.path)


@pytest.fixture
def reflink(tmp_path: os.PathLike[str]) -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab.ReflinkFs(os.fspath(tmp_path), "xfs", 512 * MIB) as made:
        yield made.path


@pytest.mark.root
def test_clients_can_ask_what_is_local(cli: Cli, reflink: str) -> None:
    path = os.path.join(reflink, "web.raw")
    content = bytearray(write_image(path, 9))
    assert cli.run("backup", path)[0] == 0
    with open(path, "r+b") as file:
        file.seek(MIB)
        file.write(b"changed after the backup")
    with Serve(cli, "latest", "--socket", "s") as server:
        for _ in range(100):
            found = json.loads(tool("nbdinfo", "--map=graincopy:source", "--json", server.uri))
            if any(span["type"] == 1 for span in found):
                break
        types = {span["type"] for span in found}
        at = [span for span in found if span["offset"] <= MIB < span["offset"] + span["length"]]
        assert (types, at[0]["type"]) == ({0, 1, 2}, 0)
        with Client(server.path) as client:
            assert client.open().ask(nbd.READ, 0, SIZE).content(0, SIZE) == content
        code, _, errors = server.end()
    assert code == 0
    (split,) = json.loads(errors)["disks"]
    assert split["local_bytes"] > 2 * MIB
    assert 0 < split["medium_bytes"] < MIB
    left = cli.json("targets")["targets"]
    assert isinstance(left, list)
    assert {target["role"] for target in left if reflink in target["volume"]} == {"checkpoint"}
