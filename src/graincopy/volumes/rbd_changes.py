"""What changed between two snapshots of a Ceph image (stage 6): objects first, then the bytes in those that changed.

With fast-diff the cluster keeps a map of the objects that changed, and answers for any size of image at once; only
those objects are asked for the ranges written in them. Without it every object that the image could have is asked.
Both know what was discarded, and what an image has from its parent.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from graincopy.core.extent import Extents
from graincopy.volumes.rbd_open_image import Image

_PIECE = 32 << 20  # bytes; changed objects that lie in one such piece are asked in one go
_AT_ONCE = 4  # pieces


def difference(image: Image, since: str, size: int, *, whole_objects: bool) -> tuple[Extents, str]:
    """Bytes of ``image`` that changed since its snapshot ``since``, and where that is known from. Raises CephError."""
    if not image.fast_diff():
        there, gone = image.diff(since, 0, size, whole_objects=False)
        return there | gone, "rbd diff"
    there, gone = image.diff(since, 0, size, whole_objects=True)
    coarse = (there | gone).clip(0, size)
    if whole_objects:
        return coarse, "rbd fast-diff of whole objects"
    return coarse & _refined(image, since, coarse.align(_PIECE).clip(0, size)), "rbd fast-diff"


def _refined(image: Image, since: str, where: Extents) -> Extents:
    """The bytes that changed inside ``where``."""

    def ask(piece: tuple[int, int]) -> Extents:
        there, gone = image.diff(since, *piece, whole_objects=False)
        return there | gone

    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return joined(pool.map(ask, where.split(_PIECE)))


def joined(parts: Iterator[Extents]) -> Extents:
    """One set of many."""
    found = [part for part in parts if len(part)]
    if not found:
        return Extents.empty()
    return Extents.from_arrays(
        np.concatenate([part.starts for part in found]), np.concatenate([part.stops for part in found])
    )
