"""Beside stages R and V: folders of single runs, with sockets and small files, that QEMU may enter and nobody else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def run_folder(runtime: str, name: str, owner: tuple[int, int] | None) -> Iterator[str]:
    """A folder for one run, that QEMU (``owner``) may enter and nobody else. It goes at the end."""
    folder = make_folder(runtime, name, owner)
    try:
        yield folder
    finally:
        drop_folder(folder)


def drop_folder(folder: str) -> None:
    """Remove the folder of a run, and the one that it lies in with the last."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.rmdir(os.path.dirname(folder))


def make_folder(runtime: str, name: str, owner: tuple[int, int] | None) -> str:
    """The same, for whoever takes it away himself; it may be there already. Raises OSError."""
    folder = os.path.join(runtime, name)
    while not os.path.isdir(folder):
        os.makedirs(runtime, mode=0o711, exist_ok=True)
        with suppress(FileExistsError, FileNotFoundError):  # somebody else's folder was the last one just now
            os.mkdir(folder, mode=0o700)
    if owner is not None:
        os.chown(folder, *owner)
    return folder


@contextmanager
def entered_by(owner: Callable[[], tuple[int, int] | None], folder: str) -> Iterator[None]:
    """Folders on the way to ``folder`` that are made in the block may be passed through by ``owner()``, a QEMU's user.

    They are made for root alone; what is in them is seen by whoever knows its name and may read it. Nobody is asked
    where there is nothing to make: libvirt may start a QEMU of each kind to answer.
    """
    made = []
    while not os.path.lexists(folder):
        made.append(folder)
        folder = os.path.dirname(folder)
    user = owner() if made else None
    try:
        yield
    finally:
        if user is not None and user[0] != os.geteuid():
            for one in made:
                with suppress(FileNotFoundError):
                    os.chmod(one, 0o711)
