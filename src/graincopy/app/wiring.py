"""The one place that names concrete drivers, and that asks the machine for time, chance and environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from graincopy.app import host
from graincopy.app.settings import FindMaster, Settings
from graincopy.core.errors import PassphraseMissing, UsageWrong
from graincopy.repository.repository import Repository
from graincopy.repository.unlock import find_master
from graincopy.transfer.progress import ProgressSink, silent
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.locked import LockedDriver
from graincopy.volumes.metadata import read_metadata
from graincopy.volumes.places import FilePlaces, MemoryPlaces
from graincopy.volumes.reflink import ReflinkDriver
from graincopy.workflow.context import Context, Limits
from graincopy.workloads.base import WorkloadSource
from graincopy.workloads.files import FilesSource


def _no_step(_name: str) -> None:
    """Passes every crash point."""


@dataclass(frozen=True, slots=True)
class Wiring(Settings):
    """Everything an operation may need, made when it is asked for."""

    progress: ProgressSink = silent
    step: Callable[[str], None] = _no_step
    find_master: FindMaster = find_master

    # --- places -----------------------------------------------------------------------------------

    def state_dir(self) -> str:
        """Where the durable notes about targets lie."""
        if self.config.paths.state:
            return self.config.paths.state
        if os.geteuid() == 0:
            return "/var/lib/graincopy"
        return os.path.join(self._home("XDG_STATE_HOME", ".local/state"), "graincopy")

    def cache_dir(self) -> str:
        """Where disposable copies of index segments lie."""
        if self.config.paths.cache:
            return self.config.paths.cache
        if os.geteuid() == 0 and "XDG_CACHE_HOME" not in self.environ:
            return "/var/cache/graincopy"
        return os.path.join(self._home("XDG_CACHE_HOME", ".cache"), "graincopy")

    def _home(self, variable: str, usual: str) -> str:
        return self.environ.get(variable) or os.path.join(self.environ.get("HOME", "/"), usual)

    # --- drivers ----------------------------------------------------------------------------------

    def drivers(self) -> dict[str, VolumeDriver]:
        """Volume drivers in order of preference."""
        places = FilePlaces(os.path.join(self.state_dir(), "places"))
        drivers: list[VolumeDriver] = [ReflinkDriver(places), LockedDriver()]
        return {driver.name: driver for driver in drivers}

    def driver_to_validate(self, name: str) -> Callable[[], VolumeDriver]:
        """How the conformance suite makes its driver objects: with places of their own, so that nothing else is seen.

        ``locked`` holds leases in the object itself, so there it is one object. Raises UsageWrong.
        """
        places, locked = MemoryPlaces(), LockedDriver()
        makers: dict[str, Callable[[], VolumeDriver]] = {
            ReflinkDriver.name: lambda: ReflinkDriver(places),
            LockedDriver.name: lambda: locked,
        }
        if name not in makers:
            raise UsageWrong(what=f"there is no volume driver {name}; choose one of {', '.join(makers)}")
        return makers[name]

    def source(self) -> WorkloadSource:
        """The workload source for files. Others will be chosen by prefix."""
        return FilesSource(os.getcwd(), read_metadata)

    # --- repository -------------------------------------------------------------------------------

    def repository(self) -> Repository:
        """Open the repository. Raises what Repository.open raises."""
        return Repository.open(
            self.medium(self.repo_url()),
            passphrase=self.passphrase(),
            clock=host.SystemClock(),
            chance=host.SystemChance(),
            owner=host.this_process(),
            cache_dir=self.cache_dir(),
            find_master=self.find_master,
        )

    def create_repository(self, grain_size: int, encrypted: bool) -> Repository:
        """Make a new repository."""
        url = self.repo_url()
        passphrase = self.passphrase() if encrypted else None
        if encrypted and not passphrase:
            raise PassphraseMissing(url=url)
        return Repository.create(
            self.medium(url, create=True),
            passphrase=passphrase,
            grain_size=grain_size,
            clock=host.SystemClock(),
            chance=host.SystemChance(),
        )

    def context(self, repository: Repository) -> Context:
        """The workflow's hands on this machine."""
        return Context(
            repository=repository,
            drivers=self.drivers(),
            clock=host.SystemClock(),
            chance=host.SystemChance(),
            owner=host.this_process(),
            alive=host.alive,
            precious=self.precious(),
            limits=self.limits(),
            progress=self.progress,
            step=self.step,
        )

    def limits(self) -> Limits:
        """The configuration's numbers, as the workflow wants them."""
        config = self.config
        return Limits(
            workers=config.backup.workers,
            audit=config.backup.audit,
            freeze_deadline_s=config.freeze.deadline,
            freeze_warn_ms=config.freeze.warn_ms,
            undo_keep_s=config.restore.undo_days * 86400,
            collect_patience_s=config.collect.patience,
            checkpoint_max_age_s=config.checkpoint.max_days * 86400 or None,
            checkpoint_min_free=config.checkpoint.min_free_percent / 100,
        )

    def precious(self) -> dict[str, str]:
        """What must never be frozen: our own ground."""
        return {
            "the repository": self.path_of(self.repo_url()),
            "graincopy's state": self.state_dir(),
            "graincopy's cache": self.cache_dir(),
            "the running Python": sys.prefix,
        }


def wire(
    settings: Settings,
    progress: ProgressSink = silent,
    step: Callable[[str], None] = _no_step,
    find_master: FindMaster = find_master,
) -> Wiring:
    """Everything an operation may need, on top of ``settings``."""
    return Wiring(settings.config, settings.config_path, settings.environ, settings.url, progress, step, find_master)
