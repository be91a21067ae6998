"""The one place that names concrete drivers, and that asks the machine for time, chance and environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from graincopy.app import host
from graincopy.app.settings import MasterOf, Settings
from graincopy.core.errors import PassphraseMissing
from graincopy.repository.repository import Repository
from graincopy.transfer.progress import ProgressSink, silent
from graincopy.views.guest.process import Spare
from graincopy.volumes.base import VolumeDriver
from graincopy.volumes.btrfs import BtrfsDriver
from graincopy.volumes.copied import CopiedDriver
from graincopy.volumes.locked import LockedDriver
from graincopy.volumes.lvm_thin import LvmThinDriver
from graincopy.volumes.metadata import metadata_of, read_metadata
from graincopy.volumes.places import FilePlaces, MemoryPlaces, Places
from graincopy.volumes.qemu import QemuDriver
from graincopy.volumes.qemu_running import QemuPlaces
from graincopy.volumes.qemu_tracker import QemuTracker
from graincopy.volumes.rbd_name import PREFIX
from graincopy.volumes.reflink import ReflinkDriver
from graincopy.volumes.tracked import TrackedDriver
from graincopy.workflow.context import Context, Limits
from graincopy.workflow.trees import mount_points
from graincopy.workloads.base import WorkloadSource
from graincopy.workloads.combined import CombinedSource
from graincopy.workloads.files import FilesSource
from graincopy.workloads.known_subsystems import BUILT_IN
from graincopy.workloads.subsystem import SubsystemSource

if TYPE_CHECKING:
    from graincopy.volumes.rbd import RbdDriver
    from graincopy.volumes.rbd_cluster import RbdSettings
    from graincopy.workloads.libvirt import LibvirtSource

BEYOND_PATHS = (PREFIX,)  # beginnings of names of disks that are no paths


def _no_step(_name: str) -> None:
    """Passes every crash point."""


class Wiring(Settings, frozen=True):
    """Everything an operation may need, made when it is asked for."""

    progress: ProgressSink = silent
    step: Callable[[str], None] = _no_step
    master_of: MasterOf | None = None  # where the key is being derived already
    spare: Spare | None = None  # a reader of guests' file systems that was started already

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
        thin = LvmThinDriver(host.SystemClock())  # before reflink: the whole volume rather than file by file
        running = self._qemu_places()
        arrays = [TrackedDriver(one, QemuTracker(running), self._tracked(one)) for one in self._arrays()]
        drivers: list[VolumeDriver] = [*arrays, self._ceph(), thin]
        # LUN images on Btrfs by one snapshot of their subvolume; disks in place by clones, which pin nothing of others
        btrfs = BtrfsDriver(places, in_place=self.config.btrfs.in_place)
        reflink, locked = ReflinkDriver(places), LockedDriver()
        drivers += [btrfs, reflink, QemuDriver(running, [reflink, locked]), locked, CopiedDriver()]
        return {driver.name: driver for driver in drivers}

    def _tracked(self, driver: VolumeDriver) -> str:
        return os.path.join(self.state_dir(), "tracked", driver.name)

    def _qemu_places(self) -> QemuPlaces:
        """The QEMUs that run machines. Nothing is connected here."""
        found = self.config.qemu
        from graincopy.hypervisor.link import Link
        from graincopy.hypervisor.qmp_libvirt import Domains

        clock = host.SystemClock()
        return QemuPlaces(
            domains=Domains(Link(self.config.vm.uri, clock, patience=0.0), clock),
            state=os.path.join(self.state_dir(), "qemu"),
            monitors=found.monitors,
            nbd_sockets={monitor: socket for monitor, _, socket in (entry.partition("=") for entry in found.nbd)},
            scratch=found.scratch,
            patience=found.timeout,
        )

    def ceph_conf(self) -> str:
        """Where the configuration of Ceph is, if there is one."""
        from graincopy.volumes.rbd_cluster import CEPH_CONF

        return self.config.rbd.conf or self.environ.get("CEPH_CONF") or CEPH_CONF

    def ceph_settings(self) -> RbdSettings:
        """How Ceph is reached."""
        from graincopy.volumes.rbd_cluster import RbdSettings

        found = self.config.rbd
        return RbdSettings(
            id=found.id,
            keyring=found.keyring,
            timeout=found.timeout,
            pools=found.pools,
            fuse={folder: pool for folder, _, pool in (entry.rpartition("=") for entry in found.fuse)},
            groups=found.groups,
            whole_objects=found.whole_objects,
        )

    def _ceph(self, places: Places | None = None) -> RbdDriver:
        """The rbd driver; without a configuration of Ceph it takes nothing. Nothing is connected here."""
        from graincopy.volumes.rbd import RbdDriver
        from graincopy.volumes.rbd_cluster import Cluster

        conf = self.ceph_conf()
        cluster = Cluster(self.ceph_settings(), conf) if self.config.rbd.conf or os.path.exists(conf) else None
        places = places or FilePlaces(os.path.join(self.state_dir(), "places-rbd"))
        return RbdDriver(cluster, places, host.SystemClock())

    def _arrays(self) -> list[VolumeDriver]:
        """The flashcopy driver, where arrays are configured. Raises ToolMissing."""
        if not self.config.flashcopy:
            return []
        from graincopy.volumes.flashcopy.assembly import ArraySettings, flashcopy_driver
        from graincopy.volumes.flashcopy.connection import Login

        settings = [
            ArraySettings(
                Login(
                    name=name,
                    host=one.host,
                    user=one.user,
                    port=one.port,
                    key_file=one.key_file,
                    password_file=one.password_file,
                    known_hosts=one.known_hosts,
                    connect_timeout=one.connect_timeout,
                    command_timeout=one.command_timeout,
                ),
                host_name=one.host_name,
                pool=one.pool,
                wait=one.wait,
                devices=one.devices,
            )
            for name, one in self.config.flashcopy.items()
        ]
        return [flashcopy_driver(settings, self.state_dir(), host.SystemClock())]

    def drivers_to_validate(self) -> dict[str, Callable[[], VolumeDriver]]:
        """How the conformance suite makes its driver objects: with places of their own, so that nothing else is seen.

        ``locked`` and ``copied`` hold what they have in the object, so there it is one object.
        """
        places, locked, copied = MemoryPlaces(), LockedDriver(), CopiedDriver()
        return {
            ReflinkDriver.name: lambda: ReflinkDriver(places),
            BtrfsDriver.name: lambda: BtrfsDriver(places),
            LockedDriver.name: lambda: locked,
            CopiedDriver.name: lambda: copied,
            "rbd": lambda: self._ceph(places),
            LvmThinDriver.name: lambda: LvmThinDriver(host.SystemClock()),
            **{driver.name: (lambda: self._arrays()[0]) for driver in self._arrays()},
        }

    def source(self, exclude: Sequence[str] = ()) -> CombinedSource:
        """Every kind of workload, in the order in which they are quiesced: applications before machines before files.

        One backup uses one object: what it describes it remembers until it is quiesced. ``exclude``: disks of virtual
        machines to leave out besides those of the configuration.
        """
        kinds: tuple[WorkloadSource, ...] = (self._subsystems(), self.machines(exclude), self._files())
        sources = {source.prefix: source for source in kinds}
        return CombinedSource(sources, {name: found.members for name, found in self.config.set.items()})

    def machines(self, exclude: Sequence[str] = ()) -> LibvirtSource:
        """Virtual machines. libvirt's binding is loaded, and its daemon asked, when one is named."""
        from graincopy.hypervisor.link import Link
        from graincopy.workloads.libvirt import LibvirtSource

        clock, vm = host.SystemClock(), self.config.vm
        return LibvirtSource(
            Link(vm.uri, clock),
            clock,
            exclude=vm.exclude,
            exclude_now=exclude,
            application=vm.application,
            metadata=read_metadata,
        )

    def _files(self) -> FilesSource:
        return FilesSource(os.getcwd(), read_metadata, BEYOND_PATHS)

    def _subsystems(self) -> SubsystemSource:
        """Those of the configuration, and the built-in ones that it does not say otherwise about."""
        specs = {**BUILT_IN, **self.config.subsystem}
        return SubsystemSource(specs, self._files(), metadata_of, host.SystemClock(), mount_points)

    # --- repository -------------------------------------------------------------------------------

    def repository(self) -> Repository:
        """Open the repository. Raises what Repository.open raises."""
        return Repository.open(
            self.medium(self.repo_url()),
            passphrase=None if self.master_of else self.passphrase(),  # it may come from a pipe: it is read once
            clock=host.SystemClock(),
            chance=host.SystemChance(),
            owner=host.this_process(),
            cache_dir=self.cache_dir(),
            master_of=self.master_of,
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
    master_of: MasterOf | None = None,
    spare: Spare | None = None,
) -> Wiring:
    """Everything an operation may need, on top of ``settings``."""
    said = (settings.config, settings.config_path, settings.environ, settings.url)
    return Wiring(*said, progress, step, master_of, spare)
