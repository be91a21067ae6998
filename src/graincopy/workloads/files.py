"""Workload ``files``: disk images named by their paths.

The same set of files in any order, through any symlink, is the same workload; its id comes from the sorted real
paths, or from ``name`` when one is given, which keeps it when files move or are added.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from typing import ClassVar

from graincopy.core.errors import PathMissing, PathUnfit, PathUnreadable, WorkloadWrong
from graincopy.core.ids import DiskId, WorkloadId, digest_id
from graincopy.model.workload import FileMetadata, SourceCapabilities, Workload, WorkloadFile
from graincopy.workloads.base import WorkloadSource

LONGEST_NAME = 255  # bytes, NAME_MAX of <limits.h>: a NAME becomes a file name
_UNFIT = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}


class FilesSource(WorkloadSource):
    """Files by path. Relative ones are taken from ``cwd``; ``metadata`` reads what a file needs back.

    ``beyond`` are the beginnings of names that are no paths, such as ``rbd:``: a volume driver knows what they mean.
    """

    prefix: ClassVar[str] = "files"

    def __init__(
        self, cwd: str, metadata: Callable[[str], FileMetadata] | None = None, beyond: tuple[str, ...] = ()
    ) -> None:
        self._cwd, self._beyond = cwd, beyond
        self._metadata = stat_metadata if metadata is None else metadata

    def capabilities(self) -> SourceCapabilities:
        return SourceCapabilities()

    def list(self) -> tuple[str, ...]:
        return ()

    def describe(self, selectors: Sequence[str], name: str | None = None) -> Workload:
        if not selectors:
            raise WorkloadWrong(workload=name or "files:", reason="it names no file")
        paths = sorted({self._real(selector) for selector in selectors}, key=os.fsencode)
        names = disk_names(paths)
        identity = digest_id("files", paths) if name is None else digest_id("name", [name])
        return Workload(
            id=WorkloadId(identity),
            name=f"files-{identity[:8]}" if name is None else name,
            kind=self.prefix,
            files=tuple(self._file(path, names[path]) for path in paths),
        )

    def _file(self, path: str, name: str) -> WorkloadFile:
        disk = DiskId(digest_id("path", [path]))
        if path.startswith(self._beyond):
            return WorkloadFile(path=path, name=name, disk=disk)
        try:
            return WorkloadFile(path=path, name=name, disk=disk, metadata=self._metadata(os.path.realpath(path)))
        except OSError as error:
            raise _refusal(path, error) from error

    def _real(self, selector: str) -> str:
        """The real path of a file that may be a disk. It is not opened: opening would break others' leases."""
        if not selector or "\0" in selector:
            raise WorkloadWrong(workload=selector or "files:", reason="it names no file")
        if selector.startswith(self._beyond):
            return selector
        path = os.path.join(self._cwd, selector)
        try:
            real = os.path.realpath(path, strict=True)
            found = os.stat(real)
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise PathMissing(path=path) from error
            raise _refusal(path, error) from error
        kind = stat.S_IFMT(found.st_mode)
        if kind in _UNFIT:
            raise PathUnfit(path=path, what=_UNFIT[kind])
        if not os.access(real, os.R_OK, effective_ids=True):
            raise PathUnreadable(path=path, reason="permission denied")
        return _lasting(real, found) if kind == stat.S_IFBLK else real


def _lasting(real: str, found: os.stat_result) -> str:
    """A name of the block device that means the same after a boot: /dev/dm-3 is numbered in order of appearance."""
    try:
        with open(f"/sys/dev/block/{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}/dm/name", "rb") as file:
            name = f"/dev/mapper/{os.fsdecode(file.read()).strip()}"
        return name if os.stat(name).st_rdev == found.st_rdev else real
    except OSError:
        return real


def _refusal(path: str, error: OSError) -> Exception:
    # realpath follows links itself and reports a loop as ELOOP
    if error.errno == errno.ELOOP:
        return PathUnfit(path=path, what="a symlink loop")
    return PathUnreadable(path=path, reason=error.strerror or str(error))


def stat_metadata(path: str) -> FileMetadata:
    """Mode and owner of the file. Raises OSError."""
    found = os.stat(path)
    return FileMetadata(mode=stat.S_IMODE(found.st_mode), uid=found.st_uid, gid=found.st_gid)


def disk_names(paths: Sequence[str]) -> dict[str, str]:
    """A NAME for each of the distinct absolute ``paths``: legal as a file name, distinct, the same in any order.

    It is the file name; where several are equal, parent folders are put before it until they differ.
    """
    depth = dict.fromkeys(paths, 1)
    while True:
        names = {path: _name(path, depth[path]) for path in paths}
        crowded = Counter(names.values())
        grow = [path for path in paths if crowded[names[path]] > 1 and depth[path] < _parts(path)]
        if not grow:
            break
        for path in grow:
            depth[path] += 1
    # "/a_b/c" and "/a/b_c" can meet in one joined name: what is still shared gets a digest of the whole path
    return {path: name if crowded[name] == 1 else _digested(path, name) for path, name in names.items()}


def _parts(path: str) -> int:
    return path.count("/")


def _name(path: str, depth: int) -> str:
    name = "_".join(path.split("/")[-depth:])
    return name if len(os.fsencode(name)) <= LONGEST_NAME else _digested(path, name)


def _digested(path: str, name: str) -> str:
    """Begins with a digest of ``path`` and ends like ``name``, as far as a file name can be long."""
    head = digest_id("path", [path])[:16].encode() + b"-"
    return os.fsdecode(head + os.fsencode(name)[-(LONGEST_NAME - len(head)) :])
