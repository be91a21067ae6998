"""The FUSE server over plain files, as a process of its own: ``python fuse_server.py DIRECTORY BROKEN FILE...``.

BROKEN: ``START-STOP``, bytes of every file that cannot be read. Says ``ready``, and at the end ``ended``.
"""

import sys

from guest_lab import FileDisk

from graincopy.core.errors import GraincopyError
from graincopy.views import fuse


def say(line: str) -> None:
    """To whoever started this."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


directory, broken, *paths = sys.argv[1:]
disks = [FileDisk(path) for path in paths]
for disk in disks:
    disk.broken = [tuple(map(int, broken.split("-")))] if broken else []  # type: ignore[list-item]
try:
    fuse.serve(disks, directory, 1_600_000_000.0, lambda: say("ready"))
except GraincopyError as failure:
    say(f"{type(failure).__name__}: {failure}")
    sys.exit(failure.exit_code)
say("ended")
