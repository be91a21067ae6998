"""The driver from its configuration (for the wiring): one array, one connection, one folder of notes each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import msgspec

from graincopy.core.clock import Clock
from graincopy.volumes.flashcopy.connection import Connection, Login, ssh_connection
from graincopy.volumes.flashcopy.driver import ArrayTerms, FlashCopyDriver
from graincopy.volumes.flashcopy.host import BY_ID, HostDevices


class ArraySettings(msgspec.Struct, frozen=True):
    """One section of the configuration; ``devices`` is the folder in which LUNs appear by their WWN."""

    login: Login
    host_name: str
    pool: str = ""
    wait: float = 0.0
    devices: str = BY_ID


def flashcopy_driver(
    settings: Sequence[ArraySettings],
    state_dir: str,
    clock: Clock,
    connect: Callable[[Login], Connection] = ssh_connection,
) -> FlashCopyDriver:
    """No connection is made before it is needed. Raises ToolMissing where asyncssh is not installed."""
    terms = [
        ArrayTerms(
            name=each.login.name,
            host_name=each.host_name,
            notes_folder=os.path.join(state_dir, "flashcopy", each.login.name),
            pool=each.pool,
            wait=each.wait,
        )
        for each in settings
    ]
    devices = HostDevices(clock, tuple(dict.fromkeys(each.devices for each in settings)))
    return FlashCopyDriver(terms, {each.login.name: connect(each.login) for each in settings}, devices, clock)
