"""The operation that serves the disks of a restore point over NBD."""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from graincopy.app import host
from graincopy.app.answer import Answer
from graincopy.app.shown import point_line
from graincopy.app.viewing_core import opened_view, view_document, view_lines, view_warnings
from graincopy.app.wiring import Wiring
from graincopy.core.errors import DONE, WARNED, OverlayUnfit, UsageWrong, printable
from graincopy.core.units import format_size
from graincopy.views.nbd_listen import Listener, listen_tcp, listen_unix
from graincopy.views.nbd_server import Offer, Server, run
from graincopy.views.nbd_tls import server_context
from graincopy.views.overlay import Overlay
from graincopy.views.source import ViewDisk
from graincopy.workflow.view import View

Values = dict[str, Any]

LOOPBACK = "127.0.0.1"


def serve_nbd(wiring: Wiring, values: Values) -> Answer:
    """Serve until SIGTERM or SIGINT, which is the usual end."""
    _check(values)
    with ExitStack() as held:
        tls = server_context(values["tls"]) if values["tls"] else None
        listener = _listener(wiring, values, tls)
        held.callback(listener.close)
        view = held.enter_context(opened_view(wiring, values, values["disk"]))
        offers = [_offer(wiring, values, view, disk, held) for disk in _one_if_kept(values, view)]
        server = Server(offers, time.monotonic, tls)
        run(server, listener, lambda: _tell_ready(values, view, server, listener))
        held.pop_all().close()  # overlays are flushed and T is gone before anything is said
    return _ended(values, view, server)


def _check(values: Values) -> None:
    if values["socket"] and values["port"] is not None:
        raise UsageWrong(what="serve-nbd takes one of --socket PATH and --port N")
    if values["bind"] and values["port"] is None:
        raise UsageWrong(what="--bind goes with --port N")
    if values["port"] is not None and not 0 <= int(values["port"]) <= 65535:
        raise UsageWrong(what=f"--port {values['port']} is no port")


def _listener(wiring: Wiring, values: Values, tls: ssl.SSLContext | None) -> Listener:
    if values["port"] is not None:
        return listen_tcp(values["bind"] or LOOPBACK, int(values["port"]), tls is not None)
    path = values["socket"] or _usual_socket(wiring, values["point"])
    return listen_unix(os.path.abspath(path), tls is not None)


def _usual_socket(wiring: Wiring, point: str) -> str:
    """A place for the socket that nobody else can reach."""
    runtime = wiring.environ.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else wiring.state_dir())
    folder = os.path.join(runtime, "graincopy")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return os.path.join(folder, f"nbd-{point.replace('/', '_')}.sock")


def _one_if_kept(values: Values, view: View) -> tuple[ViewDisk, ...]:
    if values["overlay"] and len(view.disks) > 1:
        raise UsageWrong(what=f"--overlay FILE holds one of {len(view.disks)} disks; say which with --disk")
    return view.disks


def _offer(wiring: Wiring, values: Values, view: View, disk: ViewDisk, held: ExitStack) -> Offer:
    """A disk as it is served, and as it is taken down."""
    described = f"{disk.name} of restore point {view.point.id}"
    if not (values["writable"] or values["overlay"]):
        return Offer(disk, None, printable(described))
    try:
        if values["overlay"]:
            path = os.path.abspath(values["overlay"])
            overlay = Overlay.kept(disk, path, view.point.id, host.this_process().boot)
        else:
            path = os.path.join(wiring.cache_dir(), "overlays")
            overlay = Overlay.scratch(disk, path)
    except OSError as failure:
        raise OverlayUnfit(path=path, reason=failure.strerror or str(failure)) from failure
    held.callback(overlay.close)
    return Offer(overlay, overlay, printable(described))


def _tell_ready(values: Values, view: View, server: Server, listener: Listener) -> None:
    """One line, at the moment when clients can come: scripts wait for it."""
    names = [export.name for export in server.exports]
    uris = [listener.uri(name) for name in names]
    document = {
        "restore_point": view.point.id,
        "uri": uris[0] if len(uris) == 1 else listener.uri(""),
        "socket": listener.path and printable(listener.path),
        "writable": server.exports[0].writable,
        "tls": server.tls is not None,
        "exports": [
            {"name": export.wire_name.decode(), "size": export.size, "uri": uri}
            for export, uri in zip(server.exports, uris, strict=True)
        ],
    }
    how = "writable" if server.exports[0].writable else "read-only"
    line = f"serving {point_line(view.point)}, {how}, at {' '.join(uris)}"
    _say(sys.stdout.write, json.dumps(document) if values.get("json") else line)
    sys.stdout.flush()


def _ended(values: Values, view: View, server: Server) -> Answer:
    """What was served. With --json the line at the start was the document, and this goes to stderr."""
    warnings = view_warnings(view)
    document = {**view_document(view), "clients": server.clients, "sent_bytes": server.sent_bytes}
    lines = (f"{server.clients} connections were sent {format_size(server.sent_bytes)}", *view_lines(view))
    lines += tuple(f"{count} dropped: {reason}" for reason, count in sorted(server.dropped.items()))
    if values.get("json"):
        _say(sys.stderr.write, json.dumps(document))
        return Answer(None, (), WARNED if warnings else DONE, warnings)
    return Answer(document, lines, WARNED if warnings else DONE, warnings)


def _say(write: Callable[[str], object], line: str) -> None:
    write(f"{printable(line)}\n")
