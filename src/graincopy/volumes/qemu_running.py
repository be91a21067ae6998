"""Running QEMUs that are reached by their monitors (stages 3 to 9): which has a disk, and what is done there.

Connections are made for one verb and let go: a monitor serves one client at a time. What QEMU refuses, or that it is
gone, comes out as our errors.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import msgspec
from msgspec.structs import replace

from graincopy.core.errors import GraincopyError, SnapshotFailed, TargetLost, TargetNoSpace, VolumeBusy
from graincopy.core.extent import Extents
from graincopy.core.ids import VolumeId, digest_id
from graincopy.hypervisor.qmp import Commands, Monitor, QmpRefused
from graincopy.hypervisor.qmp_libvirt import Domains
from graincopy.volumes import qemu_live
from graincopy.volumes.qemu_bitmaps import bitmap_of
from graincopy.volumes.qemu_graph import Bitmap, LiveDisk, NoPlace
from graincopy.volumes.qemu_host import has_open, make_room, user_of, writers_of
from graincopy.volumes.qemu_notes import Note

GONE = (FileNotFoundError, ConnectionRefusedError)  # nobody listens at that socket
_LONGEST_SOCKET = 100  # bytes of the path of a unix socket; unix(7) has room for 107
_LIBVIRT = "libvirt:"
_PASSED_THROUGH = ("scsi-block", "scsi-generic")  # devices that write by SG_IO: no bitmap, no filter sees that
_ELSEWHERE = "/var/tmp/graincopy-qemu-"  # where our state folder cannot be used: UID, and whose it is


class QemuPlaces(msgspec.Struct, frozen=True):
    """Where QEMUs are found and what the driver may use: ``state`` is a folder for notes, sockets and scratch files.

    ``monitors`` are paths of QMP sockets, ``nbd_sockets`` says for a monitor where the NBD server of its QEMU listens,
    if it has one already; ``scratch`` is another folder for scratch files.
    """

    state: str
    monitors: tuple[str, ...] = ()
    nbd_sockets: Mapping[str, str] = msgspec.field(default_factory=dict)
    scratch: str = ""
    patience: float = 30.0  # seconds for one answer
    domains: Domains | None = None  # the machines that libvirt runs

    @property
    def scratch_folder(self) -> str:
        """Where scratch files lie."""
        return self.scratch or os.path.join(self.state, "scratch")


class Found(msgspec.Struct, frozen=True):
    """A disk, the QEMU that has it (path of its monitor, or ``libvirt:UUID``), and as which user that runs."""

    monitor: str
    disk: LiveDisk
    uid: int


class Running:
    """The QEMUs of ``places``."""

    def __init__(self, places: QemuPlaces) -> None:
        self._places = places

    def find(self, path: str) -> Found | None:
        """The QEMU that has the file at the real ``path`` open for writing, if any is known. Raises NoPlace.

        None is asked while nobody has: there may be thousands of files.
        """
        if not writers_of(path):
            return None
        for monitor in self._places.monitors:
            found = self._find_at(monitor, path)
            if found is not None:
                return found
        domains = self._places.domains
        if domains is None:
            return None
        try:
            named = domains.with_disk(path)
        except GraincopyError as error:
            raise NoPlace(str(error)) from error
        answers = (self._find_at(f"{_LIBVIRT}{uuid}", path) for uuid in named)
        return next((found for found in answers if found is not None), None)

    def _find_at(self, monitor: str, path: str) -> Found | None:
        try:
            with self.reach(monitor) as qmp:
                disk = _seen_by(qmp, path)
                pid = qmp.peer
        except GONE:
            return None
        except (OSError, QmpRefused, GraincopyError) as error:
            raise NoPlace(f"the QEMU at {monitor} does not answer ({error})") from error
        if disk is None:
            return None
        if not has_open(pid, path):
            raise NoPlace("QEMU has another file open that had this path once")
        return Found(monitor, disk, user_of(path))

    def place(self, note: Note, found: Found) -> Note:
        """``note`` with the places where this QEMU can make the scratch file and listen."""
        folder = self._places.scratch or os.path.join(self._home(found.uid), "scratch")
        return replace(note, scratch=os.path.join(folder, f"{note.key}.scratch"), nbd=self.socket_of(found))

    def socket_of(self, found: Found) -> str:
        """Where the NBD server of this QEMU listens, or can be made to."""
        named = self._places.nbd_sockets.get(found.monitor)
        return named or os.path.join(self._home(found.uid), f"{digest_id('monitor', [found.monitor])}.nbd")

    def owns_server(self, monitor: str) -> bool:
        """Whether the NBD server of this QEMU is ours to start and stop."""
        return monitor not in self._places.nbd_sockets

    def _home(self, uid: int) -> str:
        """A folder that a QEMU of this user can use, with a path short enough for a socket."""
        state = self._places.state
        mine = uid == os.geteuid()
        if mine and len(os.fsencode(state)) + 32 <= _LONGEST_SOCKET:
            return state
        return f"{_ELSEWHERE}{uid}-{digest_id('state', [state])[:8]}" if mine else f"{_ELSEWHERE}{uid}"

    def prepare(self, note: Note, found: Found) -> None:
        """Everything but the instant. Raises SnapshotFailed, TargetNoSpace."""
        for path in (note.nbd, note.scratch):
            if path != self._places.nbd_sockets.get(found.monitor):
                make_room(os.path.dirname(path), found.uid, note.target.volume)
        with self._talk(note.monitor, note.target.volume) as monitor:
            qemu_live.make_scratch(note.scratch, found.disk.size)
            if found.uid != os.geteuid():
                os.chown(note.scratch, found.uid, -1)
            qemu_live.hang_filter(monitor, note)

    def anchor(self, found: Found, volume: VolumeId) -> str:
        """The node above the disk whose child can be exchanged."""
        with self._talk(found.monitor, volume) as monitor:
            return qemu_live.ensure_anchor(monitor, found.disk)

    def take(self, notes: Sequence[Note]) -> None:
        """The instant of ``notes``: one for all disks of one QEMU."""
        by_monitor: dict[str, list[Note]] = {}
        for note in notes:
            by_monitor.setdefault(note.monitor, []).append(note)
        for path, members in by_monitor.items():
            with self._talk(path, members[0].target.volume) as monitor:
                qemu_live.take(monitor, members)

    def show(self, note: Note) -> str:
        """The NBD socket at which the snapshot is exported as ``note.key``. Raises TargetLost."""
        own = self.owns_server(note.monitor)
        try:
            with self.reach(note.monitor) as monitor:
                qemu_live.show(monitor, note, note.nbd, own_server=own)
        except LookupError as error:
            raise TargetLost(target=note.target.id, reason="the QEMU that held it has ended") from error
        except (OSError, QmpRefused, NoPlace) as error:
            raise TargetLost(target=note.target.id, reason=str(error)) from error
        if not os.path.exists(note.nbd):
            holder = "another NBD server in that QEMU (a backup or migration of libvirt, or one for qemu.nbd to name)"
            raise VolumeBusy(volume=note.target.volume, holder=holder)
        return note.nbd

    def zeros(self, note: Note, socket: str) -> Extents:
        """What of the disk read as zeros at the instant. Raises OSError."""
        try:
            with self.reach(note.monitor) as monitor:
                return qemu_live.zeros_then(monitor, note, socket)
        except (QmpRefused, NoPlace, GraincopyError) as error:
            raise OSError(0, str(error)) from error

    def release(self, note: Note, *, keep_bitmap: bool) -> bool:
        """Take the filter away; False when that QEMU is not there any more. Raises SnapshotFailed."""
        own = self.owns_server(note.monitor)
        here = self._is_there(note.monitor)
        if here:
            with self._talk(note.monitor, note.target.volume) as monitor:
                qemu_live.release(monitor, note, keep_bitmap=keep_bitmap, own_server=own)
        with suppress(FileNotFoundError):
            os.unlink(note.scratch)
        self.tidy(os.path.dirname(note.scratch))
        return here

    def tidy(self, lowest: str) -> None:
        """The folder ``lowest`` and the one around it, outside of our own, go with the last thing in them."""
        for folder in (lowest, os.path.dirname(lowest)):
            if folder.startswith(_ELSEWHERE):
                with suppress(OSError):  # something of somebody else's target is there
                    os.rmdir(folder)

    def remove_bitmap(self, found: Found, note: Note) -> None:
        """Take the bitmap of a checkpoint off a disk that some QEMU has open."""
        with self._talk(found.monitor, note.target.volume) as monitor:
            disk = qemu_live.look(monitor).find(note.path)
            if disk is not None and note.bitmap is not None and disk.bitmap(note.bitmap) is not None:
                monitor.run("block-dirty-bitmap-remove", {"node": disk.disk, "name": note.bitmap})

    def bitmap(self, note: Note, run: str) -> Bitmap | None:
        """The bitmap that began with the target of ``run``, as it is now."""
        with self._talk(note.monitor, note.target.volume) as monitor:
            disk = qemu_live.look(monitor).find(note.path)
        return disk.bitmap(bitmap_of(run)) if disk is not None else None

    def reach(self, monitor: str) -> Commands:
        """A connection to that QEMU. Raises OSError (one of GONE: it is not there), HypervisorDown."""
        if not monitor.startswith(_LIBVIRT):
            return Monitor.connect(monitor, self._places.patience)
        if self._places.domains is None:
            raise ConnectionRefusedError("libvirt is not asked")
        return self._places.domains.monitor(monitor.removeprefix(_LIBVIRT))

    @contextmanager
    def _talk(self, path: str, volume: VolumeId) -> Iterator[Commands]:
        try:
            with self._connect(path, volume) as monitor:
                yield monitor
        except QmpRefused as error:
            if "No space left" in error.reason:
                raise TargetNoSpace(volume=volume) from error
            raise SnapshotFailed(volume=volume, reason=f"QEMU says: {error.reason}") from error
        except NoPlace as error:
            raise SnapshotFailed(volume=volume, reason=str(error)) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise TargetNoSpace(volume=volume) from error
            raise SnapshotFailed(volume=volume, reason=f"its QEMU does not answer ({error})") from error

    def _is_there(self, monitor: str) -> bool:
        try:
            self.reach(monitor).close()
        except GONE:
            return False
        except OSError:
            return True  # whoever wants something of it will hear what the matter is
        return True

    def _connect(self, path: str, volume: VolumeId) -> Commands:
        try:
            return self.reach(path)
        except GONE as error:
            raise SnapshotFailed(volume=volume, reason="the QEMU that has it open has ended") from error


def _seen_by(monitor: Commands, path: str) -> LiveDisk | None:
    """The disk at ``path``, if this QEMU sees all that is written to it. Raises NoPlace, QmpRefused, OSError."""
    graph = qemu_live.look(monitor)
    disk = graph.find(path)
    device = graph.device_of(disk.root) if disk is not None else None
    if device is not None and monitor.run("qom-get", {"path": device, "property": "type"}) in _PASSED_THROUGH:
        raise NoPlace("the guest's SCSI commands go to it past QEMU's block layer (device='lun')")
    return disk
