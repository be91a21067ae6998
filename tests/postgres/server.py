"""A real PostgreSQL server of its own, run by an ordinary user, with a writer and a judge of what came back."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from types import TracebackType

USER = "postgres"
TIMEOUT = 120  # seconds; generous, for a loaded machine
LOAD = """
CREATE TABLE ledger (n bigint PRIMARY KEY, pad text NOT NULL);
CREATE TABLE high (n bigint NOT NULL);
INSERT INTO high (n) VALUES (0);
"""
STEP = (
    "WITH next AS (UPDATE high SET n = n + 1 RETURNING n)"
    " INSERT INTO ledger SELECT n, repeat(md5(n::text), 8) FROM next;"
)
# Every number from 1 to the highest is there once, with its own text: nothing torn, nothing lost, nothing twice.
JUDGE = (
    "SELECT (SELECT n FROM high) = (SELECT count(*) FROM ledger)"
    " AND (SELECT count(*) FROM ledger) = (SELECT coalesce(max(n), 0) FROM ledger)"
    " AND NOT EXISTS (SELECT FROM ledger WHERE pad <> repeat(md5(n::text), 8))"
)


def find_programs() -> str | None:
    """The folder with initdb and pg_ctl; None where PostgreSQL, or its user, is not there."""
    with contextlib.suppress(KeyError):
        pwd.getpwnam(USER)
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_ctl"))
        return os.path.dirname(found[-1]) if found else None
    return None


class Server:
    """One data directory and its server. ``sockets`` is a folder with a short path."""

    def __init__(self, programs: str, data: str, sockets: str, port: int) -> None:
        self.programs, self.data, self.sockets, self.port = programs, data, sockets, port

    def run(self, *command: str, program: str = "", check: bool = True) -> str:
        """One of PostgreSQL's programs as its user; what it printed."""
        argv = ["runuser", "-u", USER, "--", os.path.join(self.programs, program), *command]
        done = subprocess.run(argv, capture_output=True, timeout=TIMEOUT, check=False, cwd="/", env=_environ())
        if check and done.returncode:
            log = self.log()
            raise RuntimeError(f"{argv}: {os.fsdecode(done.stdout + done.stderr)}\n{log}")
        return os.fsdecode(done.stdout).strip()

    def log(self) -> str:
        """The end of the server's log."""
        with contextlib.suppress(OSError), open(f"{self.sockets}/log{self.port}", "rb") as file:
            return os.fsdecode(file.read()[-3000:])
        return ""

    def make(self) -> Server:
        """initdb; with page checksums, so that a torn page is seen."""
        shutil.chown(os.path.dirname(self.data), USER)
        self.run("-D", self.data, "-A", "trust", "-U", USER, "--data-checksums", "-N", program="initdb")
        with open(os.path.join(self.data, "postgresql.conf"), "a", encoding="utf-8") as file:
            file.write(f"listen_addresses = ''\nunix_socket_directories = '{self.sockets}'\n")
            file.write("shared_buffers = 4MB\nmax_wal_size = 48MB\nmin_wal_size = 32MB\nwal_keep_size = 0\n")
        return self

    def start(self) -> None:
        """Start and wait until it answers, which is after its recovery."""
        options = f"-p {self.port} -k {self.sockets}"
        self._ctl("start", "-l", f"{self.sockets}/log{self.port}", "-o", options)

    def stop(self, how: str = "fast") -> None:
        """Stop it if it runs."""
        if os.path.exists(os.path.join(self.data, "postmaster.pid")):
            self._ctl("stop", "-m", how)

    def _ctl(self, verb: str, *options: str) -> None:
        self.run(verb, "-D", self.data, "-w", "-t", str(TIMEOUT), "-s", *options, program="pg_ctl")

    def sql(self, text: str, check: bool = True) -> str:
        """Run SQL; its answer without decoration."""
        where = ("-h", self.sockets, "-p", str(self.port), "-U", USER, "-d", "postgres")
        return self.run(
            "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *where, "-c", text, program="psql", check=check
        )

    def amcheck(self) -> None:
        """Every heap and index of the database, block by block."""
        where = ("-h", self.sockets, "-p", str(self.port), "-U", USER, "-d", "postgres")
        self.run("--heapallindexed", "--install-missing", *where, program="pg_amcheck")

    @contextlib.contextmanager
    def writers(self, clients: int = 2) -> Iterator[None]:
        """Transactions without pause, by ``clients`` connections."""
        script = f"{self.sockets}/step.sql"
        with open(script, "w", encoding="utf-8") as file:
            file.write(f"{STEP}\n")
        os.chmod(script, 0o644)
        where = ["-h", self.sockets, "-p", str(self.port), "-U", USER]
        bench = os.path.join(self.programs, "pgbench")
        argv = ["runuser", "-u", USER, "--", bench, "-n", "-f", script, "-c", str(clients), "-T", "600", *where]
        process = subprocess.Popen(
            [*argv, "postgres"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", env=_environ()
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(TIMEOUT)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop("immediate")


def _environ() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}
