"""The lab over a real Ceph: disks are images in a pool, written by a client of its own that holds back what it can.

That client is what a virtual machine would be: it has the exclusive lock, and a write-back cache that nothing flushes
before the snapshot does. It is shut down before a restore, as a machine would be. Small objects, so that a small disk
has many.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from graincopy.core.clock import Clock
from graincopy.core.errors import PathMissing, VolumeUnsupported
from graincopy.model.snapshot import Target
from graincopy.model.volume import Claim, Refusal
from graincopy.testing.lab import VolumeLab
from graincopy.testing.rbd_images import FAST, create_image, namespace_exists
from graincopy.volumes import rbd_c
from graincopy.volumes.base import FileSink
from graincopy.volumes.places import Places
from graincopy.volumes.rbd import RbdDriver
from graincopy.volumes.rbd_c import CephError, done
from graincopy.volumes.rbd_cluster import Cluster, Pool, RbdSettings
from graincopy.volumes.rbd_name import PREFIX, ImageName, parse
from graincopy.volumes.rbd_open_image import Image, Snap
from graincopy.volumes.rbd_records import OBJECT, SNAP, read_records

_WAYS = {"buffered", "direct", "truncate", "punch", "zero_range"}
_CASES = {"two_volumes", "resize_volume", "recreate_volume", "rename_volume", "remove", "hold", "exact"}
_TIMEOUT = 60  # seconds for one command


class RbdLab(VolumeLab):
    """Images in ``pool`` (and ``namespace``) of the cluster of ``conf``, reached as ``settings`` say.

    ``features`` and ``order`` (log2 of the object size) are those of the images. Raises PathMissing when there is no
    such pool or namespace, VolumeUnsupported, StorageUnreachable.
    """

    name = "rbd"
    block = 512

    def __init__(
        self,
        conf: str,
        places: Places,
        clock: Clock,
        *,
        settings: RbdSettings | None = None,
        pool: str = "rbd",
        namespace: str = "",
        features: int = FAST,
        order: int = 16,
    ) -> None:
        super().__init__()
        settings = settings or RbdSettings()
        self.cluster = Cluster(settings, conf)  # the driver's
        guest = {
            "rbd_default_clone_format": "2",  # of snapshots that are not protected
            "rbd_cache": "true",
            "rbd_cache_writethrough_until_flush": "false",
            "rbd_skip_partial_discard": "false",
            "rados_osd_op_timeout": "0",  # nor has the client of a machine any: librbd aborts on some that it misses
        }
        self._guest = Cluster(settings, conf, **guest)
        self._somebody = Cluster(settings, conf)
        self._places, self._clock, self._pool, self._namespace = places, clock, pool, namespace
        self._features, self._order = features, order
        self._serial = itertools.count()
        self._mark = uuid.uuid4().hex[:8]
        self._open: dict[str, tuple[contextlib.ExitStack, Image]] = {}
        self._images: list[str] = []
        self.powers = frozenset(
            _WAYS | _CASES | ({"one_instant"} if features & rbd_c.FEATURE_EXCLUSIVE_LOCK else set())
        )
        self._place = f"{pool}/{namespace}".rstrip("/")
        self._look()

    def _look(self) -> None:
        try:
            with self.cluster.pool(self._pool) as pool:
                there = not self._namespace or namespace_exists(pool, self._namespace)
        except CephError as failure:
            if failure.errno == errno.ENOENT:
                raise PathMissing(path=f"{PREFIX}{self._place}") from failure
            raise VolumeUnsupported(path=f"{PREFIX}{self._place}", reason=failure.strerror) from failure
        if not there:
            raise PathMissing(path=f"{PREFIX}{self._place}")

    def why_not(self, power: str) -> str:
        return f"nobody can do that to an image of Ceph ({power})"

    # --- the driver -------------------------------------------------------------------------------

    def driver(self) -> RbdDriver:
        return _AfterShutdown(self)

    def footprint(self) -> frozenset[str]:
        """Of the pool's other users nothing is looked at: it may have millions of objects."""
        with self.cluster.pool(self._pool, self._namespace) as pool:
            snaps = {f"{name}@{snap.name}" for name in self._images for snap in _snaps(pool, name)}
            tags = read_records(pool)
        ours = {ImageName(self._pool, name, self._namespace).volume for name in self._images}
        groups = {one for one in self.command("rbd", "group", "ls", self._place).split() if one.startswith(SNAP)}
        noted = {os.fsdecode(one.key) for one in tags if one.volume in ours}
        empty = {os.fsdecode(OBJECT)} if not tags and self._is_object(os.fsdecode(OBJECT)) else set()
        return frozenset(snaps | noted | groups | empty)

    def _is_object(self, name: str) -> bool:
        return bool(self._unless_missing("stat", name))

    def _unless_missing(self, *words: str) -> str:
        """What ``rados`` says of an object; nothing when there is none."""
        namespace = ("--namespace", self._namespace) if self._namespace else ()
        try:
            return self.command("rados", "-p", self._pool, *namespace, *words)
        except subprocess.CalledProcessError as failure:
            if "No such file" in failure.stderr:
                return ""
            raise

    def command(self, *words: str) -> str:
        """A tool of Ceph, run to its end."""
        settings = self.cluster.settings
        keyring = ("--keyring", settings.keyring) if settings.keyring else ()
        return subprocess.run(
            [words[0], "--conf", self.cluster.conf, "--id", settings.id, *keyring, *words[1:]],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=True,
        ).stdout

    def allocated(self, target: Target) -> int:
        """Bytes in clones of objects that only this snapshot needs, as the OSD lists them."""
        self._flush()
        image_id = target.id.rpartition("@")[0].rpartition("/")[2]
        numbers = range(-(-target.size >> self._order))
        return sum(self._clones(f"rbd_data.{image_id}.{number:016x}") for number in numbers)

    def _clones(self, name: str) -> int:
        said = self._unless_missing("listsnaps", name, "--format", "json")
        clones = [one for one in json.loads(said)["clones"] if one["id"] != "head"] if said else []
        return sum(one["size"] - sum(part["length"] for part in one["overlaps"]) for one in clones)

    # --- disks ------------------------------------------------------------------------------------

    def make(self, size: int, volume: int = 0, compressed: bool = False) -> Claim:
        name = f"lab-{self._mark}-{next(self._serial)}"
        with self._guest.pool(self._pool, self._namespace) as pool:
            self.create(pool, name, size)
        self._images.append(name)
        return self.claim(name)

    def create(self, pool: Pool, name: str, size: int) -> None:
        """An image of the lab's kind."""
        create_image(pool, name, size, self._features, self._order)

    def claim(self, name: str) -> Claim:
        """The driver's claim on the image."""
        claim = self.driver().resolve(ImageName(self._pool, name, self._namespace).volume)
        if isinstance(claim, Refusal):
            raise VolumeUnsupported(path=claim.path, reason=claim.reason)
        return claim

    def image(self, claim: Claim) -> Image:
        """The image as the guest has it open."""
        name = _name(claim)
        if name not in self._open:
            held = contextlib.ExitStack()
            pool = held.enter_context(self._guest.pool(self._pool, self._namespace))
            self._open[name] = held, held.enter_context(pool.image(name, writable=True))
        return self._open[name][1]

    def shut_down(self) -> None:
        """The guests end: what they held back is written, and nobody has an image open."""
        while self._open:
            _, (held, image) = self._open.popitem()
            image.flush()
            held.close()

    def _flush(self) -> None:
        for _, image in self._open.values():
            image.flush()

    def read(self, claim: Claim) -> bytes:
        image = self.image(claim)
        data = bytearray(image.size)
        image.read(0, memoryview(data))
        return bytes(data)

    def write(self, claim: Claim, offset: int, data: bytes, how: str = "buffered") -> None:
        image = self.image(claim)
        if offset + len(data) > image.size:
            image.resize(offset + len(data))
        image.write(offset, memoryview(data))
        if how == "direct":
            image.flush()

    def truncate(self, claim: Claim, size: int) -> None:
        self.image(claim).resize(size)

    def punch(self, claim: Claim, offset: int, length: int) -> None:
        image = self.image(claim)
        stop = min(offset + length, image.size)
        if stop > offset:
            image.discard(offset, stop - offset)

    def zero_range(self, claim: Claim, offset: int, length: int) -> None:
        image = self.image(claim)
        image.write_zeros(offset, max(0, min(offset + length, image.size) - offset))

    def remove(self, claim: Claim) -> None:
        self.shut_down()
        with self._guest.pool(self._pool, self._namespace) as pool:
            pool.remove(_name(claim))

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        with self._somebody.pool(self._pool, self._namespace) as pool, pool.image(_name(claim), writable=True):
            yield

    # --- volumes ----------------------------------------------------------------------------------

    def resize_volume(self, claim: Claim, size: int) -> None:
        self.truncate(claim, size)

    def recreate_volume(self, claim: Claim) -> None:
        """With snapshots an image cannot be removed: the old one gets another name."""
        size = self.image(claim).size
        self.shut_down()
        with self._guest.pool(self._pool, self._namespace) as pool:
            self._rename(pool, _name(claim), f"{_name(claim)}-old")
            self.create(pool, _name(claim), size)

    def rename_volume(self, claim: Claim) -> Claim:
        self.shut_down()
        renamed = f"{_name(claim)}-renamed"
        with self._guest.pool(self._pool, self._namespace) as pool:
            self._rename(pool, _name(claim), renamed)
        return self.claim(renamed)

    def _rename(self, pool: Pool, old: str, new: str) -> None:
        library = rbd_c.libraries()[1]
        done(library.rbd_rename(pool.handle, old.encode(), new.encode()))
        self._images.append(new)

    def reset(self) -> None:
        self.shut_down()
        super().reset()
        with self._guest.pool(self._pool, self._namespace) as pool:
            while self._images:
                with _absent():
                    pool.remove(self._images.pop())


class _AfterShutdown(RbdDriver):
    """The driver, on a host where guests are shut down before anything is restored."""

    def __init__(self, lab: RbdLab) -> None:
        super().__init__(lab.cluster, lab._places, lab._clock)
        self._lab = lab

    def open_for_restore(self, claim: Claim) -> AbstractContextManager[FileSink]:
        self._lab.shut_down()
        return super().open_for_restore(claim)


def _name(claim: Claim) -> str:
    name = parse(claim.volume)
    assert name is not None
    return name.image


def _snaps(pool: Pool, name: str) -> tuple[Snap, ...]:
    snaps: list[Snap] = []
    with _absent(), pool.image(name) as image:
        snaps += image.snaps()
    return tuple(snaps)


@contextmanager
def _absent() -> Iterator[None]:
    """What is not there needs not be removed."""
    try:
        yield
    except CephError as failure:
        if failure.errno != errno.ENOENT:
            raise
