"""The process that shows one Ceph snapshot to the kernel as a read-only file (stage 7): FUSE, by its protocol.

``attached_file`` in rbd_attach starts it; it ends by itself when the kernel drops the mount, which has no name and is
gone with its last user. A process of its own, since whoever waits for the kernel cannot answer it at the same time.
Protocol: linux/fuse.h, version 7.31.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading

import msgspec

from graincopy.core.errors import GraincopyError
from graincopy.volumes.rbd_c import CephError
from graincopy.volumes.rbd_cluster import Cluster, RbdSettings
from graincopy.volumes.rbd_name import parse_place
from graincopy.volumes.rbd_open_image import Image

_FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET = 25, 26, 36, 38, 42
_SILENT = (_FORGET, _INTERRUPT, _BATCH_FORGET)
_ASYNC_READ, _MAX_PAGES, _KEEP_CACHE = 1 << 0, 1 << 22, 1 << 1
_IN, _OUT = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ")
_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
_ATTRIBUTES = struct.Struct("=QII6Q10I")
_OPENED = struct.Struct("=QII")
_READ_IN = struct.Struct("=QQI")
_STATFS_OUT = struct.Struct("=5Q4I24x")
MODE = 0o100400  # a regular file is the whole file system
_LONGEST = 1 << 20  # bytes of one read
_FOREVER = 1 << 31  # seconds for which the kernel may keep the attributes
_THREADS = 4
_ENDED = (errno.ENODEV, errno.EBADF)


class Serve(msgspec.Struct, frozen=True):
    """What the parent asks for, as one line of JSON on standard input."""

    settings: RbdSettings
    conf: str
    options: dict[str, str]
    place: str
    image_id: str
    at: int  # number of the snapshot
    fuse: int  # descriptor of /dev/fuse


class Server(msgspec.Struct, frozen=True):
    """Answers the kernel about one image."""

    image: Image
    size: int
    fuse: int

    def run(self) -> None:
        """Until the mount is gone."""
        buffer = bytearray(1 << 17)
        while True:
            try:
                count = os.readv(self.fuse, [buffer])
                self._handle(memoryview(buffer)[:count])
            except OSError as error:
                if error.errno in _ENDED:
                    return
                if error.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # the request was taken back
                    raise

    def _handle(self, request: memoryview) -> None:
        _, verb, unique, *_ = _IN.unpack_from(request)
        if verb in _SILENT:
            return
        try:
            answer, code = self._answer(verb, request[_IN.size :]), 0
        except OSError as error:
            answer, code = b"", -(error.errno or errno.EIO)
        os.writev(self.fuse, [_OUT.pack(_OUT.size + len(answer), code, unique), answer])

    def _answer(self, verb: int, body: memoryview) -> bytes | bytearray:
        if verb == _READ:
            _, offset, length = _READ_IN.unpack_from(body)
            return self._read(offset, length)
        if verb == _GETATTR:
            return _ATTRIBUTES.pack(
                *(_FOREVER, 0, 0, 1, self.size, -(-self.size // 512), 0, 0, 0), *(0, 0, 0, MODE, 1, 0, 0, 0, 4096, 0)
            )
        if verb == _INIT:
            flags = _ASYNC_READ | _MAX_PAGES
            return _INIT_OUT.pack(7, 31, _LONGEST, flags, 64, 48, 4096, 1, _LONGEST // 4096, 0, 0)
        if verb == _OPEN:
            return _OPENED.pack(0, _KEEP_CACHE, 0)
        if verb == _STATFS:
            return _STATFS_OUT.pack(0, 0, 0, 1, 0, 4096, 255, 4096, 0)
        if verb in (_RELEASE, _FLUSH, _DESTROY):
            return b""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(max(0, min(length, self.size - offset)))
        with memoryview(data) as view:
            self.image.read(offset, view)
        return data


def main() -> int:
    """Serve what standard input asks for; says ``ready``, or why not, on standard output."""
    asked = msgspec.json.decode(sys.stdin.buffer.readline(), type=Serve)
    cluster = Cluster(asked.settings, asked.conf, **asked.options)
    try:
        with (
            cluster.pool(*parse_place(asked.place)) as pool,
            pool.image(id=asked.image_id, at=asked.at) as image,
        ):
            server = Server(image, image.size, asked.fuse)
            _say("ready")
            threads = [threading.Thread(target=server.run) for _ in range(_THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    except (CephError, GraincopyError) as failure:
        _say(str(failure))
        return 1
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
