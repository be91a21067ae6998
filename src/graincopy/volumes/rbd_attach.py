"""T of an image as a file system, without a kernel client (stage 7): librbd → FUSE → loop device → detached mount.

The FUSE mount has no mount point and is in no namespace, like the mount on top of it: when this process ends, in
whatever way, the kernel drops both, and the server process ends with them. Where a file system was not frozen cleanly
it is not attached: there is nothing here to replay its log on.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from graincopy.core.errors import AttachFailed, GraincopyError
from graincopy.model.volume import Claim
from graincopy.volumes.attach import AttachedFileSystem, attach
from graincopy.volumes.image import FdImage
from graincopy.volumes.mounts import mount_detached
from graincopy.volumes.rbd_cluster import Cluster
from graincopy.volumes.rbd_serve import MODE, Serve

_SLACK = 30.0  # seconds for starting Python, besides the time-out of the cluster
_ENDING = 10.0  # seconds in which the server sees that the mount is gone


@contextmanager
def attached_file(
    cluster: Cluster, place: str, image_id: str, at: int, claim: Claim, check: Callable[[], object]
) -> Iterator[FdImage]:
    """The file of ``claim`` in the file system on the snapshot of number ``at``.

    Raises AttachFailed, SourceChanged, what check raises. Files stay readable until the block ends; ``check`` is the
    image's ``verify``.
    """
    assert claim.inner_path is not None

    def verify() -> None:
        check()

    with (
        _attached(cluster, place, image_id, at, claim, check) as attached,
        attached.open_file(claim.inner_path, claim.path) as image,
    ):
        yield FdImage(image.fd, image.size, image.placement, verify)


@contextmanager
def attached_folder(
    cluster: Cluster, place: str, image_id: str, at: int, claim: Claim, check: Callable[[], object]
) -> Iterator[int]:
    """A descriptor of the folder of ``claim`` in the file system on the snapshot. Raises as :func:`attached_file`."""
    assert claim.inner_path is not None
    check()
    with _attached(cluster, place, image_id, at, claim, check) as attached:
        fd = attached.open_folder(claim.inner_path, claim.path)
        try:
            yield fd
        finally:
            os.close(fd)
    check()


@contextmanager
def _attached(
    cluster: Cluster, place: str, image_id: str, at: int, claim: Claim, check: Callable[[], object]
) -> Iterator[AttachedFileSystem]:
    assert claim.fs_type is not None
    with shown_as_file(cluster, place, image_id, at) as path:
        try:
            attached = attach(path, claim.fs_type, claim.fs_offset, claim.fs_size)
        except GraincopyError:
            check()  # what cannot be attached may be what somebody deleted
            raise
        with attached:
            yield attached


@contextmanager
def shown_as_file(cluster: Cluster, place: str, image_id: str, at: int) -> Iterator[str]:
    """A path at which this process can read the snapshot as a file until the block ends. Raises AttachFailed."""
    name = f"{place}/{image_id}@{at}"
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise AttachFailed(volume=name, reason=f"/dev/fuse: {error.strerror}") from error
    try:
        mount = _mount(name, fuse)
    except BaseException:
        os.close(fuse)
        raise
    asked = Serve(cluster.settings, cluster.conf, cluster.options, place, image_id, at, fuse)
    try:
        server = _start(asked)
    finally:
        os.close(fuse)  # the server has it: when that ends, nobody waits for an answer
    try:
        _await(server, name, cluster.settings.timeout + _SLACK)
        yield f"/proc/self/fd/{mount}"
    finally:
        os.close(mount)
        _end(server)


def _mount(name: str, fuse: int) -> int:
    try:
        options = (f"fd={fuse}", f"rootmode={MODE:o}", "user_id=0", "group_id=0")
        return mount_detached("fuse", "graincopy", options)
    except OSError as error:
        raise AttachFailed(volume=name, reason=f"FUSE: {error.strerror}") from error


def _start(asked: Serve) -> subprocess.Popen[bytes]:
    """In a session of its own: an interrupt from the terminal is for us to handle."""
    command = [sys.executable, "-m", "graincopy.volumes.rbd_serve"]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(asked.fuse,), start_new_session=True
    )
    assert server.stdin is not None
    with contextlib.suppress(BrokenPipeError), server.stdin as told:
        told.write(msgspec.json.encode(asked) + b"\n")
    return server


def _await(server: subprocess.Popen[bytes], name: str, patience: float) -> None:
    assert server.stdout is not None
    readable, _, _ = select.select([server.stdout], [], [], patience)
    said = os.fsdecode(server.stdout.readline().strip()) if readable else "the server process does not answer"
    if said != "ready":
        raise AttachFailed(volume=name, reason=said or "the server process ended")


def _end(server: subprocess.Popen[bytes]) -> None:
    """It ends by itself when the kernel has let the mount go; the loop device above may take a moment for that."""
    assert server.stdout is not None
    server.stdout.close()
    try:
        server.wait(_ENDING)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
