"""Which files belong to VMs (stage 2, Ef): every one that is needed to bring them back, none that is not.

Formats come from the domain definition, never from the files. Decision 0006 says why an overlay is stored as the guest
sees it, base and all.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence

import msgspec

from graincopy.core.errors import PathMissing, PathUnreadable, WorkloadWrong
from graincopy.core.ids import DiskId, digest_id
from graincopy.hypervisor.domain_xml import Disk, Source, Tpm
from graincopy.model.workload import FileMetadata, Representation, WorkloadFile
from graincopy.workloads.files import disk_names
from graincopy.workloads.libvirt_facts import Facts

SWTPM_ROOT = "/var/lib/libvirt/swtpm"  # libvirt's directory of emulated TPMs, one folder for each UUID

NVRAM, TPM = "nvram", "tpm"  # what they are called where disks have a target dev

VolumePath = Callable[[str, str], str]
Metadata = Callable[[str], FileMetadata]


class Chosen(msgspec.Struct, frozen=True):
    """The files of a workload, and what was left out, one clause each."""

    files: tuple[WorkloadFile, ...]
    notes: tuple[str, ...]


class _File(msgspec.Struct, frozen=True):
    """A file that is in. ``path`` is real."""

    path: str
    disk: DiskId
    format: str = "raw"
    representation: Representation = Representation.FILE
    state: bool = False


class Exclusions:
    """``DISK`` or ``VM:DISK`` for each to leave out, also ``nvram`` and ``tpm``; those in ``sure`` must fit one."""

    def __init__(
        self, texts: Sequence[str], sure: Sequence[str], machines: Sequence[str], used: set[str] | None = None
    ) -> None:
        self._texts, self._sure, self._machines = (*texts, *sure), tuple(sure), "+".join(machines)
        self._used = set() if used is None else used  # also of machines that were looked at before these

    def hit(self, machine: str, dev: str, path: str = "") -> bool:
        """Whether ``dev`` of ``machine``, which lies at ``path``, is to be left out."""
        names = {dev, path, os.path.basename(path)} - {""}
        found = {text for text in self._texts if text in names or text in {f"{machine}:{name}" for name in names}}
        self._used |= found
        return bool(found)

    def refuse_unused(self, known: Sequence[str]) -> None:
        """Raise WorkloadWrong for one that must fit and does not: a slip of the pen must not go unseen."""
        for text in self._sure:
            if text not in self._used:
                reason = f"there is no disk {text} to leave out; there are: {', '.join(known)}"
                raise WorkloadWrong(workload=f"vm:{self._machines}", reason=reason)


def files_of(
    machines: Sequence[Facts], exclusions: Exclusions, volume_path: VolumePath, metadata: Metadata, swtpm: str
) -> Chosen:
    """Files of all ``machines``, each once. Raises WorkloadWrong, PathMissing, PathUnreadable."""
    found: dict[str, _File] = {}
    notes: list[str] = []
    for machine in machines:
        for file in _machine(machine, exclusions, volume_path, swtpm, notes):
            if file.path in found:
                notes.append(f"{machine.name}: {file.path} belongs to another VM as well and is taken once")
            found.setdefault(file.path, file)
    exclusions.refuse_unused([f"{one.name}:{disk.dev}" for one in machines for disk in one.live.disks])
    if not found:
        raise WorkloadWrong(
            workload=f"vm:{'+'.join(one.name for one in machines)}", reason="no disk is left to be backed up"
        )
    names = disk_names(sorted(found, key=os.fsencode))
    return Chosen(tuple(_entry(file, names[path], metadata) for path, file in found.items()), tuple(notes))


def _entry(file: _File, name: str, metadata: Metadata) -> WorkloadFile:
    return WorkloadFile(
        path=file.path,
        name=name,
        disk=file.disk,
        format=file.format,
        representation=file.representation,
        state=file.state,
        metadata=FileMetadata() if _is_rbd(file.path) else metadata(file.path),
    )


def _machine(
    machine: Facts, exclusions: Exclusions, volume_path: VolumePath, swtpm: str, notes: list[str]
) -> Iterator[_File]:
    for disk in machine.live.disks:
        file = _disk(machine, disk, exclusions, volume_path, notes)
        if file is not None:
            yield file
    if machine.live.nvram is not None and exclusions.hit(machine.name, NVRAM):
        notes.append(f"{machine.name}: its firmware variables are left out: as asked")
    else:
        yield from _nvram(machine, notes)
    if machine.live.tpms and exclusions.hit(machine.name, TPM):
        notes.append(f"{machine.name}: the state of its TPM is left out: as asked")
        return
    for tpm in machine.live.tpms:
        yield from _tpm(machine, tpm, swtpm, notes)


# --- disks ----------------------------------------------------------------------------------------


def _disk(
    machine: Facts, disk: Disk, exclusions: Exclusions, volume_path: VolumePath, notes: list[str]
) -> _File | None:
    """The file of ``disk``, or None with a note why it is left out."""
    label = f"{machine.name}: disk {disk.dev}"
    why = _left_out(disk)
    if not why and exclusions.hit(machine.name, disk.dev, disk.source.path):
        why = "as asked"
    if why:
        notes.append(f"{label} is left out: {why}")
        return None
    path = _path(machine, disk, volume_path)
    notes += [f"{label} {remark}" for remark in _remarks(disk)]
    return _File(
        path=path if _is_rbd(path) else _real(path),
        disk=DiskId(digest_id("vm-disk", [machine.uuid, disk.dev])),
        format=disk.source.format,
        representation=_representation(machine, disk),
    )


def _left_out(disk: Disk) -> str:
    """Why ``disk`` does not belong to the VM's own data; "" when it does."""
    if disk.device in ("cdrom", "floppy"):
        return "a CD-ROM" if disk.device == "cdrom" else "a floppy"
    if disk.readonly and disk.shareable:
        return "read-only and shared with other VMs"
    return "" if disk.source.kind else "it is empty"


def _path(machine: Facts, disk: Disk, volume_path: VolumePath) -> str:
    source = disk.source
    if source.kind == "volume":
        path = volume_path(source.pool, source.volume)
        if path.startswith("/"):
            return path
        raise _cannot(machine, disk, f"is volume {source.volume} of the network pool {source.pool}")
    if source.kind == "network":
        if source.protocol == "rbd":
            return f"rbd:{source.name}"
        raise _cannot(machine, disk, f"is a network disk ({source.protocol}) that no driver here can read")
    if source.kind not in ("file", "block") or not source.path:
        raise _cannot(machine, disk, f"is of type {source.kind}, which no driver here can read")
    return source.path


def _representation(machine: Facts, disk: Disk) -> Representation:
    """qcow2 as the guest sees it, anything else as the file's bytes; what that would tear apart is refused."""
    source = disk.source
    if source.format == "qcow2" and not source.encryption:
        return Representation.GUEST
    if disk.chain:
        what = f"encrypted {source.format}" if source.encryption else source.format
        raise _cannot(machine, disk, f"is {what} on top of another image, which can only be read by the guest")
    return Representation.FILE


def _remarks(disk: Disk) -> Iterator[str]:
    if disk.chain:
        below = ", ".join(layer.path or layer.name or layer.volume for layer in disk.chain)
        yield f"lies on {below}: stored as the guest sees it, so that nothing else is needed to restore it"
    if disk.source.encryption:
        yield f"is encrypted ({disk.source.encryption}) and stored as it is; its secret is not in the backup"
    if disk.shareable:
        yield "is shared: other VMs may write to it while it is backed up, and are neither paused nor frozen"
    if disk.transient:
        yield "is transient: what is written since the VM was started is in a throw-away layer and not in the backup"


def _cannot(machine: Facts, disk: Disk, reason: str) -> WorkloadWrong:
    remedy = f"leave it out with --exclude {disk.dev}"
    return WorkloadWrong(workload=f"vm:{machine.name}", reason=f"disk {disk.dev} {reason}; {remedy}")


# --- firmware and TPM -----------------------------------------------------------------------------


def _nvram(machine: Facts, notes: list[str]) -> Iterator[_File]:
    nvram = machine.live.nvram
    if nvram is None:
        return
    source = nvram.source
    if source is None or (source.kind == "file" and not os.path.exists(source.path)):
        notes.append(f"{machine.name}: its firmware variables are not there yet; the first start makes them")
    elif source.kind in ("file", "block"):
        disk = DiskId(digest_id("vm-nvram", [machine.uuid]))
        yield _File(_real(source.path), disk, source.format, _nvram_representation(source), state=True)
    else:
        notes.append(f"{machine.name}: its firmware variables are on the network and left out")


def _nvram_representation(source: Source) -> Representation:
    return Representation.GUEST if source.format == "qcow2" else Representation.FILE


def _tpm(machine: Facts, tpm: Tpm, swtpm: str, notes: list[str]) -> Iterator[_File]:
    """Every file in the state directory of an emulated TPM. The lock file and the log are none of them."""
    if tpm.backend != "emulator":
        notes.append(f"{machine.name}: its TPM is the host's own ({tpm.backend}); its state is left out")
        return
    folder = tpm.state or os.path.join(swtpm, machine.uuid, "tpm2" if tpm.version == "2.0" else "tpm1.2")
    try:
        names = sorted(os.listdir(folder), key=os.fsencode) if os.path.isdir(folder) else [os.path.basename(folder)]
        folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
    except OSError as failure:
        raise PathUnreadable(path=folder, reason=failure.strerror or str(failure)) from failure
    states = [name for name in names if not name.startswith(".") and os.path.isfile(os.path.join(folder, name))]
    if not states:
        notes.append(f"{machine.name}: its TPM has no state yet; the first start makes it")
    for name in states:
        yield _File(_real(os.path.join(folder, name)), DiskId(digest_id("vm-tpm", [machine.uuid, name])), state=True)


# --- paths ----------------------------------------------------------------------------------------


def _is_rbd(path: str) -> bool:
    return path.startswith("rbd:")


def _real(path: str) -> str:
    """The real path of a file or device that is there. Raises PathMissing, PathUnreadable, WorkloadWrong."""
    try:
        real = os.path.realpath(path, strict=True)
        mode = os.stat(real).st_mode
    except OSError as failure:
        if failure.errno in (errno.ENOENT, errno.ENOTDIR):
            raise PathMissing(path=path) from failure
        raise PathUnreadable(path=path, reason=failure.strerror or str(failure)) from failure
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise PathUnreadable(path=path, reason="it is neither a file nor a block device")
    if not os.access(real, os.R_OK, effective_ids=True):
        raise PathUnreadable(path=path, reason="permission denied")
    return real
