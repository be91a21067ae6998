"""What changed between two snapshots of a Ceph image (stage 6): objects first, then the bytes in those that changed.

With fast-diff the cluster keeps a map of the objects that changed, and answers for any size of image at once; only
those objects are asked for the ranges written in them. Without it every object that the image could have is asked.
Both know what was discarded, and what an image has from its parent.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from graincopy.core.errors import TargetLost
from graincopy.core.extent import Extents
from graincopy.model.change_map import Changed, ChangeMap, Unknown
from graincopy.model.snapshot import Target
from graincopy.volumes.rbd_c import CephError
from graincopy.volumes.rbd_open_image import Image
from graincopy.volumes.rbd_records import parts_of
from graincopy.volumes.rbd_targets import Targets

_PIECE = 32 << 20  # bytes; changed objects that lie in one such piece are asked in one go
_AT_ONCE = 4  # pieces


def changed(targets: Targets, base: Target, now: Target, *, whole_objects: bool) -> ChangeMap:
    """As VolumeDriver.changed: from the snapshot that stands in for ``base`` to what ``now`` shows.

    To that comes what was written between the former and what ``base`` shows: both ways lead over it.
    """
    new = targets.check(now).shown
    try:
        old = targets.check(base)
    except TargetLost as gone:
        return Unknown(f"the checkpoint is gone ({gone.facts['reason']})")
    if base.incarnation != now.incarnation:
        return Unknown("the volume was recreated since the checkpoint")
    if old.between is None:
        return Unknown("what was written while the checkpoint was made is not known")
    place, image_id, _ = parts_of(now.id)
    try:
        with targets.by_id(place, image_id, at=new.id) as (_, image):
            found, source = difference(image, old.base.name, new.size, whole_objects=whole_objects)
    except CephError as failure:
        return Unknown(f"the cluster cannot tell ({failure.strerror})")
    targets.check(now)
    try:
        targets.check(base)
    except TargetLost as gone:
        return Unknown(f"the checkpoint went while it was looked at ({gone.facts['reason']})")
    resized = Extents.of((min(old.base.size, new.size), new.size), *old.between)
    return Changed(_inside(joined((found, resized)), new.size), source)


def difference(image: Image, since: str, size: int, *, whole_objects: bool) -> tuple[Extents, str]:
    """Bytes of ``image`` that changed since its snapshot ``since``, and where that is known from. Raises CephError."""
    if not image.fast_diff():
        return joined(image.diff(since, 0, size, whole_objects=False)), "rbd diff"
    coarse = _inside(joined(image.diff(since, 0, size, whole_objects=True)), size)
    if whole_objects:
        return coarse, "rbd fast-diff of whole objects"
    return _refined(image, since, coarse.align(_PIECE).clip(0, size)), "rbd fast-diff"


def _refined(image: Image, since: str, where: Extents) -> Extents:
    """The bytes that changed inside ``where``."""

    def ask(piece: tuple[int, int]) -> Extents:
        return joined(image.diff(since, *piece, whole_objects=False))

    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return joined(pool.map(ask, where.split(_PIECE)))


def joined(parts: Iterable[Extents]) -> Extents:
    """One set of many, sorted once: with a million members each union, even with nothing, takes tenths of a second."""
    found = [part for part in parts if len(part)]
    if len(found) < 2:
        return found[0] if found else Extents.empty()
    return Extents.from_arrays(
        np.concatenate([part.starts for part in found]), np.concatenate([part.stops for part in found])
    )


def _inside(found: Extents, size: int) -> Extents:
    """Without what lies beyond ``size``, which is rarely anything."""
    return found.clip(0, size) if len(found) and int(found.bounds[-1]) > size else found
