"""Several workloads as one: one id, NAMEs that differ, everything else side by side (stage 2)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from graincopy.core.ids import WorkloadId, digest_id
from graincopy.model.tree import definition_of, manifests
from graincopy.model.workload import Tree, Workload, WorkloadFile
from graincopy.workloads.files import LONGEST_NAME


class Member(msgspec.Struct, frozen=True):
    """One of the workloads, and what stands before the NAMEs of its disks ("": nothing)."""

    workload: Workload
    prefix: str = ""


def anonymous_id(ids: Sequence[WorkloadId]) -> WorkloadId:
    """Of a set that nobody named: the same members in any order are the same set."""
    return WorkloadId(digest_id("set", sorted(ids)))


def named_id(name: str) -> WorkloadId:
    """Of a workload that has a name of its own: members may come and go."""
    return WorkloadId(digest_id("name", [name]))


def merge(members: Sequence[Member], id: WorkloadId, name: str, kind: str) -> Workload:
    """All of ``members`` as one workload. A file that several name is taken once, from the first."""
    files: dict[str, WorkloadFile] = {}
    definitions: dict[str, bytes] = {}
    notes: list[str] = []
    names: set[str] = set()
    trees: dict[str, Tree] = {}
    for member in members:
        for file in member.workload.files:
            if file.path in files:
                notes.append(f"{file.path} belongs to several members and is taken once")
                continue
            renamed = _free_name(member.prefix + file.name, file.path, names)
            names.add(renamed)
            files[file.path] = replace(file, name=renamed)
        for tree in member.workload.trees:
            trees.setdefault(tree.path, replace(tree, name=member.prefix + tree.name))
        definitions |= dict(_renamed(definition, member.prefix) for definition in member.workload.definitions.items())
        notes += member.workload.notes
    return Workload(
        id=id,
        name=name,
        kind=kind,
        files=tuple(files.values()),
        definitions=definitions,
        notes=tuple(notes),
        trees=tuple(trees.values()),
        one_instant=any(member.workload.one_instant for member in members),
        paused=all(member.workload.paused for member in members),
    )


def _renamed(definition: tuple[str, bytes], prefix: str) -> tuple[str, bytes]:
    """A manifest under the name that its tree has in the whole; anything else as it is."""
    found = manifests(dict([definition]))
    return definition_of(replace(found[0], name=prefix + found[0].name)) if found else definition


def _free_name(name: str, path: str, taken: set[str]) -> str:
    """``name``, or behind a digest of ``path`` when it is taken or too long for a file name."""
    raw = os.fsencode(name)
    if name not in taken and len(raw) <= LONGEST_NAME:
        return name
    head = digest_id("path", [path])[:16].encode() + b"-"
    return os.fsdecode(head + raw[-(LONGEST_NAME - len(head)) :])
