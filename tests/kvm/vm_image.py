"""The guest of the lab: a Debian kernel and a busybox initramfs with a guest agent, made once and kept.

Needs: apt-get (to download a kernel and the guest agent; nothing is installed), dpkg, busybox-static, cpio, kmod, gcc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

_HERE = os.path.dirname(os.path.abspath(__file__))
_KERNEL = "linux-image-cloud-amd64"
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "xfs", "button", "evdev")
TOOLS = ("busybox", "cpio", "gcc", "modprobe", "depmod", "dpkg", "apt-get", "ldd")

INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run
while read -r module; do insmod "$module"; done < /modules
option() { for word in $(cat /proc/cmdline); do case $word in gc.$1=*) echo "${word#*=}"; return;; esac; done; }
port() {
  for name in /sys/class/virtio-ports/*/name; do
    [ "$(cat "$name" 2>/dev/null)" = "$1" ] && basename "$(dirname "$name")" && return
  done
}
start_agent() { # start_agent [OPTION...]: the real one
  qemu-ga -m virtio-serial -p "/dev/$(port org.qemu.guest_agent.0)" -t /run -f /run/agent.pid -d "$@" >/dev/ttyS0 2>&1
}
stop_agent() { kill -9 "$(cat /run/agent.pid)"; rm -f /run/agent.pid; }
lying_agent() { # says yes to everything and does nothing; thaws say $1
  while :; do
    while read -r line; do
      id=$(echo "$line" | sed -n 's/.*"id": *\([0-9]*\).*/\1/p' | head -n 1)
      case $line in
        *guest-sync*) echo "{\"return\": $id}";;
        *fsfreeze-freeze*) echo '{"return": 2}';;
        *fsfreeze-thaw*) echo "{\"return\": $1}";;
        *fsfreeze-status*) echo '{"return": "thawed"}';;
        *) echo '{"return": {}}';;
      esac
    done
    sleep 1
  done <>"/dev/$(port org.qemu.guest_agent.0)" >&0
}
for disk in $(option fs | tr , ' '); do
  mkdir -p "/mnt/$disk"; mount "/dev/$disk" "/mnt/$disk"
done
mkdir -p /etc; ln -s /proc/self/mounts /etc/mtab
case $(option agent) in
  no) ;;
  lying) lying_agent "$(option thaws)" & ;;
  hook) start_agent -F/bin/no-such-hook ;;
  *) start_agent ;;
esac
[ "$(option button)" = obey ] && for event in /sys/class/input/event*; do # off when the power button is pushed
  case $(cat "$event/device/name") in
    "Power Button") (dd if="/dev/input/${event##*/}" of=/dev/null bs=24 count=1 2>/dev/null; sync; poweroff -f) & ;;
  esac
done
slots=$(option slots)
case $(option writer) in
  *,*)
    pair=$(option writer); first=${pair%,*}; second=${pair#*,}
    for file in "$first" "$second"; do
      case $file in /mnt/*) dd if=/dev/zero of="$file" bs=4096 count="$slots" conv=fsync 2>/dev/null;; esac
    done
    sync
    guest_writer "$first" "$second" "$slots" "$(option pause)" >/dev/ttyS0 2>&1 &
    ;;
esac
( while :; do
    while read -r line; do eval "$line" </dev/null >/run/said 2>&1; echo "$? $(tr '\n' ' ' </run/said)"; done
    sleep 0.05
  done <>"/dev/$(port graincopy.control)" >&0 ) &
echo "GUEST-READY $(cat /proc/uptime)" >/dev/ttyS0
while :; do sleep 3600; done
"""


@dataclass(frozen=True)
class GuestImage:
    """What QEMU boots."""

    kernel: str
    initrd: str


def guest_image() -> GuestImage:
    """The kernel and the initramfs, from the cache or made now. Raises RuntimeError saying what is missing."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        raise RuntimeError(f"the guest lab needs {', '.join(missing)}")
    cache = _cache()
    kept = GuestImage(os.path.join(cache, "vmlinuz"), os.path.join(cache, "initrd.gz"))
    if not _fresh(kept):
        with tempfile.TemporaryDirectory(prefix="new-", dir=cache) as work:
            _make(work, kept)
    return kept


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _cache() -> str:
    for parent in (os.path.join(sys.prefix, "cache"), tempfile.gettempdir()):
        try:
            os.makedirs(os.path.join(parent, "guest-lab"), exist_ok=True)
        except OSError:
            continue
        return os.path.join(parent, "guest-lab")
    raise RuntimeError("there is no place to keep the guest lab's kernel")


def _fresh(kept: GuestImage) -> bool:
    """There, and newer than what it is made from."""
    if not (os.path.exists(kept.kernel) and os.path.exists(kept.initrd)):
        return False
    made = os.stat(kept.initrd).st_mtime
    return all(os.stat(path).st_mtime < made for path in (__file__, os.path.join(_HERE, "guest_writer.c")))


def _make(work: str, kept: GuestImage) -> None:
    unpacked = _packages(work)
    version = os.listdir(os.path.join(unpacked, "lib/modules"))[0]
    root = os.path.join(work, "root")
    for folder in ("bin", "proc", "sys", "dev", "run", "mnt", "lib", "tmp"):
        os.makedirs(os.path.join(root, folder))
    _copy_modules(unpacked, version, root)
    shutil.copy2(str(shutil.which("busybox")), os.path.join(root, "bin/busybox"))
    _copy_program(os.path.join(unpacked, "usr/sbin/qemu-ga"), root)
    writer = os.path.join(root, "bin/guest_writer")
    _run("gcc", "-O2", "-static", "-o", writer, os.path.join(_HERE, "guest_writer.c"))
    with open(os.path.join(root, "init"), "w") as file:
        file.write(INIT)
    os.chmod(os.path.join(root, "init"), 0o755)
    initrd = os.path.join(work, "initrd.gz")
    _run("sh", "-c", 'cd "$1" && find . | cpio -o -H newc --quiet | gzip -1 > "$2"', "sh", root, initrd)
    os.replace(os.path.join(unpacked, f"boot/vmlinuz-{version}"), kept.kernel)
    os.replace(initrd, kept.initrd)
    os.utime(kept.initrd)


def _packages(work: str) -> str:
    """The kernel and the agent, downloaded and unpacked, not installed."""
    folder, unpacked = os.path.join(work, "deb"), os.path.join(work, "unpacked")
    os.makedirs(folder)
    os.makedirs(unpacked)
    os.chmod(work, 0o755)
    for attempt in range(2):
        depends = _run("apt-cache", "depends", _KERNEL, check=False)
        kernels = [line.split()[1] for line in depends.splitlines() if line.strip().startswith("Depends: linux-image")]
        done = _run("apt-get", "-q", "download", *kernels[:1], "qemu-guest-agent", check=False, cwd=folder)
        if len(os.listdir(folder)) == 2 and kernels:
            break
        if attempt:
            raise RuntimeError(f"the guest's kernel and agent cannot be downloaded: {done}")
        _run("apt-get", "-q", "update", check=False)
    for package in os.listdir(folder):
        _run("dpkg", "-x", os.path.join(folder, package), unpacked)
    return unpacked


def _copy_modules(unpacked: str, version: str, root: str) -> None:
    _run("depmod", "-b", unpacked, version)
    os.makedirs(os.path.join(root, "lib/modules"))
    order: dict[str, None] = {}
    for module in _MODULES:
        shown = _run("modprobe", "-d", unpacked, "-S", version, "--show-depends", module)
        order |= {
            line.removeprefix("insmod ").strip(): None for line in shown.splitlines() if line.startswith("insmod ")
        }
    with open(os.path.join(root, "modules"), "w") as file:
        for path in order:
            shutil.copy2(path, os.path.join(root, "lib/modules"))
            file.write(f"/lib/modules/{os.path.basename(path)}\n")


def _copy_program(program: str, root: str) -> None:
    """A dynamic program with every library that it loads, each at its own path."""
    shutil.copy2(program, os.path.join(root, "bin"))
    for line in _run("ldd", program).splitlines():
        found = [word for word in line.split() if word.startswith("/")]
        if not found:
            if "not found" in line:
                raise RuntimeError(f"the guest agent needs a library that is not there: {line.strip()}")
            continue
        place = os.path.join(root, found[0].lstrip("/"))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        shutil.copy2(os.path.realpath(found[0]), place)


def _run(*command: str, check: bool = True, cwd: str | None = None) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        check=False,
        cwd=cwd,
        timeout=300,
        text=True,
        env={**os.environ, "PATH": _PATH, "LC_ALL": "C.UTF-8"},
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout if check or not done.returncode else done.stderr
