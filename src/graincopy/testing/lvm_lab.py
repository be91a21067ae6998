"""The lab over LVM: every disk is a thin volume in a pool that somebody names; and thin pools to put file systems on.

Needs root and a kernel with device-mapper: a machine of one's own, or the guest of scripts/lab-lvm.sh.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from graincopy.core.clock import Clock
from graincopy.core.errors import VolumeUnsupported
from graincopy.core.units import ceil_div
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim
from graincopy.testing.lab import VolumeLab
from graincopy.testing.laws import NotTried
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.lvm_thin import LvmThinDriver
from graincopy.volumes.lvm_thin_report import dm_name
from graincopy.volumes.lvm_thin_slot import metadata_snapshot
from graincopy.volumes.lvm_thin_tools import Lvm

BLKDISCARD = 0x1277  # linux/fs.h
BLOCK = 65536  # bytes; the smallest block that a thin pool can have
TIMEOUT = 300  # seconds; an emulated machine is slow


def command(*words: str, check: bool = True) -> str:
    """Run a tool to its end. Raises RuntimeError with what it complained of."""
    done = subprocess.run(words, capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {os.fsdecode(done.stderr or done.stdout)}")
    return os.fsdecode(done.stdout)


def listing() -> frozenset[str]:
    """Every logical volume with its tags, hidden ones included, and every device-mapper device."""
    volumes = command("lvs", "-a", "--noheadings", "--separator", "|", "-o", "vg_name,lv_name,lv_tags").splitlines()
    devices = command("dmsetup", "ls").splitlines()
    return frozenset([*(line.strip() for line in volumes), *(f"device {line.split()[0]}" for line in devices)])


class ThinStorage:
    """A volume group of its own on ``device``, with one thin pool. Nothing of it is left after ``close``."""

    def __init__(self, device: str, vg: str, pool: str, *, size: str = "1G", block: str = "64k") -> None:
        self.device, self.vg, self.pool = device, vg, pool
        command("pvcreate", "-q", "-ff", "-y", device)
        command("vgcreate", "-q", "-s", "4k", vg, device)
        shape = ("-L", size, "--chunksize", block, "--poolmetadatasize", "8M")
        command("lvcreate", "-q", "-y", "-T", *shape, f"{vg}/{pool}")

    def create(self, name: str, size: int) -> str:
        """A thin volume; path of its device."""
        command("lvcreate", "-q", "-y", "-T", "-V", f"{size}b", "-n", name, f"{self.vg}/{self.pool}")
        return self.device_of(name)

    def device_of(self, name: str) -> str:
        """Path of a volume's device."""
        return f"/dev/mapper/{dm_name(self.vg, name)}"

    def remove(self, *names: str) -> None:
        """Remove volumes that may be there."""
        if names:
            command("lvremove", "-f", "-y", "-q", *(f"{self.vg}/{name}" for name in names), check=False)

    def close(self) -> None:
        """Remove everything."""
        command("vgremove", "-f", "-y", "-q", self.vg, check=False)
        command("pvremove", "-f", "-f", "-y", "-q", self.device, check=False)


class LvmLab(VolumeLab):
    """Every disk is a thin volume of ``storage``. Discards are how a disk is punched."""

    name = "lvm-thin"
    unit = 4096  # the extent size of the lab's volume group
    fixed_size = True
    powers = frozenset(
        {"buffered", "mmap", "direct", "punch", "exact", "hold", "resize_volume", "recreate_volume", "rename_volume"}
    )

    def __init__(self, storage: ThinStorage, clock: Clock) -> None:
        super().__init__()
        self.storage, self._clock = storage, clock
        self._serial = itertools.count()
        self._disks: dict[str, int] = {}

    def why_not(self, power: str) -> str:
        if power == "one_instant":
            return "each volume has its own instant"
        return f"{power} is nothing that happens to a block device"

    def driver(self) -> VolumeDriver:
        return LvmThinDriver(self._clock)

    def footprint(self) -> frozenset[str]:
        mine = {f"{self.storage.vg}|{name}|" for name in self._disks}
        mine |= {f"device {dm_name(self.storage.vg, name)}" for name in self._disks}
        return listing() - mine

    def allocated(self, target: Target) -> int:
        """Blocks that no other thin device shares, as thin_ls counts them."""
        lvm = Lvm()
        found = {one.name: one for one in lvm.volumes()}
        pool = next(one for one in found.values() if one.uuid == found[target.id].pool_uuid)
        with metadata_snapshot(lvm, pool) as metadata:
            text = command("thin_ls", "-m", "--no-headers", "--format", "DEV,EXCLUSIVE_BLOCKS", metadata)
        counts = {int(line.split()[0]): int(line.split()[1]) for line in text.splitlines() if line.strip()}
        return counts[found[target.id].thin_id] * BLOCK

    # --- disks ------------------------------------------------------------------------------------

    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        if compressed:
            raise NotTried("LVM does not compress")
        name = f"disk-{next(self._serial)}"
        self._disks[name] = ceil_div(size, self.unit) * self.unit
        return self._claim(self.storage.create(name, self._disks[name]))

    def _claim(self, path: str) -> Claim:
        claim = self.driver().resolve(path)
        if not isinstance(claim, Claim):
            raise VolumeUnsupported(path=path, reason=claim.reason)
        return claim

    def read(self, claim: Claim) -> bytes:
        with open(claim.path, "rb") as file:
            return file.read()

    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if how == "direct" else 0)
        fd = os.open(claim.path, flags)
        try:
            if how == "mmap":
                start = offset // mmap.PAGESIZE * mmap.PAGESIZE
                with mmap.mmap(fd, offset + len(data) - start, offset=start) as pages:
                    pages[offset - start :] = data
            elif how == "direct":
                with mmap.mmap(-1, len(data)) as aligned:
                    aligned[:] = data
                    os.pwritev(fd, [aligned], offset)
            else:
                os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    def punch(self, claim: Claim, offset: int, length: int) -> None:
        first, last = ceil_div(offset, BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
        if first >= last:
            self.write(claim, offset, bytes(length))
            return
        self.write(claim, offset, bytes(first - offset))
        self.write(claim, last, bytes(offset + length - last))
        with open(claim.path, "r+b", buffering=0) as file:
            os.fsync(file.fileno())
            fcntl.ioctl(file, BLKDISCARD, struct.pack("=QQ", first, last - first))

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        with open(claim.path, "r+b"):
            yield

    # --- volumes ----------------------------------------------------------------------------------

    def resize_volume(self, claim: Claim, size: int) -> None:
        name = self._name(claim)
        command("lvresize", "-f", "-y", "-q", "-L", f"{size}b", f"{self.storage.vg}/{name}")
        self._disks[name] = size

    def recreate_volume(self, claim: Claim) -> None:
        name = self._name(claim)
        self.storage.remove(name)
        self.storage.create(name, self._disks[name])

    def rename_volume(self, claim: Claim) -> Claim:
        name = self._name(claim)
        command("lvrename", "-q", self.storage.vg, name, f"{name}-new")
        self._disks[f"{name}-new"] = self._disks.pop(name)
        return self._claim(self.storage.device_of(f"{name}-new"))

    def _name(self, claim: Claim) -> str:
        return claim.volume.rpartition("/")[2]

    def reset(self) -> None:
        super().reset()
        self.storage.remove(*self._disks)
        self._disks.clear()
