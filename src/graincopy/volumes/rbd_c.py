"""librados and librbd by their C interface (stages 3-9 on Ceph): prototypes, loading, and how failures come back.

ctypes instead of the distribution's Python bindings: those are built for one interpreter and are not seen from a
virtual environment, while librados.so.2 and librbd.so.1 are a stable C interface, and calls let go of Python's lock.
Source: rados/librados.h and rbd/librbd.h of Ceph 16.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_bool, c_char, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_uint64, c_void_p
from functools import cache
from typing import Any

from graincopy.core.errors import ToolMissing

LOCK_EXCLUSIVE = 0  # RBD_LOCK_MODE_EXCLUSIVE
FEATURE_EXCLUSIVE_LOCK = 1 << 2
FEATURE_OBJECT_MAP = 1 << 3
FEATURE_FAST_DIFF = 1 << 4
SNAP_OF_GROUP = 1  # RBD_SNAP_NAMESPACE_TYPE_GROUP
FLAGS_INVALID = 3  # RBD_FLAG_OBJECT_MAP_INVALID | RBD_FLAG_FAST_DIFF_INVALID

_P = c_void_p
DIFF = ctypes.CFUNCTYPE(c_int, c_uint64, c_size_t, c_int, c_void_p)


class SnapInfo(Structure):
    """rbd_snap_info_t"""

    _fields_ = (("id", c_uint64), ("size", c_uint64), ("name", c_char_p))


class ImageInfo(Structure):
    """rbd_image_info_t"""

    _fields_ = (
        *(("size", c_uint64), ("obj_size", c_uint64), ("num_objs", c_uint64), ("order", c_int)),
        *(("block_name_prefix", c_char * 24), ("parent_pool", c_int64), ("parent_name", c_char * 96)),
    )


class Watcher(Structure):
    """rbd_image_watcher_t"""

    _fields_ = (("addr", c_char_p), ("id", c_int64), ("cookie", c_uint64))


class GroupInfo(Structure):
    """rbd_group_info_t"""

    _fields_ = (("name", c_char_p), ("pool", c_int64))


class SnapGroup(Structure):
    """rbd_snap_group_namespace_t"""

    _fields_ = (("pool", c_int64), ("name", c_char_p), ("snap", c_char_p))


_RADOS: dict[str, tuple[Any, ...]] = {
    "rados_create2": (POINTER(_P), c_char_p, c_char_p, c_uint64),
    "rados_conf_read_file": (_P, c_char_p),
    "rados_conf_set": (_P, c_char_p, c_char_p),
    "rados_connect": (_P,),
    "rados_shutdown": (_P,),
    "rados_get_instance_id": (_P,),
    "rados_getaddrs": (_P, POINTER(_P)),
    "rados_cluster_fsid": (_P, c_char_p, c_size_t),
    "rados_ioctx_create": (_P, c_char_p, POINTER(_P)),
    "rados_ioctx_destroy": (_P,),
    "rados_ioctx_set_namespace": (_P, c_char_p),
    "rados_ioctx_get_id": (_P,),
    "rados_set_pool_full_try": (_P,),
    "rados_get_last_version": (_P,),
    "rados_mon_command": (
        *(_P, POINTER(c_char_p), c_size_t, c_char_p, c_size_t),
        *(POINTER(_P), POINTER(c_size_t), POINTER(_P), POINTER(c_size_t)),
    ),
    "rados_buffer_free": (_P,),
    "rados_create_write_op": (),
    "rados_release_write_op": (_P,),
    "rados_write_op_assert_version": (_P, c_uint64),
    "rados_write_op_remove": (_P,),
    "rados_write_op_omap_set": (_P, POINTER(c_char_p), POINTER(c_char_p), POINTER(c_size_t), c_size_t),
    "rados_write_op_omap_rm_keys": (_P, POINTER(c_char_p), c_size_t),
    "rados_write_op_operate": (_P, _P, c_char_p, c_void_p, c_int),
    "rados_create_read_op": (),
    "rados_release_read_op": (_P,),
    "rados_read_op_omap_get_vals2": (
        *(_P, c_char_p, c_char_p, c_uint64),
        *(POINTER(_P), POINTER(c_uint8), POINTER(c_int)),
    ),
    "rados_read_op_operate": (_P, _P, c_char_p, c_int),
    "rados_omap_get_next": (_P, POINTER(c_char_p), POINTER(_P), POINTER(c_size_t)),
    "rados_omap_get_end": (_P,),
}
_RBD: dict[str, tuple[Any, ...]] = {
    "rbd_open": (_P, c_char_p, POINTER(_P), c_char_p),
    "rbd_open_by_id": (_P, c_char_p, POINTER(_P), c_char_p),
    "rbd_open_read_only": (_P, c_char_p, POINTER(_P), c_char_p),
    "rbd_open_by_id_read_only": (_P, c_char_p, POINTER(_P), c_char_p),
    "rbd_close": (_P,),
    "rbd_create": (_P, c_char_p, c_uint64, POINTER(c_int)),
    "rbd_create2": (_P, c_char_p, c_uint64, c_uint64, POINTER(c_int)),
    "rbd_clone2": (_P, c_char_p, c_char_p, _P, c_char_p, c_uint64, POINTER(c_int), c_uint64, c_int),
    "rbd_namespace_exists": (_P, c_char_p, POINTER(c_bool)),
    "rbd_remove": (_P, c_char_p),
    "rbd_rename": (_P, c_char_p, c_char_p),
    "rbd_stat": (_P, POINTER(ImageInfo), c_size_t),
    "rbd_get_size": (_P, POINTER(c_uint64)),
    "rbd_get_id": (_P, c_char_p, c_size_t),
    "rbd_get_name": (_P, c_char_p, POINTER(c_size_t)),
    "rbd_get_features": (_P, POINTER(c_uint64)),
    "rbd_get_flags": (_P, POINTER(c_uint64)),
    "rbd_snap_create": (_P, c_char_p),
    "rbd_snap_remove": (_P, c_char_p),
    "rbd_snap_list": (_P, POINTER(SnapInfo), POINTER(c_int)),
    "rbd_snap_list_end": (POINTER(SnapInfo),),
    "rbd_snap_set_by_id": (_P, c_uint64),
    "rbd_snap_get_namespace_type": (_P, c_uint64, POINTER(c_int)),
    "rbd_snap_get_group_namespace": (_P, c_uint64, POINTER(SnapGroup), c_size_t),
    "rbd_snap_group_namespace_cleanup": (POINTER(SnapGroup), c_size_t),
    "rbd_get_group": (_P, POINTER(GroupInfo), c_size_t),
    "rbd_group_info_cleanup": (POINTER(GroupInfo), c_size_t),
    "rbd_group_create": (_P, c_char_p),
    "rbd_group_remove": (_P, c_char_p),
    "rbd_group_image_add": (_P, c_char_p, _P, c_char_p),
    "rbd_group_image_remove_by_id": (_P, c_char_p, _P, c_char_p),
    "rbd_group_snap_create": (_P, c_char_p, c_char_p),
    "rbd_read": (_P, c_uint64, c_size_t, c_void_p),
    "rbd_write": (_P, c_uint64, c_size_t, c_void_p),
    "rbd_discard": (_P, c_uint64, c_uint64),
    "rbd_write_zeroes": (_P, c_uint64, c_size_t, c_int, c_int),
    "rbd_flush": (_P,),
    "rbd_resize": (_P, c_uint64),
    "rbd_diff_iterate2": (_P, c_char_p, c_uint64, c_uint64, c_uint8, c_uint8, DIFF, c_void_p),
    "rbd_watchers_list": (_P, POINTER(Watcher), POINTER(c_size_t)),
    "rbd_watchers_list_cleanup": (POINTER(Watcher), c_size_t),
    "rbd_lock_acquire": (_P, c_int),
    "rbd_lock_release": (_P,),
}
_NOTHING = ("_end", "_destroy", "_free", "_cleanup", "_release_write_op", "_release_read_op", "_set_namespace")
_QUIET = ("rados_set_pool_full_try", "rados_shutdown", "rados_write_op_assert_version", "rados_write_op_remove")
_RESULTS: dict[str, Any] = {
    "rados_get_instance_id": c_uint64,
    "rados_ioctx_get_id": c_int64,
    "rados_get_last_version": c_uint64,
    "rados_create_write_op": c_void_p,
    "rados_create_read_op": c_void_p,
    "rbd_read": c_int64,
    "rbd_write": c_int64,
    "rbd_write_zeroes": c_int64,
    "rbd_discard": c_int,
    "rbd_diff_iterate2": c_int,
}


@cache
def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """librados and librbd, loaded when they are first wanted. Raises ToolMissing."""
    found = []
    for name, prototypes in (("librados.so.2", _RADOS), ("librbd.so.1", _RBD)):
        try:
            library = ctypes.CDLL(name)
            for function, arguments in prototypes.items():
                _declare(library, function, arguments)
        except (OSError, AttributeError) as failure:
            raise ToolMissing(tool=f"{name} of Ceph 16 or later", install="apt-get install librbd1") from failure
        found.append(library)
    return found[0], found[1]


def _declare(library: ctypes.CDLL, function: str, arguments: tuple[Any, ...]) -> None:
    call = getattr(library, function)
    call.argtypes = arguments
    silent = function.endswith(_NOTHING) or function in _QUIET or function.startswith("rados_write_op_omap")
    call.restype = None if silent else _RESULTS.get(function, c_int)


class CephError(OSError):
    """What a call of librados or librbd came back with; ``errno`` is positive."""


def done(result: int, *fine: int) -> int:
    """``result``, unless it is a negated errno that is not ``fine``. Raises CephError."""
    if result < 0 and -result not in fine:
        raise CephError(-result, os.strerror(-result))
    return result


def keys_array(keys: list[bytes]) -> Any:
    """``char const* const*``"""
    return (c_char_p * len(keys))(*keys)
