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
from collections.abc import Callable

from graincopy.core.clock import Chance, Clock
from graincopy.core.errors import DiskUnknown, ObjectDamaged, PassphraseMissing, RepositoryExists
from graincopy.core.ids import PieceId, PointId, RepositoryId, WorkloadId, new_id
from graincopy.core.units import KIB, MIB, is_power_of_two
from graincopy.media.base import Buffer, Medium
from graincopy.model.restore_point import DiskRecord, RestorePoint, RunRecord
from graincopy.model.snapshot import Owner
from graincopy.repository import format, frame, keys, opening, unlock
from graincopy.repository.codec import Codec, master_sealer
from graincopy.repository.grainmap import GrainMap
from graincopy.repository.history import History
from graincopy.repository.index_cache import IndexCache
from graincopy.repository.objects import Objects
from graincopy.repository.pack import TARGET_SIZE, list_packs
from graincopy.repository.passphrases import Passphrases
from graincopy.repository.pieces import Pieces
from graincopy.repository.points import Points
from graincopy.repository.records import Condemned, Config, Keyring, ObjectKind, PieceKind, Suspect, Tombstone
from graincopy.repository.removal import Removal
from graincopy.repository.restores import Restores
from graincopy.repository.runs import Runs
from graincopy.repository.store import Session

GRAIN_SIZE = 64 * KIB
FAN_OUT = 64
_FAN_OUTS = (8, 16, 32, 64, 128, 256)
NOBODY = Owner(host="", boot="", pid=0, started=0)  # whoever only reads; nobody can tell whether it lives


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
        cache = IndexCache(None if cache_dir is None else os.path.join(cache_dir, self.id, "index"))
        # What others do; documented where it is defined.
        pieces = Pieces(medium, self.codec, cache, self._points.fenced, self.grain_size)
        self.reader, self.load_index = pieces.reader, pieces.load_index
        self.fetch, self.read_chunks = pieces.fetch, pieces.read_chunks
        self.map = GrainMap(self.fan_out, pieces.read_nodes)
        passphrases = Passphrases(medium, master, clock, chance)
        self.keys, self.add_key, self.remove_key = passphrases.keys, passphrases.add, passphrases.remove
        self.read_keyring = passphrases.read_keyring
        runs = Runs(self.objects, self._points, clock, owner)
        self.open_run, self.open_runs, self.close_run = runs.open_run, runs.open_runs, runs.close_run
        self.publish, self.sequence = runs.publish, runs.sequence
        self.fence, self.is_fenced = runs.fence, runs.is_fenced
        self.beat, self.heartbeat, self.forget_ended_runs = runs.beat, runs.heartbeat, runs.forget_ended
        records = Restores(self.objects, self._points, clock)
        self.restores, self.put_restore, self.mark_restore = records.states, records.open, records.advance
        self.find_restore, self.forget_restore = records.find, records.forget
        self.undo_roots = records.undo_roots
        self.history = History(self.objects)
        removal = Removal(self.objects, self._points, runs, records, self.history)
        self.pins, self.delete_point = removal.pins, removal.delete_point

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

        ``grain_size`` is in bytes, a power of two in 4 KiB … 4 MiB. Raises RepositoryExists, PassphraseMissing (it is
        empty), or ValueError.
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

    def total_bytes(self) -> int:
        """Size of everything that is stored."""
        return sum(entry.size for entry in self.medium.list(""))
