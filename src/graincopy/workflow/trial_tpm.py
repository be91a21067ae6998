"""Below the trial: the state of a machine's TPM, copied to where libvirt looks for that of the machine on trial.

libvirt keeps it in a folder that is called after the machine's UUID, and a folder that is there is taken as it is:
https://libvirt.org/formatdomain.html#tpm-device. A note beside the run's folder, where no QEMU can write, says what is
to be removed when the run was killed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from graincopy.model.restore_point import DiskRecord
from graincopy.volumes.places import sync_directory

_NOTE = ".tpm"  # added to the path of the run's folder


@contextmanager
def tpm_state(folder: str, old: str, new: str, states: Sequence[tuple[DiskRecord, bytes]]) -> Iterator[str]:
    """Copies of ``states``, of the machine with UUID ``old``, for that with UUID ``new``, as long as the block lasts.

    Yields why there are none; "" where there are, or nothing is to be copied.
    """
    places = {path: (record, content) for record, content in states if (path := _place(record.path, old, new))}
    if not places:
        yield "its place in the restore point is not one of libvirt's" if states else ""
        return
    root = next(iter(places)).partition(new)[0] + new
    try:
        _note(folder, root)
        _write(places)
        problem = ""
    except OSError as failure:
        problem = f"{root}: {failure.strerror or failure}"
    try:
        yield problem
    finally:
        forget_tpm(folder)


def forget_tpm(folder: str) -> None:
    """Remove what was copied for the run of ``folder``. May be repeated."""
    with suppress(FileNotFoundError):
        with open(folder + _NOTE, "rb") as file:
            root = os.fsdecode(file.read())
        if root:  # else it died before anything was made
            shutil.rmtree(root, ignore_errors=True)
        os.unlink(folder + _NOTE)


def noted(name: str) -> str | None:
    """The run's folder, when ``name`` is that of a note beside it."""
    return name.removesuffix(_NOTE) if name.endswith(_NOTE) else None


def _place(path: str, old: str, new: str) -> str:
    """``path`` with the folder ``old`` called ``new``; "" where it is in no such folder."""
    parts = path.split("/")
    return "/".join(new if part == old else part for part in parts) if parts.count(old) == 1 else ""


def _note(folder: str, root: str) -> None:
    if os.path.lexists(root):
        raise FileExistsError(0, "it is there already", root)
    with open(folder + _NOTE, "wb") as file:
        file.write(os.fsencode(root))
        os.fsync(file.fileno())
    sync_directory(os.path.dirname(folder))


def _write(places: Mapping[str, tuple[DiskRecord, bytes]]) -> None:
    for path, (record, content) in places.items():
        os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(content)
            os.fchown(file.fileno(), record.metadata.uid, record.metadata.gid)
