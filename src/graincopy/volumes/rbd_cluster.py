"""Ceph at arm's length (stages 3-9): cluster → pool → image, each a handle that is closed. No decisions.

Every call ends: the time-outs of librados are always set, since without them a client waits for ever. Reads and
writes of one image may come from several threads at once.
"""

from __future__ import annotations

import ctypes
import errno
import json
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_void_p
from typing import Any

import msgspec

from graincopy.core.errors import StorageUnreachable
from graincopy.volumes import rbd_c
from graincopy.volumes.rbd_c import CephError, done
from graincopy.volumes.rbd_guarded import Guarded
from graincopy.volumes.rbd_open_image import Image


class RbdSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How Ceph is reached, and where images are looked for. Empty: as the configuration of Ceph says."""

    id: str = "admin"  # cephx user, without "client."
    keyring: str = ""  # path
    timeout: float = 30.0  # seconds after which a cluster that does not answer is given up
    pools: tuple[str, ...] = ()  # POOL or POOL/NAMESPACE: where targets are looked for besides the known places
    fuse: dict[str, str] = {}  # folder on which rbd-fuse shows a pool → that POOL
    groups: bool = True  # several images are snapshotted as one group, at one instant
    whole_objects: bool = False  # take whole objects as changed, not the bytes in them (Ceph before 16.2.15)


CEPH_CONF = "/etc/ceph/ceph.conf"  # where Ceph itself looks
SILENT = (errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN)  # nobody answers


class Cluster:
    """One connection, made when it is first needed, shared by threads, let go with this object."""

    def __init__(self, settings: RbdSettings, conf: str, **options: str) -> None:
        self.settings, self.conf = settings, conf
        self.options = options
        self._lock = threading.Lock()
        self._handle: c_void_p | None = None
        self._pools: set[int] = set()  # those that are open
        self._guards: list[Guarded] = []  # one at most

    @property
    def rados(self) -> ctypes.CDLL:
        """The library. Raises ToolMissing."""
        return rbd_c.libraries()[0]

    def handle(self) -> c_void_p:
        """The connected cluster. Raises StorageUnreachable, ToolMissing."""
        with self._lock:
            if self._handle is None:
                self._handle = self._connect()
                weakref.finalize(self, _shut_down, self._handle, self._pools, self._guards)
            return self._handle

    @property
    def _name(self) -> str:
        return f"client.{self.settings.id}"

    def guard(self) -> None:
        """From now on the cluster gives this client up as soon as its process dies; else it takes half a minute.

        For whoever is going to hold an image's lock: until then its other writers wait. May be repeated.
        Raises StorageUnreachable, ToolMissing.
        """
        address = self._address()
        with self._lock:
            if self._guards:
                return
            try:
                guard = Guarded(self._name, self.conf, self._wanted(), address, self.settings.timeout)
            except OSError as failure:
                raise unreachable(self.conf, failure) from failure
            self._guards.append(guard)

    def _address(self) -> str:
        """What the cluster knows this client by, as its blocklist has it."""
        found = c_void_p()
        done(self.rados.rados_getaddrs(self.handle(), byref(found)))
        try:
            return ctypes.string_at(found).decode()
        finally:
            self.rados.rados_buffer_free(found)

    def _connect(self) -> c_void_p:
        handle, rados = c_void_p(), self.rados
        self._read_conf()
        done(rados.rados_create2(byref(handle), b"ceph", self._name.encode(), 0))
        try:
            done(rados.rados_conf_read_file(handle, self.conf.encode()))
            for option, value in self._wanted().items():
                done(rados.rados_conf_set(handle, option.encode(), value.encode()))
            done(rados.rados_connect(handle))
        except CephError as failure:
            rados.rados_shutdown(handle)
            raise unreachable(self.conf, failure) from failure
        return handle

    def _read_conf(self) -> None:
        """librados calls a file that it may not read missing."""
        try:
            with open(self.conf, "rb") as file:
                file.read(1)
        except OSError as error:
            reason = f"its configuration: {error.strerror}"
            raise StorageUnreachable(storage=_called(self.conf), reason=reason) from error

    def _wanted(self) -> dict[str, str]:
        """Options that this client needs. No cache: what was written is written, what is read is asked for."""
        seconds = f"{max(1, round(self.settings.timeout))}"
        waits = ("client_mount_timeout", "rados_mon_op_timeout", "rados_osd_op_timeout")
        keyring = {"keyring": self.settings.keyring} if self.settings.keyring else {}
        return {**dict.fromkeys(waits, seconds), "rbd_cache": "false", **keyring, **self.options}

    def instance(self) -> int:
        """The number by which the cluster knows this client."""
        return int(self.rados.rados_get_instance_id(self.handle()))

    def fsid(self) -> str:
        """Which cluster it is."""
        buffer = ctypes.create_string_buffer(64)
        done(self.rados.rados_cluster_fsid(self.handle(), buffer, 64))
        return buffer.value.decode()

    @contextmanager
    def pool(self, name: str, namespace: str = "") -> Iterator[Pool]:
        """Raises CephError (ENOENT) when there is no such pool, StorageUnreachable."""
        handle = c_void_p()
        done(self.rados.rados_ioctx_create(self.handle(), name.encode(), byref(handle)))
        try:
            self.rados.rados_set_pool_full_try(handle)  # a full pool answers ENOSPC instead of letting us wait
            self.rados.rados_ioctx_set_namespace(handle, namespace.encode())
            self._pools.add(id(handle))
            yield Pool(self, handle)
        finally:
            self.rados.rados_ioctx_destroy(handle)
            self._pools.discard(id(handle))

    def room(self, pool: str) -> tuple[int, int]:
        """Bytes that the pool could hold, and bytes free in it; (0, 0) where this user may not ask."""
        try:
            found = self._command({"prefix": "df", "format": "json"})
            stats = next(one["stats"] for one in found["pools"] if one["name"] == pool)
            return int(stats["stored"]) + int(stats["max_avail"]), int(stats["max_avail"])
        except (CephError, ValueError, KeyError, TypeError, StopIteration):
            return 0, 0

    def _command(self, command: dict[str, str]) -> Any:
        words = rbd_c.keys_array([json.dumps(command).encode()])
        out, status = c_void_p(), c_void_p()
        out_size, status_size = c_size_t(), c_size_t()
        answer = (byref(out), byref(out_size), byref(status), byref(status_size))
        result = self.rados.rados_mon_command(self.handle(), words, 1, b"", 0, *answer)
        try:
            done(result)
            return json.loads(ctypes.string_at(out, out_size.value))
        finally:
            for buffer in (out, status):
                self.rados.rados_buffer_free(buffer)


def _shut_down(handle: c_void_p, pools: set[int], guards: list[Guarded]) -> None:
    """Not under images that are still open, as at the end of a process that was interrupted: librbd would abort.

    Then the guard is not told either: it lets those images go when this process is gone.
    """
    if pools:
        return
    rbd_c.libraries()[0].rados_shutdown(handle)
    while guards:
        guards.pop().end()


def unreachable(conf: str, failure: OSError) -> StorageUnreachable:
    """Why there is no connection, in words that say where to look."""
    said = {
        errno.ENOENT: "its keyring is missing, or its configuration names no monitor",
        errno.EINVAL: "its configuration cannot be understood",
        errno.EIO: "its keyring cannot be understood",
        errno.EISDIR: "its keyring is a directory",
        errno.EACCES: "this user or its key is not accepted, or the keyring may not be read",
        errno.EPERM: "this user or its key is not accepted",
        errno.ETIMEDOUT: "it does not answer in time",
    }
    return StorageUnreachable(storage=_called(conf), reason=said.get(failure.errno or 0, failure.strerror))


def _called(conf: str) -> str:
    return f"the Ceph cluster of {conf}"


class Pool:
    """One pool, or one namespace of it; not for several threads."""

    def __init__(self, cluster: Cluster, handle: c_void_p) -> None:
        self.cluster, self.handle = cluster, handle
        self.rados, self._rbd = rbd_c.libraries()

    @property
    def id(self) -> int:
        """The pool's number: another one when it was made anew under the same name."""
        return int(self.rados.rados_ioctx_get_id(self.handle))

    @contextmanager
    def image(
        self, name: str = "", *, id: str = "", snap: str = "", at: int = 0, writable: bool = False
    ) -> Iterator[Image]:
        """By name or by id; live, at ``snap``, or at the snapshot of number ``at``. Raises CephError (ENOENT)."""
        image = self.open(name, id=id, snap=snap, writable=writable)
        try:
            if at:
                image.show(at)
            yield image
        finally:
            image.close()

    def open(self, name: str = "", *, id: str = "", snap: str = "", writable: bool = False) -> Image:
        """As :meth:`image`; the caller closes it, and keeps the pool until then."""
        handle = c_void_p()
        call = getattr(self._rbd, f"rbd_open{'_by_id' if id else ''}{'' if writable else '_read_only'}")
        done(call(self.handle, (id or name).encode(), byref(handle), snap.encode() if snap else None))
        return Image(handle, self.cluster.instance())

    def create(self, name: str, size: int) -> None:
        """An image with the features that the cluster's configuration gives. Raises CephError (EEXIST)."""
        done(self._rbd.rbd_create(self.handle, name.encode(), size, byref(c_int(0))))

    def remove(self, name: str) -> None:
        """Raises CephError."""
        done(self._rbd.rbd_remove(self.handle, name.encode()))
