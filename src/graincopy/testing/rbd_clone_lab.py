"""The lab over a real Ceph whose images are clones."""

from __future__ import annotations

from graincopy.core.clock import Clock
from graincopy.testing.oracle import LARGEST
from graincopy.testing.rbd_images import FAST, clone_image
from graincopy.testing.rbd_lab import RbdLab
from graincopy.volumes.places import Places
from graincopy.volumes.rbd_cluster import Pool


class RbdCloneLab(RbdLab):
    """Every image is a clone of a snapshot that is full of bytes: zeros hide them, and growing must not show them."""

    name = "rbd-clone"

    def __init__(self, conf: str, places: Places, clock: Clock, *, features: int = FAST, order: int = 16) -> None:
        super().__init__(conf, places, clock, features=features, order=order)
        self.powers -= {"exact"}
        self._parent = f"lab-{self._mark}-parent"
        with self._guest.pool(self._pool) as pool:
            super().create(pool, self._parent, LARGEST)
            with pool.image(self._parent, writable=True) as image:
                image.write(0, memoryview(b"parent! " * (LARGEST // 8)))
                image.snap_create("v1")

    def why_not(self, power: str) -> str:
        if power == "exact":
            return "the first write to an object of a clone copies all of it up"
        return super().why_not(power)

    def create(self, pool: Pool, name: str, size: int) -> None:
        clone_image(pool, self._parent, "v1", name, self._features, self._order)
        with pool.image(name, writable=True) as image:
            image.write_zeros(0, image.size)
            image.resize(size)

    def close(self) -> None:
        """The clones first: they hold their parent."""
        self.reset()
        with self._guest.pool(self._pool) as pool:
            with pool.image(self._parent, writable=True) as image:
                image.snap_remove("v1")
            pool.remove(self._parent)
