"""Names that say whose a thing on the array is (stages 4 and 9): they carry the run, so that any host finds orphans.

T is ``gc_<run>_<8 digits of S>``, a consistency group ``gc_<run>_g<8 digits of its sources>``: at most 48 of the 63
characters that a name may have. Volume ids are ``flashcopy:<array>/<uid of S>``, target ids ``<array>/<name>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from graincopy.core.ids import VolumeId, digest_id

PREFIX = "flashcopy:"
LONGEST = 63
_RUN = re.compile(r"[0-9a-f]{32}")
_TARGET = re.compile(r"gc_([0-9a-f]{24}|[0-9a-f]{32})_([0-9a-f]{8})")
_GROUP = re.compile(r"gc_([0-9a-f]{24}|[0-9a-f]{32})_g([0-9a-f]{8})")


def target_name(run: str, uid: str) -> str:
    """The vdisk that ``run`` makes of the S with ``uid``: always the same, so that a rerun finds it."""
    return f"gc_{_plain(run)}_{digest_id('flashcopy', [uid])[:8]}"


def group_name(run: str, uids: Iterable[str]) -> str:
    """The consistency group of ``run`` for these sources."""
    return f"gc_{_plain(run)}_g{digest_id('flashcopy', sorted(uids))[:8]}"


def _plain(run: str) -> str:
    return run if _RUN.fullmatch(run) else digest_id("run", [run])


def run_of(name: str) -> str | None:
    """The run that made the vdisk or group ``name``; None when it is not one of ours."""
    found = _TARGET.fullmatch(name) or _GROUP.fullmatch(name)
    return found[1] if found else None


def is_target(name: str) -> bool:
    """Whether a vdisk is called as a target of ours is."""
    return _TARGET.fullmatch(name) is not None


def is_group(name: str) -> bool:
    """Whether a consistency group is called as one of ours is."""
    return _GROUP.fullmatch(name) is not None


def volume_id(array: str, uid: str) -> VolumeId:
    """The id of S."""
    return VolumeId(f"{PREFIX}{array}/{uid}")


def split_volume(volume: VolumeId) -> tuple[str, str]:
    """Array and uid of S."""
    array, _, uid = volume.removeprefix(PREFIX).partition("/")
    return array, uid


def split_target(target: str) -> tuple[str, str]:
    """Array and name of T, from its id."""
    array, _, name = target.partition("/")
    return array, name
