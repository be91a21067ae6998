"""The line to the array: one connection for many commands, made anew when it breaks, gone with the driver."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from array_world import ARRAY, GIB, HOST

from graincopy.core.errors import ArrayLoginFailed, ArrayUnreachable
from graincopy.testing.array import Array
from graincopy.testing.array_plane import NoPlane, WallClock
from graincopy.testing.array_ssh import SshFront
from graincopy.volumes.flashcopy import names
from graincopy.volumes.flashcopy.assembly import ArraySettings, flashcopy_driver
from graincopy.volumes.flashcopy.connection import Login, Lost, SshConnection
from graincopy.volumes.flashcopy.driver import FlashCopyDriver


@pytest.fixture
def front(tmp_path: os.PathLike[str]) -> Iterator[SshFront]:
    array = Array(NoPlane(), WallClock())
    array.make("ds0", GIB, HOST)
    with SshFront(array, os.path.join(tmp_path, "ssh")) as running:
        running.array = array  # type: ignore[attr-defined]
        yield running


def login(front: SshFront, **more: object) -> Login:
    at = front.endpoint
    usual: dict[str, object] = {"host": "127.0.0.1", "port": at.port, "user": at.user, "key_file": at.key_file}
    return Login(**{"name": ARRAY, "known_hosts": at.known_hosts, **usual, **more})  # type: ignore[arg-type]


def driver(front: SshFront, folder: object, **more: object) -> FlashCopyDriver:
    return flashcopy_driver([ArraySettings(login(front, **more), HOST)], str(folder), WallClock())


def test_exit_status_and_both_streams(front: SshFront) -> None:
    connection = SshConnection(login(front))
    listed = connection.run("lsvdisk -bytes -delim !")
    assert (listed.status, listed.err) == (0, "")
    assert "ds0" in listed.out
    refused = connection.run("rmvdisk nothing")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("CMMVC5754E")
    connection.close()


def test_one_connection_serves_many_commands_and_threads(front: SshFront) -> None:
    connection = SshConnection(login(front))
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: connection.run("lsfcconsistgrp -delim !").status, range(12)))
    assert replies == [0] * 12
    assert len(front._clients) == 1
    connection.close()
    connection.close()


def test_a_connection_that_was_cut_is_made_anew(front: SshFront) -> None:
    connection = SshConnection(login(front))
    assert connection.run("lsvdisk -bytes -delim !").status == 0
    front.hang_up()
    for _ in range(2):  # whether it notices at once is a matter of time
        try:
            assert connection.run("lsvdisk -bytes -delim !").status == 0
            break
        except Lost:
            continue
    else:
        raise AssertionError("it does not connect again")
    connection.close()


def test_no_answer_in_time_is_a_lost_one(front: SshFront) -> None:
    release = threading.Event()
    front.array.faults.before["lsvdisk"] = lambda: release.wait(30)  # type: ignore[attr-defined]
    connection = SshConnection(login(front, command_timeout=0.2))
    try:
        with pytest.raises(Lost):
            connection.run("lsvdisk -bytes -delim !")
    finally:
        release.set()
        connection.close()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"user": "nobody"}, "Permission denied"),
        ({"known_hosts": "/dev/null"}, "Host key is not trusted"),
        ({"key_file": "/nonexistent"}, "/nonexistent cannot be read"),
        ({"key_file": "/dev/null"}, ""),
        ({"key_file": "", "password_file": "/nonexistent"}, "password file /nonexistent: No such file"),
    ],
)
def test_who_may_not_log_in_is_told_why(front: SshFront, more: dict[str, object], reason: str) -> None:
    connection = SshConnection(login(front, **more))
    with pytest.raises(ArrayLoginFailed, match=f"array lab cannot be logged in to: {reason}"):
        connection.run("lsvdisk -bytes -delim !")
    connection.close()


def test_nobody_there(front: SshFront) -> None:
    connection = SshConnection(login(front, port=1))
    with pytest.raises(ArrayUnreachable, match=r"array lab does not answer: 127.0.0.1 port 1: "):
        connection.run("lsvdisk -bytes -delim !")
    connection.close()


def test_the_password_never_shows(front: SshFront, tmp_path: os.PathLike[str]) -> None:
    wrong = os.path.join(tmp_path, "wrong")
    with open(wrong, "w", encoding="utf-8") as file:
        file.write("s3cret\n")
    connection = SshConnection(login(front, key_file="", password_file=wrong))
    with pytest.raises(ArrayLoginFailed) as caught:
        connection.run("lsvdisk -bytes -delim !")
    assert "s3cret" not in f"{caught.value} {caught.value.next_move} {caught.value.facts} {login(front)}"
    connection.close()


def test_a_driver_that_is_dropped_hangs_up(front: SshFront, tmp_path: os.PathLike[str]) -> None:
    """By reference counts alone, also after errors: drivers are made anew at any time and never closed."""
    gc.disable()
    try:
        made = driver(front, tmp_path)
        volume = names.volume_id(ARRAY, front.array.vdisks["ds0"].uid.lower())  # type: ignore[attr-defined]
        assert made.describe(volume).size == GIB
        loop = made._arrays[ARRAY].console._connection._loop  # type: ignore[attr-defined]
        assert not loop.is_closed()
        del made
        assert loop.is_closed()
    finally:
        gc.enable()
