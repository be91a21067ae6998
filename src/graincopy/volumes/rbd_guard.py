"""The guard of a client of Ceph (stages 4-9, R): a program of its own that gives the client up when its process dies.

Whoever snapshots a group, or writes an image back, has the exclusive locks of images. When such a process is killed,
other writers wait until the cluster has missed it, 30 seconds as a rule (osd_client_watch_timeout). A client on the
blocklist loses its watches at once: a lock whose owner watches no more is broken by whoever wants it, and nothing that
the dead one still had under way takes effect (librbd/managed_lock/AcquireRequest.cc and BreakRequest.cc,
PrimaryLogPG::check_blocklisted_watchers of Ceph 16).

It is exec'd, and speaks lines over its standard input and output::

    parent → {"name", "conf", "options", "address"}       how to connect, and what the cluster knows the parent by
    guard  → ready
    parent → bye                                          it holds nothing any more

When its standard input ends without that, the parent was killed. Loaded and connected before "ready".
"""

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

_GIVE_UP = 60.0  # seconds; by then the cluster has missed the client by itself
_PAUSE = 0.5  # seconds between two tries


class Client:
    """A connection of its own. Raises OSError when there is none."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._rados, self._handle = ctypes.CDLL("librados.so.2"), ctypes.c_void_p()
        self._done(
            self._rados.rados_create2(ctypes.byref(self._handle), b"ceph", order["name"].encode(), ctypes.c_uint64(0))
        )
        self._done(self._rados.rados_conf_read_file(self._handle, os.fsencode(order["conf"])))
        for option, value in order["options"].items():
            self._done(self._rados.rados_conf_set(self._handle, option.encode(), os.fsencode(value)))
        self._done(self._rados.rados_connect(self._handle))

    def give_up(self, address: str) -> bool:
        """The client at ``address`` is refused from now on, for as long as the cluster does so by default."""
        added = self._rados.rados_blocklist_add(self._handle, address.encode(), ctypes.c_uint32(0))
        return bool(added == 0)

    def _done(self, result: int) -> None:
        if result < 0:
            raise OSError(-result, os.strerror(-result))


def settle_in() -> None:
    """Be hard to kill, as far as this user may; nothing of it is needed to be correct."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"-1000")
        finally:
            os.close(fd)
    except OSError:
        pass  # an ordinary user may not lower it


def main() -> None:
    """From the order to the end of the parent."""
    settle_in()
    order = json.loads(sys.stdin.buffer.readline())
    client = Client(order)
    os.write(1, b"ready\n")
    if sys.stdin.buffer.readline() == b"bye\n":
        return
    until = time.monotonic() + _GIVE_UP
    while not client.give_up(order["address"]) and time.monotonic() < until:
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main()
    os._exit(0)  # the connection ends with the process: nobody waits for it
