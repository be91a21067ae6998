"""One Ceph for all of these tests: the one of GRAINCOPY_CEPH_CONF, else one that is started, if it is installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "volumes"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "e2e"))
sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, "crash"))
sys.path.insert(0, os.path.dirname(__file__))

import story
from guests import TIMEOUT, Guest

_SCRIPT = os.path.join(os.path.dirname(__file__), os.pardir, os.pardir, "scripts", "lab-ceph.sh")
_TOOLS = ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd", "rados")
_GIVEN = os.environ.get("GRAINCOPY_CEPH_CONF")


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of the ceph.conf of a running cluster with the pool ``rbd``."""
    if _GIVEN:
        yield _GIVEN
        return
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs Ceph: {', '.join(missing)} missing (scripts/test-lab.sh installs it)")
    directory = os.fspath(tmp_path_factory.mktemp("ceph"))
    try:
        subprocess.run([_SCRIPT, "start", directory, str(_free_port())], check=True, timeout=180)
        yield os.path.join(directory, "ceph.conf")
    finally:
        subprocess.run([_SCRIPT, "stop", directory], check=True, timeout=60)


def _free_port() -> int:
    """The first port of a range that nobody listens in at its beginning."""
    for port in range(13300, 30000, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free ports")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own graincopy or Ceph."""
    for name in [name for name in os.environ if name.startswith(("GRAINCOPY_", "CEPH_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def guest(ceph: str) -> Iterator[Guest]:
    """Somebody with images on the cluster; afterwards they are gone, and nothing of graincopy was left in the pool."""
    with Guest(ceph) as somebody:
        yield somebody


@pytest.fixture
def long_watches(guest: Guest) -> Iterator[None]:
    """The cluster misses a dead client, by itself, only when the test has long been given up."""
    name = "osd_client_watch_timeout"
    before = guest.command("ceph", "tell", "osd.0", "config", "get", name)
    guest.command("ceph", "tell", "osd.0", "config", "set", name, str(2 * TIMEOUT))
    yield
    guest.command("ceph", "tell", "osd.0", "config", "set", name, str(json.loads(before)[name]))


@pytest.fixture
def cli(ceph: str, tmp_path: os.PathLike[str]) -> story.Cli:
    """An empty repository, and a configuration that leads to the cluster."""
    return story.Cli(os.path.join(tmp_path, "graincopy"), config=f'[rbd]\nconf = "{ceph}"\n').init()
