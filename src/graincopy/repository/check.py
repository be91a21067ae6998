"""Check: is everything that restore points need there (structure), and is every byte as it was written (data)?

    objects    configuration, keys, keyring, index segments, restore points, runs, restore records
    packs      there and of the right size; with data, every piece, directory, header and trailer
    points     every node and chunk that a restore point reaches is in a pack that is whole

Nothing is taken from a cache, nothing is changed. Others go on meanwhile: when something is found *and* points
or index changed during the check, it is repeated, as a collect may have moved what seemed to be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import msgspec
import numpy as np

from graincopy.core.errors import GraincopyError, ObjectDamaged, ObjectMissing
from graincopy.core.extent import Mask
from graincopy.core.ids import PointId
from graincopy.model.restore_point import MapRoot, RestorePoint, RestoreRecord, RunRecord, Trial
from graincopy.repository import opening, segments, unlock
from graincopy.repository.format import Ids
from graincopy.repository.format_segment import Rows
from graincopy.repository.index import Index, rows_of
from graincopy.repository.pack import is_pack_name, list_packs
from graincopy.repository.points import point_name
from graincopy.repository.records import Beat, Condemned, ObjectKind, PackRef, PieceKind, Suspect
from graincopy.repository.repository import Repository

_ROUNDS = 3
_PACKS = tuple(kind.folder for kind in PieceKind)
_FOLDERS = (
    *("config", "keys", "keyring", "data", "node", "index", "points"),
    *("runs", "beats", "restores", "history", "condemned", "suspects"),
)

Progress = Callable[[int], None]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as it should be, and the restore points that cannot be restored whole because of it."""

    name: str  # of the object; or, where there is none, what is missing
    what: str
    points: tuple[PointId, ...] = ()


def check(repository: Repository, data: bool = False, progress: Progress = lambda size: None) -> tuple[Finding, ...]:
    """All findings, by name; none when everything is whole. ``progress`` is told bytes of packs as they are read."""
    for _ in range(_ROUNDS):
        before = _fingerprint(repository)
        findings = _Check(repository, data, progress).run()
        if not findings or _fingerprint(repository) == before:
            break
    return findings


def _fingerprint(repository: Repository) -> frozenset[str]:
    folders = ("index", "points", "condemned")
    return frozenset(name for folder in folders for name in repository.objects.names(folder))


class _Check:
    """One round."""

    def __init__(self, repository: Repository, data: bool, progress: Progress) -> None:
        self._repository, self._data, self._progress = repository, data, progress
        self._found: dict[str, str] = {}
        self._affected: dict[str, set[PointId]] = {}
        self._bad_packs: dict[str, str] = {}  # name → what is wrong with all of it
        self._bad_pieces: dict[bytes, str] = {}  # id → name of the pack in which it is damaged

    def run(self) -> tuple[Finding, ...]:
        self._opening()
        self._records()
        points = self._repository.points()  # before the index: what they refer to was listed before they were there
        rows = self._segments()
        rows += self._packs({pack.id for part in rows for pack in part.packs})
        index = Index.of(rows)
        self._listed(index)
        self._points(index, points)
        return tuple(
            Finding(name=name, what=what, points=tuple(sorted(self._affected.get(name, ()))))
            for name, what in sorted(self._found.items())
        )

    def _note(self, name: str, what: object, points: Iterable[PointId] = ()) -> None:
        self._found.setdefault(name, str(what))
        self._affected.setdefault(name, set()).update(points)

    def _try(self, name: str, read: Callable[[], object], points: Iterable[PointId] = ()) -> None:
        """Note what ``read`` raises; an object that went meanwhile is none of our business."""
        try:
            read()
        except ObjectDamaged as error:
            self._note(str(error.facts.get("name", name)), error.facts.get("reason", error), points)
        except ObjectMissing:
            if self._repository.medium.size(name) is not None:
                raise
        except GraincopyError as error:
            self._note(name, error, points)

    # --- objects ----------------------------------------------------------------------------------

    def _opening(self) -> None:
        repository, medium = self._repository, self._repository.medium
        for entry in medium.list(""):
            folder = entry.name.partition("/")[0]
            if folder not in _FOLDERS or (folder in _PACKS and not is_pack_name(entry.name)):
                self._note(entry.name, "no object of this format has such a name")
        if medium.size(opening.CONFIG) is None:
            self._note(opening.CONFIG, "it is missing")
        self._try(opening.CONFIG, self._config)
        for name in repository.objects.names("keys"):
            self._try(name, lambda name=name: unlock.read_key(medium, name))  # type: ignore[misc]
        names = repository.objects.names("keyring")
        if not names:
            self._note("keyring", "it is missing")
        for name in names:
            self._try(name, lambda name=name: repository.read_keyring(name))  # type: ignore[misc]

    def _config(self) -> None:
        if opening.read_config(self._repository.medium) != self._repository.config:
            raise ObjectDamaged(name=opening.CONFIG, reason="it is not the configuration that the keyring holds")

    def _records(self) -> None:
        objects = self._repository.objects
        kinds: tuple[tuple[str, ObjectKind, type[msgspec.Struct]], ...] = (
            ("runs", ObjectKind.RUN, RunRecord),
            ("beats", ObjectKind.BEAT, Beat),
            ("condemned", ObjectKind.CONDEMNED, Condemned),
            ("suspects", ObjectKind.SUSPECT, Suspect),
            ("history", ObjectKind.TRIAL, Trial),
        )
        for folder, kind, record in kinds:
            for name in objects.names(folder):
                self._try(name, lambda name=name, kind=kind, record=record: objects.get(kind, name, record))  # type: ignore[misc]
        for name in objects.names("restores"):
            wanted: type[msgspec.Struct] = RestoreRecord if name.endswith("/opened") else Beat
            self._try(name, lambda name=name, wanted=wanted: objects.get(ObjectKind.RESTORE, name, wanted))  # type: ignore[misc]
        for id, error in self._repository.unreadable_points(fresh=True):
            self._note(f"points/{id}", error.facts.get("reason", error), [id])

    def _segments(self) -> list[Rows]:
        """Index segments, read from the medium itself."""
        repository = self._repository
        rows: list[Rows] = []
        for name in segments.list_segments(repository.medium):
            if repository.is_fenced(PointId(segments.segment_owner(name))):
                continue  # nobody reads it any more
            self._try(
                name,
                lambda name=name: rows.append(  # type: ignore[misc]
                    segments.read_segment(repository.medium, repository.codec, name)
                ),
            )
        return rows

    # --- packs ------------------------------------------------------------------------------------

    def _packs(self, listed: Collection[str]) -> list[Rows]:
        """Prove packs, or look at the directories of those that are not ``listed``; what is in the latter."""
        unlisted: list[Rows] = []
        for pack in list_packs(self._repository.medium):
            if self._data or pack.id not in listed:
                self._pack(pack, pack.id in listed, unlisted)
            self._progress(pack.size)
        return unlisted

    def _pack(self, pack: PackRef, listed: bool, unlisted: list[Rows]) -> None:
        try:
            if self._data:
                proof = self._repository.reader.prove(pack)
                directory = proof.directory
                for piece, error in proof.bad.items():
                    self._bad_pieces[piece] = pack.name
                    self._note(pack.name, error.facts["reason"])
            else:
                directory = self._repository.reader.directory(pack)
        except ObjectMissing:
            return  # swept meanwhile, or missing: its index rows will tell
        except GraincopyError as error:  # damaged, or the medium cannot read it
            self._bad_packs[pack.name] = str(error.facts.get("reason", error))
            self._note(pack.name, self._bad_packs[pack.name])
            return
        if not listed:
            unlisted.append(rows_of(directory))

    def _listed(self, index: Index) -> None:
        """Packs of the index that are not there, or of another size."""
        there = {pack.id: pack for pack in list_packs(self._repository.medium)}  # after the index was read
        condemned = self._condemned()
        for pack in index.packs:
            found = there.get(pack.id)
            if found == pack or pack.name in condemned:
                continue
            what = "it is missing" if found is None else f"it has {found.size} bytes instead of {pack.size}"
            self._note(pack.name, what)
            self._bad_packs[pack.name] = what

    def _condemned(self) -> set[str]:
        """Packs that a collect is sweeping; damaged records were noted before."""
        try:
            return {name for record in self._repository.condemned() for name in record.packs}
        except ObjectDamaged:
            return set()

    # --- restore points ---------------------------------------------------------------------------

    def _points(self, index: Index, points: Iterable[RestorePoint]) -> None:
        points = tuple(points)
        undo = _Reach(self, index, self._repository)
        undo.follow(self._repository.undo_roots())
        for name, what in undo.wrong.items():
            self._note(name, f"{what}; an undo needs it")
        whole = _Reach(self, index, self._repository)
        if whole.follow([disk.root for point in points for disk in point.disks]):
            return
        for point in points:  # something is wrong somewhere: ask each point by itself
            self._point(index, point)

    def _point(self, index: Index, point: RestorePoint) -> None:
        reach = _Reach(self, index, self._repository)
        reach.follow([disk.root for disk in point.disks])
        if self._repository.medium.size(point_name(point.id)) is None:
            return  # removed meanwhile, and what only it needed is collected
        for name, what in reach.wrong.items():
            self._note(name, what, [point.id])


class _Reach:
    """What some maps reach, and what of it is not whole."""

    def __init__(self, check: _Check, index: Index, repository: Repository) -> None:
        self._check, self._index, self._repository = check, index, repository
        self._avoid = frozenset(check._bad_packs) | frozenset(check._bad_pieces.values())
        self._seen = np.zeros(len(index), np.bool_)
        self.wrong: dict[str, str] = {}

    def follow(self, roots: Iterable[MapRoot]) -> bool:
        """True when all of it is whole."""
        try:
            self._repository.map.reachable(roots, self.mark)
        except (ObjectDamaged, ObjectMissing) as error:
            name = str(error.facts["name"])
            self.wrong[name] = str(error.facts.get("reason", "it is missing"))
        return not self.wrong

    def mark(self, ids: Ids) -> Mask:
        """For GrainMap.reachable: bad pieces are noted, and nothing below them is looked at."""
        found = self._index.locate(ids, self._avoid)
        rows = found.row
        for at in np.flatnonzero(rows < 0).tolist():
            rows[at] = self._doubtful(ids[at : at + 1])
        good = rows >= 0
        fresh: Mask = good.copy()
        fresh[good] = ~self._seen[rows[good]]
        self._seen[rows[good]] = True
        return fresh

    def _doubtful(self, piece: Ids) -> int:
        """Row of a piece that no good pack holds, if it is whole all the same; else -1, and it is noted."""
        found = self._index.locate(piece)
        if found.row[0] < 0:
            self.wrong[f"piece {piece.tobytes().hex()}"] = "it is in no pack"
            return -1
        pack = found.pack_ref(int(found.pack[0]))
        if pack.name in self._check._bad_packs:
            self.wrong[pack.name] = self._check._bad_packs[pack.name]
            return -1
        if piece.tobytes() in self._check._bad_pieces:
            self.wrong[pack.name] = "a piece in it is damaged"
            return -1
        return int(found.row[0])
