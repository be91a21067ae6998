"""``graincopy serve-nbd`` beside qemu-nbd and nbdkit on the raw file, in the same run: a table, and JSON.

Sequential: nbdcopy to nowhere. Random: 4 KiB reads, 16 under way on one connection, by a client of our own. The image
lies in the page cache and so does the repository. ``near`` is a view whose S is still there (a T of it is read),
``medium`` one that reads the repository only; ``first`` is the first pass, which proves what it reads.

Needs root, xfsprogs, libnbd-bin, qemu-utils and nbdkit. Takes about three minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from lab import GIB, MIB, machine, mounted, run, scatter, scratch

GRAINCOPY = [sys.executable, "-m", "graincopy"]
SEQUENTIAL, RANDOM = 0.6, 0.25  # what was promised, as shares of qemu-nbd's and nbdkit's figures
READERS = 8


class Served:
    """A server process and the URI that it serves at."""

    def __init__(self, command: list[str], uri: str) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.uri = uri
        self.begun = time.monotonic()

    def wait(self) -> None:
        """Until clients can come."""
        for _ in range(600):
            if subprocess.run(["nbdinfo", "--size", self.uri], capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.05)
        sys.exit(f"{self.process.args} does not serve")

    @property
    def peak(self) -> int:
        """The most memory that it ever held, in bytes."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

    def end(self) -> None:
        """Stop it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)


@contextlib.contextmanager
def served(command: list[str], uri: str) -> Iterator[Served]:
    """Serve until the end of the block."""
    server = Served(command, uri)
    try:
        server.wait()
        yield server
    finally:
        server.end()


def copy_rate(uri: str) -> float:
    """Bytes of the image a second that nbdcopy gets."""
    size = int(run("nbdinfo", "--size", uri))
    begun = time.monotonic()
    run("nbdcopy", uri, "null:")
    return size / (time.monotonic() - begun)


def random_rate(uri: str, seconds: int = 4) -> float:
    """4 KiB reads a second with 16 under way, as a client of our own gets them."""
    size = run("nbdinfo", "--size", uri).strip()
    return float(run(sys.executable, os.path.abspath(__file__), "--client", uri.partition("=")[2], size, str(seconds)))


def client(path: str, size: int, seconds: float) -> float:
    """Reads a second. As lean as Python allows, so that the server is what is measured, not the client."""
    dice = random.Random(7)
    with _connected(path) as sock:
        reply, done, filled, under_way = 28 + 4096, 0, 0, 16
        buffer = memoryview(bytearray(64 * reply))
        sock.sendall(b"".join(_requests(dice, size, under_way)))
        begun = time.monotonic()
        while under_way:
            filled += sock.recv_into(buffer[filled:])
            whole, filled = divmod(filled, reply)
            if not whole:
                continue
            assert buffer[:8] == struct.pack(">IHH", 0x668E33EF, 1, 1), "something else than data"
            buffer[:filled] = bytes(buffer[whole * reply : whole * reply + filled])
            done += whole
            if time.monotonic() - begun < seconds:
                sock.sendall(b"".join(_requests(dice, size, whole)))
            else:
                under_way -= whole
        return done / (time.monotonic() - begun)


@contextlib.contextmanager
def _connected(path: str) -> Iterator[socket.socket]:
    """A client of the default export, with structured replies; it says goodbye (nbdkit 1.32 wants that)."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.sendall(struct.pack(">I", 3) + struct.pack(">8sII", b"IHAVEOPT", 8, 0))
        sock.sendall(struct.pack(">8sIIIH", b"IHAVEOPT", 7, 6, 0, 0))
        greeting = b""
        while not greeting.endswith(struct.pack(">QIII", 0x3E889045565A9, 7, 1, 0)):
            greeting += sock.recv(4096)
        yield sock
        sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0))


def _requests(dice: random.Random, size: int, count: int) -> list[bytes]:
    places = (int(dice.random() * (size // 4096)) * 4096 for _ in range(count))
    return [struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, place, 4096) for place in places]


class Bench:
    """The places, and the rows of the table."""

    def __init__(self, folder: str, datastore: str, times: int) -> None:
        self.folder, self.times = folder, times
        self.image = os.path.join(datastore, "disk.raw")
        self.rows: list[dict[str, object]] = []
        os.environ.update(
            GRAINCOPY_REPO=os.path.join(folder, "repo"),
            GRAINCOPY_PASSPHRASE="bench",
            XDG_CACHE_HOME=os.path.join(folder, "cache"),
            XDG_CONFIG_HOME=os.path.join(folder, "config"),
        )

    def row(self, what: str, who: str, figures: list[float], unit: str) -> float:
        """Add a line to the table; its median."""
        middle = statistics.median(figures)
        self.rows.append({"what": what, "who": who, "unit": unit, "median": middle, "runs": figures})
        print(f"{what:24} {who:22} {middle:12.1f} {unit}", flush=True)
        return middle

    def socket(self, name: str) -> tuple[str, str]:
        """A path and the URI of the default export there."""
        path = os.path.join(self.folder, name)
        return path, f"nbd+unix:///?socket={path}"

    def graincopy(self, name: str, *words: str) -> contextlib.AbstractContextManager[Served]:
        """A view of the latest restore point."""
        path, uri = self.socket(name)
        return served([*GRAINCOPY, "serve-nbd", "latest", "--socket", path, *words], uri)

    def qemu(self) -> contextlib.AbstractContextManager[Served]:
        """qemu-nbd on the raw file."""
        path, uri = self.socket("qemu")
        return served(["qemu-nbd", "-r", "-f", "raw", "-t", "-e", "16", "-k", path, self.image], uri)

    def nbdkit(self) -> contextlib.AbstractContextManager[Served]:
        """nbdkit's file plugin on the raw file."""
        path, uri = self.socket("nbdkit")
        return served(["nbdkit", "-f", "-r", "-U", path, "file", self.image], uri)

    def side_by_side(self, what: str, unit: str, share: float, rate: Callable[[str], float], *, scale: float) -> None:
        """Peer, near and medium in turns, so that all see the same machine."""
        peer = self.qemu if rate is copy_rate else self.nbdkit
        name = "qemu-nbd" if rate is copy_rate else "nbdkit file"
        found: dict[str, list[float]] = {}
        with peer() as raw, self.graincopy("near") as near, self.graincopy("medium", "--medium-only") as medium:
            wait_for_near(near)
            self.row(what, "graincopy near, first", [rate(near.uri) / scale], unit)
            copy_rate(near.uri)
            for _ in range(self.times):
                for who, server in ((name, raw), ("graincopy near, warm", near), ("graincopy medium", medium)):
                    found.setdefault(who, []).append(rate(server.uri) / scale)
            print(f"    peak memory {near.peak // MIB} MiB near, {medium.peak // MIB} MiB medium")
        middles = {who: self.row(what, who, figures, unit) for who, figures in found.items()}
        value = middles["graincopy near, warm"] / middles[name]
        self.rows.append({"what": what, "peer": name, "share": round(value, 3), "wanted": share})
        print(f"  {what}: {value:.2f} × {name} (wanted ≥ {share}) {'ok' if value >= share else 'MISSED'}")

    def readers(self) -> None:
        """Memory with several sequential readers of the medium at once, and after them."""
        with self.graincopy("readers", "--medium-only") as server:
            command = ["nbdcopy", "--connections=1", server.uri, "null:"]
            for process in [subprocess.Popen(command) for _ in range(READERS)]:
                process.wait()
            peak = server.peak / MIB
        self.row(f"{READERS} readers, memory", "graincopy medium", [peak], "MiB")
        print(f"  memory {peak:.0f} MiB (wanted ≤ 256) {'ok' if peak <= 256 else 'MISSED'}")

    def first_read(self) -> None:
        """From the start of the process to the first byte of a 1 TiB image."""
        big = os.path.join(os.path.dirname(self.image), "big.raw")
        with open(big, "wb") as file:
            file.truncate(1 << 40)
            for at in range(0, 1 << 40, 1 << 33):
                file.seek(at)
                file.write(os.urandom(MIB))
        run(*GRAINCOPY, "backup", big)
        figures = []
        for number in range(self.times + 2):
            path, uri = self.socket(f"big{number}")
            server = Served([*GRAINCOPY, "serve-nbd", "latest", "--socket", path], uri)
            while not os.path.exists(path):
                time.sleep(0.005)
            with _connected(path) as sock:
                sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, (1 << 39) + number * 65536, 4096))
                assert len(sock.recv(28 + 4096, socket.MSG_WAITALL)) == 28 + 4096
            figures.append(time.monotonic() - server.begun)
            server.end()
        middle = self.row("first read of 1 TiB", "graincopy near", figures, "s")
        print(f"  first read: {middle:.2f} s (wanted ≤ 0.5) {'ok' if middle <= 0.5 else 'MISSED'}")


def wait_for_near(server: Served) -> None:
    """Until what S still has is read from there."""
    for _ in range(200):
        found = json.loads(run("nbdinfo", "--map=graincopy:source", "--json", server.uri))
        if any(span["type"] == 1 for span in found):
            return
        time.sleep(0.1)
    print("    nothing is near")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="measured runs of each (default 5)")
    parser.add_argument("--results", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "results"))
    parser.add_argument("--client", nargs=3, metavar=("SOCKET", "SIZE", "SECONDS"), help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.client:
        print(client(wanted.client[0], int(wanted.client[1]), float(wanted.client[2])))
        return
    print(machine())
    with scratch() as folder, mounted(folder, "datastore", "xfs", 40 * GIB) as datastore:
        bench = Bench(folder, datastore, wanted.runs)
        run(sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "lab.py"), bench.image)
        run(*GRAINCOPY, "init")
        run(*GRAINCOPY, "backup", bench.image)
        scatter(bench.image, 40, 1)
        bench.side_by_side("sequential", "MiB/s", SEQUENTIAL, copy_rate, scale=MIB)
        bench.side_by_side("random 4 KiB, QD16", "reads/s", RANDOM, random_rate, scale=1)
        bench.readers()
        bench.first_read()
    os.makedirs(wanted.results, exist_ok=True)
    with open(os.path.join(wanted.results, "views_nbd.json"), "w", encoding="utf-8") as file:
        json.dump({"machine": machine(), "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    main()
