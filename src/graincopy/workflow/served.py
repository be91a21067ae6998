"""Stage V, for machines: an open view as NBD exports at a unix socket, beside whatever the caller does meanwhile.

The one thread here runs the event loop of the NBD server (:mod:`graincopy.views.nbd_server`).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from graincopy.core.errors import GraincopyError, OverlayUnfit
from graincopy.hypervisor.shown_disks import Export
from graincopy.model.restore_point import DiskRecord
from graincopy.model.workload import Representation
from graincopy.views.nbd_listen import listen_unix
from graincopy.views.nbd_server import Offer, Server
from graincopy.views.overlay import Overlay
from graincopy.views.source import ViewDisk
from graincopy.workflow.view import View


class _Thread:
    """The server's event loop, in a thread that ends with :meth:`close`."""

    def __init__(self, server: Server, path: str) -> None:
        """Raises AddressTaken."""
        self._server, self._listener = server, listen_unix(path)
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self._ready = threading.Event()
        self._failures: list[Exception] = []
        self._thread = threading.Thread(target=self._run, name="nbd")
        self._thread.start()
        self._ready.wait()
        if self._failures:
            self.close()
            raise self._failures[0]

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._server.serve(self._listener, self._stop, self._ready.set))
        except (OSError, GraincopyError) as failure:
            self._failures.append(failure)
        finally:
            self._ready.set()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._listener.close()
        self._loop.close()


@contextmanager
def served(
    view: View,
    records: Sequence[DiskRecord],
    path: str,
    monotonic: Callable[[], float],
    *,
    scratch: str | None = None,
    owner: tuple[int, int] | None = None,
) -> Iterator[Mapping[str, Export]]:
    """The disks of ``view``, stored as ``records``, at the socket ``path`` until the end of the block: NAME → export.

    With ``scratch``, a folder, they take writes, which are kept there without a name and thrown away at the end.
    ``owner`` (user, group) may use the socket. Raises AddressTaken, OverlayUnfit.
    """
    with ExitStack() as held:
        offers = [_offer(disk, scratch, held) for disk in view.disks]
        server = Server(offers, monotonic)
        held.callback(_Thread(server, path).close)
        if owner is not None:
            os.chown(path, *owner)
        formats = {record.name: format_of(record) for record in records}
        yield {one.name: Export(path, one.wire_name.decode(), formats[one.name]) for one in server.exports}


def _offer(disk: ViewDisk, scratch: str | None, held: ExitStack) -> Offer:
    if scratch is None:
        return Offer(disk, None, disk.name)
    try:
        overlay = Overlay.scratch(disk, scratch)
    except OSError as failure:
        raise OverlayUnfit(path=scratch, reason=failure.strerror or str(failure)) from failure
    held.callback(overlay.close)
    return Offer(overlay, overlay, disk.name)


def format_of(record: DiskRecord) -> str:
    """The format of the bytes that a view of ``record`` shows: what a guest saw is raw, a file is what it was."""
    return "raw" if record.representation is Representation.GUEST else record.format
