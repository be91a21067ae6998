"""What this host can do, and what has to be installed for the rest."""

from __future__ import annotations

import ctypes
import os
import shutil
from importlib.util import find_spec
from typing import Any

from graincopy.app.answer import Answer, table
from graincopy.app.wiring import Wiring

Values = dict[str, Any]
Finding = tuple[str, bool, str, str]  # what, whether it is there, what for, what to do when it is not

TOOLS = (
    ("mkfs.xfs", "xfsprogs", "making XFS with reflink, to keep disk files on"),
    ("mkfs.btrfs", "btrfs-progs", "making Btrfs, to keep disk files on"),
    ("losetup", "util-linux", "LUN image files under loop devices"),
    ("fsfreeze", "util-linux", "thawing by hand what somebody left frozen"),
    ("fusermount3", "fuse3", "graincopy mount"),
    ("lvs", "lvm2", "LVM's thin volumes"),
    ("thin_delta", "thin-provisioning-tools", "what changed on LVM's thin volumes"),
    ("qemu-storage-daemon", "qemu-system-common", "qcow2 disks of machines that are off"),
    ("qemu-img", "qemu-utils", "new qcow2 disks, and machines that are brought back at once"),
)
LIBRARIES = (("librbd.so.1", "librbd1", "images of Ceph"),)
MODULES = (
    ("mfusepy", "fuse", "graincopy mount, and files inside XFS and Btrfs"),
    ("asyncssh", "flashcopy", "IBM Storage Virtualize arrays"),
    ("pytsk3", "guest", "files inside ext4 and NTFS"),
    ("libvirt", "libvirt", "virtual machines, vm:NAME"),
)


def doctor(wiring: Wiring, _values: Values) -> Answer:
    """What this host can do, what is missing, and the command that installs it."""
    findings = [*_rights(wiring.state_dir()), *_packages()]
    rows = [(name, "yes" if there else "no", use, "" if there else remedy) for name, there, use, remedy in findings]
    document = [{"name": r[0], "there": r[1] == "yes", "for": r[2], "remedy": r[3]} for r in rows]
    drivers = [f"volume drivers: {', '.join(wiring.drivers())}"]
    return Answer(
        {"checks": document, "drivers": list(wiring.drivers())},
        (*table(("WHAT", "THERE", "FOR", "REMEDY"), rows), *drivers),
    )


def _rights(state_dir: str) -> list[Finding]:
    loops = os.access("/dev/loop-control", os.R_OK | os.W_OK)
    return [
        ("root", os.geteuid() == 0, "freezing, loop devices, attaching targets", "run graincopy as root"),
        ("/dev/loop-control", loops, "attaching LUN targets", "modprobe loop"),
        ("state directory", _writable(state_dir), "noting where targets are", f"mkdir -p {state_dir}"),
    ]


def _packages() -> list[Finding]:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [
        *(
            (tool, shutil.which(tool, path=path) is not None, use, f"apt-get install {package}")
            for tool, package, use in TOOLS
        ),
        *((name, _loads(name), use, f"apt-get install {package}") for name, package, use in LIBRARIES),
        *(
            (module, find_spec(module) is not None, use, f"pip install 'graincopy[{extra}]'")
            for module, extra, use in MODULES
        ),
    ]


def _loads(library: str) -> bool:
    """Whether this process could use the library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _writable(path: str) -> bool:
    """Whether ``path``, or the nearest folder above it that exists, can be written."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return os.access(path, os.W_OK)
