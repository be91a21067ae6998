"""The parent's end of the guard of a client of Ceph (stages 4-9, R). See :mod:`graincopy.volumes.rbd_guard`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping

from graincopy.volumes import rbd_guard

_ENDING = 10.0  # seconds in which the guard sees that it is not needed any more
_SLACK = 30.0  # seconds for starting Python, besides the time-out of the cluster


class Guarded:
    """From here to :meth:`end` the cluster gives the client at ``address`` up as soon as this process is gone."""

    def __init__(self, name: str, conf: str, options: Mapping[str, str], address: str, timeout: float) -> None:
        """``timeout`` in seconds, that of the cluster. Raises OSError when there is no guard."""
        order = {"name": name, "conf": conf, "options": dict(options), "address": address}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.realpath(rbd_guard.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            start_new_session=True,
        )
        self._say(json.dumps(order).encode())
        if not self._ready(timeout + _SLACK):
            self._process.kill()
            self.end()
            raise OSError(errno.ECHILD, "the guard of this client did not start")

    def end(self) -> None:
        """The client has let go of everything. May be repeated."""
        self._say(b"bye")
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(_ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, line: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            if not stdin.closed:
                stdin.write(line + b"\n")

    def _ready(self, patience: float) -> bool:
        stdout = self._process.stdout
        assert stdout is not None
        readable, _, _ = select.select([stdout], [], [], patience)
        return bool(readable) and stdout.readline() == b"ready\n"
