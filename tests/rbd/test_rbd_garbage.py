"""A Ceph that is none: what answers in place of a monitor or an OSD, and configurations and keyrings that are garbage.

One sentence and the code of StorageUnreachable, within the configured time-out, S unharmed, no process left.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import scene
from guests import MIB, TIMEOUT, Guest
from story import Cli, Done, noise

from graincopy.core.errors import StorageUnreachable

BANNER = b"ceph v2\n\x10\x00"  # and 16 bytes of features
SAID = {
    "nothing": b"",
    "noise": b"\xff" * 4096,
    "half a banner": BANNER[:5],
    "noise after the banner": BANNER + noise(1, 100_000),
    "a banner of version 1, then noise": b"ceph v027" + noise(2, 4096),
    "the end at once": None,
}

MANY = 50  # connections that are kept open; a client of Ceph tries again and again


def given_up(done: Done, *words: str) -> None:
    """It ended with the code of StorageUnreachable, and one sentence with these ``words``."""
    assert done.code == StorageUnreachable.exit_code, done
    assert all(word in done.err for word in words) and "Traceback" not in done.err, done.err
    assert len(done.err.splitlines()) <= 3, done.err


@contextmanager
def talking(garbage: bytes | None, port: int = 0) -> Iterator[int]:
    """A port at which everybody is told ``garbage`` and heard no more; None: everybody is turned away."""
    server = socket.create_server(("127.0.0.1", port))
    said: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
                client.sendall(garbage or b"")
            except OSError:
                if server.fileno() < 0 or not accepting.is_set():
                    return
                continue
            said.append(client)
            while len(said) > (MANY if garbage is not None else 0):
                said.pop(0).close()

    accepting = threading.Event()
    accepting.set()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        accepting.clear()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT)
        server.close()
        for client in said:
            client.close()


def nobody_left(cli: Cli) -> bool:
    """No process runs on with the environment of ``cli``; a guard needs a moment to have a dead client given up."""
    gc.collect()  # what ran in this process has a guard, too
    return scene.wait_until(TIMEOUT, lambda: not any(cli.repo in _environment(pid) for pid in os.listdir("/proc")))


def _environment(pid: str) -> str:
    try:
        with open(f"/proc/{int(pid)}/environ", "rb") as file:
            return os.fsdecode(file.read())
    except (OSError, ValueError):
        return ""


@pytest.mark.parametrize("version", ["v2", "v1"])
@pytest.mark.parametrize("garbage", SAID.values(), ids=SAID)
def test_a_monitor_that_is_none(cli: Cli, tmp_path: object, garbage: bytes | None, version: str) -> None:
    with talking(garbage) as port:
        with open(f"{tmp_path}/ceph.conf", "w") as file:
            file.write("[global]\nauth client required = none\nkeyring = /dev/null\n")
            file.write(f"mon host = {version}:127.0.0.1:{port}\n")
        cli.configure(f'[rbd]\nconf = "{tmp_path}/ceph.conf"\ntimeout = 2\n')
        given_up(cli.process("backup", "rbd:rbd/web"), "does not answer in time")
    assert nobody_left(cli)


START = 'setsid "$@" </dev/null >/dev/null 2>&1 & echo $! >"$0"'


@contextmanager
def replaced_osd(guest: Guest, garbage: bytes | None) -> Iterator[None]:
    """The OSD dies without a word, and at its addresses somebody says ``garbage``; afterwards it is back."""
    pid_file = os.path.join(os.path.dirname(guest.conf), "osd.pid")
    if not os.path.exists(pid_file):
        pytest.skip("this cluster was not started by scripts/lab-ceph.sh")
    with open(pid_file) as file:
        pid = int(file.read())
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        command = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    osd = _osd(guest)
    ports = [int(one["addr"].rpartition(":")[2]) for one in osd["public_addrs"]["addrvec"]]
    os.kill(pid, signal.SIGKILL)
    try:
        assert scene.wait_until(TIMEOUT, lambda: all(map(_is_free, ports)))
        with ExitStack() as held:
            for port in ports:
                held.enter_context(talking(garbage, port))
            yield
    finally:
        subprocess.run(
            ["bash", "-c", START, pid_file, *command],
            env={**os.environ, "CEPH_CONF": guest.conf},
            timeout=TIMEOUT,
            check=True,
        )
        assert scene.wait_until(TIMEOUT, lambda: _osd(guest)["up"] and _osd(guest)["up_from"] > osd["up_from"], 0.5)


def _osd(guest: Guest) -> Any:
    """What the monitor says of the one OSD."""
    return json.loads(guest.command("ceph", "osd", "dump", "--format", "json"))["osds"][0]


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("kind", ["nothing", "noise after the banner"])
def test_an_osd_that_is_none(guest: Guest, cli: Cli, kind: str) -> None:
    path = guest.make("told", 8 * MIB)
    guest.write("told", (MIB, noise(1, MIB)))
    cli.backup(path)
    before, traces = guest.read("told"), guest.traces()
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\ntimeout = 2\n')
    with replaced_osd(guest, SAID[kind]):
        given_up(cli.process("backup", path), "does not answer in time")
        given_up(cli.process("volumes", path), "does not answer in time")
        assert nobody_left(cli)
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\n')
    assert (guest.read("told"), guest.traces()) == (before, traces)
    assert cli.backup(path)["disks"][0]["change_map"] == "rbd fast-diff"


def test_an_osd_that_turns_to_garbage_under_a_backup(guest: Guest, cli: Cli) -> None:
    """Nothing is published, and what it left behind is reaped when the cluster is back."""
    path = guest.make("turned", 8 * MIB)
    guest.write("turned", (0, noise(1, 4 * MIB)))
    before = guest.read("turned")
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\ntimeout = 2\n')
    with scene.stopped(cli, "settled", "backup", path) as halted, replaced_osd(guest, SAID["noise after the banner"]):
        done = halted.go_on()
        given_up(done, "does not answer in time")
        assert nobody_left(cli)
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\n')
    guest.await_alone("turned")
    cli("targets", "--reap")
    assert cli.ok("points") == [] and guest.traces() == []
    assert guest.read("turned") == before


def test_an_osd_that_turns_to_garbage_under_a_restore(guest: Guest, cli: Cli) -> None:
    """What was begun is finished when it is back: the image is that of the restore point."""
    path = guest.make("half", 8 * MIB)
    guest.write("half", (0, noise(1, 4 * MIB)))
    cli.backup(path)
    before = guest.read("half")
    guest.write("half", (MIB, noise(2, 2 * MIB)))
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\ntimeout = 2\n')
    stopped = scene.stopped(cli, "recorded", "restore", "latest", "--in-place")
    with stopped as halted, replaced_osd(guest, SAID["noise"]):
        done = halted.go_on()
        given_up(done, "does not answer in time")
        assert nobody_left(cli)
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\n')
    guest.await_alone("half")
    cli.ok("restore", "latest", "--in-place")
    assert guest.read("half") == before
    cli.undamaged()


CONFS = {
    "noise": (noise(3, 5000), "its configuration cannot be understood"),
    "a line that is none": (b"[global\nmon host == = [[\n", "its configuration cannot be understood"),
    "no monitor": (b"[global]\n", "names no monitor"),
}


@pytest.mark.parametrize(("conf", "said"), CONFS.values(), ids=CONFS)
def test_a_configuration_that_is_garbage(cli: Cli, tmp_path: object, conf: bytes, said: str) -> None:
    with open(f"{tmp_path}/ceph.conf", "wb") as file:
        file.write(conf)
    cli.configure(f'[rbd]\nconf = "{tmp_path}/ceph.conf"\n')
    given_up(cli.process("backup", "rbd:rbd/web"), said, f"{tmp_path}/ceph.conf")


def test_a_configuration_that_cannot_be_read(cli: Cli, tmp_path: object) -> None:
    cli.configure(f'[rbd]\nconf = "{tmp_path}/none"\n')
    given_up(cli.process("backup", "rbd:rbd/web"), "its configuration: No such file")
    cli.configure(f'[rbd]\nconf = "{tmp_path}"\n')
    given_up(cli.process("backup", "rbd:rbd/web"), "its configuration: Is a directory")


KEYRINGS = {
    "noise": (noise(4, 5000), "its keyring cannot be understood"),
    "text": (b"[global\nkey == = [[\n", "its keyring cannot be understood"),
    "half a key": (b"[client.admin]\nkey = AQA5M2Vn0000A\n", "its keyring cannot be understood"),
    "nobody": (b"", "not accepted"),
    "somebody else": (b"[client.other]\nkey = AQA5M2Vn0000ABAAbHaNOF5Lr7KFpDmWDmxHcw==\n", "not accepted"),
}


@pytest.mark.parametrize(("keyring", "said"), KEYRINGS.values(), ids=KEYRINGS)
def test_a_keyring_that_is_garbage(guest: Guest, cli: Cli, tmp_path: object, keyring: bytes, said: str) -> None:
    with open(f"{tmp_path}/keyring", "wb") as file:
        file.write(keyring)
    cli.configure(f'[rbd]\nconf = "{guest.conf}"\nkeyring = "{tmp_path}/keyring"\ntimeout = 2\n')
    given_up(cli.process("backup", "rbd:rbd/web"), said)


def test_a_keyring_that_cannot_be_read(guest: Guest, cli: Cli, tmp_path: object) -> None:
    for path, said in ((f"{tmp_path}/none", "its keyring is missing"), (tmp_path, "its keyring is a directory")):
        cli.configure(f'[rbd]\nconf = "{guest.conf}"\nkeyring = "{path}"\ntimeout = 2\n')
        given_up(cli.process("backup", "rbd:rbd/web"), said)
