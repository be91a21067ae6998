"""What Ceph answers with, as errors that people can act on (all stages of the rbd driver)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from graincopy.core.clock import Clock
from graincopy.core.errors import GraincopyError, SnapshotFailed, TargetLost, TargetNoSpace
from graincopy.model.snapshot import Target
from graincopy.volumes.rbd_c import CephError
from graincopy.volumes.rbd_cluster import SILENT, Cluster, unreachable

_PATIENCE, _PAUSE = 3.0, 0.1  # seconds


def patiently(work: Callable[[], object], clock: Clock) -> None:
    """``work``, again while it is told EBUSY: for as long as somebody takes an instant of a group, its images are.

    Raises CephError (EBUSY) after some seconds.
    """
    until = clock.monotonic() + _PATIENCE
    while True:
        try:
            work()
            return
        except CephError as failure:
            if failure.errno != errno.EBUSY or clock.monotonic() >= until:
                raise
        clock.sleep(_PAUSE)


@contextmanager
def failures(cluster: Cluster, volume: str) -> Iterator[None]:
    """CephError while T of ``volume`` is made or looked at → SnapshotFailed, TargetNoSpace, StorageUnreachable."""
    try:
        yield
    except CephError as failure:
        raise _translated(cluster, volume, failure) from failure


def _translated(cluster: Cluster, volume: str, failure: CephError) -> GraincopyError:
    if failure.errno in SILENT:
        return unreachable(cluster.conf, failure)
    if failure.errno == errno.ENOSPC:
        return TargetNoSpace(volume=volume)
    said = {
        errno.ENOENT: "it is gone, or its pool is",
        errno.EDQUOT: "the pool's quota or the image's limit of snapshots is reached",
        errno.EROFS: "a client has it mapped exclusively and does not answer",
        errno.EACCES: "this user may not write to the pool (cephx: profile rbd)",
        errno.EPERM: "this user may not write to the pool (cephx: profile rbd)",
    }
    return SnapshotFailed(volume=volume, reason=said.get(failure.errno or 0, failure.strerror))


@contextmanager
def reading(cluster: Cluster, target: Target) -> Iterator[None]:
    """CephError while ``target`` is looked at → TargetLost, StorageUnreachable."""
    try:
        yield
    except CephError as failure:
        if failure.errno in SILENT:
            raise unreachable(cluster.conf, failure) from failure
        gone = failure.errno == errno.ENOENT
        reason = "the image or the snapshot is gone" if gone else failure.strerror
        raise TargetLost(target=target.id, reason=reason) from failure


@contextmanager
def optional_pool(cluster: Cluster) -> Iterator[None]:
    """A pool that is not there any more holds nothing: what would be done with it is left out. As failures else."""
    try:
        yield
    except CephError as failure:
        if failure.errno != errno.ENOENT:
            raise _translated(cluster, f"the pools of {cluster.conf}", failure) from failure
