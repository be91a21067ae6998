"""What a QEMU exports over NBD (stages 7 and 9): the exports that are ours to add and take away, and the server."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from graincopy.hypervisor.qmp import Commands, QmpRefused


def exports(monitor: Commands) -> dict[str, str]:
    """Id → type of everything that is exported."""
    return {str(one["id"]): str(one["type"]) for one in monitor.run("query-block-exports")}


def export(monitor: Commands, name: str, node: str, disk: str, bitmaps: Sequence[str]) -> None:
    """Show ``node`` as ``name``, and the ``bitmaps`` of the node ``disk`` with it. Raises QmpRefused, OSError."""
    options: dict[str, Any] = {"type": "nbd", "id": name, "node-name": node, "name": name}
    if bitmaps:
        options["bitmaps"] = [{"node": disk, "name": bitmap} for bitmap in bitmaps]
    monitor.run("block-export-add", options)


def unexport(monitor: Commands, name: str) -> None:
    """It is gone on return, whoever read it; no error when it was not there."""
    if name in exports(monitor):
        monitor.run("block-export-del", {"id": name, "mode": "hard"})
        monitor.wait("BLOCK_EXPORT_DELETED", name)


def start_server(monitor: Commands, socket: str) -> None:
    """Let it listen at ``socket``, if it does not listen anywhere yet."""
    try:
        address = {"type": "unix", "data": {"path": socket}}
        monitor.run("nbd-server-start", {"addr": address})
    except QmpRefused as refused:
        if "already running" not in refused.reason:
            raise
    else:
        with contextlib.suppress(OSError):
            os.chmod(socket, 0o600)


def stop_server(monitor: Commands, own: bool) -> None:
    """With the last export goes a server that is our ``own``."""
    if own and "nbd" not in exports(monitor).values():
        with contextlib.suppress(QmpRefused):  # it does not run
            monitor.run("nbd-server-stop")
