"""A process that writes numbered records alternately to images in turn, each durable before the next: CONF NAME...

It holds all of them open, as a virtual machine would, until standard input ends. The last line says how many records
each image has, and the longest that one write took, in seconds.
"""

from __future__ import annotations

import select
import struct
import sys
import time
from contextlib import ExitStack

from graincopy.volumes.rbd_cluster import Cluster, RbdSettings

SLOT = 512  # bytes; one record in each
SLOTS = 8192


def main(conf: str, *names: str) -> None:
    with ExitStack() as held:
        pool = held.enter_context(Cluster(RbdSettings(), conf).pool("rbd"))
        images = [held.enter_context(pool.image(name, writable=True)) for name in names]
        number, longest = 0, 0.0
        _say("ready")
        while not select.select([sys.stdin], [], [], 0)[0]:
            number += 1
            for image in images:
                began = time.monotonic()
                image.write(number % SLOTS * SLOT, memoryview(struct.pack("<Q", number)))
                longest = max(longest, time.monotonic() - began)
    _say(f"{number} {longest:.3f}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def last_of(data: bytes) -> int:
    """The last record that an image shows."""
    return max(struct.unpack_from("<Q", data, at)[0] for at in range(0, SLOT * SLOTS, SLOT))


if __name__ == "__main__":
    main(*sys.argv[1:])
