"""The lab for subvolumes: files in one or two of them, watched for snapshots that are left beside or in them.

Everything else is :class:`~graincopy.testing.file_lab.FileLab`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from graincopy.core.clock import Clock
from graincopy.testing.file_lab import FileLab
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.btrfs_store import FOLDER, subvolume_root


class BtrfsLab(FileLab):
    """Disks are files in ``directories``, which lie in Btrfs subvolumes, or on LUN images that do (``watched``)."""

    def __init__(
        self,
        directories: Sequence[str],
        make_driver: Callable[[], VolumeDriver],
        clock: Clock,
        *,
        name: str = "btrfs",
        watched: Sequence[str] = (),
        also: Sequence[str] = (),
    ) -> None:
        roots = [subvolume_root(os.path.join(folder, ".")) for folder in (*directories, *watched)]
        self._folders = [
            os.path.join(place, FOLDER) for root in roots if root is not None for place in (root, os.path.dirname(root))
        ]
        super().__init__(directories, make_driver, clock, name=name, watched=watched, also=also)

    def footprint(self) -> frozenset[str]:
        """Besides what the file lab sees: our folders, and every entry of them. Snapshots are entries."""
        ours = {os.path.join(folder, name) for folder in self._folders for name in _names(folder)}
        return super().footprint() | ours | {folder for folder in self._folders if os.path.lexists(folder)}


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
