"""Operations that look at this host: volumes, targets, conformance, tools, configuration."""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import msgspec

from graincopy.app import host
from graincopy.app.answer import Answer, table
from graincopy.app.config import explain
from graincopy.app.shown import when
from graincopy.app.wiring import BEYOND_PATHS, Wiring
from graincopy.core.errors import DONE, WARNED, ConformanceFailed, GraincopyError, printable
from graincopy.core.units import format_size
from graincopy.model.reap import Decision, Delete, Keep
from graincopy.model.volume import Claim
from graincopy.repository.repository import Repository
from graincopy.workflow.context import resolve
from graincopy.workflow.reap import reap, survey_targets

Values = dict[str, Any]


def volumes(wiring: Wiring, values: Values) -> Answer:
    """For each path: which driver takes it, where it lies, what can be done there, and why others do not take it."""
    drivers = wiring.drivers()
    documents: list[dict[str, object]] = []
    lines: list[str] = []
    unsupported = False
    for text in values["path"]:
        path = text if text.startswith(BEYOND_PATHS) else os.path.realpath(text)
        answers = [driver.resolve(path) for driver in drivers.values()]
        best = resolve(drivers, path)
        refusals = [answer for answer in answers if not isinstance(answer, Claim)]
        document: dict[str, object] = {"path": path, "refusals": [msgspec.to_builtins(one) for one in refusals]}
        if isinstance(best, Claim):
            driver = drivers[best.driver]
            described = driver.describe(best.volume)
            document |= {
                "driver": best.driver,
                "volume": best.volume,
                "claim": msgspec.to_builtins(best),
                "source": msgspec.to_builtins(described),
                "capabilities": msgspec.to_builtins(driver.capabilities()),
            }
            lines += [
                f"{printable(path)}: {best.driver}, {printable(best.why)}",
                f"  volume {printable(best.volume)}, {format_size(described.size)}, {described.extents} extents",
            ]
        else:
            unsupported = True
            document["driver"] = None
            lines.append(f"{printable(path)}: not supported")
        for refusal in refusals:
            remedy = f" ({printable(refusal.remedy)})" if refusal.remedy else ""
            lines.append(f"  not {refusal.driver}: {printable(refusal.reason)}{remedy}")
        documents.append(document)
    return Answer(documents, tuple(lines), WARNED if unsupported else DONE)


_AT_ONCE = "a machine that is brought back at once"


def targets(wiring: Wiring, values: Values) -> Answer:
    """What is on the storage, who owns it, and with --reap: remove what nobody needs."""
    failures: tuple[str, ...] = ()
    try:
        repository = wiring.repository()
    except GraincopyError as failure:
        if values["reap"]:
            raise
        repository = None
        failures = (f"without the repository only owners are known: {failure}",)
    if values["reap"] and not values["dry_run"]:
        assert repository is not None
        reaped = reap(wiring.context(repository), silence=values["silence"])
        decisions, failures = reaped.decisions, reaped.failures + _reap_trials(wiring, repository)
    else:
        decisions = survey_targets(wiring.drivers(), repository, host.alive, host.SystemClock().now(), wiring.limits())
    rows = [
        (
            printable(one.target.id),
            one.target.tag.role,
            format_size(one.target.allocated),
            when(one.target.tag.created),
            _verb(one, values["reap"]),
            printable(one.reason),
        )
        for one in decisions
    ]
    document: dict[str, object] = {
        "targets": [_target_document(one) for one in decisions],
        "restores": _restores(repository),
        "failures": list(failures),
    }
    head = ("TARGET", "ROLE", "ALLOCATED", "CREATED", "STATE", "WHY")
    lines = table(head, rows) + tuple(
        f"restore {record['restore']} of {', '.join(record['paths']) or _AT_ONCE}: {record['state']}"
        for record in _restores(repository)
    )
    return Answer(document, lines, WARNED if failures else DONE, failures)


def _reap_trials(wiring: Wiring, repository: Repository) -> tuple[str, ...]:
    """Machines that trials left. libvirt is only asked where one has left a folder: it may well not be there."""
    from graincopy.app.trial import link, machine_runtime

    runtime = machine_runtime(wiring)
    if not os.path.isdir(runtime) or not os.listdir(runtime):
        return ()
    from graincopy.workflow.trial import reap_trials

    try:
        with link(wiring) as libvirt:
            reap_trials(wiring.context(repository), libvirt, runtime)
    except GraincopyError as failure:
        return (f"machines of trials that died: {failure}",)
    return ()


def _restores(repository: Any) -> list[dict[str, Any]]:
    """Restores that can still be finished or undone."""
    if repository is None:
        return []
    return [
        {
            "restore": state.record.id,
            "restore_point": state.record.point,
            "state": state.state,
            "paths": [disk.path for disk in state.record.disks],
            "expires": state.record.expires,
        }
        for state in repository.restores()
        if state.state != "undone"
    ]


def _verb(decision: Decision, reaped: bool) -> str:
    if isinstance(decision, Keep):
        return "look" if decision.report else "kept"
    if isinstance(decision, Delete):
        return "deleted" if reaped else "to delete"
    return "promoted" if reaped else "to promote"


def _target_document(decision: Decision) -> dict[str, object]:
    target = decision.target
    return {
        "id": target.id,
        "driver": target.driver,
        "volume": target.volume,
        "role": target.tag.role,
        "run": target.tag.run,
        "repository": target.tag.repository,
        "owner": str(target.tag.owner),
        "created": target.tag.created,
        "size": target.size,
        "allocated": target.allocated,
        "decision": type(decision).__name__.lower(),
        "reason": decision.reason,
    }


def validate_volume(wiring: Wiring, values: Values) -> Answer:
    """The volume laws against the user's storage. Where the directory lies on a LUN, its file system is frozen."""
    from graincopy.app.validating import labs_for
    from graincopy.testing.validate import validate_volume as run

    driver, place = values["driver"], values["directory"]
    makers = labs_for(wiring, driver, place)
    found = []
    for make in makers:
        with closing(make()) as lab:
            several = f"{lab.name}: " if len(makers) > 1 else ""
            found += [replace(verdict, law=several + verdict.law) for verdict in run(lab)]
    return _validated(f"{driver} on {place}", found)


def validate_medium(wiring: Wiring, values: Values) -> Answer:
    """The medium laws against the user's place for backups, which must be empty; what was made in it is removed."""
    from graincopy.testing.medium_labs import DirectoryLab
    from graincopy.testing.validate import validate_medium as run

    wiring.medium(values["url"], create=True)
    path = wiring.path_of(values["url"])
    try:
        return _validated(values["url"], list(run(DirectoryLab(path))))
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _validated(what: str, results: list[Any]) -> Answer:
    broken = [result for result in results if result.outcome == "failed"]
    rows = [(result.law, result.outcome, printable(result.message)) for result in results]
    document = {"laws": [{"law": row[0], "outcome": row[1], "message": row[2]} for row in rows]}
    lines = table(("LAW", "OUTCOME", ""), rows)
    if not broken:
        return Answer(document, lines)
    failure = ConformanceFailed(what=what, count=len(broken))
    return Answer(document, lines, failure.exit_code, (f"{failure}. {failure.next_move}",))


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
    root = os.geteuid() == 0
    findings = [
        ("root", root, "freezing, loop devices, attaching targets", "run graincopy as root"),
        (
            "/dev/loop-control",
            os.access("/dev/loop-control", os.R_OK | os.W_OK),
            "attaching LUN targets",
            "modprobe loop",
        ),
        (
            "state directory",
            _writable(wiring.state_dir()),
            "noting where targets are",
            f"mkdir -p {wiring.state_dir()}",
        ),
    ]
    findings += [
        (
            tool,
            shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is not None,
            use,
            f"apt-get install {package}",
        )
        for tool, package, use in TOOLS
    ]
    findings += [(name, _loads(name), use, f"apt-get install {package}") for name, package, use in LIBRARIES]
    findings += [
        (module, find_spec(module) is not None, use, f"pip install 'graincopy[{extra}]'")
        for module, extra, use in MODULES
    ]
    rows = [(name, "yes" if there else "no", use, "" if there else remedy) for name, there, use, remedy in findings]
    document = [{"name": r[0], "there": r[1] == "yes", "for": r[2], "remedy": r[3]} for r in rows]
    drivers = [f"volume drivers: {', '.join(wiring.drivers())}"]
    return Answer(
        {"checks": document, "drivers": list(wiring.drivers())},
        (*table(("WHAT", "THERE", "FOR", "REMEDY"), rows), *drivers),
    )


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


def config(wiring: Wiring, _values: Values) -> Answer:
    """Every setting in force and where it comes from."""
    document = {"path": wiring.config_path, "config": msgspec.to_builtins(wiring.config)}
    return Answer(document, explain(wiring.config, wiring.config_path))
