"""One line of command to the array and its answer, over SSH (below stages 3 to 9). Host keys are always checked.

asyncssh is imported when the first connection is made (``graincopy[flashcopy]``). Its event loop runs only while a
command does, in the caller's thread: no thread is started here. A connection that broke is made anew by the next call.
"""

from __future__ import annotations

import asyncio
import os
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import msgspec

from graincopy.core.errors import ArrayLoginFailed, ArrayUnreachable, ToolMissing

if TYPE_CHECKING:
    import asyncssh

LONGEST_ANSWER = 64 << 20  # characters; more is no answer of an array


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """Where the array is and who we are there. Files are read at each connection; empty paths are not used."""

    name: str  # what the configuration calls the array
    host: str
    user: str
    port: int = 22
    key_file: str = ""
    password_file: str = ""
    known_hosts: str = ""  # empty: the user's own
    connect_timeout: float = 15.0  # seconds
    command_timeout: float = 60.0  # seconds


class Reply(msgspec.Struct, frozen=True):
    """What a command answered. ``status`` is its exit status."""

    status: int
    out: str
    err: str


class Lost(Exception):
    """The connection broke, or no answer came in time: nobody knows whether the command took effect."""


class Connection(Protocol):
    """One array, one command at a time."""

    def run(self, line: str) -> Reply:
        """Raises Lost; ArrayUnreachable, ArrayLoginFailed or ToolMissing when no connection can be made."""

    def close(self) -> None:
        """May be repeated; the next ``run`` connects again."""


class SshConnection:
    """A :class:`Connection` by asyncssh. Safe to use from several threads, which take turns."""

    def __init__(self, login: Login) -> None:
        self._login = login
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: asyncssh.SSHClientConnection | None = None

    def run(self, line: str) -> Reply:
        """As the protocol says."""
        with self._lock:
            loop = self._loop = self._loop or asyncio.new_event_loop()
            try:
                return loop.run_until_complete(self._run(line))
            except BaseException:
                self._drop()
                raise

    async def _run(self, line: str) -> Reply:
        import asyncssh

        connection = self._connection
        if connection is None or connection.is_closed():
            connection = self._connection = await self._connect()
        try:
            async with asyncio.timeout(self._login.command_timeout):
                done = await connection.run(line, errors="replace")
        except (asyncssh.Error, OSError) as error:  # TimeoutError is an OSError
            raise Lost(str(error) or type(error).__name__) from error
        if done.exit_status is None or done.exit_status < 0:
            raise Lost("the command ended without an exit status")
        out, err = str(done.stdout or ""), str(done.stderr or "")
        if len(out) > LONGEST_ANSWER:
            raise Lost("the answer has no end")
        return Reply(done.exit_status, out, err)

    async def _connect(self) -> asyncssh.SSHClientConnection:
        import asyncssh

        login = self._login
        password = _read_password(login)
        known_hosts = login.known_hosts or os.path.expanduser("~/.ssh/known_hosts")
        for path in (known_hosts, *([login.key_file] if login.key_file else [])):
            if not os.access(path, os.R_OK):
                raise ArrayLoginFailed(array=login.name, reason=f"{path} cannot be read")
        try:
            async with asyncio.timeout(login.connect_timeout):
                return await asyncssh.connect(
                    login.host,
                    login.port,
                    username=login.user,
                    password=password,
                    client_keys=[login.key_file] if login.key_file else None,
                    known_hosts=known_hosts,
                    agent_path=None,
                    config=None,
                    keepalive_interval=0,
                )
        except (asyncssh.HostKeyNotVerifiable, asyncssh.PermissionDenied, ValueError) as error:  # bad files too
            raise ArrayLoginFailed(array=login.name, reason=_why(error)) from error
        except (asyncssh.Error, OSError) as error:
            reason = _why(error) or "no answer in time"
            raise ArrayUnreachable(array=login.name, reason=f"{login.host} port {login.port}: {reason}") from error

    def close(self) -> None:
        """Close the connection and the event loop; may be repeated."""
        with self._lock:
            self._drop()

    def __del__(self) -> None:
        """Drivers are made anew at any time and never closed: the socket goes with the last of them.

        That may be in the middle of somebody else's event loop, which then pauses for the moment that ours needs.
        """
        running = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            self._drop()
        finally:
            asyncio._set_running_loop(running)

    def _drop(self) -> None:
        loop, self._loop = self._loop, None
        connection, self._connection = self._connection, None
        if loop is None:
            return
        try:
            if connection is not None:
                connection.abort()
            loop.run_until_complete(_ended())
        finally:
            loop.close()


async def _ended() -> None:
    """Let every task of the loop come to its end: a connection closes its socket in one."""
    await asyncio.sleep(0)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)


def _why(error: BaseException) -> str:
    return getattr(error, "reason", "") or getattr(error, "strerror", "") or str(error)


def _read_password(login: Login) -> str | None:
    """The first line of the password file."""
    if not login.password_file:
        return None
    try:
        with open(login.password_file, encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"password file {login.password_file}: {_why(error)}"
        raise ArrayLoginFailed(array=login.name, reason=reason) from error


def ssh_connection(login: Login) -> SshConnection:
    """A connection that is made when it is first used. Raises ToolMissing where asyncssh is not installed."""
    try:
        import asyncssh  # noqa: F401
    except ImportError as error:
        raise ToolMissing(tool="asyncssh", install="pip install 'graincopy[flashcopy]'") from error
    return SshConnection(login)
