"""What the tests in the guest share: its volume group, mounted thin volumes, the clock."""

from __future__ import annotations

import os

from graincopy.app.host import SystemClock
from graincopy.testing.lvm_lab import ThinStorage, command

__all__ = ["Datastore", "SystemClock", "ThinStorage"]

MIB = 1 << 20
VG, POOL = "gc-odd.vg_0+", "po-ol"  # hyphens are doubled by device-mapper
FIRST, SECOND = "/dev/vdd", "/dev/vde"


class Datastore:
    """A mounted file system on a thin volume of its own."""

    def __init__(self, storage: ThinStorage, name: str, fs_type: str, folder: str, size: int) -> None:
        self.storage, self.name, self.fs_type = storage, name, fs_type
        self.device = storage.create(name, size)
        options = {"xfs": ("-q", "-f", "-m", "reflink=1"), "ext4": ("-q", "-F", "-b", "4096", "-J", "size=4")}[fs_type]
        command(f"mkfs.{fs_type}", *options, self.device)
        self.path = os.path.join(folder, name)
        os.makedirs(self.path)
        command("mount", self.device, self.path)

    def close(self) -> None:
        """Unmount and remove it."""
        command("umount", self.path, check=False)
        self.storage.remove(self.name)
