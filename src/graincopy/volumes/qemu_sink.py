"""A qcow2 disk whose machine is off, held for a restore: written through QEMU, as a guest would (stage R).

Two phases, as for any live file: until the first write a read lease holds writers off, so that U can still be taken of
the file; the first write exchanges it for a daemon of ours that has the image open for writing, under QEMU's own image
locks. Bitmaps in the image are loaded and record what is written: the next backup is incremental again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from graincopy.core.errors import PathUnfit, PathUnreadable, RestoreNoSpace, SourceInUse, SourceWritten, Unsupported
from graincopy.core.placement import Placement
from graincopy.hypervisor.daemon import StorageDaemon
from graincopy.hypervisor.nbd import NbdClient
from graincopy.hypervisor.qmp import QmpRefused
from graincopy.model.workload import FileMetadata
from graincopy.volumes import leases, live, qemu_rest
from graincopy.volumes.base import FileSink
from graincopy.volumes.image import fill_zeros
from graincopy.volumes.leases import ReadLease
from graincopy.volumes.metadata import apply_metadata, metadata_of
from graincopy.volumes.places import make_directory, sync_directory
from graincopy.volumes.qemu_graph import NoPlace
from graincopy.volumes.qemu_header import HeaderUnfit
from graincopy.volumes.qemu_image import NbdPool, placement_of
from graincopy.volumes.qemu_rest import EXPORT
from graincopy.volumes.qemu_running import Running


@contextmanager
def open_guest_sink(path: str, kind: str, running: Running) -> Iterator[FileSink]:
    """The disk at ``path``, which QEMU is told is ``kind``; a missing one is created.

    Raises SourceInUse while a QEMU or anybody else has it open for writing; PathUnfit, PathUnreadable.
    """
    with suppress(NoPlace):
        if running.find(path) is not None:
            raise SourceInUse(path=path, reason="by a running QEMU")
    if kind == "raw":
        with live.open_sink(path) as sink:
            yield sink
        return
    with _open(path) as disk:
        yield disk


def _open(path: str) -> GuestDisk:
    try:
        return GuestDisk(path, ReadLease(leases.open_regular(path), path))
    except FileNotFoundError:
        return create_disk(path, 0)


def create_disk(path: str, size: int) -> GuestDisk:
    """A new, empty qcow2 disk of ``size`` bytes at ``path``, folders included. Raises PathUnreadable."""
    try:
        make_directory(os.path.dirname(path))
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        qemu_rest.create(path, size)
        return GuestDisk(path, None)
    except OSError as error:
        raise PathUnreadable(path=path, reason=error.strerror or str(error)) from error


class GuestDisk:
    """A FileSink (volumes/base) over what a guest sees of the qcow2 at ``path``. ``lease`` is None for a new one."""

    def __init__(self, path: str, lease: ReadLease | None) -> None:
        """Raises PathUnfit when it is no qcow2 that can be opened; the lease is then given up."""
        self.path, self.existed = path, lease is not None
        self._lease = lease
        self._open = ExitStack()
        self._turn = threading.RLock()  # several threads write; one of them opens the image
        self._pool: NbdPool | None = None
        self._daemon: StorageDaemon | None = None  # phase two
        try:
            self._fd = os.dup(lease.fd) if lease is not None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._size = qemu_rest.header_of(path).size
        except BaseException as error:
            self.close()
            if isinstance(error, HeaderUnfit):
                raise PathUnfit(path=path, what=f"not to be opened as qcow2 ({error})") from error
            raise

    @property
    def size(self) -> int:
        """Bytes that the guest sees, now."""
        return self._size

    def placement(self) -> Placement:
        """Identity, with holes where QEMU knows zeros."""
        found: list[Placement] = []
        self._with(lambda client: found.append(placement_of(client, self._size)))
        return found[0]

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``; beyond the end with zeros."""
        wanted = max(0, min(len(buffer), self._size - offset))
        if wanted:
            self._with(lambda client: client.readinto(offset, buffer[:wanted]))
        fill_zeros(buffer[wanted:])

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``. Raises RestoreNoSpace, SourceInUse, SourceWritten or OSError."""
        self._writable()
        self._with(lambda client: client.write(offset, data))

    def zero(self, offset: int, length: int) -> None:
        """Make the range, as far as it lies in the disk, read as zeros; its clusters are given back."""
        self._writable()
        length = min(length, self._size - offset)
        if length > 0:
            self._with(lambda client: client.zero(offset, length))

    def resize(self, size: int) -> None:
        """Cut or extend the disk. Raises Unsupported for a size that qcow2 cannot have."""
        if size % 512:
            raise Unsupported(driver="qemu", power=f"make a qcow2 disk of {size} bytes")
        daemon = self._writable()
        self._close_pool()
        try:
            daemon.monitor.run("block-export-del", {"id": EXPORT, "mode": "hard"})
            daemon.monitor.wait("BLOCK_EXPORT_DELETED", EXPORT)
            daemon.monitor.run("block_resize", {"node-name": EXPORT, "size": size})
        except QmpRefused as error:
            raise OSError(0, error.reason) from error
        finally:
            daemon.export(EXPORT, EXPORT, writable=True)
            self._pool = NbdPool(daemon.nbd, EXPORT)
        self._size = size

    def sync(self) -> None:
        """Everything written, and the directory entry, is durable on return."""
        if self._daemon is not None:
            self._with(lambda client: client.flush())
        os.fsync(self._fd)
        sync_directory(os.path.dirname(self.path))

    def metadata(self) -> FileMetadata:
        """What the file has besides its bytes."""
        return metadata_of(self._fd)

    def apply(self, metadata: FileMetadata) -> tuple[str, ...]:
        """Give the file this metadata; what could not be set, one clause each."""
        self._writable()
        return apply_metadata(self._fd, metadata)

    def free_bytes(self) -> int | None:
        """Room for newly allocated bytes where the file lies."""
        return live.free_bytes(self.path)

    def remove(self) -> None:
        """Take the file away, durably."""
        self._end()
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._fd)):
                os.unlink(self.path)
        sync_directory(os.path.dirname(self.path))

    def close(self) -> None:
        """Let the disk go: the image is closed in order, with its bitmaps. May be repeated."""
        self._end()
        fd, self._fd = getattr(self, "_fd", -1), -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> GuestDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end(self) -> None:
        self._close_pool()
        self._open.close()
        self._daemon = None
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close()

    def _close_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _reading(self) -> NbdPool:
        """Phase one: read-only, beside the lease."""
        with self._turn:
            if self._pool is None:
                _, socket = self._open.enter_context(qemu_rest.shown(self.path, self.path, self._fd))
                self._pool = NbdPool(socket, EXPORT)
            return self._pool

    def _writable(self) -> StorageDaemon:
        """Phase two: nobody else can open the image in a QEMU; who opened it otherwise meanwhile is noticed."""
        with self._turn:
            if self._daemon is None:
                self._exchange()
            assert self._daemon is not None
            return self._daemon

    def _exchange(self) -> None:
        """The lease for a daemon that writes."""
        lease, self._lease = self._lease, None
        self._close_pool()
        self._open.close()
        if lease is not None:
            lease.check()
            before = lease.start
            lease.close()
            if leases.changed(before, os.fstat(self._fd)) or leases.writers_of(before):
                raise SourceWritten(path=self.path)
        daemon = self._open_image()
        self._pool = NbdPool(daemon.nbd, EXPORT)
        self._daemon = daemon

    def _open_image(self) -> StorageDaemon:
        daemon = self._open.enter_context(StorageDaemon())
        try:
            header = qemu_rest.header_of(self.path)
            daemon.add(qemu_rest.node_options(self.path, qemu_rest.layers_of(self.path, header), writable=True))
            daemon.export(EXPORT, EXPORT, writable=True)
        except QmpRefused as error:
            raise SourceInUse(path=self.path, reason=error.reason) from error
        return daemon

    def _with(self, act: Callable[[NbdClient], None]) -> None:
        pool = self._pool or self._reading()
        client = pool.take()
        try:
            act(client)
        except OSError as error:
            client.close()
            if error.errno == errno.ENOSPC:
                free = live.free_bytes(self.path)
                raise RestoreNoSpace(path=self.path, needed=0, free=free) from error
            raise
        pool.give(client)
