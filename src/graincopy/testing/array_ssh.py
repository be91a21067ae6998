"""The array of our own behind an SSH server on loopback: users by key or password, a host key, one line a command.

``python -m graincopy.testing.array_ssh DIRECTORY`` runs one in the foreground, with three LUNs whose images lie in
DIRECTORY (on XFS with reflink; as root), and prints the section of the configuration that finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import asyncssh

from graincopy.testing.array import Array, LineBroken

USER = "superuser"
PASSWORD = "passw0rd"
HOST = "thishost"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to log in to a running server."""

    port: int
    user: str
    key_file: str
    password_file: str
    known_hosts: str

    def config(self, name: str, by_id: str, **more: object) -> str:
        """The section of the configuration, as TOML."""
        values: dict[str, object] = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": self.user,
            "key_file": self.key_file,
            "known_hosts": self.known_hosts,
            "host_name": HOST,
            "devices": by_id,
            **more,
        }
        return f"[flashcopy.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


class _Server(asyncssh.SSHServer):
    """One user, by key or password."""

    def __init__(self, authorized: str) -> None:
        self._authorized = authorized

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn

    def begin_auth(self, username: str) -> bool:
        if username == USER:
            self._connection.set_authorized_keys(self._authorized)
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


class SshFront:
    """A server thread over ``array``. ``folder`` gets the keys and what a client needs to know."""

    def __init__(self, array: Array, folder: str) -> None:
        self._array, self._folder = array, folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="array")
        self._clients: set[asyncssh.SSHServerConnection] = set()
        self.endpoint: Endpoint

    def __enter__(self) -> SshFront:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)
        except BaseException:
            self._end()
            raise
        return self

    async def _listen(self) -> None:
        host_key = asyncssh.generate_private_key("ssh-ed25519")
        user_key = asyncssh.generate_private_key("ssh-ed25519")
        os.makedirs(self._folder, exist_ok=True)
        authorized = self._path("authorized_keys")
        user_key.write_public_key(authorized)
        self._write("key", user_key.export_private_key())
        self._write("password", f"{PASSWORD}\n".encode())
        self._acceptor = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=lambda: _Server(authorized),
            server_host_keys=[host_key],
            process_factory=self._process,
        )
        port = self._acceptor.get_port()
        public = host_key.export_public_key()
        self._write("known_hosts", b"[127.0.0.1]:%d %s" % (port, public))
        self.endpoint = Endpoint(port, USER, self._path("key"), self._path("password"), self._path("known_hosts"))

    async def _process(self, process: asyncssh.SSHServerProcess[str]) -> None:
        connection = process.get_extra_info("connection")
        self._clients.add(connection)
        try:
            answer = await self._loop.run_in_executor(None, self._array.execute, process.command or "")
        except LineBroken:
            connection.abort()
            return
        process.stdout.write(answer.out)
        process.stderr.write(answer.err)
        process.exit(answer.status)

    def hang_up(self) -> None:
        """Cut every connection."""
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result(30)

    async def _hang_up(self) -> None:
        while self._clients:
            self._clients.pop().abort()

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._end()

    async def _close(self) -> None:
        self._acceptor.close()
        await self._hang_up()
        await asyncio.sleep(0.05)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _write(self, name: str, content: bytes) -> None:
        fd = os.open(self._path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)


@contextmanager
def served(array: Array, folder: str) -> Iterator[Endpoint]:
    """A running server for as long as the block lasts."""
    with SshFront(array, folder) as front:
        yield front.endpoint


def main(arguments: list[str]) -> int:
    """The program of the module's docstring."""
    from graincopy.testing.array_plane import LoopPlane, WallClock

    folder = os.path.abspath(arguments[0])
    plane = LoopPlane(os.path.join(folder, "luns"), os.path.join(folder, "by-id"))
    array = Array(plane, WallClock())
    try:
        for number in range(3):
            array.make(f"lun{number}", 1 << 30, HOST)
        with served(array, os.path.join(folder, "ssh")) as endpoint:
            sys.stdout.write(endpoint.config("lab", plane.by_id))
            sys.stdout.write("".join(f"# lun{n} is {plane.device(n + 1)}\n" for n in range(3)))
            sys.stdout.flush()
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    finally:
        plane.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
