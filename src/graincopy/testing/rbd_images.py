"""Images of a certain kind, as an administrator of Ceph makes them."""

from __future__ import annotations

from ctypes import byref, c_bool, c_int

from graincopy.volumes import rbd_c
from graincopy.volumes.rbd_c import done
from graincopy.volumes.rbd_cluster import Pool

# RBD_FEATURE_*: what Ceph gives an image by default, and the same without the map of objects
FAST = 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5
SLOW = 1 | 1 << 2 | 1 << 5


def create_image(pool: Pool, name: str, size: int, features: int, order: int) -> None:
    """An image of exactly this kind. Raises CephError."""
    library = rbd_c.libraries()[1]
    done(library.rbd_create2(pool.handle, name.encode(), size, features, byref(c_int(order))))


def clone_image(pool: Pool, parent: str, snap: str, name: str, features: int, order: int) -> None:
    """A clone in the same pool. Raises CephError."""
    library = rbd_c.libraries()[1]
    made_of = (pool.handle, parent.encode(), snap.encode())
    done(library.rbd_clone2(*made_of, pool.handle, name.encode(), features, byref(c_int(order)), 0, 0))


def namespace_exists(pool: Pool, namespace: str) -> bool:
    """Whether ``pool`` has it. Raises CephError."""
    found = c_bool()
    done(rbd_c.libraries()[1].rbd_namespace_exists(pool.handle, namespace.encode(), byref(found)))
    return found.value
