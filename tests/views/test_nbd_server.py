"""The NBD server as a process: what other people's clients see, and what clients may do to it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import nbd_client as nbd
import pytest
from hypothesis import HealthCheck, given, settings
from nbd_client import Client, go, option, request
from test_nbd_protocol import conversations

MIB = 1 << 20
SIZE = 24 * MIB + 333
HERE = os.path.dirname(__file__)
TOOLS = ("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")


def tool(*command: str, check: bool = True) -> str:
    """A client of somebody else."""
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout.decode()


class Serving:
    """The server in a process of its own."""

    def __init__(self, folder: str, *words: str, files: tuple[str, ...]) -> None:
        self.path = os.path.join(folder, "sock")
        where = () if "--port" in words else ("--socket", self.path)
        program = [sys.executable, os.path.join(HERE, "nbd_disks.py"), *files, *where, *words]
        self.process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.uri = self.process.stdout.readline().strip()
        self.rest = self.errors = ""

    @property
    def memory(self) -> int:
        """Resident bytes."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Tell it to end; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.rest, self.errors = self.process.communicate(timeout=20)
        return self.process.returncode

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Data, holes, and an end that is no multiple of anything."""
    path = os.fspath(tmp_path_factory.mktemp("image") / "disk one.raw")
    made = random.Random(5)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for at, length in ((0, 3 * MIB), (5 * MIB + 4096, 8192), (8 * MIB, 9 * MIB), (SIZE - 5000, 5000)):
            file.seek(at)
            file.write(made.randbytes(length))
    return path


@pytest.fixture(scope="module")
def content(image: str) -> bytes:
    with open(image, "rb") as file:
        return file.read()


@pytest.fixture(scope="module")
def serving(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all the tests that must not harm it; at the end it is seen to be whole."""
    with Serving(os.fspath(tmp_path_factory.mktemp("serving")), files=(image,)) as server:
        yield server
        with Client(server.path) as client:
            assert client.open().ask(nbd.READ, 0, 10).error == 0
        assert server.end() == 0
        assert server.errors == ""


# --- other people's clients -----------------------------------------------------------------------


def test_nbdinfo_sees_the_export(serving: Serving) -> None:
    (found,) = json.loads(tool("nbdinfo", "--json", serving.uri))["exports"]
    assert found["export-name"] == "disk one.raw"
    assert found["export-size"] == SIZE
    assert found["contexts"] == ["base:allocation", "graincopy:source"]
    assert found["is_read_only"] and found["can_multi_conn"] and found["can_df"] and found["can_flush"]
    assert not found["can_trim"] and not found["can_zero"]
    listed = json.loads(tool("nbdinfo", "--list", "--json", serving.uri))
    assert [export["export-name"] for export in listed["exports"]] == ["disk one.raw"]
    assert tool("nbdinfo", "--size", serving.uri.replace("disk%20one.raw", "")).strip() == str(SIZE)


def test_the_map_covers_everything_and_zeros_are_holes(serving: Serving, content: bytes) -> None:
    found = json.loads(tool("nbdinfo", "--map", "--json", serving.uri))
    at = 0
    for span in found:
        assert span["offset"] == at
        assert span["type"] in (0, 3)
        if span["type"] == 3:
            assert not any(content[at : at + span["length"]])
        at += span["length"]
    assert at == SIZE
    assert sum(span["length"] for span in found if span["type"] == 3) > 10 * MIB
    sources = json.loads(tool("nbdinfo", "--map=graincopy:source", "--json", serving.uri))
    assert {span["type"] for span in sources} == {0, 2}


def test_nbdcopy_and_qemu_img_copy_it_whole(serving: Serving, image: str, tmp_path: os.PathLike[str]) -> None:
    copy = os.path.join(tmp_path, "copy")
    tool("nbdcopy", serving.uri, copy)
    tool("cmp", image, copy)
    os.unlink(copy)
    tool("nbdcopy", "--connections=1", "--requests=1", "--request-size=32768", serving.uri, copy)
    tool("cmp", image, copy)
    converted = os.path.join(tmp_path, "copy.qcow2")
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", serving.uri, converted)
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, converted)
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", image, serving.uri)
    mapped = json.loads(tool("qemu-img", "map", "--output=json", "-f", "raw", serving.uri))
    assert {span["zero"] for span in mapped} == {True, False}


def test_qemu_io_reads_and_may_not_write(serving: Serving) -> None:
    out = tool("qemu-io", "-r", "-f", "raw", "-c", "read 0 1M", "-c", f"read {5 * MIB} 64k", serving.uri)
    assert "read 1048576/1048576" in out
    refused = tool("qemu-io", "-f", "raw", "-c", "write 0 4k", serving.uri, check=False)
    assert "read-only" in refused or "wrote" not in refused


# --- clients that do what they should not ---------------------------------------------------------


def test_eight_clients_at_once_get_the_right_bytes(serving: Serving, content: bytes) -> None:
    wrong: list[str] = []

    def reader(seed: int) -> None:
        chance = random.Random(seed)
        with Client(serving.path) as client:
            client.open(structured=seed % 2 == 0)
            for _ in range(30):
                asked = {}
                for handle in range(8):
                    offset = chance.randrange(SIZE)
                    length = min(chance.choice((1, 512, 4096, 70000, 300000)), SIZE - offset)
                    asked[handle] = offset, length
                    client.send(request(nbd.READ, offset, length, handle))
                for _ in range(len(asked)):
                    _check_reply(client, asked, content, wrong)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def _check_reply(client: Client, asked: dict[int, tuple[int, int]], content: bytes, wrong: list[str]) -> None:
    head = client.take(16)
    client.data = head + client.data
    if head.startswith(struct.pack(">I", 0x67446698)):
        offset, length = asked.pop(struct.unpack(">Q", head[8:])[0])
        got = client.reply(length).data[-1]
    else:
        offset, length = asked.pop(struct.unpack(">Q", head[8:])[0])
        got = client.reply().content(offset, length)
    if got != content[offset : offset + length]:
        wrong.append(f"{offset} {length}")


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        bytes(400),
        b"\xff" * 400,
        struct.pack(">I", 3) + b"IHAVENOT" + bytes(8),
        struct.pack(">I", 3) + struct.pack(">8sII", b"IHAVEOPT", 7, 0xFFFFFFFF),
        struct.pack(">I", 3) + option(nbd.EXPORT_NAME, b"no such disk"),
        struct.pack(">I", 3) + option(nbd.EXPORT_NAME) + b"garbage where a request should be",
        struct.pack(">I", 3) + option(nbd.EXPORT_NAME) + request(nbd.WRITE, 0, 0xFFFFFFFF),
    ],
)
def test_clients_that_send_garbage_are_hung_up_on(serving: Serving, data: bytes) -> None:
    with Client(serving.path, timeout=5) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(data)
        assert client.hung_up()


@pytest.mark.parametrize("cut", [1, 4, 12, 20, 40, 60, 75])
def test_clients_that_stop_in_the_middle_harm_nobody(serving: Serving, cut: int) -> None:
    whole = struct.pack(">I", 3) + option(nbd.STRUCTURED) + go() + request(nbd.READ, 0, MIB)
    with Client(serving.path) as half, Client(serving.path) as other:
        half.send(whole[:cut])
        assert other.open().ask(nbd.READ, 0, 512).error == 0
    with Client(serving.path) as other:
        assert other.open().ask(nbd.READ, 0, 512).error == 0


def test_a_client_that_dies_while_it_reads_harms_nobody(serving: Serving, content: bytes) -> None:
    for _ in range(10):
        client = Client(serving.path).open()
        client.send(b"".join(request(nbd.READ, at, MIB, at) for at in range(0, 16 * MIB, MIB)))
        client.take(5000)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    with Client(serving.path) as other:
        assert other.open().ask(nbd.READ, MIB, 512).content(MIB, 512) == content[MIB : MIB + 512]


def test_clients_that_never_read_their_replies_cost_a_bounded_amount(serving: Serving) -> None:
    with contextlib.ExitStack() as held:
        before = serving.memory
        for _ in range(6):
            client = held.enter_context(Client(serving.path)).open()
            client.socket.settimeout(0.5)
            asking = b"".join(request(nbd.READ, at, MIB, at) for at in range(0, 16 * MIB, MIB)) * 40
            with pytest.raises(TimeoutError):  # the server stops reading from it
                for _ in range(100):
                    client.send(asking)
        with Client(serving.path) as other:
            other.open()
            for at in range(0, 20 * MIB, MIB):
                assert other.ask(nbd.READ, at, MIB).error == 0
        assert serving.memory - before < 160 * MIB  # each asked for gigabytes


def test_replies_that_wait_for_slow_clients_stay_as_they_are(serving: Serving, content: bytes) -> None:
    """Memory of replies is used again: never while a client has still to read what lies in it."""
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(Client(serving.path)).open(structured=False) for _ in range(4)]
        places = [[(at * 7 + number * 3) % 23 * MIB + number for at in range(20)] for number in range(4)]
        for client, asked in zip(clients, places, strict=True):
            client.send(b"".join(request(nbd.READ, offset, 700_000, at) for at, offset in enumerate(asked)))
        for _ in range(20):
            for client, asked in zip(clients, places, strict=True):
                reply = client.reply(700_000)
                offset = asked[reply.handle]
                assert reply.data[-1] == content[offset : offset + 700_000]


def test_replies_of_a_client_that_said_goodbye_still_come(serving: Serving, content: bytes) -> None:
    with Client(serving.path) as client:
        client.open(structured=False)
        client.send(b"".join(request(nbd.READ, at * MIB, MIB, at) for at in range(8)) + request(nbd.DISC))
        asked = {at: (at * MIB, MIB) for at in range(8)}
        wrong: list[str] = []
        for _ in range(8):
            _check_reply(client, asked, content, wrong)
        assert not wrong
        assert client.hung_up()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations)
def test_whatever_is_said_to_the_server_it_lives(serving: Serving, data: bytes) -> None:
    with Client(serving.path) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.send(data)
    assert serving.process.poll() is None


# --- its life -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_removes_the_socket_whatever_clients_do(
    number: int, image: str, tmp_path: os.PathLike[str]
) -> None:
    folder = os.fspath(tmp_path)
    with Serving(folder, files=(image,)) as server, contextlib.ExitStack() as held:
        idle = held.enter_context(Client(server.path)).open()
        half = held.enter_context(Client(server.path)).begin()
        deaf = held.enter_context(Client(server.path)).open()
        deaf.send(b"".join(request(nbd.READ, 0, 8 * MIB, at) for at in range(20)))
        begun = time.monotonic()
        assert server.end(number) == 0
        assert time.monotonic() - begun < 10
        assert not os.path.exists(server.path)
        assert idle.hung_up() and half.hung_up()
        assert server.errors == ""


def test_the_socket_is_its_owners_alone(serving: Serving) -> None:
    assert os.stat(serving.path).st_mode & 0o777 == 0o600


def test_a_socket_that_is_served_is_refused_and_goes_on(image: str, serving: Serving) -> None:
    with Serving(os.path.dirname(serving.path), files=(image,)) as second:
        assert second.process.wait(20) == 64
        assert "another server has this socket" in (second.process.stderr.read() if second.process.stderr else "")
    with Client(serving.path) as client:
        client.open()


def test_the_socket_of_a_dead_server_is_replaced(image: str, tmp_path: os.PathLike[str]) -> None:
    folder = os.fspath(tmp_path)
    with Serving(folder, files=(image,)) as first:
        first.process.kill()
        first.process.wait()
        assert os.path.exists(first.path)
        with Serving(folder, files=(image,)) as second, Client(second.path) as client:
            client.open()
            assert second.end() == 0
    assert os.listdir(folder) == []


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_what_is_no_socket_is_left_alone(kind: str, image: str, tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "sock")
    if kind == "file":
        with open(path, "wb") as file:
            file.write(b"precious")
    elif kind == "folder":
        os.mkdir(path)
    else:
        os.symlink("nowhere", path)
    with Serving(os.fspath(tmp_path), files=(image,)) as server:
        assert server.process.wait(20) == 64
    assert os.listdir(tmp_path) == ["sock"]
    assert os.path.lexists(path)


def test_a_server_does_not_remove_the_socket_of_its_successor(image: str, tmp_path: os.PathLike[str]) -> None:
    with Serving(os.fspath(tmp_path), files=(image,)) as first:
        os.unlink(first.path)
        with Serving(os.fspath(tmp_path), files=(image,)) as second:
            assert first.end() == 0
            with Client(second.path) as client:
                client.open()
            assert second.end() == 0


def test_tcp_on_loopback_and_a_port_that_is_taken(image: str, tmp_path: os.PathLike[str]) -> None:
    folder = os.fspath(tmp_path)
    with Serving(folder, "--port", "0", files=(image,)) as server:
        port = server.uri.split(":")[2].split("/")[0]
        assert tool("nbdinfo", "--size", server.uri).strip() == str(SIZE)
        with Serving(folder, "--port", port, files=(image,)) as second:
            assert second.process.wait(20) == 64
        assert server.end() == 0


def test_tcp_off_loopback_without_certificates_is_refused(image: str, tmp_path: os.PathLike[str]) -> None:
    with Serving(os.fspath(tmp_path), "--port", "0", "--bind", "0.0.0.0", files=(image,)) as server:
        assert server.process.wait(20) == 2
        assert server.uri == ""


def test_several_disks_are_chosen_by_name(image: str, tmp_path: os.PathLike[str]) -> None:
    other = os.path.join(tmp_path, "two.raw")
    with open(other, "wb") as file:
        file.write(b"two" * 1000)
    with Serving(os.fspath(tmp_path), files=(image, other)) as server:
        listed = json.loads(tool("nbdinfo", "--list", "--json", server.uri))
        assert {found["export-name"]: found["export-size"] for found in listed["exports"]} == {
            "disk one.raw": SIZE,
            "two.raw": 3000,
        }
        with Client(server.path) as client:
            assert client.open(b"two.raw").ask(nbd.READ, 0, 6).content(0, 6) == b"twotwo"
        with Client(server.path) as client:
            client.begin().send(go(b""))
            assert client.option_replies()[-1].kind == nbd.UNKNOWN


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An authority, a server, a client; and a client that nobody signed."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    folder = os.fspath(tmp_path_factory.mktemp("tls"))

    def made(name: str, subject: str, *more: str) -> None:
        key, certificate = (os.path.join(folder, f"{name}-{kind}.pem") for kind in ("key", "cert"))
        new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={subject}"]
        tool(*new, "-keyout", key, "-out", certificate, *more)

    signed = ("-CA", os.path.join(folder, "ca-cert.pem"), "-CAkey", os.path.join(folder, "ca-key.pem"))
    leaf = ("-addext", "basicConstraints=critical,CA:FALSE")
    made("ca", "authority", "-addext", "basicConstraints=critical,CA:TRUE")
    made("server", "localhost", *signed, *leaf, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    made("client", "client", *signed, *leaf)
    stranger = os.path.join(folder, "stranger")
    os.mkdir(stranger)
    made("stranger/client", "stranger", *leaf)
    shutil.copy(os.path.join(folder, "ca-cert.pem"), stranger)
    return folder


def test_tls_with_certificates_of_one_authority(certificates: str, image: str, tmp_path: os.PathLike[str]) -> None:
    words = ("--port", "0", "--bind", "localhost", "--tls", certificates)
    with Serving(os.fspath(tmp_path), *words, files=(image,)) as server:
        assert server.uri.startswith("nbds://")
        copy = os.path.join(tmp_path, "copy")
        tool("nbdcopy", f"{server.uri}?tls-certificates={certificates}", copy)
        tool("cmp", image, copy)
        strange = os.path.join(certificates, "stranger")
        refused = tool("nbdinfo", "--size", f"{server.uri}?tls-certificates={strange}", check=False)
        assert refused == ""
        plain = tool("nbdinfo", "--size", server.uri.replace("nbds:", "nbd:"), check=False)
        assert plain == ""
        again = tool("nbdinfo", "--size", f"{server.uri}?tls-certificates={certificates}")
        assert again.strip() == str(SIZE)
        assert server.end() == 0
        assert server.errors == ""


def test_tls_handshakes_that_are_garbage_harm_nobody(certificates: str, image: str, tmp_path: os.PathLike[str]) -> None:
    with Serving(os.fspath(tmp_path), "--tls", certificates, files=(image,)) as server:
        for data in (b"\0" * 100, b"\x16\x03\x01\xff\xff" + bytes(100), b""):
            with Client(server.path, timeout=5) as client:
                client.begin().send(option(nbd.STARTTLS))
                assert client.option_reply().kind == nbd.ACK
                client.send(data)
                client.socket.shutdown(socket.SHUT_WR)
                assert client.hung_up()
        uri = f"{server.uri}&tls-certificates={certificates}&tls-hostname=localhost"
        assert tool("nbdinfo", "--size", uri).strip() == str(SIZE)
        assert server.end() == 0
        assert server.errors == ""


def test_a_client_that_never_shakes_hands_does_not_keep_the_server(
    certificates: str, image: str, tmp_path: os.PathLike[str]
) -> None:
    with Serving(os.fspath(tmp_path), "--tls", certificates, files=(image,)) as server, Client(server.path) as client:
        client.begin().send(option(nbd.STARTTLS))
        assert client.option_reply().kind == nbd.ACK
        assert server.end() == 0
        assert server.errors == ""


@pytest.mark.parametrize("missing", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_certificates_that_are_not_there_are_named(
    missing: str, certificates: str, image: str, tmp_path: os.PathLike[str]
) -> None:
    folder = os.path.join(tmp_path, "tls")
    shutil.copytree(certificates, folder)
    os.unlink(os.path.join(folder, missing))
    with Serving(os.fspath(tmp_path), "--tls", folder, files=(image,)) as server:
        assert server.process.wait(20) == 66
        assert server.process.stderr is not None
        assert missing in server.process.stderr.read()
