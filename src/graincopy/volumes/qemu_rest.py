"""Disks whose machine is off (stages 4 to 7): another driver holds or clones the file, a daemon of ours shows it.

The image is opened with the stated format over T, read-only; its backing files, whose formats its header states, below
it. Nothing is probed. Bitmaps that lie in the file came along into T, as they were at the instant.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from graincopy.core.errors import AttachFailed, ToolMissing, VolumeBusy
from graincopy.hypervisor.daemon import INSTALL, StorageDaemon
from graincopy.hypervisor.qmp import QmpRefused
from graincopy.volumes import leases
from graincopy.volumes.qemu_bitmaps import GRAIN
from graincopy.volumes.qemu_graph import Bitmap, bitmap_from
from graincopy.volumes.qemu_header import Header, HeaderUnfit, read_header

EXPORT = "disk"
_DEEPEST = 64  # backing files below each other
_PATIENCE = 120.0  # seconds for qemu-img


class Layer(msgspec.Struct, frozen=True):
    """One image file of a disk."""

    path: str
    format: str


def layers_of(path: str, header: Header) -> tuple[Layer, ...]:
    """The backing files below the qcow2 at ``path``, the nearest first. Raises HeaderUnfit, OSError."""
    layers: list[Layer] = []
    while header.backing is not None:
        if header.backing_format not in ("raw", "qcow2"):
            raise HeaderUnfit(f"the format of the backing file {header.backing} is not stated in {path}")
        if ":" in header.backing.partition("/")[0]:
            raise HeaderUnfit(f"the backing file {header.backing} is no plain file")
        path = os.path.join(os.path.dirname(path), header.backing)
        layers.append(Layer(path, header.backing_format))
        if len(layers) > _DEEPEST:
            raise HeaderUnfit("its backing files go in a circle")
        if header.backing_format == "raw":
            break
        header = header_of(path)
    return tuple(layers)


def header_of(path: str) -> Header:
    """The header of the qcow2 at ``path``. Raises HeaderUnfit, OSError."""
    fd = os.open(path, os.O_RDONLY | leases.OPENING & ~os.O_NOFOLLOW)
    try:
        return read_header(fd)
    finally:
        os.close(fd)


def node_options(filename: str, layers: Sequence[Layer], *, writable: bool = False) -> dict[str, Any]:
    """``blockdev-add`` of a qcow2 with its backing files, as the node ``disk``."""
    below: dict[str, Any] | None = None
    for layer in reversed(layers):
        below = _image(layer.path, layer.format, below, writable=False)
    return {**_image(filename, "qcow2", below, writable=writable), "node-name": EXPORT}


def _image(filename: str, kind: str, below: dict[str, Any] | None, *, writable: bool) -> dict[str, Any]:
    common = {"read-only": not writable, "discard": "unmap"}
    options: dict[str, Any] = {"driver": kind, "file": {"driver": "file", "filename": filename, **common}, **common}
    if kind == "qcow2":
        options["backing"] = below
    return options


@contextmanager
def shown(volume: str, path: str, fd: int, wanted: Sequence[str] = ()) -> Iterator[tuple[StorageDaemon, str]]:
    """The guest's view of the qcow2 behind ``fd``, whose own path is ``path``, as the export :data:`EXPORT`.

    Of the bitmaps ``wanted``, those that are sound are exported with it. Raises AttachFailed, ToolMissing.
    """
    try:
        options = node_options(f"/proc/self/fd/{fd}", layers_of(path, read_header(fd)))
        with StorageDaemon([fd]) as daemon:
            daemon.add(options)
            sound = [one.name for one in bitmaps_in(daemon) if one.sound and one.name in wanted]
            daemon.export(EXPORT, EXPORT, bitmaps=sound)
            yield daemon, daemon.nbd
    except (HeaderUnfit, QmpRefused) as error:
        raise AttachFailed(volume=f"{volume} ({error})") from error


def bitmaps_in(daemon: StorageDaemon) -> tuple[Bitmap, ...]:
    """The bitmaps of the node ``disk``."""
    nodes = daemon.monitor.run("query-named-block-nodes", {"flat": True})
    found = [one for node in nodes if node["node-name"] == EXPORT for one in node.get("dirty-bitmaps", ())]
    return tuple(bitmap_from(one) for one in found if "name" in one)


# --- bitmaps in a file that nobody has open -----------------------------------------------------------


def add_bitmap(path: str, name: str) -> str:
    """Let a bitmap begin in the qcow2 at ``path``; "" or, in one clause, why there is none now. May be repeated."""
    done = _qemu_img("bitmap", "--add", "-g", str(GRAIN), "-f", "qcow2", path, name)
    said = _said(done)
    return "" if not done.returncode or "already exists" in said else f"no bitmap could be put into the image: {said}"


def remove_bitmap(volume: str, path: str, name: str) -> None:
    """Take a bitmap out of the qcow2 at ``path``; nothing to do where the file or the bitmap is gone.

    Raises VolumeBusy while somebody has the image open.
    """
    done = _qemu_img("bitmap", "--remove", "-f", "qcow2", path, name)
    if done.returncode and "lock" in _said(done):
        raise VolumeBusy(volume=volume, holder="a QEMU that has the image open")


def create(path: str, size: int) -> None:
    """An empty qcow2 of ``size`` guest bytes in the existing, empty file ``path``. Raises OSError."""
    done = _qemu_img("create", "-q", "-f", "qcow2", path, str(size))
    if done.returncode:
        raise OSError(0, _said(done))


def _qemu_img(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["qemu-img", *arguments], capture_output=True, timeout=_PATIENCE, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise ToolMissing(tool="qemu-img", install=INSTALL) from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = os.fsdecode(done.stderr).strip().splitlines()
    return lines[-1].removeprefix("qemu-img: ").rstrip(".") if lines else f"qemu-img ended with {done.returncode}"
