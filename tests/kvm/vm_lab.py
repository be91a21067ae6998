"""Real guests for tests: a libvirtd of our own, out of sight of the host's, and small VMs under TCG.

libvirtd runs in a mount and a process namespace of its own, with /etc, /run, /var/lib, /var/log and /var/cache of
libvirt bound over from a scratch folder. It and every QEMU die with the namespace, and that with this process. Needs
root; see :data:`TOOLS` for the programs.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import pytest
from vm_image import GuestImage, guest_image

TOOLS = ("libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "unshare", "nsenter", "setpriv", "mke2fs")
RECORD = 4096
PATIENCE = 90.0  # seconds for anything to happen on a loaded machine
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

needs_guests = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(tool, path=_PATH) is None for tool in TOOLS),
    reason="needs root, libvirtd and QEMU",
)

_NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "slave"]
_INIT = """
set -e
for part in etc run lib log cache; do
  case $part in etc) place=/etc/libvirt;; run) place=/run/libvirt;; *) place=/var/$part/libvirt;; esac
  mkdir -p "$place"; mount --bind "$GC_LAB/$part" "$place"
done
for list in passwd group; do # Debian's libvirtd asks for its user and group, also where it is not going to use them
  line=libvirt-qemu:x:64055:; [ $list = group ] || line=${line}64055::/:/bin/false
  { cat /etc/$list; echo "$line"; } >"$GC_LAB/$list"; mount --bind "$GC_LAB/$list" /etc/$list
done
while :; do
  [ -e "$GC_LAB/hold" ] || libvirtd -f "$GC_LAB/libvirtd.conf" -p "$GC_LAB/libvirtd.pid" || true
  sleep 0.1
done
"""
_LIBVIRTD = """
auth_unix_rw = "none"
auth_unix_ro = "none"
log_filters = "3:qemu 3:util"
log_outputs = "3:file:{folder}/libvirtd.log"
"""
_QEMU = """
user = "root"
group = "root"
security_driver = "none"
namespaces = []
stdio_handler = "file"
cgroup_controllers = []
"""


@dataclass(frozen=True, kw_only=True)
class LabDisk:
    """One disk of a guest: ``source`` and ``extra`` are raw XML where a plain file will not do."""

    dev: str
    path: str = ""
    format: str = "raw"
    source: str = ""
    extra: str = ""
    device: str = "disk"
    kind: str = "file"

    def xml(self) -> str:
        source = self.source or (f"<source file={quoteattr(self.path)}/>" if self.path else "")
        bus = "virtio" if self.device == "disk" else "sata"
        return (
            f"<disk type='{self.kind}' device='{self.device}'><driver name='qemu' type='{self.format}'"
            f" discard='unmap'/>{source}<target dev='{self.dev}' bus='{bus}'/>{self.extra}</disk>"
        )


@dataclass
class Guest:
    """One VM. ``options`` go to its init: fs=vda,vdb agent=no|lying|hook button=obey writer=A,B slots= pause=."""

    lab: GuestLab
    name: str
    disks: Sequence[LabDisk]
    options: dict[str, str] = field(default_factory=dict)
    devices: str = ""  # more XML
    os_extra: str = ""
    agent_channel: bool = True
    uuid: str = ""

    @property
    def folder(self) -> str:
        return os.path.join(self.lab.folder, "guests", self.name.encode().hex()[:24])

    @property
    def agent_socket(self) -> str:
        return os.path.join(self.folder, "agent")

    @property
    def console(self) -> str:
        path = os.path.join(self.folder, "console")
        with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as file:
            return file.read()
        return ""

    def xml(self) -> str:
        words = " ".join(f"gc.{key}={value}" for key, value in self.options.items())
        channel = (
            f"<channel type='unix'><source mode='bind' path={quoteattr(self.agent_socket)}/>"
            "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        )
        control = os.path.join(self.folder, "control")
        return (
            f"<domain type='qemu'><name>{escape(self.name)}</name>"
            + (f"<uuid>{self.uuid}</uuid>" if self.uuid else "")
            + "<memory unit='MiB'>192</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64' machine='q35'>hvm</type><kernel>{self.lab.image.kernel}</kernel>"
            f"<initrd>{self.lab.image.initrd}</initrd>"
            f"<cmdline>console=ttyS0 panic=-1 quiet loglevel=3 {escape(words)}</cmdline>{self.os_extra}</os>"
            "<features><acpi/></features><cpu mode='maximum'/><on_poweroff>destroy</on_poweroff><devices>"
            + "".join(disk.xml() for disk in self.disks)
            + f"<serial type='file'><source path={quoteattr(os.path.join(self.folder, 'console'))}/></serial>"
            + (channel if self.agent_channel else "")
            + f"<channel type='unix'><source mode='bind' path={quoteattr(control)}/>"
            "<target type='virtio' name='graincopy.control'/></channel>"
            f"<controller type='usb' model='none'/><memballoon model='none'/>{self.devices}</devices></domain>"
        )

    def define(self) -> Guest:
        os.makedirs(self.folder, exist_ok=True)
        self.lab.connection().defineXML(self.xml())
        return self

    def start(self) -> Guest:
        """Boot it and wait for its init."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, "console"))
        self.domain().create()
        return self.wait_ready()

    def wait_ready(self) -> Guest:
        wait(lambda: "GUEST-READY" in self.console, f"{self.name} does not boot: {self.console[-2000:]}")
        return self

    def wait_agent(self) -> Guest:
        """Wait until libvirt has the agent on the line."""
        wait(lambda: "state='connected'" in self._agent_line(), f"no agent in {self.name}: {self.console[-2000:]}")
        return self

    def _agent_line(self) -> str:
        lines = self.domain().XMLDesc(0).splitlines()
        return next((line for line in lines if "org.qemu.guest_agent.0" in line), "")

    def domain(self) -> Any:
        return self.lab.connection().lookupByName(self.name)

    def run(self, command: str) -> tuple[int, str]:
        """A shell command in the guest → its status and what it printed, on one line."""
        with socket.socket(socket.AF_UNIX) as talk:
            talk.settimeout(PATIENCE)
            talk.connect(os.path.join(self.folder, "control"))
            talk.sendall(command.encode() + b"\n")
            said = b""
            while not said.endswith(b"\n"):
                more = talk.recv(4096)
                if not more:
                    raise RuntimeError(f"{self.name} hung up on {command!r}")
                said += more
        status, _, text = said.decode().strip().partition(" ")
        return int(status), text

    def status(self) -> tuple[bool, bool]:
        """(running, writable): writable is whether a write to the first mounted file system ends."""
        running = self.domain().info()[0] == 1
        if not running:
            return False, False
        return True, self.can_write(20)

    def can_write(self, seconds: float = 2) -> bool:
        """Whether a write to the first mounted file system ends. One to a frozen one cannot be killed: it is left."""
        mount = f"/mnt/{self.options['fs'].split(',')[0]}"
        self.run(f"rm -f /run/wrote; ( echo x > {mount}/probe && sync {mount}/probe && touch /run/wrote ) &")
        tries = int(seconds * 10)
        code, _ = self.run(
            f"i=0; until test -e /run/wrote || test $i -ge {tries}; do i=$((i+1)); sleep 0.1; done; test -e /run/wrote"
        )
        return code == 0

    def destroy(self) -> None:
        """Pull the plug and forget it."""
        import libvirt

        with contextlib.suppress(libvirt.libvirtError):
            self.domain().destroy()
        with contextlib.suppress(libvirt.libvirtError):
            self.domain().undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
                | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            )


class GuestLab:
    """The private libvirtd. Use it as a context manager."""

    def __init__(self) -> None:
        self.image: GuestImage = guest_image()
        self.folder = tempfile.mkdtemp(prefix="kvm-")
        self.uri = f"qemu+unix:///system?socket={self.folder}/run/libvirt-sock"
        self._init: subprocess.Popen[bytes] | None = None
        self._connection: Any = None

    def __enter__(self) -> GuestLab:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        tool("mount", "--bind", self.folder, self.folder)  # so that what tests mount in it is seen in the namespace
        tool("mount", "--make-shared", self.folder)
        for part in ("etc", "run", "lib", "log", "cache", "guests"):
            os.makedirs(os.path.join(self.folder, part))
        _write(os.path.join(self.folder, "libvirtd.conf"), _LIBVIRTD.format(folder=self.folder))
        _write(os.path.join(self.folder, "etc/qemu.conf"), _QEMU)
        with open(os.path.join(self.folder, "init.log"), "wb") as log:
            self._init = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *_NAMESPACE, "sh", "-c", _INIT],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": _PATH, "GC_LAB": self.folder, "LC_ALL": "C.UTF-8"},
                start_new_session=True,
            )
        self.wait_daemon()

    def close(self) -> None:
        """Take everything down: the namespace's init is killed, and with it all that runs in it."""
        self.disconnect()
        process, self._init = self._init, None
        if process is not None:
            process.kill()
            process.wait(PATIENCE)
            wait(lambda: not self.processes(), "the lab's processes do not end")
        self._unmount()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _unmount(self) -> None:
        """The folder from itself; the namespace may take a moment to let it go."""
        for _ in range(50):
            if self.folder not in _read("/proc/self/mountinfo"):
                return
            with contextlib.suppress(RuntimeError):
                tool("umount", "--recursive", self.folder)
            time.sleep(0.1)
        tool("umount", "--recursive", "--lazy", self.folder)

    # --- the daemon ----------------------------------------------------------------------------------

    def connection(self) -> Any:
        """A virConnect of the lab's own, made anew when the daemon was restarted."""
        import libvirt

        libvirt.registerErrorHandler(lambda *_: None, None)
        if self._connection is None or not self._connection.isAlive():
            self.disconnect()
            self._connection = libvirt.open(self.uri)
        return self._connection

    def disconnect(self) -> None:
        import libvirt

        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

    def wait_daemon(self) -> None:
        import libvirt

        def answers() -> bool:
            try:
                return bool(self.connection().getVersion())
            except libvirt.libvirtError:
                return False

        libvirt.registerErrorHandler(lambda *_: None, None)
        wait(answers, "libvirtd does not start")

    def kill_daemon(self, *, stay_down: bool = False) -> None:
        """kill -9 of libvirtd; it is started again at once unless it is to ``stay_down``."""
        if stay_down:
            _write(os.path.join(self.folder, "hold"), "")
        for pid in self.processes("libvirtd"):
            os.kill(pid, signal.SIGKILL)
        if not stay_down:
            self.disconnect()
            self.wait_daemon()

    def start_daemon(self) -> None:
        """After ``kill_daemon(stay_down=True)``."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, "hold"))
        self.wait_daemon()

    def processes(self, name: str = "") -> list[int]:
        """Pids, as the host sees them, of everything in the lab that is called ``name``."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                ours = f"GC_LAB={self.folder}" in _read(f"/proc/{entry}/environ")
                comm = _read(f"/proc/{entry}/comm").strip()
                if (ours or self.folder in _read(f"/proc/{entry}/cmdline")) and comm.startswith(name[:15]):
                    found.append(int(entry))
        return [pid for pid in found if pid != os.getpid()]

    def inside(self) -> list[str]:
        """What has to stand before a command that is to see /etc/libvirt and /var/lib/libvirt as libvirtd does."""
        return ["nsenter", "--target", str(self.processes("sh")[0]), "--mount", "--pid", "--"]

    # --- guests --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guest(self, name: str, disks: Sequence[LabDisk], *, start: bool = True, **facts: Any) -> Iterator[Guest]:
        """A VM for the length of a ``with``; booted unless ``start`` is false."""
        guest = Guest(self, name, disks, **facts)
        try:
            guest.define()
            yield guest.start() if start else guest
        finally:
            self.wait_daemon()
            guest.destroy()

    def file(self, name: str, size: int, *, format: str = "raw", fs: bool = True) -> str:
        """A new disk file in the lab's folder, with an ext4 in it."""
        path = os.path.join(self.folder, name)
        make_disk(path, size, format=format, fs=fs)
        return path


def make_disk(path: str, size: int, *, format: str = "raw", fs: bool = True) -> None:
    """A sparse disk file of ``size`` bytes, with an ext4 in it where ``fs``."""
    raw = path if format == "raw" else f"{path}.raw"
    with open(raw, "xb") as file:
        file.truncate(size)
    if fs:
        tool("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=1", "-J", "size=4", raw)
    if format != "raw":
        tool("qemu-img", "convert", "-f", "raw", "-O", format, raw, path)
        os.unlink(raw)


def tool(*command: str) -> str:
    """Run a program to its end. Raises RuntimeError."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False, env={**os.environ, "PATH": _PATH}
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


def wait(ready: Any, complaint: Any, patience: float = PATIENCE) -> None:
    """Wait until ``ready()``; raise RuntimeError after ``patience`` seconds."""
    end = time.monotonic() + patience
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(complaint if isinstance(complaint, str) else complaint())
        time.sleep(0.05)


# --- what the writer left -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Records:
    """The records in one disk or file: every number seen, and slots that hold neither a record nor zeros."""

    numbers: frozenset[int]
    torn: tuple[int, ...]

    @property
    def last(self) -> int:
        return max(self.numbers, default=0)

    def whole(self, slots: int) -> bool:
        """Every record that must still be there is."""
        return all(number in self.numbers for number in range(max(1, self.last - slots + 1), self.last + 1))


def read_records(data: bytes) -> Records:
    """What :file:`guest_writer.c` left in ``data``."""
    numbers, torn = set(), []
    for offset in range(0, len(data) - RECORD + 1, RECORD):
        record = data[offset : offset + RECORD]
        if not any(record):
            continue
        magic, number, total = struct.unpack_from("<8sQQ", record)
        if magic == b"GRAINREC" and total == _checksum(record[24:]):
            numbers.add(number)
        else:
            torn.append(offset // RECORD)
    return Records(frozenset(numbers), tuple(torn))


def one_instant(first: Records, second: Records, slots: int) -> bool:
    """Whether both show one instant: no record is torn or lost, and none is on the second without the first."""
    untouched = not first.torn and not second.torn and first.whole(slots) and second.whole(slots)
    return untouched and first.last - second.last in (0, 1)


def _checksum(data: bytes) -> int:
    total = 0xCBF29CE484222325
    for (word,) in struct.iter_unpack("<Q", data):
        total = ((total ^ word) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return total


def file_in_image(image: str, path: str) -> bytes:
    """A file's bytes out of a raw ext4 image, without mounting it."""
    done = subprocess.run(
        ["debugfs", "-R", f"cat {path}", image],
        capture_output=True,
        timeout=PATIENCE,
        check=True,
        env={**os.environ, "PATH": _PATH},
    )
    return done.stdout


def needs_replay(image: str) -> bool:
    """Whether the ext4 in the raw ``image`` has a journal to replay (linux/fs/ext4/ext4.h, INCOMPAT_RECOVER)."""
    with open(image, "rb") as file:
        file.seek(1024 + 0x60)
        return bool(struct.unpack("<I", file.read(4))[0] & 0x4)


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return os.fsdecode(file.read())


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
