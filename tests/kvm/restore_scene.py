"""A repository, the command line, and machines of the guest lab that come back under other names."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vm_lab import PATIENCE, GuestLab, wait

from graincopy.core.ids import digest_id
from graincopy.testing import crash


@dataclass
class Scene:
    """Where graincopy works: ``folder`` holds its repository, state and cache."""

    lab: GuestLab
    folder: str
    first: str = ""  # a restore point that tests come back to
    medium: str = ""  # folder of the repository; empty: in ``folder``
    more: str = ""  # TOML, added to the configuration
    inside: bool = False  # where libvirtd is: /etc/libvirt and /var/lib/libvirt are the lab's

    def __post_init__(self) -> None:
        os.makedirs(self.folder, exist_ok=True)
        self.repo = self.medium or os.path.join(self.folder, "repo")
        self.state = os.path.join(self.folder, "state")
        self.config = os.path.join(self.folder, "config.toml")
        with open(self.config, "w") as file:
            file.write(f'repo = "{self.repo}"\n[vm]\nuri = "{self.lab.uri}"\n[paths]\nstate = "{self.state}"\n')
            file.write(f'cache = "{self.folder}/cache"\n')
            file.write(self.more)
        self.run("init", "--no-encryption")

    @property
    def runtime(self) -> str:
        """Where sockets for machines lie while there are any."""
        return f"/run/graincopy-machines-{digest_id('runtime', [self.state])[:8]}"

    def command(self, *arguments: str) -> list[str]:
        return [*self._where(), sys.executable, "-m", "graincopy", "--config", self.config, *arguments]

    def _where(self) -> list[str]:
        return self.lab.inside() if self.inside else []

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ}

    def run(self, *arguments: str, code: int = 0) -> Any:
        """The JSON document of a command that has to end with ``code``; of one that fails, what it says."""
        done = subprocess.run(
            self.command(*arguments, "--json"),
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
            check=False,
            env=self.environ,
        )
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stderr}\n{done.stdout[:3000]}"
        return json.loads(done.stdout) if done.stdout.strip() else done.stderr

    def killed(self, step: str, *arguments: str) -> None:
        """Run a command and kill it -9 at a crash point."""
        line = crash.command(["--config", self.config, *arguments], crash.CrashPoint.parse(step))
        done = subprocess.run(
            [*self._where(), *line], capture_output=True, text=True, timeout=4 * PATIENCE, check=False
        )
        assert done.returncode == -9, f"{step}: {done.returncode}\n{done.stderr}"

    @contextlib.contextmanager
    def stopped(self, step: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command that has stopped itself at a crash point. It does not outlive the block."""
        line = crash.command(["--config", self.config, *arguments], crash.CrashPoint.parse(step), "STOP")
        with subprocess.Popen([*self._where(), *line], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                ended = b"" if os.WIFSTOPPED(status) or process.stderr is None else process.stderr.read()
                assert os.WIFSTOPPED(status), f"it ended before {step}: {status} {ended.decode()}"
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
                    process.kill()

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """The same, going on beside the test, and killed at the end of the block."""
        with (
            open(os.path.join(self.folder, "said"), "wb") as said,
            subprocess.Popen(
                self.command(*arguments, "--json"), stdout=said, stderr=said, env=self.environ, stdin=subprocess.DEVNULL
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def said(self) -> str:
        """What the command beside the test has said."""
        with open(os.path.join(self.folder, "said"), errors="replace") as file:
            return file.read()

    # --- machines ------------------------------------------------------------------------------------

    def names(self) -> set[str]:
        """Of all domains that libvirt knows."""
        return {domain.name() for domain in self.lab.connection().listAllDomains()}

    def xml(self, name: str, *, inactive: bool = False) -> str:
        return str(self.lab.connection().lookupByName(name).XMLDesc(2 if inactive else 0))

    def domain_state(self, name: str) -> int:
        return int(self.lab.connection().lookupByName(name).state()[0])

    def ask(self, name: str, command: str) -> tuple[int, str]:
        """A shell command in the guest of the domain ``name``, whose control channel libvirt has placed.

        It may come more than once: QEMU hangs up on who calls while the guest is about to open its end.
        """
        found = re.findall(r"<source mode='bind' path='([^']*graincopy\.control)'", self.xml(name))
        path = found[0].replace("/var/lib/libvirt", f"{self.lab.folder}/lib")
        path = path.replace("/run/libvirt", f"{self.lab.folder}/run")
        said: list[bytes] = []
        wait(lambda: _talk(path, command.encode(), said), f"{name} does not answer")
        status, _, text = said[0].decode().strip().partition(" ")
        return int(status), text

    def forget(self, name: str) -> None:
        """Pull the plug of a domain, and undefine it."""
        import libvirt

        with contextlib.suppress(libvirt.libvirtError):
            domain = self.lab.connection().lookupByName(name)
            with contextlib.suppress(libvirt.libvirtError):
                domain.destroy()
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)

    def wait_names(self, gone: str) -> None:
        wait(lambda: gone not in " ".join(self.names()), f"{gone} does not go")


def _talk(path: str, line: bytes, said: list[bytes]) -> bool:
    """Send ``line`` to the socket at ``path``, which may be a long one, and add the answer; False without one."""
    folder = os.open(os.path.dirname(path), os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as talk:
            talk.settimeout(PATIENCE)
            talk.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
            talk.sendall(line + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                more = talk.recv(4096)
                if not more:
                    return False
                answer += more
    except ConnectionError:
        return False
    finally:
        os.close(folder)
    said.append(answer)
    return True
