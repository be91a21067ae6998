"""Stage 5 for directories: which files they hold at the instant, and not when they were surveyed.

A directory inside a volume's file system is listed in T, which cannot be wrong. One whose files are cloned by
themselves, or held by leases, is listed while the workload stands still; what came is prepared then, what went is let
go. A file that was named itself, and is gone, fails the backup; one of a directory is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import msgspec

from graincopy.core.errors import GraincopyError, SnapshotFailed
from graincopy.core.ids import VolumeId
from graincopy.model.lineage import Incremental
from graincopy.model.snapshot import Target
from graincopy.model.tree import definition_of
from graincopy.model.volume import Claim
from graincopy.model.workload import Tree, Workload
from graincopy.volumes.instant import Instant, Revision
from graincopy.volumes.metadata import metadata_of
from graincopy.volumes.mounts import read_mounts
from graincopy.workflow.context import Context
from graincopy.workflow.survey import Histories, Place, Survey, inner_folder, places_of, refuse_scattered, sibling
from graincopy.workloads.tree import Listing, differences, list_live, list_tree


def relist(context: Context, found: Survey) -> tuple[Survey, Revision]:
    """The survey with the directories listed anew whose files are volumes of their own, and what that changes."""
    trees = [tree for tree in found.workload.trees if _sample(found, tree) is None]
    if not trees:
        return found, Revision()
    gone: set[tuple[str, VolumeId]] = set()
    came: dict[str, list[VolumeId]] = {}
    for tree in trees:
        before = _places_in(found, tree)
        listing = list_live(tree, metadata_of, mount_points())
        now = _places_now(context, found, listing, before)
        gone |= _volumes(before) - _volumes(now)
        kept = {(place.claim.driver, place.volume.incarnation, place.volume.id) for place in before}
        for place in now:
            if (place.claim.driver, place.volume.incarnation, place.volume.id) not in kept:
                gone.add((place.claim.driver, place.claim.volume))  # one of this name may have been prepared before
                came.setdefault(place.claim.driver, []).append(place.claim.volume)
        found = _with_listing(found, tree, listing, now)
    refuse_scattered(context, found.workload, [place.claim for place in found.places])
    groups = tuple((context.drivers[name], tuple(volumes)) for name, volumes in came.items())
    return found, Revision(frozenset(gone), groups)


def _places_now(context: Context, found: Survey, listing: Listing, before: Sequence[Place]) -> tuple[Place, ...]:
    """Where the files of ``listing`` lie; those surveyed are asked for nothing but their incarnation."""
    known = {place.file.path: place for place in before}
    elsewhere = {place.file.path for place in found.places if place.file.path not in known}
    fresh = places_of(
        context, [file for file in listing.files if file.path not in known and file.path not in elsewhere]
    )
    for place in fresh:
        if not place.claim.identity:
            reason = "the first files of a directory came while it was backed up; run the same command again"
            raise SnapshotFailed(volume=place.claim.volume, reason=reason)
    now = []
    for file in listing.files:
        if file.path in known:
            claim = known[file.path].claim
            with suppress(SnapshotFailed):  # it is gone after all
                now.append(Place(file, claim, context.driver(claim).describe(claim.volume)))
    return (*now, *fresh)


@contextmanager
def as_targets_show(context: Context, found: Survey, instant: Instant) -> Iterator[Survey]:
    """The survey with the directories listed as their targets show them; these stay attached inside.

    So do the checkpoints that they are compared with, and all targets that hold several files: attaching one for each
    of a thousand files would take minutes.
    """
    with ExitStack() as attached:
        for tree in found.workload.trees:
            sample = _sample(found, tree)
            if sample is None:
                continue
            driver = context.driver(sample.claim)
            target = instant.targets[sample.claim.driver, sample.claim.volume]
            fd = attached.enter_context(driver.open_folder(target, _folder(sample, tree)))
            listing = list_tree(tree, fd, metadata_of)
            lineage = found.base_of(context, sample, target.incarnation)
            if isinstance(lineage, Incremental):
                attached.enter_context(keep_attached(context, sample.claim, lineage.checkpoint))
            found = _with_listing(found, tree, listing, _inside(found, sample, listing))
        for place in _first_of_several(found):
            target = instant.targets[place.claim.driver, place.claim.volume]
            attached.enter_context(keep_attached(context, place.claim, target))
            lineage = found.base_of(context, place, target.incarnation)
            if isinstance(lineage, Incremental):
                attached.enter_context(keep_attached(context, place.claim, lineage.checkpoint))
        yield found


def _first_of_several(found: Survey) -> tuple[Place, ...]:
    """The first file of each volume whose file system holds several files of the workload that were named."""
    named: dict[tuple[str, VolumeId], list[Place]] = {}
    for place in found.places:
        if place.claim.inner_path is not None and not place.file.tree:
            named.setdefault((place.claim.driver, place.claim.volume), []).append(place)
    return tuple(places[0] for places in named.values() if len(places) > 1)


@contextmanager
def keep_attached(context: Context, claim: Claim, target: Target) -> Iterator[None]:
    """``target`` stays attached inside, if it can be: whoever reads it will say what is wrong with it."""
    root = msgspec.structs.replace(claim, inner_path="/", size=None)
    with ExitStack() as attached:
        with suppress(GraincopyError):
            attached.enter_context(context.driver(claim).open_folder(target, root))
        yield


def _inside(found: Survey, sample: Place, listing: Listing) -> tuple[Place, ...]:
    named = {place.file.path for place in found.places if place.file.tree != sample.file.tree}
    return tuple(
        Place(
            msgspec.structs.replace(file, tree_disk=sample.file.tree_disk), sibling(sample.claim, file), sample.volume
        )
        for file in listing.files
        if file.path not in named
    )


def mount_points() -> frozenset[str]:
    """Where something is mounted on this host."""
    return frozenset(mount.point for mount in read_mounts())


def _places_in(found: Survey, tree: Tree) -> tuple[Place, ...]:
    return tuple(place for place in found.places if place.file.tree == tree.path)


def _sample(found: Survey, tree: Tree) -> Place | None:
    """A file of ``tree`` that lies inside a volume; None where the files are volumes, or there are none."""
    return next((place for place in _places_in(found, tree) if not place.claim.identity), None)


def _folder(sample: Place, tree: Tree) -> Claim:
    return msgspec.structs.replace(
        sample.claim, path=tree.path, inner_path=inner_folder(sample.claim, tree.path), size=None
    )


def _volumes(places: Sequence[Place]) -> set[tuple[str, VolumeId]]:
    return {(place.claim.driver, place.claim.volume) for place in places}


def _with_listing(found: Survey, tree: Tree, listing: Listing, now: Sequence[Place]) -> Survey:
    """``found`` with what is in ``tree`` replaced by ``now``."""
    before = _places_in(found, tree)
    others = tuple(place for place in found.places if place.file.tree != tree.path)
    places = (*others, *now)
    notes = (*listing.notes, *differences([place.file for place in before], [place.file for place in now]))
    workload = msgspec.structs.replace(
        found.workload,
        files=tuple(place.file for place in places),
        definitions=dict([*found.workload.definitions.items(), definition_of(listing.manifest)]),
        notes=tuple(dict.fromkeys((*found.workload.notes, *notes))),
    )
    return msgspec.structs.replace(found, workload=workload, places=places, histories=_pinned(found, before, now))


def _pinned(found: Survey, before: Sequence[Place], now: Sequence[Place]) -> Histories:
    """Without the past of files that came: the points of that past were not pinned when the run was opened."""
    came = {place.file.disk for place in now} - {place.file.disk for place in before}
    return {disk: history for disk, history in found.histories.items() if disk not in came}


def with_learnt(asked: Workload, found: Workload) -> Workload:
    """``found`` with the definitions and notes that the source added to ``asked`` while it quiesced it."""
    return msgspec.structs.replace(
        found,
        definitions={**asked.definitions, **found.definitions},
        notes=tuple(dict.fromkeys((*asked.notes, *found.notes))),
    )
