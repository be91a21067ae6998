"""The machine of a lab: a real qemu-storage-daemon plays it, and its NBD export is the guest that writes."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import subprocess
import time

from graincopy.hypervisor.daemon import PROGRAM
from graincopy.hypervisor.nbd import NbdClient
from graincopy.hypervisor.qmp import Monitor, QmpRefused

PATIENCE = 60.0  # seconds for the daemon to come up or to end, and for a tool: storage may be busy


class Machine:
    """A qemu-storage-daemon that outlives no test: monitor at ``qmp``, NBD server at ``nbd``."""

    def __init__(self, folder: str) -> None:
        self.qmp, self.nbd = os.path.join(folder, "qmp"), os.path.join(folder, "nbd")
        self._guests: dict[str, NbdClient] = {}
        self._nodes: dict[str, str] = {}
        self._serial = itertools.count()
        self.start()

    def start(self) -> None:
        """Switch on, with no disk."""
        for path in (self.qmp, self.nbd):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        chardev = f"socket,id=monitor,path={self.qmp},server=on,wait=off"
        command = [PROGRAM, "--chardev", chardev, "--monitor", "chardev=monitor,mode=control"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with self.monitor() as monitor:
                    monitor.run("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.nbd}}})
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def monitor(self) -> Monitor:
        """For as short as possible: there is one at a time."""
        return Monitor.connect(self.qmp, PATIENCE)

    def stop(self, *, kill: bool = False) -> None:
        """Switch off, in order or by pulling the plug."""
        for client in self._guests.values():
            client.close()
        self._guests.clear()
        self._nodes.clear()
        (self.process.kill if kill else self.process.terminate)()
        self.process.wait(PATIENCE)

    def plug(self, path: str, kind: str) -> None:
        """Give the machine the disk at ``path``; it hangs below a raw node that is exported."""
        name = f"d{next(self._serial)}"
        driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
        protocol = {"driver": driver, "node-name": f"{name}p", "filename": path, "discard": "unmap"}
        with self.monitor() as monitor:
            monitor.run("blockdev-add", protocol)
            below = f"{name}p"
            if kind == "qcow2":
                monitor.run("blockdev-add", {"driver": kind, "node-name": name, "file": below, "discard": "unmap"})
                below = name
            raw = {"driver": "raw", "node-name": f"{name}t", "file": below, "discard": "unmap"}
            monitor.run("blockdev-add", raw)
        self._nodes[path] = name
        self._attach(path)

    def unplug(self, path: str) -> None:
        """Take the disk away; nothing of ours may hang on it any more."""
        self._detach(path)
        name = self._nodes.pop(path)
        with self.monitor() as monitor:
            for node in (f"{name}t", name, f"{name}p"):
                with contextlib.suppress(QmpRefused):  # a raw disk has no node in the middle
                    monitor.run("blockdev-del", {"node-name": node})

    def resize(self, path: str, size: int) -> None:
        """Give the disk another size. Its nodes stay, and their bitmaps."""
        self._detach(path)
        with self.monitor() as monitor:
            monitor.run("block_resize", {"node-name": f"{self._nodes[path]}t", "size": size})
        self._attach(path)

    def _attach(self, path: str) -> None:
        name = self._nodes[path]
        with self.monitor() as monitor:
            export = {"type": "nbd", "id": name, "node-name": f"{name}t", "name": name, "writable": True}
            monitor.run("block-export-add", export)
        self._guests[path] = NbdClient(self.nbd, name)

    def _detach(self, path: str) -> None:
        self._guests.pop(path).close()
        with self.monitor() as monitor:
            monitor.run("block-export-del", {"id": self._nodes[path], "mode": "hard"})
            monitor.wait("BLOCK_EXPORT_DELETED", self._nodes[path])

    def has(self, path: str) -> bool:
        """Whether the disk is plugged in."""
        return path in self._nodes

    def node(self, path: str) -> str:
        """The format node of the disk."""
        return self._nodes[path]

    def guest(self, path: str) -> NbdClient:
        """What writes the disk at ``path``."""
        return self._guests[path]

    def nodes(self) -> frozenset[str]:
        """Nodes, exports and bitmaps that are there."""
        with self.monitor() as monitor:
            nodes = monitor.run("query-named-block-nodes", {"flat": True})
            exports = monitor.run("query-block-exports")
        bitmaps = {f"bitmap {one['name']}" for node in nodes for one in node.get("dirty-bitmaps", ()) if "name" in one}
        return frozenset({node["node-name"] for node in nodes} | {one["id"] for one in exports} | bitmaps)
