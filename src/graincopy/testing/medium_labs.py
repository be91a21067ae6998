"""Labs over the media that exist here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

from graincopy.media.base import Medium
from graincopy.media.directory import TEMPORARY, DirectoryMedium
from graincopy.media.memory import MemoryMedium, MemoryStore
from graincopy.testing.laws_medium import MediumLab

# puts an object of which every part says where it is, so that the parent can kill in the middle of the writing
_WRITER = """
import sys
from graincopy.media.directory import DirectoryMedium
path, name, size, nameless = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1"
medium = DirectoryMedium(path, nameless=nameless)
piece = bytes(10000)
class Parts(list):
    def __iter__(self):
        print("writing", flush=True)
        return super().__iter__()
medium.put(name, Parts([piece] * (size // 10000)))
"""


class MemoryMediumLab(MediumLab):
    """The reference medium."""

    name = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()

    def medium(self) -> Medium:
        return MemoryMedium(self.store)


class DirectoryLab(MediumLab):
    """A directory; ``nameless`` off tries the way through named temporary files."""

    name = "directory"

    def __init__(self, path: str, nameless: bool = True) -> None:
        super().__init__()
        self.path, self.nameless = path, nameless

    def medium(self) -> Medium:
        return DirectoryMedium(self.path, nameless=self.nameless)

    def kill_writer(self, name: str, size: int) -> None:
        command = [sys.executable, "-c", _WRITER, self.path, name, str(size), str(int(self.nameless))]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            writer.kill()
            writer.wait(30)

    def reset(self) -> None:
        """Also the empty folders: a directory medium never removes one."""
        super().reset()
        for home in (self.home, TEMPORARY):
            for folder, _, _ in os.walk(os.path.join(self.path, home), topdown=False):
                with contextlib.suppress(OSError):  # somebody else's file is in it
                    os.rmdir(folder)
