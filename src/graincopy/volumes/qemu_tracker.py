"""What the QEMU that has a raw file open knows of the writes to it (stages 4 to 7), for a T that somebody else makes.

A dirty bitmap on the file's own node, and its copies; nothing is hung in the guest's way. Every verb that can fail
answers with the reason instead: without the bitmap the file is compared, and the backup goes on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

import msgspec
from msgspec.structs import replace

from graincopy.core.errors import GraincopyError
from graincopy.core.extent import Extents
from graincopy.hypervisor.nbd import DIRTY, NbdClient
from graincopy.hypervisor.qmp import Commands, QmpRefused
from graincopy.model.change_map import Unknown
from graincopy.model.volume import Claim
from graincopy.volumes import qemu_bitmaps
from graincopy.volumes.qemu_bitmaps import bitmap_of, frozen_of, is_copy_for
from graincopy.volumes.qemu_exports import export, exports, start_server, stop_server, unexport
from graincopy.volumes.qemu_graph import LiveDisk, NoPlace
from graincopy.volumes.qemu_host import make_room, user_of, writers_of
from graincopy.volumes.qemu_live import look
from graincopy.volumes.qemu_notes import key_of
from graincopy.volumes.qemu_running import GONE, Found, QemuPlaces, Running
from graincopy.volumes.qemu_source import identity

_FAILED = (OSError, QmpRefused, NoPlace, GraincopyError, LookupError)
_END = 1 << 62  # bytes; beyond any file


class Tracked(msgspec.Struct, frozen=True, kw_only=True):
    """One file, and the QEMU that tells what is written to it. ``why``: nothing is known after all, one clause."""

    claim: Claim
    path: str  # real
    incarnation: str = ""  # which file it was
    size: int = 0  # bytes, before the bitmap began
    monitor: str = ""
    nbd: str = ""  # socket of its NBD server
    why: str = ""


class QemuTracker:
    """The QEMUs of ``places``."""

    def __init__(self, places: QemuPlaces) -> None:
        self._running = Running(places)
        self._read: dict[tuple[str, str], Extents] = {}  # copies of bitmaps never change

    def refusal(self, path: str) -> str | None:
        """Why no QEMU tells what is written to the file, one clause; empty: none that is known has it open."""
        try:
            return None if self._find(os.path.realpath(path)) else ""
        except NoPlace as error:
            return str(error)

    def _find(self, path: str) -> Found | None:
        """The QEMU that sees everything that is written to the file on this host. Raises NoPlace."""
        found = self._running.find(path)
        if found is None:
            return None
        if found.disk.format != "raw":
            raise NoPlace(f"QEMU has it open as {found.disk.format}, and its file is stored")
        writers = writers_of(path)
        if len(writers) != 1:
            raise NoPlace(f"several have it open for writing: {', '.join(map(str, writers))}")
        return found

    # --- before the instant -------------------------------------------------------------------------

    def locate(self, claims: Sequence[Claim]) -> tuple[Tracked, ...]:
        """Which QEMU has each file now. No effect."""
        return tuple(self._locate(claim, os.path.realpath(claim.path)) for claim in claims)

    def _locate(self, claim: Claim, path: str) -> Tracked:
        file = Tracked(claim=claim, path=path)
        try:
            found = self._find(path)
            if found is None:
                return replace(file, why="no QEMU had it open when the last backup began")
            size, incarnation = identity(path, "raw", found)
        except (NoPlace, OSError) as error:
            return replace(file, why=f"the last backup could not track it: {error}")
        nbd = self._running.socket_of(found)
        return replace(file, incarnation=incarnation, size=size, monitor=found.monitor, nbd=nbd)

    def begin(self, run: str, files: Sequence[Tracked]) -> tuple[Tracked, ...]:
        """The bitmaps of ``run`` know every write that completes from now on."""
        for monitor, members in _by_monitor(files).items():
            try:
                with self._running.reach(monitor) as qmp:
                    disks = _disks(qmp, members)
                    qemu_bitmaps.begin(qmp, [(disk, bitmap_of(run)) for disk in disks])
            except _FAILED as error:
                why = f"QEMU did not begin a bitmap in the last backup ({error})"
                files = [replace(one, why=why) if one in members else one for one in files]
        return tuple(files)

    # --- after the instant ----------------------------------------------------------------------------

    def freeze(self, run: str, files: Sequence[Tracked]) -> tuple[Tracked, ...]:
        """Copy the bitmaps of older runs as they are now; not before every write that the instant shows has completed.

        A copy that cannot be made is missed by :meth:`dirty`. A file that lies elsewhere by now is not known any more.
        """
        files = tuple(one if one.why or _is_same(one) else replace(one, why=_REPLACED) for one in files)
        for monitor, members in _by_monitor(files).items():
            try:
                with self._running.reach(monitor) as qmp:
                    qemu_bitmaps.freeze(qmp, [(disk, run) for disk in _disks(qmp, members)])
            except _FAILED:
                continue
        return files

    def dirty(self, since: str, before: Tracked, until: str, now: Tracked) -> Extents | Unknown:
        """Bytes of the file that were written between the instants of the runs ``since`` and ``until``, or beside them.

        It reaches beyond the end: what the file grew by, and what QEMU does not take for the disk, counts as written.
        """
        if before.why or now.why:
            return Unknown(before.why or now.why)
        if before.incarnation != now.incarnation:
            return Unknown(_REPLACED)
        name = frozen_of(since, until)
        if (name, now.path) not in self._read:
            try:
                found = self._dirty(since, name, until, now)
            except _FAILED as error:
                return Unknown(f"its QEMU does not show the bitmap ({error})")
            if isinstance(found, Unknown):
                return found
            self._read[name, now.path] = found
        return self._read[name, now.path] | Extents.of((before.size, _END))

    def _dirty(self, since: str, name: str, until: str, now: Tracked) -> Extents | Unknown:
        own = self._running.owns_server(now.monitor)
        with self._running.reach(now.monitor) as qmp:
            disk = look(qmp).find(now.path)
            if disk is None or disk.bitmap(name) is None:
                return Unknown(_why_no_copy(disk, since))
            key = _key(until, now)
            if key not in exports(qmp):
                if own:
                    make_room(os.path.dirname(now.nbd), user_of(now.path), now.claim.volume)
                    start_server(qmp, now.nbd)
                copies = [one.name for one in disk.bitmaps if is_copy_for(one.name, until)]
                export(qmp, key, disk.disk, disk.disk, copies)
        context = f"qemu:dirty-bitmap:{name}"
        client = NbdClient(now.nbd, key, [context])
        try:
            return client.extents(context, DIRTY) | Extents.of((client.size, _END))
        finally:
            client.close()
            with suppress(*_FAILED), self._running.reach(now.monitor) as qmp:
                unexport(qmp, key)  # meanwhile the disk cannot be given another size

    # --- the end --------------------------------------------------------------------------------------

    def release(self, run: str, files: Sequence[Tracked], *, keep_bitmap: bool) -> bool:
        """Take away what was made for ``run``, but for the bitmap that goes on; False: some QEMU could not be asked.

        One that has ended holds nothing any more.
        """
        done = True
        for monitor, members in _by_monitor(files, all_of=True).items():
            try:
                with self._running.reach(monitor) as qmp:
                    for file in members:
                        self._release(qmp, run, file, keep_bitmap)
                    stop_server(qmp, self._running.owns_server(monitor))
            except GONE:
                pass
            except _FAILED:
                done = False
            for file in members:
                self._running.tidy(os.path.dirname(file.nbd))
        return done

    def _release(self, qmp: Commands, run: str, file: Tracked, keep_bitmap: bool) -> None:
        unexport(qmp, _key(run, file))
        graph = look(qmp)
        for node in graph.protocols(file.path):
            names = [one.name for one in graph.bitmaps(node)]
            gone = [name for name in names if is_copy_for(name, run) or (name == bitmap_of(run) and not keep_bitmap)]
            qemu_bitmaps.remove(qmp, node, gone)


_REPLACED = "another file has its path now"


def _by_monitor(files: Sequence[Tracked], *, all_of: bool = False) -> dict[str, list[Tracked]]:
    """The files of each QEMU that are tracked, or that ever were."""
    found: dict[str, list[Tracked]] = {}
    for file in files:
        if file.monitor and (all_of or not file.why):
            found.setdefault(file.monitor, []).append(file)
    return found


def _disks(qmp: Commands, files: Sequence[Tracked]) -> list[LiveDisk]:
    """Raises NoPlace, QmpRefused, OSError, LookupError."""
    graph = look(qmp)
    found = [graph.find(file.path) for file in files]
    if None in found:
        raise LookupError("it has let a disk go")
    return [disk for disk in found if disk is not None]


def _is_same(file: Tracked) -> bool:
    try:
        return identity(file.path, "raw", None)[1] == file.incarnation
    except OSError:
        return False


def _why_no_copy(disk: LiveDisk | None, since: str) -> str:
    if disk is None:
        return "its QEMU has let it go"
    bitmap = disk.bitmap(bitmap_of(since))
    if bitmap is None:
        return "QEMU was started anew since, and a raw disk keeps no bitmap"
    if bitmap.busy:
        return "its bitmap is in use by somebody else"
    return bitmap.why or "its bitmap could not be copied after the instant"


def _key(run: str, file: Tracked) -> str:
    """Name of the export."""
    return key_of(f"{run}:{file.path}")
