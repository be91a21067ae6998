"""One repository on one medium: the door to everything that is stored (stage 8) and read back (stage R).

config               what must be known before anything can be read; also sealed inside the keyring
keys/, keyring/      passphrases, and the keys behind them
data/, node/         packs of chunks, packs of grain-map nodes
index/               which pack holds a piece
points/              restore points; also the tombstones of fenced runs
runs/, beats/        who is at work                          see runs.py
restores/            in-place restores and their undo        see restores.py
history/             trials of restore points                see history.py
condemned/           packs that a collect is about to sweep  see collect.py
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from graincopy.core.clock import Chance, Clock
from graincopy.core.errors import (
    DiskUnknown,
    KeyUnknown,
    LastKey,
    ObjectDamaged,
    ObjectMissing,
    PassphraseMissing,
    PointPinned,
    PointUnknown,
    RepositoryExists,
)
from graincopy.core.ids import PieceId, PointId, RepositoryId, WorkloadId, new_id
from graincopy.core.units import KIB, MIB, is_power_of_two
from graincopy.media.base import Buffer, Medium
from graincopy.model.restore_point import DiskRecord, RestorePoint, RunRecord
from graincopy.model.snapshot import Owner
from graincopy.repository import format, frame, index, keys, opening, unlock
from graincopy.repository.codec import Codec, master_sealer
from graincopy.repository.fetch import Order
from graincopy.repository.format import Ids
from graincopy.repository.grainmap import CHUNK, Entries, GrainMap, distinct_ids
from graincopy.repository.history import History
from graincopy.repository.index import Index, SegmentCache
from graincopy.repository.objects import Objects
from graincopy.repository.pack import TARGET_SIZE, PackReader, list_packs
from graincopy.repository.points import Points, point_name
from graincopy.repository.records import Condemned, Config, KeyInfo, Keyring, ObjectKind, PieceKind, Suspect, Tombstone
from graincopy.repository.restores import Restores
from graincopy.repository.runs import Alive, Runs
from graincopy.repository.store import Session

GRAIN_SIZE = 64 * KIB
FAN_OUT = 64
_FAN_OUTS = (8, 16, 32, 64, 128, 256)
NOBODY = Owner(host="", boot="", pid=0, started=0)  # whoever only reads; nobody can tell whether it lives
_READ_BATCH = 8 * MIB  # bytes of content that read_chunks holds at a time


class Fetched(NamedTuple):
    """Contents in the order asked for, and the bytes that were read from packs to get them."""

    pieces: list[bytes]
    fetched_bytes: int


class Repository:
    """An open repository. Safe to use from several threads."""

    def __init__(
        self,
        medium: Medium,
        master: bytes,
        keyring: Keyring,
        *,
        clock: Clock,
        chance: Chance,
        owner: Owner,
        cache_dir: str | None,
    ) -> None:
        """Not to be called: :meth:`create` and :meth:`open` are."""
        self.medium, self.clock, self.chance = medium, clock, chance
        self.url = medium.url
        self.config = keyring.config
        self.id: RepositoryId = keyring.config.repository
        self.grain_size = keyring.config.grain_size
        self.fan_out = keyring.config.fan_out
        self.codec = Codec(keyring)
        self.objects = Objects(medium, self.codec, chance)
        self._points = Points(self.objects)
        self.map = GrainMap(self.fan_out, self._read_nodes)
        self.reader = PackReader(self.codec, medium)
        self._master = master
        self.cache = SegmentCache(None if cache_dir is None else os.path.join(cache_dir, self.id, "index"))
        self._index: Index | None = None
        self._lock = threading.Lock()
        # What others do with runs and restore records; documented where it is defined.
        runs = Runs(self.objects, self._points, clock, owner)
        self.open_run, self.open_runs, self.close_run = runs.open_run, runs.open_runs, runs.close_run
        self.publish, self.fence, self.is_fenced, self.sequence = (
            runs.publish,
            runs.fence,
            runs.is_fenced,
            runs.sequence,
        )
        self.beat, self.heartbeat, self.forget_ended_runs = runs.beat, runs.heartbeat, runs.forget_ended
        records = Restores(self.objects, self._points, clock)
        self.restores, self.put_restore, self.mark_restore = records.states, records.open, records.advance
        self.find_restore, self.forget_restore = records.find, records.forget
        self.undo_roots, self._restore_pins = records.undo_roots, records.pins
        self.history = History(self.objects)

    # --- making and opening -----------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        medium: Medium,
        *,
        passphrase: bytes | None,
        grain_size: int = GRAIN_SIZE,
        fan_out: int = FAN_OUT,
        clock: Clock,
        chance: Chance,
        label: str = "first",
        owner: Owner = NOBODY,
        cache_dir: str | None = None,
    ) -> Repository:
        """A new repository in an empty place. ``passphrase`` None: not encrypted, readable by everybody.

        ``grain_size`` is in bytes, a power of two in 4 KiB … 4 MiB. Raises RepositoryExists or ValueError.
        """
        if not is_power_of_two(grain_size) or not 4 * KIB <= grain_size <= 4 * MIB:
            raise ValueError("a grain is a power of two from 4 KiB to 4 MiB")
        if fan_out not in _FAN_OUTS:
            raise ValueError(f"the fan-out is one of {_FAN_OUTS}")
        if passphrase == b"":
            raise PassphraseMissing(url=medium.url)
        if next(medium.list(""), None) is not None:
            raise RepositoryExists(url=medium.url)
        config = Config(
            repository=RepositoryId(new_id(chance)), grain_size=grain_size, fan_out=fan_out, created=clock.now()
        )
        master, keyring = chance.token(keys.KEY_SIZE), keys.make_keyring(config, chance)
        name = opening.keyring_name(1)
        sealed = master_sealer(master).seal(
            ObjectKind.KEYRING, name, frame.encode_record(keyring), chance.token(format.SALT_SIZE)
        )
        opening.put_new(medium, name, sealed)  # of two creators one loses here, before it has left anything
        key = keys.wrap_master(master, passphrase, label, clock, chance)
        opening.put_new(medium, unlock.key_name(key.id), keys.encode_key(key))
        opening.put_new(medium, opening.CONFIG, frame.encode_frame(frame.CONFIG_MAGIC, frame.encode_record(config)))
        return cls(medium, master, keyring, clock=clock, chance=chance, owner=owner, cache_dir=cache_dir)

    @classmethod
    def open(
        cls,
        medium: Medium,
        *,
        passphrase: bytes | None,
        clock: Clock,
        chance: Chance,
        owner: Owner = NOBODY,
        cache_dir: str | None = None,
        master_of: Callable[[Medium], bytes] | None = None,
    ) -> Repository:
        """``master_of`` gives the master key where it is being derived already; then ``passphrase`` is not needed.

        Raises RepositoryMissing, RepositoryTooNew, PassphraseMissing, PassphraseWrong or ObjectDamaged.
        """
        config = opening.read_config(medium)
        master = master_of(medium) if master_of else unlock.find_master(medium, passphrase)
        keyring = opening.read_keyring(medium, master)
        if keyring.config != config:
            raise ObjectDamaged(name=opening.CONFIG, reason="it is not the configuration that the keyring holds")
        return cls(medium, master, keyring, clock=clock, chance=chance, owner=owner, cache_dir=cache_dir)

    # --- keys -------------------------------------------------------------------------------------

    def keys(self) -> tuple[KeyInfo, ...]:
        """All keys, oldest first. Raises ObjectDamaged."""
        return keys.describe(unlock.read_key(self.medium, name) for name in self.objects.names("keys"))

    def add_key(self, passphrase: bytes, label: str) -> KeyInfo:
        """Another passphrase that opens this repository."""
        if not passphrase:
            raise PassphraseMissing(url=self.url)
        key = keys.wrap_master(self._master, passphrase, label, self.clock, self.chance)
        opening.put_new(self.medium, unlock.key_name(key.id), keys.encode_key(key))
        return keys.describe([key])[0]

    def remove_key(self, id: str) -> None:
        """Forget the passphrase of key ``id``. Raises KeyUnknown or LastKey.

        Whoever had the passphrase *and* a copy of the key object can still get at the master key.
        """
        names = self.objects.names("keys")
        if unlock.key_name(id) not in names:
            raise KeyUnknown(key=id)
        if len(names) == 1:
            raise LastKey(key=id)
        kept = self.medium.get(unlock.key_name(id))
        self.medium.delete(unlock.key_name(id))
        if not self.objects.names("keys"):  # somebody removed the other one at the same time
            self.medium.put(unlock.key_name(id), [kept])
            raise LastKey(key=id)

    def read_keyring(self, name: str) -> Keyring:
        """One keyring, the current one or an older one. Raises ObjectMissing or ObjectDamaged."""
        return opening.unseal_keyring(self.medium, self._master, name)

    # --- restore points ---------------------------------------------------------------------------

    def points(self) -> tuple[RestorePoint, ...]:
        """Readable restore points, newest first; :meth:`unreadable_points` has the rest."""
        return self._points.listing().points

    def unreadable_points(self, fresh: bool = False) -> tuple[tuple[PointId, ObjectDamaged], ...]:
        """Restore points that are there and damaged, and how; ``fresh``: those read before are read again."""
        return tuple((broken.id, broken.error) for broken in self._points.listing(fresh).unreadable)

    def point(self, id: PointId) -> RestorePoint:
        """The restore point ``id``. Raises PointUnknown or ObjectDamaged."""
        return self._points.point(id)

    def find_disks(self, point: RestorePoint, name: str | None) -> tuple[DiskRecord, ...]:
        """The disk ``name`` of ``point``, or all of them. Raises DiskUnknown."""
        found = tuple(disk for disk in point.disks if name in (None, disk.name))
        if not found:
            raise DiskUnknown(point=point.id, disk=name, disks=", ".join(disk.name for disk in point.disks))
        return found

    def find_point(self, text: str, workload: WorkloadId | None = None) -> RestorePoint:
        """POINT of the command line. Raises PointUnknown, PointAmbiguous or ObjectDamaged."""
        return self._points.find(text, workload)

    def pins(self, alive: Alive | None = None) -> dict[PointId, str]:
        """Restore points that must stay, and who holds them. Runs whose owner is provably dead hold nothing."""
        held = self._restore_pins()
        for run in self.open_runs():
            if alive is None or alive(run.owner) is not False:
                held.update((pin, f"{run.kind} run {run.id} ({run.owner})") for pin in run.pins)
        return held

    def delete_point(self, id: PointId, alive: Alive | None = None) -> None:
        """Remove a restore point; its space comes back with collect. Raises PointUnknown or PointPinned.

        A run pins first and reads the point then; so the pins are looked at once more when the point is gone, and
        if one has come the point comes back. All of it is a run, for which collect waits.
        """
        name = point_name(id)
        try:
            sealed = self.medium.get(name)
        except ObjectMissing:
            raise PointUnknown(point=id) from None
        if _is_tombstone(sealed):
            raise PointUnknown(point=id)
        run = self.open_run("expire", None)
        try:
            self._refuse_pinned(id, alive)
            self._points.remove(id)
            try:
                self._refuse_pinned(id, alive)
            except PointPinned:
                if not self._points.fenced(run.id):
                    self.medium.put(name, [sealed])
                raise
            self.history.forget(id)
        finally:
            self.close_run(run)

    def _refuse_pinned(self, id: PointId, alive: Alive | None) -> None:
        holder = self.pins(alive).get(id)
        if holder is not None:
            raise PointPinned(point=id, holder=holder)

    def tombstones(self) -> tuple[Tombstone, ...]:
        """Of all fenced runs."""
        return self._points.listing().tombstones

    def remove_tombstone(self, run: PointId) -> None:
        """Only for a run whose owner is provably dead: it could publish otherwise."""
        self._points.remove(run)

    # --- storing ----------------------------------------------------------------------------------

    def session(self, run: RunRecord, target_size: int = TARGET_SIZE) -> Session:
        """For what ``run``, which is open, stores. Condemned packs first, then the index: see runs.py for why.

        Packs that are missing, of the wrong size or suspect are not reused either: what was in them is stored anew.
        """
        condemned = {name for record in self.condemned() for name in record.packs}
        known = self.load_index(fresh=True)
        # After the index: what it lists was there before it was listed, so that what is not there now is lost.
        there = set(list_packs(self.medium))
        lost = {pack.name for pack in known.packs if pack not in there} | {one.pack for one in self.suspects()}
        return Session(self, run, known.excluding(condemned | lost), target_size, lost=bool(lost))

    def suspect(self, pack: str) -> None:
        """Reuse nothing of the pack with this object name any more. May be repeated."""
        name = f"suspects/{pack.partition('/')[0]}-{pack.rpartition('/')[2]}"
        self.objects.put(ObjectKind.SUSPECT, name, Suspect(pack=pack))

    def suspects(self) -> tuple[Suspect, ...]:
        """Packs that were found damaged and are still there. Raises ObjectDamaged."""
        found = self.objects.all(ObjectKind.SUSPECT, "suspects", Suspect)
        return tuple(record for _, record in found if self.medium.size(record.pack) is not None)

    def condemned(self) -> tuple[Condemned, ...]:
        """Packs that collects are about to sweep. Raises ObjectDamaged."""
        return tuple(record for _, record in self.objects.all(ObjectKind.CONDEMNED, "condemned", Condemned))

    def chunk_id(self, content: Buffer) -> PieceId:
        """Id of one grain's content."""
        return self.codec.piece_id(PieceKind.CHUNK, content)

    # --- reading ----------------------------------------------------------------------------------

    def load_index(self, fresh: bool = False, rebuild: bool = False) -> Index:
        """Where every piece lies. ``fresh``: read the medium again; ``rebuild``: packs that no segment lists too."""
        with self._lock:
            if self._index is not None and not fresh and not rebuild:
                return self._index
        loaded = index.load(self.medium, self.codec, self.cache, self._points.fenced)
        found = loaded.index
        if loaded.damaged or rebuild:
            found = self.with_unlisted_packs(found)
        with self._lock:
            self._index = found
        return found

    def with_unlisted_packs(self, known: Index) -> Index:
        """``known`` and what lies in packs that it does not have, as far as their directories can be read."""
        listed = {pack.id for pack in known.packs}
        rows = [known.rows()]
        for pack in list_packs(self.medium):
            if pack.id not in listed:
                try:
                    rows.append(index.rows_of(self.reader.directory(pack)))
                except (ObjectDamaged, ObjectMissing):
                    continue  # nothing can be found in it; check reports it
        return Index.of(rows) if len(rows) > 1 else known

    def fetch(self, ids: Ids, extra: Index | None = None) -> Fetched:
        """Contents of pieces, in the order of ``ids``. ``extra`` is looked into first.

        Where a pack fails, another one that holds the piece will do. A pack that is missing may have been moved
        by a collect: the index is read again, and then rebuilt from the packs. Raises ObjectMissing or
        ObjectDamaged.
        """
        order = Order(ids)
        if extra is not None:
            order.fill(extra, self.reader)
        for again in ({}, {"fresh": True}, {"rebuild": True}):
            if order.open:
                order.fill(self.load_index(**again), self.reader)
        return Fetched(order.contents(), order.fetched_bytes)

    def _read_nodes(self, ids: Ids) -> list[bytes]:
        return self.fetch(ids).pieces

    def read_chunks(self, entries: Entries) -> Iterator[tuple[int, bytes]]:
        """Grain number and content for every entry that is a chunk (a ZERO entry has none), in their order."""
        chunks = entries.pick(entries.kinds == CHUNK)
        batch = max(1, _READ_BATCH // self.grain_size)
        for start in range(0, len(chunks), batch):
            part = chunks.pick(slice(start, start + batch))
            ids = distinct_ids(part.ids)
            by_id = {piece.tobytes(): content for piece, content in zip(ids, self.fetch(ids).pieces, strict=True)}
            for grain, piece in zip(part.grains.tolist(), part.ids, strict=True):
                yield grain, by_id[piece.tobytes()]

    def total_bytes(self) -> int:
        """Size of everything that is stored."""
        return sum(entry.size for entry in self.medium.list(""))


def _is_tombstone(sealed: bytes) -> bool:
    """A damaged object is no tombstone: it may be removed as the restore point that it was."""
    try:
        return format.decode_envelope_header(sealed).kind is ObjectKind.TOMBSTONE
    except frame.Malformed:
        return False
