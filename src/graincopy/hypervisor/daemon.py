"""Below stages 7 and R: a qemu-storage-daemon of our own, which shows an image that no virtual machine has open.

It dies with us: nothing that it does has to outlive the process, and an image that it writes is closed cleanly on
SIGTERM. A shell waits for the end of a pipe that only we hold, and then sends it. (The kernel's own way,
PR_SET_PDEATHSIG, takes the end of the *thread* that made the child for our end.) Nobody else reaches the daemon: its
monitor is a socket pair, its NBD socket lies in a folder of mode 0700 that goes with it.
https://www.qemu.org/docs/master/tools/qemu-storage-daemon.html
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from graincopy.core.errors import ToolMissing
from graincopy.hypervisor.qmp import Monitor

PROGRAM = "qemu-storage-daemon"
INSTALL = "apt-get install qemu-system-common qemu-utils"
_SHEPHERD = '"$@" </dev/null & read -r _; kill $! 2>/dev/null; wait $!'
_PATIENCE = 30.0  # seconds to end


class StorageDaemon:
    """A running daemon: ``monitor`` to give it nodes, ``nbd`` the path of its NBD socket."""

    def __init__(self, pass_fds: Sequence[int] = ()) -> None:
        """Raises ToolMissing, OSError. ``pass_fds`` are open in it under the same numbers."""
        if shutil.which(PROGRAM) is None:
            raise ToolMissing(tool=PROGRAM, install=INSTALL)
        self._folder = tempfile.mkdtemp(prefix="graincopy-qsd-")
        self.nbd = os.path.join(self._folder, "nbd")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        ours, theirs = socket.socketpair()
        try:
            self._process = _start((*pass_fds, theirs.fileno()), theirs.fileno(), self._said.fileno())
        except BaseException:
            ours.close()
            self._clean()
            raise
        finally:
            theirs.close()
        try:
            self.monitor = Monitor(ours)
            address = {"type": "unix", "data": {"path": self.nbd}}
            self.monitor.run("nbd-server-start", {"addr": address})
            os.chmod(self.nbd, 0o600)
        except BaseException:
            ours.close()
            self.close()
            raise

    def export(self, node: str, name: str, *, writable: bool = False, bitmaps: Sequence[str] = ()) -> None:
        """Show ``node`` as the NBD export ``name`` with these of its bitmaps. Raises QmpRefused."""
        options: dict[str, Any] = {"type": "nbd", "id": name, "node-name": node, "name": name, "writable": writable}
        if bitmaps:
            options["bitmaps"] = [{"node": node, "name": bitmap} for bitmap in bitmaps]
        self.monitor.run("block-export-add", options)

    def add(self, options: Mapping[str, Any]) -> None:
        """A block node. Raises QmpRefused."""
        self.monitor.run("blockdev-add", options)

    def close(self) -> bool:
        """End it in order, images closed and bitmaps saved; may be repeated. False when it had to be killed."""
        process = self._process
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if hasattr(self, "monitor"):
            self.monitor.close()
        self._clean()
        return process.returncode == 0

    def last_words(self) -> str:
        """What it said to standard error."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace").strip()

    def _clean(self) -> None:
        self._said.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> StorageDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start(fds: Sequence[int], monitor: int, errors: int) -> subprocess.Popen[bytes]:
    chardev = f"socket,id=monitor,fd={monitor},server=off"
    return subprocess.Popen(
        [
            "sh",
            "-c",
            _SHEPHERD,
            "graincopy",
            PROGRAM,
            "--chardev",
            chardev,
            "--monitor",
            "chardev=monitor,mode=control",
        ],
        pass_fds=fds,
        stdin=subprocess.PIPE,
        stdout=errors,
        stderr=errors,
        start_new_session=True,  # an interrupt from the terminal is for us, and we end it in order
    )
