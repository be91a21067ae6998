"""graincopy as a process that kills itself at a call of librbd: CALL WHEN COUNT -- ARGUMENTS.

CALL is a function of rbd_group. WHEN is before, after, or locked: in the middle, as soon as one image of the pool
``rbd`` is locked by this process. Not earlier: an OSD of Ceph 16 keeps the watch of a client for ever that dies just
while it opens an image (tracker 58120).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from ctypes import byref, c_int, c_size_t, create_string_buffer
from typing import Any

from graincopy.cli.main import run
from graincopy.volumes import rbd_group
from graincopy.volumes.rbd_cluster import Cluster
from graincopy.volumes.rbd_records import Group, parts_of


def strike(*_: object) -> None:
    """Nothing runs after this."""
    os.kill(os.getpid(), signal.SIGKILL)


def strike_when_locked(cluster: Cluster, group: Group) -> None:
    """By whoever: the writer had the lock, then we have it."""
    _, image_id, _ = parts_of(group.members[0])
    with cluster.pool("rbd") as pool:
        first = locker(pool, image_id)
        while locker(pool, image_id) in (b"", first):
            pass
    strike()


def locker(pool: Any, image_id: str) -> bytes:
    """Who has the exclusive lock of an image."""
    texts = [create_string_buffer(1024) for _ in range(4)]
    sizes = [c_size_t(1024) for _ in texts]
    pairs = [part for text, size in zip(texts, sizes, strict=True) for part in (text, byref(size))]
    pool.rados.rados_list_lockers(pool.handle, f"rbd_header.{image_id}".encode(), b"rbd_lock", byref(c_int()), *pairs)
    return texts[1].value


def main(call: str, when: str, count: str, _: str, *arguments: str) -> int:
    """Runs graincopy with ``arguments``; the ``count``-th ``call`` is its last."""
    inner, left, lock = getattr(rbd_group, call), [int(count)], threading.Lock()

    def struck(*args: Any, **options: Any) -> Any:
        with lock:
            left[0] -= 1
            mine = left[0] == 0
        if mine and when == "before":
            strike()
        if mine and when == "locked":
            threading.Thread(target=strike_when_locked, args=args[:2]).start()
        answer = inner(*args, **options)
        if mine:
            strike()
        return answer

    setattr(rbd_group, call, struck)
    return run(list(arguments), None)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
