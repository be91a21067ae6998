"""A disk of a view as a file that the kernel can put a file system on, and that nobody else sees.

A FUSE mount whose root is that one file, made with fsopen(2) and never attached to a directory: it ends with its
descriptors, so that SIGKILL leaves nothing. Documentation/filesystems/fuse.rst; messages: linux/fuse.h, protocol 7.31.
Closing the mount ends the threads that serve it.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from graincopy.views.source import ViewDisk
from graincopy.volumes.mounts import mount_detached

_IN, _OUT = struct.Struct("<LLQQLLLHH"), struct.Struct("<LlQ")
_ATTR = struct.Struct("<QQQQQQLLLLLLLLLL")
_READ = struct.Struct("<QQLLQLL")
_FORGET, _GETATTR, _OPEN, _READ_OP, _STATFS, _RELEASE, _FLUSH, _INIT, _INTERRUPT = 2, 3, 14, 15, 17, 18, 25, 26, 36
_DESTROY, _BATCH_FORGET = 38, 42
_SILENT = (_FORGET, _INTERRUPT, _BATCH_FORGET)  # have no answer
_MAJOR, _MINOR, _ASYNC_READ, _KEEP_CACHE = 7, 31, 1, 2
_LONGEST_READ = 1 << 17
_BUFFER = _LONGEST_READ + 8192
_FOREVER = 1 << 30  # seconds that attributes stay valid: nothing ever changes
_THREADS = 4


@contextmanager
def seen_by_kernel(disk: ViewDisk) -> Iterator[str]:
    """The path (of this process alone) of a read-only file with the bytes of ``disk``. Root only. Raises OSError."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = (f"fd={device}", f"rootmode={stat.S_IFREG | 0o400:o}", "user_id=0", "group_id=0")
        mount = mount_detached("fuse", "graincopy", (*options, f"max_read={_LONGEST_READ}"))
        server = _Server(device, disk)
        threads = [threading.Thread(target=server.run, daemon=True) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        try:
            yield f"/proc/self/fd/{mount}"
        finally:
            os.close(mount)
            for thread in threads:
                thread.join()
    finally:
        os.close(device)


class _Server:
    """Answers the kernel's requests about the one file."""

    def __init__(self, device: int, disk: ViewDisk) -> None:
        self._device, self._disk = device, disk
        self._answers: dict[int, Callable[[bytes], bytes]] = {
            _INIT: self._init,
            _GETATTR: lambda _: struct.pack("<QLL", _FOREVER, 0, 0) + self._attributes(),
            _OPEN: lambda _: struct.pack("<QLL", 0, _KEEP_CACHE, 0),
            _READ_OP: self._read,
            _STATFS: lambda _: bytes(80),
            _RELEASE: lambda _: b"",
            _FLUSH: lambda _: b"",
            _DESTROY: lambda _: b"",
        }

    def run(self) -> None:
        """Until the mount is gone."""
        while True:
            try:
                request = os.read(self._device, _BUFFER)
            except OSError as failure:
                if failure.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):  # ENOENT: it was interrupted
                    continue
                return
            _, operation, unique, *_ = _IN.unpack_from(request)
            if operation not in _SILENT:
                self._reply(unique, *self._answer(operation, request[_IN.size :]))

    def _answer(self, operation: int, body: bytes) -> tuple[int, bytes]:
        known = self._answers.get(operation)
        if known is None:
            return errno.ENOSYS, b""
        try:
            return 0, known(body)
        except OSError as failure:
            return failure.errno or errno.EIO, b""

    def _reply(self, unique: int, code: int, data: bytes) -> None:
        try:
            os.writev(self._device, [_OUT.pack(_OUT.size + len(data), -code, unique), data])
        except OSError:
            return  # whoever asked is gone

    def _init(self, body: bytes) -> bytes:
        _, _, ahead, flags = struct.unpack_from("<LLLL", body)
        return struct.pack(
            "<LLLLHHLLHHLL24x",
            _MAJOR,
            _MINOR,
            min(ahead, _LONGEST_READ),
            flags & _ASYNC_READ,
            16,
            12,
            4096,
            1,
            0,
            0,
            0,
            0,
        )

    def _attributes(self) -> bytes:
        size = self._disk.size
        mode = stat.S_IFREG | 0o400
        return _ATTR.pack(1, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _read(self, body: bytes) -> bytes:
        _, offset, length, *_ = _READ.unpack_from(body)
        data = bytearray(max(0, min(length, _LONGEST_READ, self._disk.size - offset)))
        self._disk.readinto(offset, memoryview(data))
        return bytes(data)
